"""What bench_race.py found. `races()`: what each race chose beside the best of the whole grid; `answer()`: in words."""
import functools
import json
from pathlib import Path

from IPython.display import Markdown

from alf_nb.core.format import percent
from suite_table import gap

RESULTS = Path(__file__).resolve().parent/'results'/'race.jsonl'


@functools.cache
def rows():
    "task → its last row"
    return {r['task']: r for r in map(json.loads, RESULTS.read_text(encoding='utf-8').splitlines())}


def setting(pair): return f'{percent(pair[0], 0)} at {pair[1]:g}'


def points(r):
    "By how much the choice is worse than the best of the grid, in points or hundredths of a nat, and its interval"
    mean, low, high = (100*v + 0. for v in r['gap'])
    return f'{gap(mean)} ({gap(low)} to {gap(high)})' if any((mean, low, high)) else 'the same setting'


def hit(r): return r['gap'][1] <= 0
def time_share(r): return r['race_s']/r['grid_s']


def races():
    heads = 'task', 'best of the grid', 'found by the race', 'worse by', 'race, s', 'grid, s', 'part of the time'
    lines = [f"| {' | '.join(heads)} |", '|---'*len(heads) + '|']
    for name, r in rows().items():
        cells = (name, setting(r['best']), setting(r['chosen']), points(r), f"{r['race_s']:.0f}", f"{r['grid_s']:.0f}",
                 percent(time_share(r), 0))
        lines.append(f"| {' | '.join(cells)} |")
    return Markdown('\n'.join(lines))


def answer():
    "Does it find the best, and in how much of the time?"
    of = rows().values()
    low, high = (percent(f(map(time_share, of)), 0) for f in (min, max))
    n = sum(map(hit, of))
    said = f"On {n} of {len(of)} tasks the race ends within the interval of the best of the grid"
    return Markdown(f"{said}, in {low if low == high else f'{low} to {high}'} of the time.")
