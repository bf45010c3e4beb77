"""What bench_scales.py found. `frontiers()`: pictures of what is learnt against what is forgotten, a line over the
parts of a change that are added to the base model; `parts()`: a table; `answer()`: in words."""
import functools
from pathlib import Path

from IPython.display import Markdown

from alf_nb.report.results import read_results
from suite_table import FRONT, forgot, gained, pictures, range_of, table

RESULTS = Path(__file__).resolve().parent/'results'/'scales.jsonl'


@functools.cache
def rows():
    "data → method → its row"
    found = {}
    for r in read_results(RESULTS): found.setdefault(r['data'], {})[r['method']] = r
    return found


def at(r, scale):
    "A row as it would be with that part of the change"
    return r | dict(map(tuple, r['scales']))[scale]


def along(r):
    "(forgot, learnt) from the base model to the whole change"
    parts = [at(r, scale) for scale, _ in r['scales']]
    return [(0., 0.), *((forgot(p), gained(p)) for p in [*parts, r])]


def frontiers():
    "A picture for each task"
    ways = {data: {m: along(of[m]) for m in FRONT if m in of} for data, of in rows().items()}
    return pictures(ways)


PARTS = {.5: 'half', .75: 'three quarters', 1.: 'all'}


def cells(r):
    "What is learnt and forgotten with each of PARTS, in hundredths of a nat"
    found = [r if scale == 1 else at(r, scale) for scale in PARTS]
    return [f'{100*figure(p):.1f}' for p in found for figure in (gained, forgot)]


def parts():
    "A table for each task: what is learnt and forgotten with a part of a change, in hundredths of a nat"
    heads = [f'{name}: {word}' for name in PARTS.values() for word in ('learnt', 'forgot')]
    found = []
    for data, of in rows().items():
        lines = table(heads, lambda m: cells(of[m]) if m in of else ['–'])
        found.append(f'{data}, in hundredths of a nat:\n\n{lines.data}')
    return Markdown('\n\n'.join(found))


def of_part(scale, runs):
    "What a part of a change is worth beside the whole, in words"
    learns = range_of([gained(at(r, scale))/gained(r) for r in runs])
    said = f'With {PARTS[scale]} of a change {learns} of what is learnt stays'
    worst = [r for r in runs if forgot(r) > .02]
    if not worst: return f'{said}.'
    return f'{said}, and {range_of([forgot(at(r, scale))/forgot(r) for r in worst])} of what is forgotten.'


def answer():
    "What a half and three quarters of a change are worth, in words"
    runs = [r for of in rows().values() for r in of.values()]
    return Markdown(' '.join(of_part(scale, runs) for scale in (.75, .5)))
