"What the README quotes, from the committed results: `methods()` is its table, `points()` its four bullets."
import json
from pathlib import Path

from IPython.display import Markdown

from alf_nb.core.format import num, percent

RESULTS = Path(__file__).resolve().parent/'results'
STEPS = 136     # of the control: the time that every method has (bench_turns.py --equal)
METHODS = {'full': 'full fine-tuning', 'lora': 'LoRA (PEFT)', 'alf': '**alf**, the default',
           'lot-top80': 'as many, drawn by lot'}


def lines(name):
    "Rows of a result file"
    return [json.loads(l) for l in (RESULTS/name).read_text(encoding='utf-8').splitlines()]


def mean(values):
    values = list(values)
    return sum(values)/len(values)


def at_equal_time():
    "(method, data) → its runs"
    found = {}
    for r in lines('turns.jsonl'):
        if r.get('equal') == STEPS: found.setdefault((r['method'], r['data']), []).append(r)
    return found


def domains(runs): return list(dict.fromkeys(data for _, data in runs))


def loss(runs, method, data):
    "Mean held-out loss, the lowest of the shown ones in bold"
    means = {m: mean(r['task_loss'] for r in runs[m, data]) for m in METHODS}
    return f"**{means[method]:.3f}**" if means[method] == min(means.values()) else f"{means[method]:.3f}"


def forgetting(runs, method):
    "Rise of the loss on unrelated text"
    before = {r['data']: r['other_loss_before'] for r in lines('policies.jsonl') if r['length'] == 192}
    return mean(r['other_loss'] - before[d] for d in domains(runs) for r in runs[method, d])


def of_full(of, method, k):
    "Mean of a field relative to full fine-tuning's"
    return mean(r[k] for r in of[method])/mean(r[k] for r in of['full'])


def methods():
    "Four methods at equal time"
    runs = at_equal_time()
    of = {m: [r for d in domains(runs) for r in runs[m, d]] for m in METHODS}
    heads = ' | '.join(f'loss, {d}' for d in domains(runs))
    out = [f"| | state | step | {heads} | forgets |", '|---'*(4+len(domains(runs))) + '|']
    for m, name in METHODS.items():
        state, steps = (of_full(of, m, k) for k in ('state_bytes_peak', 'steps'))
        losses = ' | '.join(loss(runs, m, d) for d in domains(runs))
        out.append(f'| {name} | {num(state, 2)} | {num(1/steps, 2)} | {losses} | {forgetting(runs, m):+.3f} |')
    return Markdown('\n'.join(out))


def points():
    "What you get, a number each"
    demo, live = lines('demo.jsonl')[-1], lines('live.jsonl')[-1]
    state, budget = demo['state_bytes_peak']/demo['state_bytes_full'], percent(demo['trainable_share_peak'])
    delta, model = (f'{b/1e6:,.0f} MB' for b in (demo['delta_bytes'], 4*demo['n_total']))
    runs = at_equal_time()
    gap = mean(a['task_loss'] - b['task_loss'] for d in domains(runs)
               for a in runs['alf', d] for b in runs['lot-top80', d] if a['seed'] == b['seed'])
    return Markdown('\n'.join([
        f"- **Watch and change what learns, while it trains.** A move of the threshold is answered in "
        f"{live['p50_ms']:.0f} ms.",
        f"- **A quarter of the training state.** {budget} of the parameters train, with {state:.2f} of the bytes that "
        f"gradients and AdamW take for all. The budget holds at every step.",
        f"- **A small exact result.** A delta of {delta} instead of a model of {model}; killed and resumed equals "
        f"uninterrupted, bit for bit.",
        f"- **Honest answers.** `alf compare` asks *your* data whether choosing helps. Here a measured choice is "
        f"{gap:+.3f} in loss from as many units drawn by lot in the same strata.",
    ]))
