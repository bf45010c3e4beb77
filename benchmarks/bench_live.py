"""Is it live? From key press to changed read-out in a real browser, and what an open dashboard costs, while SmolLM2
trains on the same cores.

    python benchmarks/bench_live.py [--presses 60] [--rounds 5] [--seconds 12] [--torch-first] [--threads N] [--append]

Starts JupyterLab and Chromium, trains in the background, and alternates between an open dashboard with a picker and a
page without them. Latency: from the page's `keydown` to the mutation of
the read-out that follows, so it holds the way to the kernel, the policy's choice, the way back and the drawing.
Slowdown: median step time with the page open over without, minus 1,
with the interval that a bootstrap over steps gives; opening the page, about a second once, is left out. Bytes: payload
of each widget update as the browser received it. Cores: what browser, server, training and the rest of the kernel took
of a core, with and without the page (Linux). --torch-first loads torch before `alf_nb.all`, which then cannot ask its
threads to wait briefly; --threads trains with so many. Prints, and with --append adds to results/live.jsonl, one row.
"""
import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from datetime import date
from pathlib import Path

import nbformat

sys.path.insert(0, str(Path(__file__).resolve().parents[1]/'tests'/'browser'))
from lab import Notebook, browser, jupyterlab  # noqa: E402

RESULTS = Path(__file__).parent/'results'/'live.jsonl'
FIRST = "from alf_nb.all import *\nimport json, os, threading, time, torch\n"
TORCH_FIRST = "import torch\n" + FIRST
START = """
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator
from alf_nb.sources.losses import supports_bf16
from alf_nb.core.system import versions
phase, ends, names = 'start', [], {}
class Times(TrainerCallback):
    def on_step_end(self, *args, **kw): ends.append((time.perf_counter(), phase))
model, tokenizer = load_model(progress=False)
blocks = token_blocks(load_texts(), tokenizer, 128)
args = TrainingArguments('run', max_steps=20000, per_device_train_batch_size=3, learning_rate=1e-4, logging_steps=1,
                         save_strategy='no', report_to=[], bf16=supports_bf16(), use_cpu=True,
                         dataloader_pin_memory=False)
alf = ALFCallback(budget=.25, interval=0, probe_batches=2)
run = train_in_background(Trainer(model, args, train_dataset=blocks, data_collator=default_data_collator,
                                  callbacks=[alf, Times()]))
while run.step < 5 and run.alive: time.sleep(.1)
views = []
"""
CELLS = [
    START,
    "phase = 'opening'; views = [TrainingDashboard(run)]; views[0]",
    "views.append(ThresholdPicker(run)); views[1]",
    "phase = 'closed'\nfor v in views: v.close()\nnames.update({t.native_id: t.name for t in threading.enumerate()})",
    "phase = 'pressing'",
    "told = dict(ends=ends, threads=torch.get_num_threads(), versions=versions(), names=names, pid=os.getpid())\n"
    "print(json.dumps(dict(told, spins=os.environ.get('GOMP_SPINCOUNT'))))",
    "run.stop(); run.wait()",
    "phase = 'open'\nnames.update({t.native_id: t.name for t in threading.enumerate()})",
]
WATCH = """() => {
  const cell = document.querySelectorAll('.jp-Notebook .jp-CodeCell')[2], times = []; let t0 = null, before = null;
  const said = () => cell.querySelector('.jp-OutputArea').innerText;
  document.addEventListener('keydown', () => { t0 = performance.now(); before = said(); }, true);
  new MutationObserver(() => {
    if (t0 !== null && said() !== before) { times.push(performance.now() - t0); t0 = null; }
  }).observe(cell, {subtree: true, childList: true, characterData: true});
  window.alfTimes = times;
}"""


GROUPS = dict(browser='chrom', server='jupyterlab', kernel='ipykernel_launcher')     # word of the command line
OURS = {'alf-views': 'drawing', 'alf_nb training': 'training', 'MainThread': 'kernel main'}


def core_seconds():
    "Seconds of a core that each thread has taken: (group, process, thread) → seconds; empty where nothing tells"
    found = {}
    for p in Path('/proc').glob('[0-9]*'):
        try:
            words = (p/'cmdline').read_bytes().decode(errors='replace')
            group = next((g for g, w in GROUPS.items() if w in words), None)
            for s in (p/'task').glob('*/stat') if group else ():
                used = s.read_text().rpartition(')')[2].split()[11:13]
                found[group, int(p.name), int(s.parent.name)] = sum(map(int, used))/os.sysconf('SC_CLK_TCK')
        except OSError: continue        # it has ended
    return found


class Cores:
    "What each group takes of a core while it is watched"

    def __init__(self): self.spent, self.seconds = defaultdict(float), 0.

    def watch(self, wait):
        before, t = core_seconds(), time.perf_counter()
        wait()
        self.seconds += time.perf_counter() - t
        for k, v in core_seconds().items(): self.spent[k] += v - before.get(k, 0.)

    def by_group(self, pid, names):
        "Of our kernel by what a thread is for; threads without a name are torch's"
        found = defaultdict(float)
        for (group, p, thread), s in self.spent.items():
            ours = group == 'kernel' and OURS.get(names.get(str(thread), 'alf_nb training'), 'kernel')
            if group != 'kernel' or p == pid: found[ours or group] += s
        return {k: round(v/self.seconds, 4) for k, v in sorted(found.items())}


def slowdown(ends):
    """Median step with the page open over without it, minus 1, and its 95 % interval; steps that began in another
    phase are left out"""
    steps = dict(open=[], closed=[])
    for (t0, p0), (t1, p1) in zip(ends, ends[1:]):
        if p0 == p1 and p0 in steps: steps[p0].append(t1 - t0)
    rng = random.Random(0)
    ratio = lambda a, b: statistics.median(a)/statistics.median(b) - 1
    boot = sorted(
        ratio(rng.choices(steps['open'], k=len(steps['open'])), rng.choices(steps['closed'], k=len(steps['closed'])))
        for _ in range(2000)
    )
    return (
        ratio(steps['open'], steps['closed']),
        boot[50],
        boot[-51],
        {k: len(v) for k, v in steps.items()},
        statistics.median(steps['closed']),
    )


def main():
    ap = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    ap.add_argument('--presses', type=int, default=60)
    ap.add_argument('--rounds', type=int, default=5)
    ap.add_argument('--seconds', type=float, default=12)
    ap.add_argument('--torch-first', action='store_true')
    ap.add_argument('--threads', type=int)
    ap.add_argument('--append', action='store_true')
    a = ap.parse_args()
    cores, cells = dict(open=Cores(), closed=Cores()), list(CELLS)
    fewer = f'torch.set_num_threads({a.threads})\n' if a.threads else ''
    cells[0] = (TORCH_FIRST if a.torch_first else FIRST) + fewer + START
    os.environ.pop('GOMP_SPINCOUNT', None)
    with tempfile.TemporaryDirectory() as root:
        nbformat.write(
            nbformat.v4.new_notebook(
                cells=[nbformat.v4.new_code_cell(c) for c in cells],
                metadata=dict(kernelspec=dict(name='python3', display_name='Python 3', language='python')),
            ),
            Path(root) / 'live.ipynb',
        )
        with jupyterlab(root) as base, browser() as context:
            nb = Notebook(context, base, 'live.ipynb')
            sizes, counting = [], [False]

            def received(frame):
                data = frame if isinstance(frame, bytes) else str(frame).encode()
                if counting[0] and b'comm_msg' in data and b'"update"' in data: sizes.append(len(data))
            nb.page.on('websocket', lambda ws: ws.on('framereceived', received))
            # so that its web socket is seen from the start
            nb.page.reload()
            nb.page.wait_for_selector('.jp-Notebook .jp-CodeCell', timeout=60_000)
            nb.page.evaluate(
                "async () => { while (!window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel) await"
                " new Promise(r => setTimeout(r, 100)); const s = window.jupyterapp.shell.currentWidget.sessionContext;"
                " await s.ready; await s.session.kernel.info; }"
            )
            print('loading the model and starting to train', flush=True)
            nb.run(0, timeout=300)
            for i in range(a.rounds):
                print(f'round {i+1} of {a.rounds}', flush=True)
                nb.run(1)
                nb.run(2)
                nb.page.wait_for_timeout(3000)
                nb.run(7)
                # a plain sleep would hear nothing
                counting[0] = True
                cores['open'].watch(lambda: nb.page.wait_for_timeout(1000*a.seconds))
                counting[0] = False
                if i == a.rounds-1: break
                nb.run(3)
                cores['closed'].watch(lambda: nb.page.wait_for_timeout(1000*a.seconds))
            nb.run(4)
            print(f'{a.presses} key presses', flush=True)
            slider = nb.cell(2).get_by_role('slider').first
            slider.focus()
            nb.page.evaluate(WATCH)
            for i in range(a.presses):
                nb.page.keyboard.press('ArrowRight' if i//20 % 2 == 0 else 'ArrowLeft')
                time.sleep(.35)
            times = sorted(nb.page.evaluate('() => window.alfTimes'))
            nb.run(3)
            nb.page.wait_for_timeout(1000*a.seconds)
            nb.run(5)
            found = json.loads(nb.output(5).strip().splitlines()[-1])
            nb.run(6, timeout=120)
            nb.close()
    if len(times) < .9*a.presses: raise SystemExit(f'only {len(times)} of {a.presses} key presses changed the read-out')
    share, low, high, n, step_s = slowdown(found['ends'])
    q = lambda v, p: sorted(v)[min(len(v)-1, int(p*len(v)))]
    row = dict(
        p50_ms=round(q(times, 0.5), 1),
        p95_ms=round(q(times, 0.95), 1),
        max_ms=round(times[-1], 1),
        presses=len(times),
        slowdown_share=round(share, 4),
        slowdown_low=round(low, 4),
        slowdown_high=round(high, 4),
        steps=n,
        step_s=round(step_s, 4),
        bytes_per_update=q(sizes, 0.5),
        bytes_per_update_max=max(sizes),
        updates_per_s=round(len(sizes) / (a.rounds * a.seconds), 2),
        bytes_per_s=round(sum(sizes) / (a.rounds * a.seconds)),
        model='SmolLM2-135M-Instruct',
        tokens_per_step=384,
        spins=found['spins'],
        cores={k: c.by_group(found['pid'], found['names']) for k, c in cores.items()},
        device=f"cpu, {found['threads']} threads, JupyterLab and Chromium on the same cores",
        versions=found['versions'],
        date=str(date.today()),
    )
    print(json.dumps(row))
    if a.append:
        with open(RESULTS, 'a', encoding='utf-8') as f: f.write(json.dumps(row) + '\n')


if __name__ == '__main__': main()
