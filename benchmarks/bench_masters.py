"""What 16-bit weights cost, and what fp32 for what trains gives back.

    python benchmarks/bench_masters.py [--seeds 0 1 2] [--steps 40] [--lr 5e-5 2e-4]
        [--ways fp32 masters bf16] [--append]

SmolLM2-135M learns GSM8K under bf16 autocast, a random quarter of its matrices (in strata) trains. Three ways to hold
weights: all in fp32; in bf16 with fp32 for what trains (`masters=True`); all in bf16 (`masters=False`). They take
turns. A row: the loss on held-out text as it was trained, and as it is kept in the model's own dtype; the largest
number of bytes that weights took.

A CPU that multiplies bf16 in software takes 99 s instead of 5 s for a step. There products are emulated: bf16 factors,
multiplied and added in fp32, the result rounded to bf16, which is what hardware does.
"""
import argparse
import copy
import json
import time
import warnings
from datetime import datetime, timezone
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from alf_nb.core.system import versions
from alf_nb.sources.blocks import holdout_split, token_blocks
from alf_nb.sources.losses import evaluate_loss, supports_bf16
from alf_nb.sources.models import load_model
from alf_nb.sources.texts import unrelated_texts
from alf_nb.study.runs import device_name
from alf_nb.train.trainer import ALFCallback

RESULTS = Path(__file__).parent/'results'/'masters.jsonl'
WAYS = {'fp32': (torch.float32, True), 'masters': (torch.bfloat16, True), 'bf16': (torch.bfloat16, False)}
QUARTER = dict(policy=dict(policy='static', where='random', budget=.25, strata=3), interval=0, references='none')


def emulated(real):
    "`real`, a function of tensors, on bf16 values in fp32"
    narrow = lambda v: v.bfloat16().float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v

    def product(*args, **kw):
        with torch.autocast('cpu', enabled=False):
            return real(*map(narrow, args), **{k: narrow(v) for k, v in kw.items()}).bfloat16()

    return product


class Weights(TrainerCallback):
    "The largest number of bytes that the weights take, and the loss before what trains is rounded"
    peak = 0

    def __init__(self, held): self.held = held

    def on_step_end(self, args, state, control, model=None, **kw):
        self.peak = max(self.peak, sum(p.nbytes for p in model.parameters()))
        if state.global_step < state.max_steps: return
        self.loss, _ = evaluate_loss(model, self.held)


def run(base, rows, held, way, lr, seed, a):
    "One training; its row"
    torch.manual_seed(seed)
    dtype, masters = WAYS[way]
    model = copy.deepcopy(base).to(dtype)
    weights = Weights(held)
    args = TrainingArguments(
        'runs/masters',
        max_steps=a.steps,
        per_device_train_batch_size=2,
        learning_rate=lr,
        lr_scheduler_type='cosine',
        warmup_steps=3,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        save_strategy='no',
        report_to=[],
        disable_tqdm=True,
        seed=seed,
    )
    alf = ALFCallback(**QUARTER, masters=masters, seed=seed)
    t0 = time.perf_counter()
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'masters=False')
        Trainer(model, args, train_dataset=rows, data_collator=default_data_collator, callbacks=[alf, weights]).train()
    wall_s = time.perf_counter() - t0
    kept, _ = evaluate_loss(model, held)
    return dict(
        way=way, lr=lr, seed=seed, steps=a.steps, batch_size=2, length=192, loss=weights.loss, loss_kept=kept,
        weight_bytes=weights.peak, wall_s=wall_s, model='SmolLM2-135M-Instruct', data='180 problems of GSM8K',
        emulated=not supports_bf16(), device=device_name(), versions=versions(),
        date=datetime.now(timezone.utc).isoformat(timespec='seconds'),
    )


def main():
    ap = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    ap.add_argument('--seeds', type=int, default=[0, 1, 2], nargs='+')
    ap.add_argument('--steps', type=int, default=40)
    ap.add_argument('--lr', type=float, nargs='+', default=[5e-5, 2e-4])
    ap.add_argument('--ways', nargs='+', choices=WAYS, default=list(WAYS))
    ap.add_argument('--append', action='store_true')
    a = ap.parse_args()
    base, tok = load_model(dtype=torch.bfloat16, progress=False)     # all ways begin with the same numbers
    base.to('cuda' if torch.cuda.is_available() else 'cpu')
    learnt, held = holdout_split(unrelated_texts())
    rows, held = (token_blocks(t, tok, 192) for t in (learnt, held))
    held = held.select(range(min(24, len(held))))
    if not supports_bf16():
        F.linear, F.scaled_dot_product_attention = map(emulated, (F.linear, F.scaled_dot_product_attention))
    print('held-out loss before:', evaluate_loss(base, held)[0], flush=True)
    for seed in a.seeds:
        for lr in a.lr:
            for way in a.ways:
                row = run(base, rows, held, way, lr, seed, a)
                print(json.dumps(row), flush=True)
                if a.append:
                    with open(RESULTS, 'a', encoding='utf-8') as f: f.write(json.dumps(row) + '\n')


if __name__ == '__main__': main()
