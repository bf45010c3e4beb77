"""What it saves to compute frozen blocks once (`cache_prefix`): three epochs of MiniLM, in turns with its peers.

    python benchmarks/bench_prefix.py [--ways full lora frozen-2 kept-2 …] [--rows 2000] [--epochs 3] [--out FILE]

MiniLM learns to say from which part of the Python reference some words come. Trainings take turns of a few steps in one
process, each with a model, an optimizer and an order of rows of its own: all weights (`full`); LoRA of rank 16 on all
linear layers (`lora`); what is above the lowest n of six blocks, head included (`frozen-n`); and the same with
`cache_prefix` (`kept-n`). The last two run the frozen blocks without dropout, so they see the same numbers. A row:
seconds of each epoch, also those of all cores, the look at one batch before the first step included, the losses, and
the bytes that states took.
While `--pause` names a file that exists, everything waits between two turns.
"""
import argparse
import copy
import json
import random
import time
import warnings
from datetime import datetime, timezone
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding

from alf_nb.core.config import KINDS
from alf_nb.core.system import versions
from alf_nb.sources.models import load_encoder
from alf_nb.study.runs import device_name
from alf_nb.train.loop import ALFLoop
from chapters import with_head

RESULTS = Path(__file__).parent/'results'/'prefix.jsonl'
RATES = dict(full=1e-4, lora=1e-3, frozen=2e-4, kept=2e-4)
WAYS = ('full', 'lora', *(f'{how}-{n}' for n in (2, 3, 4) for how in ('frozen', 'kept')))
PARTS = dict(
    statements='assert async await break class continue def del except exec for global if import nonlocal pass raise'
               ' return try while with yield function assignment augassign compound',
    types='string types sequences mapping objects bltin dict list set',
    debugger='debugger',
)


def part_of(topic):
    "Which part of the reference a page belongs to"
    found = [i for i, words in enumerate(PARTS.values()) if any(topic.startswith(w) for w in words.split())]
    return found[0] if found else len(PARTS)


def labelled(n, words, seed=0):
    "(text, label) of `n` pieces of the reference, in an order of its own"
    pieces = {}
    for topic, text in topics.items():
        all_of = text.split()
        for i in range(0, len(all_of)-words//2, words): pieces.setdefault(' '.join(all_of[i:i+words]), part_of(topic))
    rows = sorted(pieces.items())
    random.Random(seed).shuffle(rows)
    if len(rows) < n: raise ValueError(f"{n} rows asked for, and the reference has {len(rows)}")
    return rows[:n], rows[n:n+400]


def encoded(rows, tokenizer):
    return [dict(tokenizer(t, truncation=True, max_length=48), labels=label) for t, label in rows]


class Training:
    "One training, made a few steps at a time"
    def __init__(self, way, model, data, collate, a):
        torch.manual_seed(a.seed)
        self.name, (self.way, _, n) = way, way.partition('-')
        self.frozen, self.model, self.a = int(n or 0), model.train(), a
        if way == 'lora': self.model = model = with_lora(model)
        self.optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=RATES[self.way],
                                           weight_decay=0.)
        order = torch.Generator().manual_seed(a.seed)
        self.loader = DataLoader(data, a.batch_size, shuffle=True, collate_fn=collate, generator=order)
        self.per_epoch = len(self.loader)
        self.losses, self.alf, self.rng = [], None, torch.get_rng_state()
        self.seconds, self.cpu_s = [0.]*a.epochs, [0.]*a.epochs
        if self.frozen: self.timed(0, self.begin)
        self.batches = self.read()

    def begin(self):
        steps, bottom = self.per_epoch*self.a.epochs, self.frozen/6 + 1e-6
        self.alf = ALFLoop(self.model, self.optimizer, self.loader, steps, policy='full', kinds=KINDS, interval=0,
                           references='none', freeze_bottom=bottom, cache_prefix=self.way == 'kept', eval_prefix=True)

    def read(self):
        for epoch in range(self.a.epochs):
            for batch in self.loader: yield epoch, batch

    def timed(self, epoch, f):
        "Chance is that of this training alone"
        torch.set_rng_state(self.rng)
        t0, c0 = time.perf_counter(), time.process_time()
        res = f()
        self.seconds[epoch] += time.perf_counter() - t0
        self.cpu_s[epoch] += time.process_time() - c0
        self.rng = torch.get_rng_state()
        return res

    def turn(self, n):
        "Up to `n` steps; False: all are made"
        for _ in range(n):
            epoch = min(len(self.losses)//self.per_epoch, self.a.epochs-1)
            if not self.timed(epoch, self.step): return False
        return True

    def step(self):
        if (item := next(self.batches, None)) is None: return False
        loss = self.model(**item[1]).loss
        loss.backward()
        if self.alf is not None: self.alf.step()
        else:
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.losses.append(float(loss.detach()))
        return True


def with_lora(model, rank=16):
    from peft import LoraConfig, get_peft_model
    how = LoraConfig(r=rank, lora_alpha=2*rank, task_type='SEQ_CLS', lora_dropout=0.,
                     target_modules=['query', 'key', 'value', 'dense'])
    return get_peft_model(model, how)


def accuracy(model, data, collate):
    "(loss, part that is right) on rows that nobody learnt from"
    model.eval()
    right = loss = 0
    with torch.no_grad():
        for batch in DataLoader(data, 64, collate_fn=collate):
            out = model(**batch)
            loss += float(out.loss)*len(batch['labels'])
            right += int((out.logits.argmax(-1) == batch['labels']).sum())
    return loss/len(data), right/len(data)


def summary(t, test, collate):
    "The row of a training"
    loss, right = accuracy(t.model, test, collate)
    end = t.per_epoch
    more = {}
    if t.way == 'kept':
        p = t.alf.run.prefix
        more = dict(kept_rows=len(p.kept), kept_bytes=p.nbytes, hits=p.hits, computed=p.computed)
    if t.alf is not None: t.alf.close()
    return dict(
        way=t.way, frozen=t.frozen, epoch_s=t.seconds, wall_s=sum(t.seconds),
        cpu_s=t.cpu_s, steps=len(t.losses),
        train_losses=[sum(t.losses[i:i+end])/end for i in range(0, len(t.losses), end)], last_loss=t.losses[-1],
        test_loss=loss, accuracy=right, lr=RATES[t.way], **more)


def waited(pause):
    while pause.exists(): time.sleep(.5)
    return True


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in dict(rows=2000, words=8, epochs=3, batch_size=64, turn=4, threads=2, seed=0).items():
        p.add_argument('--'+name.replace('_', '-'), type=int, default=default)
    p.add_argument('--ways', nargs='+', default=WAYS)
    p.add_argument('--pause', type=Path, default=Path('no such file'))
    p.add_argument('--out', type=Path, default=RESULTS)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    warnings.simplefilter('ignore')
    encoder, tokenizer = load_encoder(dtype=torch.float32, progress=False)
    base = with_head(encoder, len(PARTS) + 1, a.seed)
    data, test = (encoded(r, tokenizer) for r in labelled(a.rows, a.words))
    collate = DataCollatorWithPadding(tokenizer)
    trainings = [Training(w, copy.deepcopy(base), data, collate, a) for w in a.ways if waited(a.pause)]
    going = list(trainings)
    while going: going = [t for t in going if waited(a.pause) and t.turn(a.turn)]
    tokens = sum(len(r['input_ids']) for r in data)
    about = dict(rows=a.rows, tokens=tokens, epochs=a.epochs, batch_size=a.batch_size, seed=a.seed, threads=a.threads,
                 model='all-MiniLM-L6-v2', dtype='fp32', device=device_name(torch.device('cpu')), versions=versions(),
                 date=datetime.now(timezone.utc).isoformat(timespec='seconds'))
    with a.out.open('a', encoding='utf-8') as f:
        for t in trainings:
            row = summary(t, test, collate) | about
            f.write(json.dumps(row)+'\n')
            print({k: row[k] for k in ('way', 'frozen', 'epoch_s', 'wall_s', 'train_losses', 'accuracy')}, flush=True)


if __name__ == '__main__': main()
