"""What a step costs where columns of every matrix train, beside whole matrices, LoRA and full, in turns.

    python benchmarks/bench_columns_step.py [--steps 12] [--out FILE]

SmolLM2-135M, 2 × 192 tokens, AdamW: a quarter in whole matrices by lot in strata above the lowest fifth of the blocks,
the same from every depth, LoRA of rank 16 on all linear layers (PEFT), a tenth in columns of every matrix, and of those
above the lowest fifth.
Methods take turns step by step, each time in another order. A row of results/columns_step.jsonl holds medians, seconds
relative to the quarter of the same round with quartiles, bytes of gradients and AdamW's moments, and what autograd
keeps from forward to backward beside the weights.
"""
import argparse
import copy
import json
import statistics
from datetime import datetime, timezone
from pathlib import Path

import torch

from alf_nb.core.system import versions
from alf_nb.model.columns import split_columns
from alf_nb.study.runs import device_name
from alf_nb.study.step_costs import StepMeter
from bench_policies import make
from prepared import only, prepare

RESULTS = Path(__file__).parent/'results'/'columns_step.jsonl'
SIZE = 2, 192


def columns(base, freeze_bottom=0.):
    model = copy.deepcopy(base)
    only(model, [m.columns for m in split_columns(model, .1, freeze_bottom).values()])
    return model


def models(base, batch):
    "Name → a copy that is ready to train"
    rows = torch.cat([batch['input_ids']]*2)
    found = {name: prepare(base, rows, False, 0, **how).model for name, how in
             (('quarter', {}), ('quarter-deep', dict(freeze_bottom=0.)), ('lora', dict(what='lora')),
              ('full', dict(what='full')))}
    return found | {'columns': columns(base), 'columns-top80': columns(base, .2)}


def seconds(meter):
    "Of every step but the first"
    return [sum(t) for t in zip(*(meter.times[k] for k in ('forward_s', 'backward_s', 'optimizer_s')))][1:]


def row_of(name, meter, of, total):
    "Figures of a method; `of` is the one that it is compared with"
    relative, costs = [a/b for a, b in zip(seconds(meter), seconds(of))], meter.costs()
    return dict(method=name, share=sum(p.numel() for p in meter.params)/total, step_s=statistics.median(seconds(meter)),
                relative=statistics.median(relative), quartiles=statistics.quantiles(relative, n=4)[::2],
                state_bytes=costs.gradient_bytes + costs.optimizer_bytes,
                kept_bytes=costs.activation_bytes + costs.cast_bytes)


def main():
    ap = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    ap.add_argument('--steps', type=int, default=12, help='of each method, the first of them not counted')
    ap.add_argument('--out', type=Path, default=RESULTS)
    a = ap.parse_args()
    task = make('gsm8k', SIZE)
    batch = task.collate([task.train[i] for i in range(SIZE[0])])
    methods = {k: StepMeter(m, batch, bf16=task.bf16) for k, m in models(task.model, batch).items()}
    names, total = list(methods), sum(p.numel() for p in task.model.parameters())
    for i in range(a.steps):
        k = i % len(names)
        for name in names[k:] + names[:k]: methods[name].step()
    about = dict(device=device_name(model=True), threads=torch.get_num_threads(), versions=versions(), bf16=task.bf16,
                 batch=SIZE[0], length=SIZE[1], steps=a.steps,
                 date=datetime.now(timezone.utc).isoformat(timespec='seconds'))
    with a.out.open('a') as f:
        for name, m in methods.items():
            row = row_of(name, m, methods['quarter'], total)
            f.write(json.dumps(row | about) + '\n')
            print(f"{name:14} {row['relative']:.3f} {row['quartiles']} {row['step_s']:.2f} s,"
                  f" state {row['state_bytes']/1e6:.0f} MB, kept {row['kept_bytes']/1e6:.0f} MB")


if __name__ == '__main__': main()
