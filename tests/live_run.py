"""What `train_in_background` returns, as far as views see it: a thread that writes a real run log, one step when
told to or on its own."""
import json, math, random, subprocess, sys, threading, time

import ipywidgets as W
from alf_nb.core.policies import BudgetPolicy
from alf_nb.core.records import Scores
from alf_nb.core.runlog import RunLog
from alf_nb.widgets.parts import all_widgets
from fake_run import fake_units


class LiveRun:
    error, traceback = None, ''

    def __init__(self, path, blocks=30, interval=30, steps=500, budget=.25, seed=0):
        self.log = RunLog(path)
        self.units = fake_units(blocks)
        self.policy = BudgetPolicy(budget)
        self.interval = interval
        self.max_steps = steps
        self.status = 'starting'
        self.activity = 'starting'
        self.alive = True
        self.step = 0
        self.current = None
        self.pending = None
        self.rng = random.Random(seed)
        self._out = RunLog(path)
        self._go = threading.Event()
        self._end = False
        self._thread = None
        self._go.set()

    def begin(self):
        self._out.write(
            'run_begin',
            step=0,
            run_id='live',
            model='SmolLM2-135M',
            device='cpu',
            seed=0,
            max_steps=self.max_steps,
            n_total=sum(u.n_params for u in self.units),
            units=self.units,
            config=dict(policy=self.policy.to_dict(), signal='gain', interval=self.interval),
        )
        self.select()
        self.status, self.activity = 'running', 'training'

    def select(self):
        gain = {u.name: self.rng.random()**3 if u.eligible else None for u in self.units}
        scores = Scores('gain', gain)
        new = self.policy.select(scores, self.units, self.step, self.current)
        self._out.write('probe', step=self.step, signals=dict(gain=gain), wall_s=.1, batches=2)
        self._out.write(
            'select',
            step=self.step,
            names=list(new),
            entered=[],
            left=[],
            reason=new.reason,
            policy=new.policy,
            share=new.share,
            signal='gain',
            scores=gain,
            ages={},
        )
        size = sum(u.n_params for u in self.units if u.name in new)
        self._out.write(
            'memory',
            step=self.step + 1,
            grad_bytes=4 * size,
            optimizer_bytes=8 * size,
            reference_bytes=4 * size,
            parked_bytes=self.step * 10**5,
            rss_bytes=2**30,
        )
        self.current = new

    def train(self, n=1):
        "n steps, in another thread, without waiting between them"
        t = threading.Thread(target=self._steps, args=(n, 0))
        t.start()
        t.join()

    def start(self, rate=200):
        "All steps, `rate` a second at most"
        self._thread = threading.Thread(target=self._steps, args=(self.max_steps - self.step, 1/rate))
        self._thread.start()

    def _steps(self, n, pause):
        for _ in range(n):
            self.step += 1
            now = False
            if self.pending:
                (self.policy, now), self.pending = self.pending, None
                self._out.write('choose', step=self.step, policy=self.policy.to_dict(), now=now)
            if now or self.step % self.interval == 0 and self.step < self.max_steps: self.select()
            s = self.step
            self._out.write(
                'log',
                step=s,
                loss=1.4 + 0.8 * math.exp(-s / 60) + self.rng.gauss(0, 0.1),
                learning_rate=4e-4 * (1 - s / self.max_steps),
                grad_norm=self.rng.random(),
                seconds_per_step=1.2 + 0.1 * self.rng.random(),
                tokens_per_second=500 + 50 * self.rng.random(),
            )
            if s % 10 == 0:
                self._out.write(
                    'measure',
                    step=s,
                    steps=10,
                    sum_lr=0.001,
                    signals=dict(rate={n: self.rng.random() * 1e-4 for n in self.current}),
                    ages={n: 0 for n in self.current},
                    wall_s=0.01,
                )
            if not self._go.is_set():
                self._out.write('pause', step=s)
                self.status = 'paused'
                self._go.wait()
                self._out.write('unpause', step=s, paused_s=1.)
                self.status = 'running'
            if self._end: break
            if pause: time.sleep(pause)
        if self._end or self.step == self.max_steps: self.end('stopped' if self._end else 'complete')

    def end(self, status):
        self._out.write('run_end', step=self.step, wall_s=self.step*1.2, stopped=status == 'stopped')
        self.status, self.activity, self.alive = status, status, False

    def fail(self, e, trace=''):
        self._out.write('error', step=self.step, type=type(e).__name__, message=str(e), traceback=trace)
        self.error, self.traceback, self.status, self.activity, self.alive = e, trace, 'failed', 'failed', False

    def close(self):
        self._end = True
        self._go.set()
        if self._thread: self._thread.join()
        self._out.close()
        self.log.close()

    def _must_live(self):
        if not self.alive: raise RuntimeError(f'this run is {self.status}')
    def pause(self):
        self._must_live()
        self._go.clear()
    def resume(self):
        self._must_live()
        self._go.set()
    def stop(self):
        self._must_live()
        self._end, self.status = True, 'stopping'
        self._go.set()
    def choose(self, policy, now=False):
        self._must_live()
        self.pending = policy, now


def leave_lock(folder):
    "The lock of a process that was killed"
    code = (
        'import os, signal, sys; from alf_nb.core.lock import RunLock; lock = RunLock(sys.argv[1]).acquire();'
        ' os.kill(os.getpid(), signal.SIGKILL)'
    )
    subprocess.run([sys.executable, '-c', code, str(folder)])


class Sent:
    "Bytes that a box of widgets sends to the page"
    def __init__(self, box):
        self.n, self.by = 0, {}
        for w in all_widgets(box):
            if isinstance(w, W.Widget): w.observe(self._count, list(w.keys))

    def _count(self, change):
        try: n = len(json.dumps(change['new']).encode())
        except TypeError: n = 40        # another widget, by its id
        self.n += n
        self.by[change['name'], type(change['owner']).__name__, n] = n

    def take(self):
        n, self.n, self.last, self.by = self.n, 0, self.by, {}
        return n


def wait_for(f, s=10):
    end = time.monotonic() + s
    while not (res := f()):
        assert time.monotonic() < end, 'it never came'
        time.sleep(.01)
    return res
