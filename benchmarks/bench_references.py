"""How well change rates are known without full reference weights: beside a snapshot of the same windows of the same
run.

    python benchmarks/bench_references.py [--steps 60] [--every 10] [--append]

Fine-tunes the default model; at the end of every window the rate of each unit that trains is taken three ways: from
fp32 references (the truth), from the optimizer's last update
(`references='none'`), and from 8-bit references with their known rounding error taken out (`references='8bit'`).
Prints, and with --append adds to results/references.jsonl, one row per way.
"""
import argparse
import json
import statistics
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from alf_nb.kernels.plan import delta_norms, quantize_reference
from alf_nb.model.updates import last_update
from alf_nb.model.states import unwrap_optimizer
from alf_nb.sources.models import load_model
from alf_nb.sources.losses import supports_bf16
from alf_nb.sources.blocks import token_blocks
from alf_nb.sources.texts import load_texts
from alf_nb.train.trainer import ALFCallback
from alf_nb.core.system import versions

RESULTS = Path(__file__).parent/'results'/'references.jsonl'


def ranks(x): return np.argsort(np.argsort(x))


class Compare(TrainerCallback):
    "Truth and estimates of each window, in memory of its own"
    def __init__(self, alf, every): self.alf, self.every, self.rows, self.ref, self.sum_lr = alf, every, [], None, {}

    def params(self): return {n: self.alf.run.layers.params(n) for n in self.alf.selection.names}

    def on_step_begin(self, args, state, control, **kw):
        if state.global_step % self.every == 0:
            self.ref = {n: [p.detach().clone() for p in ps] for n, ps in self.params().items()}
            self.low = {n: [quantize_reference(p.detach()) for p in ps] for n, ps in self.params().items()}
            self.sum_lr = dict.fromkeys(self.ref, 0.)

    def on_optimizer_step(self, args, state, control, optimizer=None, **kw):
        opt = unwrap_optimizer(optimizer)
        lr = opt.param_groups[0]['lr']
        for n in self.sum_lr: self.sum_lr[n] += lr
        if (state.global_step + 1) % self.every: return
        now = {n: [p.detach() for p in ps] for n, ps in self.params().items() if n in self.ref}
        ref = {n: self.ref[n] for n in now}
        true, low = delta_norms(now, ref).relative, delta_norms(now, {n: self.low[n] for n in now})
        low = {n: (d, e) for n, d, e in zip(low.names, low.delta, low.error)}
        for n in now:
            w2 = sum(float(p.float().square().sum()) for p in self.ref[n])
            u2 = sum(float(last_update(opt, p).square().sum()) for p in self.params()[n])
            s = self.sum_lr[n]
            self.rows.append(
                dict(
                    step=state.global_step + 1,
                    unit=n,
                    snapshot=true[n] / s,
                    none=(u2 / w2) ** 0.5,
                    bits8=low[n][0] / w2**0.5 / s,
                    bits8_uncorrected=(low[n][0] ** 2 + low[n][1] ** 2) ** 0.5 / w2**0.5 / s,
                )
            )


def main():
    ap = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    ap.add_argument('--steps', type=int, default=60)
    ap.add_argument('--every', type=int, default=10)
    ap.add_argument('--lr', type=float, default=4e-4)
    ap.add_argument('--append', action='store_true')
    a = ap.parse_args()
    torch.manual_seed(0)
    model, tok = load_model(progress=False)
    data = token_blocks(load_texts(None), tok, 256)
    alf = ALFCallback(budget=.25, measure_every=a.every, interval=0)
    watch = Compare(alf, a.every)
    args = TrainingArguments(
        output_dir='runs/references',
        max_steps=a.steps,
        per_device_train_batch_size=3,
        learning_rate=a.lr,
        lr_scheduler_type='cosine',
        warmup_steps=3,
        weight_decay=0.0,
        logging_steps=10,
        save_strategy='no',
        bf16=supports_bf16(torch.device('cpu')),
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        seed=0,
    )
    Trainer(model, args, train_dataset=data, data_collator=default_data_collator, callbacks=[alf, watch]).train()
    for way in ('none', 'bits8', 'bits8_uncorrected'):
        corr, ratio, within = [], [], []
        for step in sorted({r['step'] for r in watch.rows}):
            rows = [r for r in watch.rows if r['step'] == step]
            t, e = (np.array([r[k] for r in rows]) for k in ('snapshot', way))
            corr.append(float(np.corrcoef(ranks(t), ranks(e))[0, 1]))
            ratio += list(e/t)
            within.append(float(np.mean(np.abs(e/t/np.median(e/t) - 1) < .05)))
        row = dict(
            way=way,
            steps=a.steps,
            window=a.every,
            lr=a.lr,
            units=len({r['unit'] for r in watch.rows}),
            rank_correlation_median=statistics.median(corr),
            rank_correlation_min=min(corr),
            ratio_median=float(np.median(ratio)),
            ratio_p10=float(np.quantile(ratio, 0.1)),
            ratio_p90=float(np.quantile(ratio, 0.9)),
            within_5_percent_of_median_ratio=statistics.median(within),
            model='SmolLM2-135M-Instruct',
            device=f"{'cuda' if torch.cuda.is_available() else 'cpu'}, {torch.get_num_threads()} threads",
            seed=0,
            date=str(date.today()),
            versions=versions(),
            t=round(time.time()),
        )
        print(json.dumps(row))
        if a.append:
            with open(RESULTS, 'a', encoding='utf-8') as f: f.write(json.dumps(row) + '\n')


if __name__ == '__main__': main()
