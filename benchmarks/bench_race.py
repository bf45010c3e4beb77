"""Does a race find what the whole grid finds? Budgets × learning rates on tasks of an encoder.

    python benchmarks/bench_race.py [--tasks chapters TREC] [--folder DATA] [--steps 108] [--seeds 0 1 2] [--out FILE]

Nine settings train whole, with every seed; then `race` looks for the best with seed 0. A row says what the race chose,
how far that is from the best of the grid on dev rows (means over seeds, with the interval of the difference), and the
seconds of both. TREC is read from DATA (suite.py). Runs are kept in runs/race, and those that are there are not made
again.
"""
import argparse
import json
import statistics
from datetime import datetime, timezone
from pathlib import Path

import torch
from transformers.utils import logging as hf_logging

from alf_nb.core.stats import t_interval
from alf_nb.core.system import versions
from alf_nb.report.results import read_results
from alf_nb.study.compare import compare_policies
from alf_nb.study.methods import alf_method
from alf_nb.study.race import race
from alf_nb.study.runs import device_name
from bench_policies import make
from suite import encoder_task

RESULTS = Path(__file__).parent/'results'/'race.jsonl'
KEPT = Path('runs/race')
BUDGETS, RATES = (.1, .25, .5), (2e-4, 4e-4, 8e-4)


def whole_grid(task, steps, seeds, folder, lrs=RATES):
    "(budget, rate) → its rows, one for each seed"
    methods, found = [alf_method(f'{b:g}', budget=b) for b in BUDGETS], {}
    for lr in lrs:
        # a file for each rate: of the rates in a file only the best is repeated with other seeds
        file = folder/f'{lr:g}.jsonl'
        compare_policies(task, methods=methods, amount=steps, seeds=seeds, lrs=lr, extend=0, points=0, out=file,
                         progress=False)
        for r in read_results(file): found.setdefault((float(r['method']), lr), []).append(r)
    return found


def judged(rows): return [r['choice'] for r in sorted(rows, key=lambda r: r['seed'])]


def task_of(name, folder):
    return make('chapters', (16, 48)) if name == 'chapters' else encoder_task(name, folder)


def row_of(name, a):
    "A race beside the grid, on one task"
    task, folder = task_of(name, a.folder), KEPT/name
    grid = whole_grid(task, a.steps, a.seeds, folder)
    found = race(task, budgets=BUDGETS, lrs=RATES, steps=a.steps, seed=a.seeds[0], out=folder/'race.jsonl')
    print(found._repr_markdown_(), flush=True)
    best = min(grid, key=lambda k: statistics.fmean(judged(grid[k])))
    chosen = found.best.budget, found.best.lr
    gaps = [x-y for x, y in zip(judged(grid[chosen]), judged(grid[best]))]
    grid_s = sum(r['wall_s'] for rows in grid.values() for r in rows)/len(a.seeds)
    return dict(
        task=name, steps=a.steps, seeds=a.seeds, best=best, chosen=chosen, gap=t_interval(gaps), goal=task.goal,
        grid={f'{b:g}, {lr:g}': judged(rows) for (b, lr), rows in grid.items()},
        rounds=found.to_dict()['rounds'], race_s=found.seconds, grid_s=grid_s,
        threads=torch.get_num_threads(), device=device_name(model=True), versions=versions(),
        date=datetime.now(timezone.utc).isoformat(timespec='seconds'),
    )


def main():
    ap = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    ap.add_argument('--tasks', nargs='+', default=['chapters', 'TREC'])
    ap.add_argument('--folder', type=Path, help='of the tasks that may not be shipped')
    ap.add_argument('--steps', type=int, default=108)
    ap.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    ap.add_argument('--out', type=Path, default=RESULTS)
    a = ap.parse_args()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    for name in a.tasks:
        row = row_of(name, a)
        with a.out.open('a', encoding='utf-8') as f: f.write(json.dumps(row)+'\n')
        print({k: row[k] for k in ('task', 'best', 'chosen', 'gap', 'race_s', 'grid_s')}, flush=True)


if __name__ == '__main__': main()
