"""Some of the committed runs once more (`make evidence`): does this machine find what the page says?

    python benchmarks/bench_again.py [--tasks MAWPS] [--methods alf lora full] [--seeds 0 1] [--folder DATA]

A figure is how much the loss on test problems fell, how much that on other texts rose, or what a method has less than
the default, seed by seed. A mean over the seeds that were run is compared with the interval in which the committed ones
say that a mean of so many runs lies, 95 % of the time. Ends with status 1 where one is outside, or none can be
compared. The tasks of an encoder need DATA (suite.py).
"""
import math
import statistics
import time
from datetime import datetime
from pathlib import Path

from transformers.utils import logging as hf_logging

from alf_nb.core.stats import t_quantile
from alf_nb.report.results import read_results
from alf_nb.report.results_page import compare_results
from bench_suite import RESULTS, compared, options, ready, rule_of
from suite_table import forgot, gained, general, points

METHODS = 'alf', 'lora', 'full'
OUT = Path('runs/evidence')


def mean_between(committed, n):
    "Where the mean of `n` more runs lies, 95 % of the time (Student's prediction interval)"
    mean, of = statistics.fmean(committed), len(committed)
    half = t_quantile(of-1)*statistics.stdev(committed)*math.sqrt(1/of + 1/n)
    return mean-half, mean+half


def learnt(r): return points(r) if r.get('task_score') is not None else 100*gained(r)
def lost(r): return 100*forgot(r)
def by_seed(rows, figure): return {r['seed']: figure(r) for r in rows}


def figures(of):
    "what is measured → seed → value, in points or hundredths of a nat; `of`: method → rows, the default's too"
    found = {}
    for m, rows in of.items():
        found[f'{m}, learnt'] = by_seed(rows, learnt)
        if general(rows[0]) is not None: found[f'{m}, forgot'] = by_seed(rows, lost)
    for m in of.keys() - {'alf'}:
        default, other = (found[f'{n}, learnt'] for n in ('alf', m))
        found[f'alf less {m}, learnt'] = {s: default[s]-other[s] for s in default.keys() & other.keys()}
    return found


def judged(committed, now):
    "(what, interval, mean of now, is it inside?) of every figure that both have"
    lines = []
    for what, values in now.items():
        known = list(committed.get(what, {}).values())
        if len(known) < 2 or not values: continue
        low, high = mean_between(known, len(values))
        mean = statistics.fmean(values.values())
        lines.append((what, low, high, mean, low <= mean <= high))
    return lines


def runs_of(rows, methods, name):
    "method → its rows of a task, at the best rate"
    mine = [r for r in rows if r['task'] == name]
    return {m.name: m.runs for m in compare_results(mine) if m.name in methods} if mine else {}


def name_of(task, a):
    "A task and its length, as rows say it"
    rule, amount = rule_of(task, a)
    return f'{task.key}|{rule} {amount:g}'


def run_again(task, a):
    "Run the methods at their best rates; their committed rows. Ends with a message where a method has none"
    name = name_of(task, a)
    known = runs_of(read_results(RESULTS), a.methods, name)
    if missing := set(a.methods) - set(known):
        raise SystemExit(f"{task.data}: no committed runs of {', '.join(sorted(missing))} have this data, these weights"
                         f" and this length ({name}): nothing to compare")
    compared(task, a.methods, a, a.out, {m: (known[m][0]['lr'],) for m in a.methods})
    return known


def of_task(data, a):
    "Lines of `judged` for a task"
    task = ready(data, a)
    known = run_again(task, a)
    return judged(figures(known), figures(runs_of(read_results(a.out), a.methods, name_of(task, a))))


def main():
    ap = options(__doc__.split('\n')[0])
    ap.set_defaults(tasks=['MAWPS'], methods=METHODS, seeds=[0, 1],
                    out=OUT/f'{datetime.now():%Y-%m-%d-%H%M%S}.jsonl')
    a = ap.parse_args()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    t0, n, wrong = time.perf_counter(), 0, 0
    for data in a.tasks:
        for what, low, high, mean, inside in of_task(data, a):
            print(f"{data:8} {what:26} {mean:7.2f}  committed {low:7.2f} to {high:7.2f}{'' if inside else '  OUTSIDE'}")
            n, wrong = n+1, wrong + (not inside)
    print(f"{n-wrong} of {n} figures are where the committed runs say; {(time.perf_counter()-t0)/60:.0f} minutes")
    raise SystemExit(bool(wrong or not n))


if __name__ == '__main__': main()
