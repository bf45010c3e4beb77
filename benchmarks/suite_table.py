"""What the tasks of suite.py say: `scores()` is a table of methods by tasks, `differences()` what the default gains or
loses against others, averaged over tasks, with a bootstrap over tasks and seeds."""
import functools
import random
import statistics
from pathlib import Path

from IPython.display import Markdown

from alf_nb.core.format import num
from alf_nb.report.results_page import compare_results
from alf_nb.report.results import read_results

RESULTS = Path(__file__).resolve().parent/'results'/'suite.jsonl'
NAMES = {
    'full': 'full fine-tuning', 'lora': 'LoRA (PEFT)', 'alf': '**alf**, the default', 'alf-10': 'alf, a tenth',
    'random-stratified': "as many, by lot (`preset='short'`)", 'freeze-50': 'upper half of the blocks', 'lisa': 'LISA',
    'shira': 'SHiRA (PEFT)',
}


@functools.cache
def tasks(path=RESULTS):
    "data → its comparison, for tasks of which every method has all seeds"
    rows, found = read_results(path), {}
    for name in dict.fromkeys(r['task'] for r in rows):
        c = compare_results(rows, name)
        if len({len(m.runs) for m in c}) == 1 and len(c.methods[0].runs) > 1: found[c.task['data']] = c
    return found


def points(r): return 100*r['task_score'] if r.get('task_score') is not None else -100*r['task_loss']


def runs_of(c, method): return next((m.runs for m in c if m.name == method), [])


def scores():
    "Mean of the test score in points, and its spread over seeds, of methods by tasks"
    heads = [f"{data}, {c.reached}" for data, c in tasks().items()]
    lines = [f"| | {' | '.join(heads)} |", '|---'*(len(heads)+1) + '|']
    for method, name in NAMES.items():
        cells = []
        for c in tasks().values():
            found = [points(r) for r in runs_of(c, method)]
            best = c.methods[0].name == method
            said = f'{statistics.fmean(found):.1f} ± {statistics.stdev(found):.1f}' if found else '–'
            cells.append(f'**{said}**' if best else said)
        if set(cells) != {'–'}: lines.append(f"| {name} | {' | '.join(cells)} |")
    return Markdown('\n'.join(lines))


def paired(method, other):
    "data → differences in points, seed by seed"
    found = {}
    for data, c in tasks().items():
        of = {r['seed']: points(r) for r in runs_of(c, other)}
        found[data] = [points(r)-of[r['seed']] for r in runs_of(c, method) if r['seed'] in of]
    return {k: v for k, v in found.items() if v}


def bootstrap(by_task, draws=10_000, seed=0):
    "Mean over tasks, its standard error, and 95 % interval: tasks are drawn, and seeds inside them"
    rng, of = random.Random(seed), list(by_task.values())
    mean = statistics.fmean(map(statistics.fmean, of))
    drawn = sorted(
        statistics.fmean(statistics.fmean(rng.choices(t, k=len(t))) for t in rng.choices(of, k=len(of)))
        for _ in range(draws)
    )
    return mean, statistics.stdev(drawn), drawn[int(.025*draws)], drawn[int(.975*draws)]


def differences(method='alf'):
    "What the default gains over each other method, in points"
    heads = f'{method} less', 'mean over tasks', 'standard error', '95 % interval', 'tasks × seeds'
    lines = [f"| {' | '.join(heads)} |", '|---'*len(heads) + '|']
    for other, name in NAMES.items():
        if other == method or not (by := paired(method, other)): continue
        mean, error, low, high = bootstrap(by)
        size = f'{len(by)} × {min(map(len, by.values()))}'
        lines.append(f'| {name} | {mean:+.1f} | {num(error, 1)} | {low:+.1f} to {high:+.1f} | {size} |')
    return Markdown('\n'.join(lines))
