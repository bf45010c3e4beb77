"""What the README quotes, from the committed results: `methods()` is its table, `verdict()` the sentence below it,
`points()` its four bullets."""
import functools, json, sys
from pathlib import Path

from IPython.display import Markdown

from alf_nb.core.format import num, percent
from alf_nb.core.stats import t_interval
from alf_nb.report.results import read_results

sys.path.insert(0, str(Path(__file__).resolve().parent))
import suite_table      # noqa: E402

RESULTS = Path(__file__).resolve().parent/'results'
METHODS = {     # in suite.jsonl → its name, and what it is called in turns.jsonl
    'full': ('full fine-tuning', 'full'),
    'lora': ('LoRA (PEFT)', 'lora'),
    'alf': ('**alf**, the default', 'alf'),
    'random-stratified': ("as many, drawn by lot (`preset='short'`)", 'lot-top80'),
}
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
    found = {m: {} for _, m in METHODS.values()}
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
    "Four methods: what each takes beside full fine-tuning, and what it reaches on the tasks of suite.py"
    suites, time = suite_table.tasks(), runs()
    scored, problems = suite_table.encoders(), suite_table.decoders()
    heads = ['state', 'step', f'encoder, {len(scored)} tasks', 'decoder, learnt', 'forgot']
    lines = [f"| | {' | '.join(heads)} |", '|---'*(len(heads)+1) + '|']
    for method, (name, in_turns) in METHODS.items():
        of = {data: suite_table.runs_of(c, method) for data, c in suites.items()}
        row, full = (next(iter(time[m].values())) for m in (in_turns, 'full'))
        cells = [num(row['state_bytes_peak']/full['state_bytes_peak'], 2), num(full['steps']/row['steps'], 2)]
        cells.append(f'{mean([mean(list(map(suite_table.points, of[data]))) for data in scored]):.1f}')
        for figure in (suite_table.gained, suite_table.forgot):
            cells.append(f'{100*mean([mean(list(map(figure, of[data]))) for data in problems]):.1f}')
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return Markdown('\n'.join(lines))


def less(other):
    "Loss of the default less that of another method at equal time, in words"
    of = runs()
    gaps = [r['task_loss'] - of[other][k]['task_loss'] for k, r in of['alf'].items()]
    at, low, high = t_interval(gaps)
    return f'{at:+.3f} ({low:+.3f} to {high:+.3f}, {len(gaps)} pairs)'


def verdict():
    "What the tables say, in words"
    time = f"At equal time, on two texts, in loss: {less('lora')} less LoRA, {less('lot-top80')} less the lot."
    return Markdown(f'{suite_table.in_short()} {time}')


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
        "- **Honest answers.** `alf compare` asks *your* data whether choosing helps, and whether a lot would have done"
        " as well.",
    ]))
