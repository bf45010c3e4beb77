"""What a training step costs over model size, sequence length and budget: everything, ALF and LoRA in turns.

    python benchmarks/bench_efficiency.py [--limit 340] [--repeats 6] [--threads N] [--device cuda] [--only size length
    budget peak]
    python benchmarks/bench_efficiency.py --quick

Models of the Llama family with random weights; ALF trains what its default policy selects from a gradient probe of the
same data (sequences that count round a ring). Methods take turns, step by step, in
changing order, so that all of them see the same machine; times are medians. `peak` runs every method in a process of
its own for the memory that the system sees. Appends one row per method and case to
results/efficiency.jsonl; `--quick` runs the smallest cases and appends nothing. A case that would not end within
--limit seconds, or not fit the memory, is left out and named.
"""
import argparse
import copy
import json
import os
import subprocess
import sys
import time
import warnings
from datetime import date
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging

from alf_nb.study.runs import device_name
from alf_nb.demo import demo_dataset
from alf_nb.study.step_costs import StepMeter
from alf_nb.study.estimate import ModelShape, extrapolate
from alf_nb.model.layers import partition_layers
from alf_nb.core.policies import BudgetPolicy
from alf_nb.signals.probe import model_loss, probe_gradients
from alf_nb.sources.losses import supports_bf16
from alf_nb.core.system import peak_rss_bytes, versions

RESULTS = Path(__file__).parent/'results'/'efficiency.jsonl'
VOCAB, RANK, BUDGET, LENGTH = 16384, 16, .25, 256
SHAPES = [
    ModelShape('9M', 192, 6, 3, 3, 512, VOCAB),
    ModelShape('23M', 320, 10, 5, 5, 864, VOCAB),
    ModelShape('55M', 512, 12, 8, 8, 1376, VOCAB),
    ModelShape('138M', 768, 16, 12, 12, 2048, VOCAB),
    ModelShape('342M', 1024, 24, 16, 16, 2816, VOCAB),
]
BUDGETS, LENGTHS = (.05, .1, .25, .5, .8), (64, 128, 256, 512, 1024)
METHODS = (('full', None), ('alf', BUDGET), ('lora', None))


def build(shape, device, seed=0):
    "A model of this shape with random weights, fp32"
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocab,
        max_position_embeddings=4096,
        tie_word_embeddings=shape.tied,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device)


def batches(n, length, device):
    "`n` batches of one sequence each"
    rows = demo_dataset(n=n, length=length)
    return [{k: torch.tensor([r[k]], device=device) for k in ('input_ids', 'labels')} for r in rows]


def meter(model, method, budget, length, bf16):
    "A meter of one method, warmed up, with the numbers of the units that ALF chose"
    device = next(model.parameters()).device
    data, names, picked = batches(2, length, device), None, None
    if method == 'lora':
        model = get_peft_model(
            model,
            LoraConfig(
                r=RANK, lora_alpha=2 * RANK, target_modules='all-linear', lora_dropout=0.0, task_type='CAUSAL_LM'
            ),
        )
    if method == 'alf':
        layers = partition_layers(model)
        def loss(m, b):
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16): return model_loss(m, b)
        names = BudgetPolicy(budget).select(probe_gradients(layers, data, loss=loss).gain, layers.units).names
        picked = [i for i, n in enumerate(layers) if n in set(names)]
    m = StepMeter(model, data[0], names, bf16=bf16)
    if names is not None: m.select()
    m.step()
    m.forget()
    return m, picked


def available_bytes(device):
    "Free memory; infinity where it is not told"
    if device == 'cuda': return torch.cuda.mem_get_info()[0]
    try: return int(next(l for l in open('/proc/meminfo') if l.startswith('MemAvailable')).split()[1])*1024
    except (OSError, StopIteration): return float('inf')


def peak_of(shape, method, budget, length, bf16, device, threads):
    "Process peak of two steps in a new process, and what that process held before there was a model"
    args = [
        sys.executable,
        __file__,
        '--child',
        json.dumps(
            dict(
                shape=shape.to_dict(),
                method=method,
                budget=budget,
                length=length,
                bf16=bf16,
                device=device,
                threads=threads,
            )
        ),
    ]
    out = subprocess.run(args, capture_output=True, text=True)
    if out.returncode: raise RuntimeError(f"{method} on {shape.name} failed in its own process:\n{out.stderr[-2000:]}")
    return json.loads(out.stdout.splitlines()[-1])


def peak_now(device):
    "Peak memory so far"
    return torch.cuda.max_memory_allocated() if device == 'cuda' else peak_rss_bytes()


def child(a):
    "What `peak_of` runs: the first probe or step, and one more"
    torch.set_num_threads(a['threads'])
    before = peak_now(a['device'])
    m, _ = meter(build(ModelShape.from_dict(a['shape']), a['device']), a['method'], a['budget'], a['length'], a['bf16'])
    m.step(measure=a['method'] == 'alf')
    print(json.dumps(dict(peak_bytes=peak_now(a['device']), before_bytes=before)))


SWEEPS = ('size', 'length', 'budget', 'peak')


def options():
    ap = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    ap.add_argument('--limit', type=float, default=340, help="seconds that the whole run may take")
    ap.add_argument('--repeats', type=int, default=6)
    ap.add_argument('--threads', type=int, default=torch.get_num_threads())
    ap.add_argument('--device', default='cpu', choices=('cpu', 'cuda'))
    ap.add_argument('--only', nargs='+', default=SWEEPS, choices=SWEEPS)
    ap.add_argument('--quick', action='store_true', help="smallest cases, nothing appended")
    ap.add_argument('--child', help=argparse.SUPPRESS)
    return ap.parse_args()


def cases(quick):
    "(sweep, shape, length, methods with their budgets)"
    shapes, lengths, budgets = (SHAPES[:2], LENGTHS[:2], BUDGETS[1:3]) if quick else (SHAPES, LENGTHS, BUDGETS)
    middle = shapes[0 if quick else 2]
    yield from (('size', s, LENGTH, METHODS) for s in shapes)
    yield from (('length', middle, l, METHODS) for l in lengths)
    yield 'budget', middle, LENGTH, (('full', None), *(('alf', b) for b in budgets), ('lora', None))
    # a process for each method: quickly, one
    shapes, methods = (shapes[:1], METHODS[1:2]) if quick else (shapes, METHODS)
    yield from (('peak', s, LENGTH, methods) for s in shapes)


def work_of(computed, rounds):
    "FLOPs that a case will take"
    steps = sum(rounds*(e.forward_flops + e.backward_flops) for e in computed)
    return steps + sum((2 + rounds)*computed[0].flops for e in computed if e.method == 'alf')


def need_of(computed, sweep):
    "Bytes that a case will take: one process after the other, or all models side by side"
    if sweep == 'peak': return max(e.total_bytes for e in computed)
    return sum(e.weight_bytes + e.state_bytes for e in computed) + max(e.activation_bytes + e.cast_bytes
                                                                       for e in computed)


def measure_side_by_side(shape, methods, length, bf16, device, repeats):
    "Rows of one case, methods taking turns"
    base = build(shape, device)
    meters = [meter(copy.deepcopy(base), m, b or BUDGET, length, bf16) for m, b in methods]
    del base
    for r in range(repeats):
        for i in range(len(meters)):
            m = meters[(i+r) % len(meters)][0]
            if m.alf and r % 2 == 0: m.probe()
            if m.alf and r % 3 == 1: m.select()
            m.step(measure=m.alf is not None)
    costs = [m.costs().to_dict() | dict(peak_bytes=None) for m, _ in meters]
    return [dict(method=n, budget=b, units=u, costs=c) for (n, b), (_, u), c in zip(methods, meters, costs)]


def measure_peaks(shape, methods, length, bf16, device, threads):
    "Rows of one case, each method in a process of its own"
    peak = lambda m, b: peak_of(shape, m, b or BUDGET, length, bf16, device, threads)
    return [dict(method=m, budget=b, **peak(m, b)) for m, b in methods]


def show(row, full):
    "A line for a row; `full`: costs of training everything"
    head = f"{row['sweep']:7}{row['shape']['name']:5}{row['length']:5} {row['method']:5}{row['budget'] or '':5}"
    if row['sweep'] == 'peak':
        peak, before = row['peak_bytes']/2**30, row['before_bytes']/2**30
        return print(f"{head} process peak {peak:6.2f} GB, {before:.2f} before the model", flush=True)
    c = row['costs']
    step = lambda c: sum(c[k] for k in ('forward_s', 'backward_s', 'optimizer_s'))
    print(f"{head} forward {c['forward_s']*1e3:7.1f} backward {c['backward_s']*1e3:7.1f} optimizer"
          f" {c['optimizer_s']*1e3:7.1f} ms, {step(c)/step(full):.2f} of full", flush=True)


def settings(a, bf16, weights):
    "What all rows share"
    return dict(rank=RANK, bf16=bf16, weights=weights, batch_size=1, repeats=a.repeats, quick=a.quick, seed=0,
                date=str(date.today()), versions=versions(), device=device_name(a.device), cores=os.cpu_count())


def no_room(case, a, work, need, pace, t0):
    "Why a case is left out; None: it is measured"
    sweep, _, _, methods = case
    # a process needs seconds to start
    left, takes = a.limit - (time.perf_counter()-t0), work/pace + (8*len(methods) if sweep == 'peak' else 0)
    if not a.quick and takes > left: return f"about {takes:.0f} s with {left:.0f} s left"
    return f"needs {need*1.2/2**30:.1f} GB" if need*1.2 > available_bytes(a.device) else None


def main():
    a = options()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter('ignore', FutureWarning)
    if a.child: return child(json.loads(a.child))
    torch.set_num_threads(a.threads)
    t0, bf16 = time.perf_counter(), supports_bf16(a.device)
    weights = 'mixed' if bf16 else 'fp32'
    same, pace = settings(a, bf16, weights), 2e10          # FLOPs per second so far: a guess before the first case
    for case in cases(a.quick):
        sweep, shape, length, methods = case
        if sweep not in a.only: continue
        computed = [extrapolate(shape, m, b or BUDGET, length=length, weights=weights, rank=RANK) for m, b in methods]
        work = work_of(computed, 2 if sweep == 'peak' else 1 + a.repeats)
        if why := no_room(case, a, work, need_of(computed, sweep), pace, t0):
            print(f"left out: {sweep} {shape.name} length {length}, {why}")
            continue
        t1 = time.perf_counter()
        if sweep == 'peak': rows = measure_peaks(shape, methods, length, bf16, a.device, a.threads)
        else:
            rows = measure_side_by_side(shape, methods, length, bf16, a.device, a.repeats)
            if (took := time.perf_counter()-t1) > 2: pace = work/took
        where = dict(sweep=sweep, shape=shape.to_dict(), length=length)
        rows = [where | r | same | dict(t=round(time.time())) for r in rows]
        for r in rows: show(r, rows[0].get('costs'))
        if not a.quick:
            with open(RESULTS, 'a', encoding='utf-8') as out:
                out.writelines(json.dumps(r, separators=(',', ':')) + '\n' for r in rows)
    print(f"{time.perf_counter()-t0:.0f} s, {'nothing appended' if a.quick else f'rows appended to {RESULTS.name}'}")


if __name__ == '__main__': main()
