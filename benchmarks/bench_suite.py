"""Tasks with accuracy: methods with rates chosen on dev rows, the test rows seen once.

    python benchmarks/bench_suite.py --tasks ARC-Easy MAWPS SVAMP 'Python reference' [--methods full lora …]
    [--seeds 0 1 2 3] [--steps 100] [--out FILE]
    python benchmarks/bench_suite.py --tasks TREC CoLA SST-2 MRPC --folder DATA [--rows 1000] [--epochs 3]

What a task is stands in suite.py; DATA holds those that may not be shipped. Two rates of a method are tried with
seed 0 and a third beyond the better one; the best on dev rows is run with the other seeds. Rows are appended to
results/suite.jsonl; what it holds is not run again.
"""
import argparse
from pathlib import Path

from peft import ShiraConfig, get_peft_model
from transformers.utils import logging as hf_logging

from alf_nb.core.rates import rates_around
from alf_nb.study.compare import compare_policies
from alf_nb.study.methods import METHODS, Method, adapted, alf_method
from suite import DECODER, FILES, decoder_task, encoder_task

SCALES = .25, .5, .75       # parts of a decoder's change
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


def main():
    ap = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    ap.add_argument('--tasks', nargs='+', choices=[*FILES, *DECODER], required=True)
    ap.add_argument('--folder', type=Path, help='of the tasks that may not be shipped')
    ap.add_argument('--methods', nargs='+', choices=WAYS, default=list(WAYS))
    ap.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2, 3])
    ap.add_argument('--rows', type=int, default=1000, help='that an encoder trains on')
    ap.add_argument('--epochs', type=int, default=3, help='of an encoder')
    ap.add_argument('--steps', type=int, default=100, help='of a decoder')
    ap.add_argument('--out', type=Path, default=RESULTS)
    a = ap.parse_args()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    for name in a.tasks:
        encodes = name in FILES
        task = encoder_task(name, a.folder, a.rows) if encodes else decoder_task(name, scales=SCALES)
        rates = ENCODER_RATES if encodes else DECODER_RATES
        rule = dict(rule='epochs', amount=a.epochs) if encodes else dict(rule='steps', amount=a.steps)
        found = compare_policies(task, methods=[WAYS[m] for m in a.methods], seeds=a.seeds, extend=1, points=0,
                                 lrs={m: rates[m] for m in a.methods}, out=a.out, **rule)
        print('\n'.join(found.verdict), flush=True)


if __name__ == '__main__': main()
