"""Does LoRA learn more per step, for how long, and why?

    python benchmarks/bench_curves.py [--out FOLDER] [--seconds N] [--claims FOLDER] [--list]

SmolLM2-135M learns GSM8K or the Python reference, 2 × 192 tokens a step. *lengths*: held-out loss after 60, 120, 240
and 480 steps, each a run of its own, since the rate's schedule depends on the length; a quarter by lot in strata (the
preset `short`), ALF's default, LoRA and full, at their committed best rates and at the neighbours of these. *why*: at
120 steps, what could explain the difference, one change at a time. `bench_columns.py`'s runs are on the list, too: what
is worth most comes first, and what is not reached is left out.
"""
import argparse

import bench_columns
from equal_steps import Run, add_options, main
from prepared import ATTENTION, MLP

LENGTHS = 60, 120, 240, 480
BOTH = 'python', 'gsm8k'
HOW = {'random': dict(), 'lora': dict(what='lora'), 'full': dict(what='full'), 'alf': dict(what='alf')}
BEST = {'random': 4e-4, 'lora': 2e-3, 'full': 1e-4, 'alf': 4e-4}      # of results/policies.jsonl, at 60 steps
NEAR = {'random': (2e-4, 8e-4), 'lora': (1e-3, 4e-3), 'full': (5e-5, 2e-4)}


def twice(roles): return dict.fromkeys(roles, 2.)


# what it does, and learning rates; each is the stratified random quarter but for what is said
WHY = {
    'beta2-95': (dict(betas=(.9, .95)), (4e-4,)),
    'beta2-99': (dict(betas=(.9, .99)), (4e-4,)),
    'tiny-4': (dict(tiny=4, tiny_lr=5.), (4e-4,)),              # BREAD: adapters of rank 4 on the rest, rate 2e-3
    'project-64': (dict(project=64), (4e-4,)),                  # gradients on 64 directions
    'galore-64': (dict(project=64, space=True), (4e-4, 8e-4)),  # Adam and movement in 64 directions, equal size
    'galore-16': (dict(project=16, space=True), (4e-4, 8e-4)),
    'warm-up-1': (dict(warm_up=1), (4e-4,)),
    'warm-up-12': (dict(warm_up=12), (4e-4,)),
    'warm-up-24': (dict(warm_up=24), (4e-4,)),
    'attention-2x': (dict(factors=twice(ATTENTION)), (4e-4,)),
    'mlp-2x': (dict(factors=twice(MLP)), (4e-4,)),
    'writers-2x': (dict(factors=twice(('o_proj', 'down_proj'))), (4e-4,)),
    'lora-of-quarter': (dict(what='lora', of='strata'), (2e-3, 4e-3)),  # LoRA on the matrices of the quarter
    'linear': (dict(of='all'), (1e-4, 2e-4)),              # all matrices at full rank
    'linear-galore-16': (dict(of='all', project=16, space=True), (1e-4, 2e-4)),
    'lora-64': (dict(what='lora', rank=64), (1e-3, 2e-3)),
    'tiny-1': (dict(tiny=1, tiny_lr=5.), (4e-4,)),
    'no-clip': (dict(clip=0.), (4e-4,)),
    'beta1-95': (dict(betas=(.95, .999)), (4e-4,)),
    'all-depth': (dict(freeze_bottom=0.), (4e-4,)),
}


def lengths(ways, steps, seeds, rates=None):
    return [Run('lengths', w, data, lr, seed, n, how=HOW[w]) for n in steps for seed in seeds for data in BOTH
            for w in ways for lr in (rates[w] if rates else (BEST[w],))]


def why(seeds, names=WHY):
    "Every change; and the methods themselves with a batch of eight rows, where gradients are less noisy"
    runs = [Run('why', w, data, lr, seed, how=WHY[w][0]) for seed in seeds for w in names for lr in WHY[w][1]
            for data in BOTH]
    return runs + [Run('why', f'{w}-batch-8', data, BEST[w], seed, batch=8, how=HOW[w]) for seed in seeds
                   for w in ('random', 'lora') for data in BOTH]


def plan():
    "All runs, what is worth most first"
    three = 'random', 'lora', 'full'
    return [
        *lengths(three, (60, 120), (0, 1, 2)),
        *bench_columns.runs('gsm8k', (0, 1, 2)),
        *lengths(three, (240, 480), (0,)),
        *why((0,)),
        *lengths(three, (60, 120, 240, 480), (0,), NEAR),
        *lengths(('alf',), (60, 120, 240), (0,)),
        *lengths(three, (240, 480), (1, 2)),
        *why((1,)),
        *bench_columns.runs('python', (0, 1, 2)),
        *lengths(('alf',), (60, 120, 240), (1, 2)),
        *why((2,)),
        *lengths(('alf',), (480,), (0, 1, 2)),
        *bench_columns.plan(),
        *lengths(three, (60, 120), (3, 4)),
        *why((3, 4)),
    ]


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    main(plan(), add_options(parser))
