"""What the tasks of suite.py say. `answer()` says it in words; `scores()`, `learnt()` and `forgotten()` are tables of
methods by tasks; `differences()` is what the default gains or loses against others, averaged over tasks, with a
bootstrap over tasks and seeds; `frontiers()` are pictures of what is learnt against what is forgotten."""
import functools
import itertools
import random
import statistics
from pathlib import Path

from IPython.display import Markdown

from alf_nb.core.format import num, percent
from alf_nb.core.rates import best_lr
from alf_nb.report.html import Html, tag
from alf_nb.report.lines import line_chart
from alf_nb.report.results_page import compare_results
from alf_nb.report.results import choice_of, read_results

RESULTS = Path(__file__).resolve().parent/'results'/'suite.jsonl'
NAMES = {
    'full': 'full fine-tuning', 'lora': 'LoRA (PEFT)', 'alf': '**alf**, the default', 'alf-10': 'alf, a tenth',
    'random-stratified': "as many, by lot (`preset='short'`)", 'freeze-50': 'upper half of the blocks', 'lisa': 'LISA',
    'shira': 'SHiRA (PEFT)',
}


def in_file(path):
    "data → its comparison, for tasks of which every method has all seeds"
    rows, found = read_results(path), {}
    for name in dict.fromkeys(r['task'] for r in rows):
        c = compare_results(rows, name)
        if len({len(m.runs) for m in c}) == 1 and len(c.methods[0].runs) > 1: found[c.task['data']] = c
    return found


@functools.cache
def tasks(): return in_file(RESULTS)


def points(r): return 100*r['task_score'] if r.get('task_score') is not None else -100*r['task_loss']


def runs_of(c, method): return next((m.runs for m in c if m.name == method), [])


def general(r, before=''):
    "Mean loss on the texts of the general panel; None: the task has none"
    texts = [v for k, v in (r.get(f'general{before}') or {}).items() if k != 'PIQA']
    return statistics.fmean(texts) if texts else None


def gained(r):
    "By how much the loss on the task's test rows fell"
    return r['task_loss_before'] - r['task_loss']


def forgot(r):
    "By how much the loss on texts of other kinds rose"
    return general(r) - general(r, '_before')


def scored(): return {d: c for d, c in tasks().items() if c.goal != 'loss'}


def decoders(): return {d: c for d, c in tasks().items() if general(c.rows[0]) is not None}


def encoders(): return {d: c for d, c in tasks().items() if d not in decoders()}


def table(heads, cells_of):
    "A line for every method that has runs; `cells_of(method)`: a list of texts"
    lines = [f"| | {' | '.join(heads)} |", '|---'*(len(heads)+1) + '|']
    for method, name in NAMES.items():
        cells = cells_of(method)
        if set(cells) != {'–'}: lines.append(f"| {name} | {' | '.join(cells)} |")
    return Markdown('\n'.join(lines))


def spread(values, digits, best=False):
    "Mean and standard deviation over seeds"
    if not values: return '–'
    mean, deviation = (f'{v:.{digits}f}' for v in (statistics.fmean(values), statistics.stdev(values)))
    said = f'{mean} ± {deviation}'.replace(' ', '\N{NO-BREAK SPACE}')
    return f'**{said}**' if best else said


def scores():
    "Test score in points, of methods by the tasks that have one"
    of = scored()
    cells = lambda m: [spread(list(map(points, runs_of(c, m))), 1, c.methods[0].name == m) for c in of.values()]
    return table([f'{data}, {c.reached}' for data, c in of.items()], cells)


def hundredths(figure, word, mark=False):
    "A figure of runs in hundredths of a nat per token, of methods by the tasks of a decoder; `mark`: the best is bold"
    of = decoders()
    def cell(c, m): return spread([100*figure(r) for r in runs_of(c, m)], 1, mark and c.methods[0].name == m)
    return table([f'{data}, {word}' for data in of], lambda m: [cell(c, m) for c in of.values()])


def learnt(): return hundredths(gained, 'learnt', mark=True)


def forgotten(): return hundredths(forgot, 'forgot')


def paired(method, other, among=None):
    "data → differences in points, seed by seed; `among`: these tasks, not all"
    found = {}
    for data, c in (tasks() if among is None else among).items():
        of = {r['seed']: points(r) for r in runs_of(c, other)}
        found[data] = [points(r)-of[r['seed']] for r in runs_of(c, method) if r['seed'] in of]
    return {k: v for k, v in found.items() if v}


@functools.cache
def drawn(of, draws, seed):
    "Means over tasks of as many draws, the lowest first; `of`: a tuple of differences for each task"
    rng = random.Random(seed)
    return sorted(
        statistics.fmean(statistics.fmean(rng.choices(t, k=len(t))) for t in rng.choices(of, k=len(of)))
        for _ in range(draws)
    )


def bootstrap(by_task, draws=10_000, seed=0):
    "Mean over tasks, its standard error, and 95 % interval: tasks are drawn, and seeds inside them"
    means = drawn(tuple(map(tuple, by_task.values())), draws, seed)
    mean = statistics.fmean(map(statistics.fmean, by_task.values()))
    return mean, statistics.stdev(means), means[int(.025*draws)], means[int(.975*draws)]


def gap(v):
    "A difference in points; there is no negative zero"
    return f'{round(v, 1) + 0.:+.1f}'


def range_of(shares):
    "From the lowest to the highest, in percent"
    low, high = (percent(f(shares), 0) for f in (min, max))
    return low if low == high else f'{low} to {high}'


def differences(method='alf'):
    "What the default gains over each other method, in points"
    heads = f'{method} less', 'mean over tasks', 'standard error', '95 % interval', 'tasks × seeds'
    lines = [f"| {' | '.join(heads)} |", '|---'*len(heads) + '|']
    for other, name in NAMES.items():
        if other == method or not (by := paired(method, other)): continue
        mean, error, low, high = bootstrap(by)
        size = f'{len(by)} × {min(map(len, by.values()))}'
        lines.append(f'| {name} | {gap(mean)} | {num(error, 1)} | {gap(low)} to {gap(high)} | {size} |')
    return Markdown('\n'.join(lines))


def edges():
    "Which best rates have no neighbour on one side"
    pairs = [(data, m) for data, c in tasks().items() for m in c]
    found = [f"{NAMES[m.name].replace('*', '')} on {data}" for data, m in pairs if m.edge]
    if not found: return Markdown('Every best rate has a lower and a higher one beside it, both tried.')
    is_or_are = 'is' if len(found) == 1 else 'are'
    return Markdown(f"{len(found)} of {len(pairs)} best rates {is_or_are} the lowest or highest that was tried:"
                    f" {', '.join(found)}.")


FRONT = 'full', 'lora', 'alf', 'random-stratified', 'freeze-50', 'lisa'


def first_seed(c, method):
    "Runs of a method with the first seed, one for each learning rate that was tried, the lowest first"
    rows = [r for r in c.rows if (r['method'], r['seed']) == (method, 0) and r.get('task_loss') is not None]
    return sorted(rows, key=lambda r: r['lr'])


def rates_of(c, method):
    "(forgot, learnt) at every learning rate that was tried with the first seed, by rate"
    return [(forgot(r), gained(r)) for r in first_seed(c, method)]


def shares_and_rates():
    "data → [(share that trains, the learning rate that suits it)], of methods that train weights themselves"
    found = {}
    for data, c in tasks().items():
        for m in 'full', 'freeze-50', 'alf', 'random-stratified':
            runs = first_seed(c, m)
            lr = best_lr({r['lr']: choice_of(r) for r in runs})
            if lr: found.setdefault(data, []).append((runs[0]['trainable_share_mean'], lr))
    return found


def lines_of(ways):
    "A line and its points for each method; the sixth is dashed"
    lines = []
    for k, (m, pts) in enumerate(ways.items()):
        name, (x, y) = NAMES[m].replace('*', '').split(' (')[0], zip(*pts)
        lines.append(dict(name=name, x=x, y=y, c=k % 5 + 1, kind='line' if k < 5 else 'dash'))
    return lines + [dict(line, name='', kind='dots') for line in lines]


def picture(data, ways):
    "What was learnt of a task against what was forgotten; `ways`: method → (forgot, learnt) along its line"
    xs = [x for found in ways.values() for x, _ in found]
    wide = .05*(max(xs)-min(0, *xs))
    said = f'{data}: how much the loss on the task fell against how much that on other texts rose'
    chart = line_chart(lines_of(ways), said, '{:.3g}'.format, 260, x_range=(min(0, *xs)-wide, max(xs)+wide),
                       x_name='forgot', n_x_ticks=4)
    return tag('div', tag('h4', f'{data}: learnt'), chart)


SIDE_BY_SIDE = 'display:grid; grid-template-columns:repeat(auto-fit, minmax(20rem, 1fr)); gap:0 2rem'


def pictures(of):
    "Side by side; `of`: data → ways"
    return Html(tag('div', *(picture(data, ways) for data, ways in of.items()), style=SIDE_BY_SIDE))


def frontiers():
    "A picture for each task of a decoder, lines over the learning rates of each method"
    return pictures({
        data: {m: found for m in FRONT if (found := rates_of(c, m))} for data, c in decoders().items()
    })


def compared(other, among=None):
    "The default beside another method: in a word, and in points with the interval"
    mean, _, low, high = bootstrap(paired('alf', other, among))
    if low > 0: word = 'ahead of'
    else: word = 'behind' if high < 0 else 'level with'
    return word, f'{gap(mean)} ({gap(low)} to {gap(high)})'


OTHERS = {'lora': 'LoRA', 'full': 'full fine-tuning', 'random-stratified': 'a quarter drawn by lot'}


def listed(items, last=' and '): return last.join([', '.join(items[:-1]), items[-1]]) if len(items) > 1 else items[0]


def standing(words):
    "Where the default stands, in words of `compared()` for each of OTHERS"
    pairs = itertools.groupby(zip(words, OTHERS.values()), key=lambda pair: pair[0])
    groups = [f'{word} {listed([name for _, name in of])}' for word, of in pairs]
    return listed(groups, ', and ' if any(' and ' in g for g in groups) else ' and ')


def gaps(figures): return ', '.join(f'{figure} less {name}' for figure, name in zip(figures, OTHERS.values()))


def by_kind():
    "The same for encoders and for decoders alone"
    said = []
    for kind, of in ('encoder', encoders()), ('decoder', decoders()):
        words, figures = zip(*(compared(other, of) for other in OTHERS))
        said.append(f"Of the {len(of)} {kind} tasks alone it is {standing(words)}: {gaps(figures)}.")
    return Markdown(' '.join(said))


def in_short():
    "The answer in a sentence or two, without figures"
    n, seeds = len(tasks()), min(len(c.methods[0].runs) for c in tasks().values())
    words = standing([compared(other)[0] for other in OTHERS])
    said = (f"**The default, which trains a quarter of the parameters, is {words}**, as far as {n} tasks with {seeds}"
            " seeds tell, at equal steps.")
    if not decoders(): return said
    return f"{said} Of the decoder tasks alone it is {standing([compared(o, decoders())[0] for o in OTHERS])}."


def answer():
    "The answer in plain words"
    said = f"{in_short()} In points, with 95 % intervals: {gaps([compared(other)[1] for other in OTHERS])}."
    rows = {m: [r for c in decoders().values() for r in runs_of(c, m)] for m in ('alf', 'lora', 'full')}
    if not rows['alf']: return Markdown(said)
    rise = {m: gap(100*statistics.fmean(map(forgot, rs))) for m, rs in rows.items()}
    lost = f"On other texts its loss changes by {rise['alf']} hundredths of a nat per token, LoRA's by {rise['lora']}"
    return Markdown(f"{said} {lost}, full fine-tuning's by {rise['full']}.")
