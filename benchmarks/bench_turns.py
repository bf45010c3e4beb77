"""Equal time, in turns: what should the default be?

    python benchmarks/bench_turns.py [--data gsm8k python] [--seeds 0 1 2 3] [--wall 150 | --steps 80 | --equal 136]
    [--ways columns lora …] [--lr 8e-4] [--out FILE]

SmolLM2-135M learns GSM8K or the Python reference, 2 × 192 tokens a step, for so many seconds, choosing included, for so
many steps, or (`--equal`) for as many as fit into the time of so many steps of the control by the measured times of a
step: that gives the same losses on a busy machine. For a data set and a seed all methods run one after the other in
one process, each pair in another order. Rows go to results/turns.jsonl.
"""
import argparse, copy, json, time
from datetime import datetime, timezone
from pathlib import Path

import torch
from transformers.utils import logging as hf_logging

from alf_nb.core.stats import t_interval
from alf_nb.core.system import versions
from alf_nb.model.columns import split_columns
from alf_nb.study.methods import METHODS, Method, alf_method
from alf_nb.study.runs import device_name, train_method
from bench_policies import make
from prepared import gradients, only

RESULTS = Path(__file__).parent/'results'/'turns.jsonl'
SIZE = 2, 192
# seconds of a step, the control's are 1: results/columns_step.jsonl, one thread, 2026-11-26; a meter and the callback
# add 0.02 (results/meter.jsonl, results/profile.jsonl)
RELATIVE = {'lot-top80': 1., 'lora': 1.38, 'full': 1.71, 'columns': 1.18, 'columns-top80': 1.06, 'columns-grad': 1.18,
            'alf': 1.02, 'alf-deep': 1.13}


def by_gradient(model, task):
    "Of every matrix a tenth of its columns trains, those of the largest gradient over four batches"
    rows = torch.tensor([task.train[i]['input_ids'] for i in range(8)], device=task.device)
    grads = gradients(model, rows, task.bf16, 4)
    found = split_columns(model, .1).values()
    for m in found:
        m.split(grads[id(m.weight)].norm(dim=0).argsort(descending=True)[:len(m.index)].sort().values)
    only(model, [m.columns for m in found])
    return model


WAYS = {
    m.name: (m, lr)
    for m, lr in (
        (alf_method('lot-top80', 'drawn by lot in the same strata: the control', selects=False, preset='short'), 4e-4),
        (METHODS['lora'], 2e-3),
        (METHODS['full'], 1e-4),
        (METHODS['alf'], 4e-4),
        (METHODS['columns'], 1.6e-3),
        (alf_method('columns-top80', 'a tenth, as columns of every matrix above the lowest fifth', selects=False,
                    unit='columns', budget=.1, freeze_bottom=.2), 1.6e-3),
        (Method('columns-grad', 'a tenth, as the columns of every matrix with the largest gradient', (1.6e-3,),
                prepare=by_gradient), 1.6e-3),
        (alf_method('alf-deep', 'the default from every depth', freeze_bottom=0.), 4e-4),
    )
}


def row_of(task, way, lr, seed, wall, planned, turn, equal):
    "One run, as a row"
    r = train_method(task, way, lr, seed, planned, (), wall)
    kept = ('steps', 'steps_planned', 'wall_s', 'step_s_median', 'task_loss', 'other_loss', 'importance_s',
            'trainable_share_mean', 'state_bytes_peak', 'data_order', 'diverged')
    return dict(
        data=task.data, method=way.name, about=way.about, settings=way.alf if isinstance(way.alf, dict) else None,
        lr=lr, seed=seed, wall=wall, equal=equal, turn=turn, batch=SIZE[0], length=SIZE[1], bf16=task.bf16,
        device=device_name(model=True), threads=torch.get_num_threads(), versions=versions(),
        **{k: r[k] for k in kept}, date=datetime.now(timezone.utc).isoformat(timespec='seconds'),
    )


def most_steps(task, wall):
    "More steps than a run can make: those of steps that train a third of the time that all of it would take"
    model = copy.deepcopy(task.model).to(task.device)
    batch = task.collate([task.train[i] for i in range(SIZE[0])])
    for i in range(4):
        if i == 1: t0 = time.perf_counter()
        with torch.autocast(task.device.type, torch.bfloat16, enabled=task.bf16): model(**batch).loss.backward()
    return int(1.8*wall*3/(time.perf_counter()-t0))


def differences(rows, a, b):
    "Loss of `a` less that of `b`, for every data set and seed that has both"
    loss = {(r['data'], r['seed'], r['method']): r['task_loss'] for r in rows}
    pairs = sorted({k[:2] for k in loss})
    return [loss[*k, a] - loss[*k, b] for k in pairs if (*k, a) in loss and (*k, b) in loss]


def report(rows):
    "Every way less the control and less LoRA"
    for a in WAYS:
        for b in ('lot-top80', 'lora'):
            if a != b and len(d := differences(rows, a, b)) > 1:
                mean, low, high = t_interval(d)
                print(f'{a:18} less {b:10} {mean:+.4f} ({low:+.4f} to {high:+.4f}), {len(d)} pairs')


def main():
    ap = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    ap.add_argument('--data', nargs='+', choices=('gsm8k', 'python'), default=['gsm8k', 'python'])
    ap.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2, 3])
    ap.add_argument('--wall', type=float, default=150, help='seconds of a run')
    ap.add_argument('--steps', type=int, help='steps of a run, instead of seconds')
    ap.add_argument('--equal', type=int, help='as many steps as fit into the time of so many of the control')
    ap.add_argument('--lr', type=float, help='learning rate of all, instead of their own')
    ap.add_argument('--ways', nargs='+', choices=WAYS, default=list(WAYS))
    ap.add_argument('--out', type=Path, default=RESULTS)
    a = ap.parse_args()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    for i, name in enumerate(a.data):
        task = make(name, SIZE)
        wall = None if a.steps or a.equal else a.wall
        planned = a.steps or wall and most_steps(task, wall)
        for seed in a.seeds:
            k = (seed + i) % len(a.ways)
            for turn, way in enumerate(a.ways[k:] + a.ways[:k]):
                method, lr = WAYS[way]
                steps = round(a.equal/RELATIVE[way]) if a.equal else planned
                row = row_of(task, method, a.lr or lr, seed, wall, steps, turn, a.equal)
                with a.out.open('a') as f: f.write(json.dumps(row) + '\n')
                print(name, seed, way, row['steps'], f"{row['task_loss']:.4f}", flush=True)
    report([r for r in map(json.loads, a.out.open()) if r.get('equal') == a.equal and r['wall'] == wall])


if __name__ == '__main__': main()
