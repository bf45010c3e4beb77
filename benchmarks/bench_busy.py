"""How a step slows down beside a busy process, by how torch's threads wait for each other.

    python benchmarks/bench_busy.py [--ways default spin1000] [--quiet 9] [--busy 7] [--slowest 3] [--append]

OpenMP's threads spin while they wait at a barrier. Beside another busy process one of them has to wait for a core, and
those that spin hold the cores it waits for. Each way of waiting is a process of its own, since the settings are read
when torch is loaded; the processes take turns, a step at a time, in changing order, first on a quiet machine, then
beside as many busy processes as --beside says, of the same session or of their own (Linux may share the cores out
between sessions first). A way whose step beside them takes longer than 12 s makes --slowest
steps there. A step during which something else took more than a twentieth of a core does not count (Linux tells). A
step: SmolLM2-135M, 3 × 128 tokens, a random quarter of its matrices trains, AdamW. Prints one row for each way, and
adds it with --append to results/busy.jsonl.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

RESULTS = Path(__file__).parent/'results'/'busy.jsonl'
KEYS = ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT', 'KMP_BLOCKTIME', 'OMP_NUM_THREADS')
SPINS = (100, 1000, 3000, 10000, 30000, 100000)
WAYS = {
    'default': {},
    **{f'spin{n}': dict(GOMP_SPINCOUNT=str(n)) for n in SPINS},
    'passive': dict(OMP_WAIT_POLICY='PASSIVE'),
    'one thread': dict(OMP_NUM_THREADS='1'),
}
BUSY = 'while True: pass'


def serve(seed):
    "In a process of its own: a step for each line that comes in; its seconds go out"
    import torch

    from alf_nb.core.policies import StaticPolicy
    from alf_nb.core.system import versions
    from alf_nb.model.layers import partition_layers
    from alf_nb.model.optim import apply_selection
    from alf_nb.sources.models import load_model
    from alf_nb.study.runs import device_name

    torch.manual_seed(seed)
    model, _ = load_model(progress=False)
    layers = partition_layers(model, unit='matrix')
    chosen = StaticPolicy(where='random', budget=.25, strata=3, seed=seed).select(None, layers.units)
    apply_selection(layers, chosen.names)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    ids = torch.randint(1000, 40000, (3, 128))

    def step():
        t, used = time.perf_counter(), time.process_time()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - t, time.process_time() - used

    model.train()
    step()
    about = dict(threads=torch.get_num_threads(), share=chosen.share, device=device_name(), versions=versions())
    print(json.dumps(about), flush=True)
    for _ in sys.stdin: print(*step(), flush=True)


def used_s():
    "Seconds that all cores worked since the machine started; None where the system does not tell"
    try: user, nice, system, _, _, irq, soft, steal = map(int, open('/proc/stat').readline().split()[1:9])
    except OSError: return None
    return (user + nice + system + irq + soft + steal)/os.sysconf('SC_CLK_TCK')


def used_by(pid):
    "Seconds that a process worked"
    try: fields = open(f'/proc/{pid}/stat').read().rpartition(')')[2].split()
    except OSError: return 0.
    return sum(map(int, fields[11:13]))/os.sysconf('SC_CLK_TCK')


class Worker:
    "A process that makes a step when asked"

    def __init__(self, way, seed):
        env = {k: v for k, v in os.environ.items() if k not in KEYS} | WAYS[way]
        self.way, self.times = way, dict(quiet=[], busy=[])
        self.process = subprocess.Popen([sys.executable, __file__, '--serve', str(seed)], text=True, env=env,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ready(self):
        self.about = json.loads(self.process.stdout.readline())
        return self

    def step(self, when, beside=()):
        "One step, kept unless something else took more than a twentieth of a core"
        known = lambda: sum(map(used_by, beside))
        before, theirs = used_s(), known()
        self.process.stdin.write('\n')
        self.process.stdin.flush()
        wall, own = map(float, self.process.stdout.readline().split())
        other = 0. if before is None else used_s() - before - own - (known() - theirs)
        # clocks tick every hundredth of a second
        self.times[when].append(None if other > .05*wall + .03 else wall)

    def known(self, when):
        "Seconds of the steps that nothing disturbed"
        return [t for t in self.times[when] if t is not None]

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def turns(workers, when, rounds, slowest, until, beside=()):
    "Steps in turns; every round begins with another process"
    for i in range(rounds):
        if time.monotonic() > until: break
        k = i % len(workers)
        for w in workers[k:] + workers[:k]:
            slow = len(known := w.known(when)) >= slowest and statistics.median(known) > 12
            if not slow: w.step(when, beside)
        print(when, i+1, *(f'{w.way} {w.times[when][-1]}' for w in workers), flush=True)


def main():
    ap = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    ap.add_argument('--ways', nargs='+', choices=WAYS, default=['default', 'spin1000', 'spin10000', 'passive'])
    ap.add_argument('--quiet', type=int, default=9, help='rounds on a quiet machine')
    ap.add_argument('--busy', type=int, default=7, help='rounds beside busy processes')
    ap.add_argument('--slowest', type=int, default=3)
    ap.add_argument('--beside', type=int, default=1, help='busy processes')
    ap.add_argument('--session', choices=('same', 'own'), default='same', help='of the busy processes')
    ap.add_argument('--limit', type=float, default=3600, help='seconds, two fifths of them on a quiet machine')
    ap.add_argument('--seed', type=int, default=0)
    ap.add_argument('--append', action='store_true')
    ap.add_argument('--serve', type=int, help=argparse.SUPPRESS)
    a = ap.parse_args()
    if a.serve is not None: return serve(a.serve)
    workers = [w.ready() for w in [Worker(way, a.seed) for way in a.ways]]
    until = time.monotonic() + a.limit
    turns(workers, 'quiet', a.quiet, a.slowest, until - .6*a.limit)
    own = a.session == 'own'
    others = [subprocess.Popen([sys.executable, '-c', BUSY], start_new_session=own) for _ in range(a.beside)]
    try: turns(workers, 'busy', a.busy, a.slowest, until, [p.pid for p in others])
    finally:
        for p in others: p.kill()
    for w in workers:
        w.close()
        if not all(map(w.known, w.times)):
            print(f'{w.way}: every step was disturbed')
            continue
        medians = {f'{k}_s': round(statistics.median(w.known(k)), 4) for k in w.times}
        steps = {k: [t and round(t, 4) for t in v] for k, v in w.times.items()}
        row = dict(
            way=w.way, settings=WAYS[w.way], beside=a.beside, session=a.session, **medians, steps=steps,
            model='SmolLM2-135M-Instruct', tokens_per_step=384, cpus=os.cpu_count(), seed=a.seed, **w.about,
            date=datetime.now(timezone.utc).isoformat(timespec='seconds'),
        )
        print(json.dumps(row), flush=True)
        if a.append:
            with open(RESULTS, 'a', encoding='utf-8') as f: f.write(json.dumps(row) + '\n')


if __name__ == '__main__': main()
