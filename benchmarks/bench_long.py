"""A long run: thousands of re-selections with widgets attached, and what grows meanwhile.

    python benchmarks/bench_long.py --steps 5000            # appends a row to benchmarks/results/long.jsonl

A tiny model re-selects after every step. After the first tenth (everything is compiled, every buffer has its size),
resident memory, live tensors and objects, threads, open files and the bytes of the log
are taken at twenty places, and a straight line is laid through them: its slope is what a selection leaves behind."""
import argparse
import datetime
import gc
import json
import os
import statistics
import tempfile
import threading
import time
import warnings
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from alf_nb.study.runs import device_name
from alf_nb.demo import demo_dataset, demo_model
from alf_nb.core.runlog import RunLog
from alf_nb.train.trainer import ALFCallback
from alf_nb.core.system import versions

POLICIES = (
    dict(policy="budget", budget=0.3, explore=0.3),
    dict(policy="rotate", budget=0.3),
    dict(policy="threshold", threshold=0.3),
    dict(policy="topk", k=4),
    dict(policy="lisa", k=1),
    dict(policy="inverted", budget=0.3),
)


def rss_bytes():
    "Resident memory now; None where the system does not tell"
    try: return int(Path("/proc/self/statm").read_text().split()[1])*os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError): return None


def open_files(): return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None


def slope(xs, ys):
    "Of the straight line through the points; None: nothing was measured"
    if len(xs) < 2 or any(y is None for y in ys): return None
    return statistics.linear_regression(xs, ys).slope


class Watch(TrainerCallback):
    "Changes the policy now and then, lets the views look, and takes what there is"
    def __init__(self, alf, path, views, every, begin, period):
        self.alf = alf
        self.path = path
        self.views = views
        self.every = every
        self.begin = begin
        self.period = period
        self.rows = []

    def on_step_end(self, args, state, control, **kw):
        step = state.global_step
        if step % self.period == 0 and step < state.max_steps - self.period:
            self.alf.choose(policy=POLICIES[step//self.period % len(POLICIES)])
        if step % max(10, state.max_steps//100) == 0 and self.views:
            self.views[0].follower.update()
            for v in self.views: v.refresh()
        if step < self.begin or step % self.every: return
        gc.collect()
        objects = gc.get_objects()
        self.rows.append(
            dict(
                step=step,
                rss=rss_bytes(),
                tensors=sum(type(o) in (torch.Tensor, torch.nn.Parameter) for o in objects),
                objects=len(objects),
                threads=threading.active_count(),
                files=open_files(),
                log=self.path.stat().st_size,
                selections=len(RunLog(self.path).events("select")) if step + self.every > state.max_steps else None,
            )
        )
        del objects


def long_run(folder, steps, views=True, seed=0, places=20):
    "(what was measured at `places`, the row of figures)"
    folder = Path(folder)
    torch.manual_seed(seed)
    args = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=10,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        seed=seed,
    )
    alf = ALFCallback(
        policy=POLICIES[0], signal="rate", start="prior", interval=1, select_until=1.0, measure_every=5, seed=seed
    )
    trainer = Trainer(demo_model(blocks=2), args, train_dataset=demo_dataset(length=8), callbacks=[alf])
    trainer.remove_callback(PrinterCallback)
    shown, path = [], folder/"events.jsonl"
    if views:
        from alf_nb.widgets.dashboard import TrainingDashboard
        from alf_nb.widgets.map import SelectionMap
        from alf_nb.widgets.picker import ThresholdPicker
        log = RunLog(folder)
        shown = [TrainingDashboard(log), SelectionMap(log), ThresholdPicker(log)]
    watch = Watch(alf, path, shown, max(steps//places, 1), max(steps//10, 15), max(steps//50, 10))
    trainer.add_callback(watch)
    t = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    wall, rows = time.perf_counter() - t, watch.rows
    n = len(RunLog(folder).events("select"))
    for v in shown: v.close()
    xs = [r["step"] for r in rows]
    per = {
        f"{k}_per_selection": slope(xs, [r[k] for r in rows])
        for k in ("rss", "tensors", "objects", "threads", "files", "log")
    }
    kinds = {}
    for l in path.read_bytes().splitlines():
        k = json.loads(l)["event"]
        a, b = kinds.get(k, (0, 0))
        kinds[k] = a + 1, b + len(l) + 1
    return rows, dict(
        steps=steps,
        selections=n,
        units=len(alf.run.units),
        views=len(shown),
        wall_s=wall,
        begin=rows[0],
        end=rows[-1],
        **per,
        log_bytes_by_event={k: dict(count=a, mean=round(b / a, 1)) for k, (a, b) in sorted(kinds.items())}
    )


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--steps", type=int, default=5000)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--no-views", action="store_true")
    p.add_argument("--out", default=Path(__file__).parent/"results"/"long.jsonl")
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as folder: _, row = long_run(folder, a.steps, not a.no_views, a.seed)
    row = dict(date=datetime.date.today().isoformat(), device=device_name(), versions=versions(), seed=a.seed, **row)
    with open(a.out, "a", encoding="utf-8") as f: f.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=1))


if __name__ == "__main__": main()
