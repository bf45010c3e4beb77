"""A part of the change instead of all of it: what is learnt and what is forgotten along the way from the base model.

    python benchmarks/bench_scales.py [--tasks MAWPS SVAMP] [--methods alf lora full …] [--seeds 0] [--out FILE]

Every method trains once with its best rate of results/suite.jsonl; then a quarter, a half and three quarters of its
change are added to the base model (WiSE-FT, https://arxiv.org/abs/2109.01903), and all is measured there too. Rows are
appended to results/scales.jsonl; what it holds is not run again.
"""
from pathlib import Path

from transformers.utils import logging as hf_logging

from bench_again import run_again
from bench_suite import options, ready

OUT = Path(__file__).parent/'results'/'scales.jsonl'


def main():
    a = options(__doc__.split('\n')[0])
    a.set_defaults(tasks=['MAWPS', 'SVAMP'], seeds=[0], scales=[.25, .5, .75], out=OUT,
                   methods=['full', 'lora', 'alf', 'random-stratified', 'freeze-50', 'lisa'])
    a = a.parse_args()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    for data in a.tasks:
        run_again(ready(data, a), a)
        print(data, 'is done', flush=True)


if __name__ == '__main__': main()
