"""Tasks with accuracy: methods with rates chosen on dev rows, the test rows seen once.

    python benchmarks/bench_suite.py --tasks MAWPS SVAMP GSM8K 'Python reference' [--methods full lora …]
    [--seeds 0 1 2 3] [--steps 40] [--workers N] [--out FILE]
    python benchmarks/bench_suite.py --tasks TREC CoLA SST-2 MRPC --folder DATA [--rows 1000] [--epochs 3]

What a task is stands in suite.py; DATA holds those that may not be shipped. Two rates of a method are tried with
seed 0, and up to three beyond them, until the best on dev rows has a lower and a higher beside it; the best is run with
the other seeds. Rows are appended to results/suite.jsonl; what it holds is not run again. --workers N runs as many
methods at a time, each in a process of its own: for a GPU, which one small model does not fill. Times of such runs say
nothing.
"""
import argparse
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.setdefault('PYTORCH_NVML_BASED_CUDA_CHECK', '1')     # a process that has spoken to a GPU cannot be forked
import torch
from peft import ShiraConfig, get_peft_model
from transformers.utils import logging as hf_logging

from alf_nb.core.rates import rates_around
from alf_nb.study.compare import compare_policies
from alf_nb.study.methods import METHODS, Method, adapted, alf_method
from suite import DECODER, FILES, decoder_task, encoder_task

RESULTS = Path(__file__).parent/'results'/'suite.jsonl'


def shira(model, task):
    "PEFT's SHiRA: as many single weights of every matrix as LoRA of rank 16 has parameters, drawn by lot"
    return get_peft_model(model, ShiraConfig(r=16, **adapted(model, task.pin)))


WAYS = {m.name: m for m in (
    *(METHODS[n] for n in ('full', 'lora', 'random-stratified', 'alf', 'freeze-50', 'lisa')),
    alf_method('alf-10', "ALF's default, a tenth of the parameters", budget=.1),
    Method('shira', 'SHiRA: single weights drawn by lot, as many as LoRA has parameters, PEFT'
           ' (https://arxiv.org/abs/2406.13175)', rates_around(.1), prepare=shira),
)}
# two each, for encoders: around the best of the chapters task (results/policies.jsonl)
ENCODER_RATES = {
    'full': (2e-4, 4e-4), 'lora': (1e-3, 2e-3), 'random-stratified': (4e-4, 8e-4), 'alf': (4e-4, 8e-4),
    'freeze-50': (2e-4, 4e-4), 'lisa': (4e-4, 8e-4), 'alf-10': (8e-4, 1.6e-3), 'shira': (1e-3, 2e-3),
}
DECODER_RATES = ENCODER_RATES | {'full': (1e-4, 2e-4)}
EXTEND = 3      # times a method may go beyond its rates while the best stands at an edge


def ready(name, a):
    "A task of suite.py"
    bf16 = True if torch.cuda.is_available() else None      # to ask a GPU for it would be to speak to it
    if name in FILES: return encoder_task(name, a.folder, a.rows, bf16)
    return decoder_task(name, a.n_dev, a.n_test, a.n_texts, a.n_questions, tuple(a.scales), bf16)


def rule_of(task, a):
    "How long it is trained on"
    return ('epochs', a.epochs) if task.data in FILES else ('steps', a.steps)


def compared(task, methods, a, out, rates=None):
    "Run methods on a task; `rates`: their learning rates, where they are known"
    first = ENCODER_RATES if task.data in FILES else DECODER_RATES
    (rule, amount), tried = rule_of(task, a), rates or {m: first[m] for m in methods}
    return compare_policies(task, methods=[WAYS[m] for m in methods], seeds=a.seeds, extend=0 if rates else EXTEND,
                            points=0, lrs=tried, out=out, progress=False, rule=rule, amount=amount)


def lines_of(path): return path.read_bytes().splitlines(keepends=True) if path.exists() else []


def in_parts(tasks, a):
    "Several at a time, each with a file of its own that begins with what is known; what is new is added as they end"
    torch.set_num_threads(1)
    known = lines_of(a.out)
    jobs = [(t, m) for m in a.methods for t in tasks]
    parts = [a.out.with_name(f"{a.out.stem}.{t.data.replace(' ', '-')}.{m}.jsonl") for t, m in jobs]
    for part in parts:
        if not part.exists(): part.write_bytes(b''.join(known))
    with ProcessPoolExecutor(a.workers, multiprocessing.get_context('fork')) as pool:
        running = [pool.submit(compared, t, [m], a, p) for (t, m), p in zip(jobs, parts)]
        for job, part, one in zip(jobs, parts, running):
            print(job[0].data, *one.result().verdict, flush=True)
            with a.out.open('ab') as f: f.writelines(l for l in lines_of(part) if l not in known)
            part.unlink()


def options(about):
    "A parser of what the runs of `results/suite.jsonl` can be told; by default they are as there"
    ap = argparse.ArgumentParser(description=about)
    ap.add_argument('--tasks', nargs='+', choices=[*FILES, *DECODER], default=list(DECODER))
    ap.add_argument('--folder', type=Path, help='of the tasks that may not be shipped')
    ap.add_argument('--methods', nargs='+', choices=WAYS, default=list(WAYS))
    ap.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2, 3])
    ap.add_argument('--rows', type=int, default=1000, help='that an encoder trains on')
    ap.add_argument('--epochs', type=int, default=3, help='of an encoder')
    ap.add_argument('--steps', type=int, default=40, help='of a decoder')
    ap.add_argument('--n-dev', type=int, default=60, help='rows that rates of a decoder are chosen on, at most')
    ap.add_argument('--n-test', type=int, default=120, help='rows that a decoder is tested on, at most')
    ap.add_argument('--n-texts', type=int, default=6, help='blocks of C4 and of WikiText-2')
    ap.add_argument('--n-questions', type=int, default=0, help='of PIQA; 0: none')
    ap.add_argument('--scales', nargs='*', type=float, default=[],
                    help="parts of a decoder's change at which all is measured too")
    ap.add_argument('--workers', type=int, default=1)
    ap.add_argument('--out', type=Path, default=RESULTS)
    return ap


def main():
    a = options(__doc__.split('\n')[0]).parse_args()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    tasks = (ready(name, a) for name in a.tasks)
    if a.workers > 1: return in_parts(list(tasks), a)
    for task in tasks: print('\n'.join(compared(task, a.methods, a, a.out).verdict), flush=True)


if __name__ == '__main__': main()
