"""What the README quotes, from the committed results: `methods()` is its table, `verdict()` the sentence below it,
`points()` its four bullets."""
import functools, json
from pathlib import Path

from IPython.display import Markdown

from alf_nb.core.format import num, percent
from alf_nb.core.stats import t_interval
from alf_nb.report.results import read_results

RESULTS = Path(__file__).resolve().parent/'results'
METHODS = {'full': 'full fine-tuning', 'lora': 'LoRA (PEFT)', 'alf': '**alf**, the default',
           'lot-top80': "as many, drawn by lot (`preset='short'`)"}
STEPS = 136     # of the lot: the time of every method in turns.jsonl


def lines(name):
    "Rows of a result file"
    return [json.loads(l) for l in (RESULTS/name).read_text(encoding='utf-8').splitlines()]


def last(name):
    "The newest row of a result file"
    return lines(name)[-1]


@functools.cache
def runs():
    "method → (data, seed) → row, for the pairs that all methods have"
    found = {m: {} for m in METHODS}
    for r in lines('turns.jsonl'):
        if r.get('equal') == STEPS and r['method'] in found: found[r['method']][r['data'], r['seed']] = r
    pairs = sorted(set.intersection(*map(set, found.values())))
    return {m: {k: of[k] for k in pairs} for m, of in found.items()}


def before():
    "data → loss of SmolLM2 on unrelated text before training"
    rows = [r for r in read_results(RESULTS/'policies.jsonl') if r['model'].startswith('SmolLM2')]
    return {r['data']: r['other_loss_before'] for r in rows if r['batch_size'] == 2}


def mean(values): return sum(values)/len(values)


def methods():
    "Four methods at equal time"
    of, base = runs(), before()
    domains = list(dict.fromkeys(d for d, _ in of['alf']))
    losses = {(m, d): mean([r['task_loss'] for k, r in of[m].items() if k[0] == d]) for m in of for d in domains}
    lowest = {d: min(losses[m, d] for m in of) for d in domains}
    lines = [f"| | state | step | {' | '.join(f'loss, {d}' for d in domains)} | forgets |",
             '|---'*(4+len(domains)) + '|']
    for method, name in METHODS.items():
        row, full = (next(iter(of[m].values())) for m in (method, 'full'))
        state, step = row['state_bytes_peak']/full['state_bytes_peak'], full['steps']/row['steps']
        bold = lambda d: '**'*(losses[method, d] == lowest[d])
        shown = ' | '.join(f'{bold(d)}{losses[method, d]:.3f}{bold(d)}' for d in domains)
        forgets = mean([r['other_loss'] - base[d] for (d, _), r in of[method].items()])
        lines.append(f'| {name} | {num(state, 2)} | {num(step, 2)} | {shown} | {forgets:+.3f} |')
    return Markdown('\n'.join(lines))


def less(other):
    "Loss of the default less that of another method at equal time, in words"
    of = runs()
    gaps = [r['task_loss'] - of[other][k]['task_loss'] for k, r in of['alf'].items()]
    at, low, high = t_interval(gaps)
    return f'{at:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}, {len(gaps)} pairs'


def verdict():
    "What the table says, in a sentence"
    return Markdown(f"The default less LoRA: {less('lora')}; less the lot: {less('lot-top80')}.")


def points():
    "What you get, a number each"
    demo, live = last('demo.jsonl'), last('live.jsonl')
    state, budget = demo['state_bytes_peak']/demo['state_bytes_full'], percent(demo['trainable_share_peak'])
    delta, model = (f'{b/1e6:,.0f} MB' for b in (demo['delta_bytes'], 4*demo['n_total']))
    return Markdown('\n'.join([
        f"- **Watch and change what learns, while it trains.** A move of the threshold is answered in "
        f"{live['p50_ms']:.0f} ms.",
        f"- **A quarter of the training state.** {budget} of the parameters train, with {state:.2f} of the bytes that "
        f"gradients and AdamW take for all. The budget holds at every step.",
        f"- **A small exact result.** A delta of {delta} instead of a model of {model}; killed and resumed equals "
        f"uninterrupted, bit for bit.",
        "- **Honest answers.** `alf compare` asks *your* data whether choosing helps. Here it does not: as many "
        f"units drawn by lot in the same strata learn as much or a little more ({less('lot-top80')}).",
    ]))
