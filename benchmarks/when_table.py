"""What bench_when.py found. `scores()`: methods by settings; `parts()`: each part alone, after a shift; `placed()`: how
much of each part a choice let train; `answer()`: in words."""
import functools
import statistics
from pathlib import Path

from IPython.display import Markdown

from alf_nb.core.format import percent
from alf_nb.core.stats import t_interval
from alf_nb.report.results import read_results
from alf_nb.report.results_page import compare_results
from suite_table import gap, runs_of, spread

RESULTS = Path(__file__).resolve().parent/'results'/'when.jsonl'
NAMES = {
    'full': 'full fine-tuning', 'lora': 'LoRA (PEFT)', 'alf': '**alf**, the default',
    'random-stratified': 'its control: as many, by lot', 'alf-head': "alf, `pin='head'`",
    'alf-anywhere': 'alf without strata, by agreement',
    'alf-unstratified': 'alf without strata, by gain', 'random': 'their control: as many, by lot, anywhere',
    'inverted': 'the opposite: the lowest gain',
    'surgical': 'one block, by relative gradient norm (surgical fine-tuning)',
}
PARTS = {'embeddings': 'embeddings', 'lower': 'blocks 0 and 1', 'middle': 'blocks 2 and 3', 'upper': 'blocks 4 and 5',
         'head': 'head'}
CHOSEN = 'alf', 'alf-anywhere', 'alf-unstratified', 'inverted'
LAYERS = {'lower': ('block.0', 'block.1'), 'middle': ('block.2', 'block.3'), 'upper': ('block.4', 'block.5'),
          'head': ('head',)}


@functools.cache
def settings():
    "data → its comparison"
    rows = read_results(RESULTS)
    found = (compare_results(rows, name) for name in dict.fromkeys(r['task'] for r in rows))
    return {c.task['data'].removeprefix('TREC, '): c for c in found}


def shifts(): return {k: c for k, c in settings().items() if 'shifted' in k}


def scores_of(c, method): return [100*r['task_score'] for r in runs_of(c, method)]


def table(heads, lines):
    return Markdown('\n'.join([f"| {' | '.join(heads)} |", '|---'*len(heads) + '|',
                               *(f"| {' | '.join(l)} |" for l in lines)]))


def cells(method, of):
    "A method's scores in each setting; none where it has not been run"
    found = [scores_of(c, method) for c in of.values()]
    return [spread(values, 1) if values else '–' for values in found]


def scores():
    "Accuracy on test rows in points"
    of = settings()
    return table(['', *of], [[name, *cells(m, of)] for m, name in NAMES.items()])


def share(method):
    "How many of the parameters it trains"
    return percent(runs_of(next(iter(shifts().values())), method)[0]['trainable_share_mean'])


def parts():
    "Accuracy of each part alone, and how many of the parameters it has"
    of = shifts()
    lines = [[name, share(f'only-{p}'), *cells(f'only-{p}', of)] for p, name in PARTS.items()]
    return table(['only', 'trains', *of], lines)


def part_of(c, method, part):
    "How much of a part of the model trained, 0–1, averaged over the run and over seeds"
    rows = runs_of(c, method)
    return statistics.fmean(int(d)/9 for r in rows for layer in LAYERS[part] for d in r['map'][layer])


def placed():
    "How much of each part trained"
    of = shifts().items()
    heads = [f'{name}: {PARTS[p]}' for name, _ in of for p in LAYERS]
    lines = []
    for m in CHOSEN: lines.append([NAMES[m], *(percent(part_of(c, m, p), 0) for _, c in of for p in LAYERS)])
    return table(['', *heads], lines)


def less(c, method, other):
    "Differences in points, seed by seed"
    of = {r['seed']: 100*r['task_score'] for r in runs_of(c, other)}
    return [100*r['task_score'] - of[r['seed']] for r in runs_of(c, method) if r['seed'] in of]


def beside(c, method, other):
    "A difference in points with Student's interval over seeds"
    mean, low, high = t_interval(less(c, method, other))
    return f'{gap(mean)} ({gap(low)} to {gap(high)})'


def of_shift(name, c):
    "What must learn after a shift, and what a choice is worth there"
    alone = {p: statistics.fmean(scores_of(c, f'only-{p}')) for p in PARTS}
    best, worst = max(alone, key=alone.get), min(alone, key=alone.get)
    whole = statistics.fmean(scores_of(c, 'full'))
    strata, chance, worst_choice = (
        beside(c, *pair) for pair in
        (('alf', 'random-stratified'), ('alf-unstratified', 'random'), ('alf-unstratified', 'inverted'))
    )
    return (
        f"**{name.capitalize()}**: {PARTS[best]} alone reaches {alone[best]:.1f}, {PARTS[worst]} alone"
        f" {alone[worst]:.1f}, everything {whole:.1f}. The default less its control is {strata}; by gain and without"
        f" strata it is {chance} less as many by lot, and {worst_choice} less the opposite."
    )


def answer():
    "When does choosing pay? In words"
    few = [f"{beside(c, 'alf', 'random-stratified')} of {name}" for name, c in settings().items() if 'rows' in name]
    said = [of_shift(name, c) for name, c in shifts().items()]
    return Markdown(' '.join(said) + f" **Few rows**: the default less its control is {' and '.join(few)}.")
