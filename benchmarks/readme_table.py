"What the README quotes, from the committed results: `methods()` is its table, `points()` its four bullets."
import json
from pathlib import Path

from IPython.display import Markdown

from alf_nb.report.results_page import compare_results

from alf_nb.report.results import read_results
from alf_nb.core.format import num, percent

RESULTS = Path(__file__).resolve().parent/'results'
SECONDS = 150
METHODS = {'full': 'full fine-tuning', 'lora': 'LoRA (PEFT)', 'alf-probed': "**alf** with probes (`preset='probe'`)",
           'random-stratified': "**alf** by lot (`preset='short'`)", 'lisa': 'LISA'}
TURNS = {'alf': 'the default, which meters,', 'lot-top80': 'as many by lot', 'lora': 'LoRA'}
STEPS = 136     # of the control by lot: the time of every method in turns.jsonl


def lines(name):
    "Rows of a result file"
    return [json.loads(l) for l in (RESULTS/name).read_text(encoding='utf-8').splitlines()]


def last(name):
    "The newest row of a result file"
    return lines(name)[-1]


def under_the_clock():
    "data → method → row of its comparison at equal time"
    rows = read_results(RESULTS/'policies.jsonl')
    found = [compare_results(rows, task) for task in dict.fromkeys(r['task'] for r in rows)]
    found = [c for c in found if (c.task['rule'], c.task['amount']) == ('wall', SECONDS)]
    return {c.task['data']: {r['method']: r for r in c.table()} for c in found}


def loss(rows, method):
    "Mean held-out loss, the lowest of the shown ones in bold"
    means = {m: rows[m]['task_loss'][0] for m in METHODS}
    return f"**{means[method]:.3f}**" if means[method] == min(means.values()) else f"{means[method]:.3f}"


def methods():
    "Five methods at equal time"
    domains = under_the_clock()
    first = next(iter(domains.values()))
    losses = ' | '.join(f'loss, {d}' for d in domains)
    lines = [f"| | state | step | {losses} | forgets |", '|---'*(4+len(domains)) + '|']
    for method, name in METHODS.items():
        row = first[method]
        state, step = num(row['state_of_full'], 2), num(row['seconds_per_step']/first['full']['seconds_per_step'], 2)
        losses = ' | '.join(loss(rows, method) for rows in domains.values())
        forgets = sum(rows[method]['forgetting'] for rows in domains.values())/len(domains)
        lines.append(f'| {name} | {state} | {step} | {losses} | {forgets:+.3f} |')
    return Markdown('\n'.join(lines))


def at_equal_time():
    "(data, seed) → method → loss, where the default, its control and LoRA were all run"
    found = {}
    for r in lines('turns.jsonl'):
        if r.get('equal') == STEPS: found.setdefault((r['data'], r['seed']), {})[r['method']] = r['task_loss']
    return {k: of for k, of in sorted(found.items()) if TURNS.keys() <= of.keys()}


def default():
    "What the default reached beside its control and LoRA, at equal time"
    rows, means = at_equal_time(), []
    for data in dict.fromkeys(d for d, _ in rows):
        runs = [of for (d, _), of in rows.items() if d == data]
        said = ', '.join(f"{name} {sum(of[m] for of in runs)/len(runs):.3f}" for m, name in TURNS.items())
        means.append(f"{data}: {said} ({len(runs)} seed{'s'*(len(runs) != 1)})")
    return Markdown(f"In as much time by the measured seconds of a step, on another machine: {'; '.join(means)}.")


def points():
    "What you get, a number each"
    demo, live = last('demo.jsonl'), last('live.jsonl')
    state, budget = demo['state_bytes_peak']/demo['state_bytes_full'], percent(demo['trainable_share_peak'])
    delta, model = (f'{b/1e6:,.0f} MB' for b in (demo['delta_bytes'], 4*demo['n_total']))
    gaps = [of['alf'] - of['lot-top80'] for of in at_equal_time().values()]
    return Markdown('\n'.join([
        f"- **Watch and change what learns, while it trains.** A move of the threshold is answered in "
        f"{live['p50_ms']:.0f} ms.",
        f"- **A quarter of the training state.** {budget} of the parameters train, with {state:.2f} of the bytes that "
        f"gradients and AdamW take for all. The budget holds at every step.",
        f"- **A small exact result.** A delta of {delta} instead of a model of {model}; killed and resumed equals "
        f"uninterrupted, bit for bit.",
        f"- **Honest answers.** `alf compare` asks *your* data whether choosing helps. Here a measured choice does not "
        f"beat as many units drawn by lot in the same strata ({sum(gaps)/len(gaps):+.3f} in loss at equal time).",
    ]))
