"""What bench_race.py found. `races()`: what each race chose beside the best of the whole grid; `answer()`: in words."""
import functools
import json
from pathlib import Path

from IPython.display import Markdown

from alf_nb.core.format import percent
from suite_table import gap, range_of
from when_table import table

RESULTS = Path(__file__).resolve().parent/'results'/'race.jsonl'


@functools.cache
def rows():
    "task → its last row"
    return {r['task']: r for r in map(json.loads, RESULTS.read_text(encoding='utf-8').splitlines())}


def setting(pair): return f'{percent(pair[0], 0)} at {pair[1]:g}'


def worse_by(r):
    "By how much the choice is worse than the best of the grid, in points or hundredths of a nat, and its interval"
    mean, low, high = (100*v for v in r['gap'])
    return f'{gap(mean)} ({gap(low)} to {gap(high)})' if any((mean, low, high)) else 'the same setting'


def hit(r): return r['gap'][1] <= 0
def time_share(r): return r['race_s']/r['grid_s']


def races():
    heads = 'task', 'best of the grid', 'found by the race', 'worse by', 'race, s', 'grid, s', 'part of the time'
    lines = []
    for name, r in rows().items():
        lines.append((name, setting(r['best']), setting(r['chosen']), worse_by(r), f"{r['race_s']:.0f}",
                      f"{r['grid_s']:.0f}", percent(time_share(r), 0)))
    return table(heads, lines)


def answer():
    "Does it find the best, and in how much of the time?"
    of = rows().values()
    n = sum(map(hit, of))
    said = f"On {n} of {len(of)} tasks the race ends within the interval of the best of the grid"
    return Markdown(f"{said}, in {range_of(list(map(time_share, of)))} of the time.")
