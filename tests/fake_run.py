"A recorded run of SmolLM2's shape, made up but plausible and the same every time: for tests of what reads a run."
import math, random
from alf_nb.core.records import UnitInfo
from alf_nb.core.runlog import RunLog

SHAPES = {
    'self_attn.q_proj': (576, 576),
    'self_attn.k_proj': (192, 576),
    'self_attn.v_proj': (192, 576),
    'self_attn.o_proj': (576, 576),
    'mlp.gate_proj': (1536, 576),
    'mlp.up_proj': (1536, 576),
    'mlp.down_proj': (576, 1536),
}
WORTH = {'v_proj': 1.6, 'o_proj': 1.2, 'down_proj': 1.0, 'up_proj': 0.8, 'gate_proj': 0.6}      # others .5
PROMPT = 'The with statement is used to'
BEFORE = f'{PROMPT} describe the state of a person, place or thing. It can also be used as a verb.'
AFTER = (f'{PROMPT} wrap the execution of a block with methods defined by a context manager. This allows common'
         ' try…except…finally usage patterns to be encapsulated for convenient reuse.')

def fake_units(blocks=30, layer='block.{}', vocab=49152):
    us = [UnitInfo('embeddings', 'embeddings', 'embedding', 'embed_tokens', vocab*576, 0, ((vocab, 576),), False)]
    for i in range(blocks):
        l = layer(i) if callable(layer) else layer.format(i)
        us += [UnitInfo(f'{l}.{r}', l, 'matrix', r.split('.')[1], a*b, i+1, ((a, b),)) for r,(a,b) in SHAPES.items()]
        us += [
            UnitInfo(f'{l}.{r}', l, 'norm', r, 576, i + 1, ((576,),), False)
            for r in ('input_layernorm', 'post_attention_layernorm')
        ]
    return us + [UnitInfo('norm', 'head', 'norm', 'norm', 576, blocks+1, ((576,),), False)]

def worth(u, blocks, rng):
    "What a unit is really worth: most a little above the middle"
    return math.exp(-(((u.depth/blocks - .62)/.3)**2))*WORTH.get(u.role, .5)*rng.uniform(.6, 1.4)

class Writer:
    "What is written, event by event."
    def __init__(self, path, units, blocks, steps, seed, budget, lr):
        self.rng, self.units, self.log, self.t = random.Random(seed), units, RunLog(path), 1.79e9
        self.steps, self.seed, self.budget, self.lr, self.current, self.grad = steps, seed, budget, lr, [], 0
        self.total, self.size = sum(u.n_params for u in units), {u.name: u.n_params for u in units}
        self.true = {u.name: worth(u, blocks, self.rng) for u in units if u.eligible}

    def write(self, kind, step, **fields): self.log.write(kind, step=step, t=self.t, **fields)

    def text(self, when, step, samples, **losses):
        "Losses on two texts, and a sample"
        for name, loss in losses.items(): self.write('eval', step, name=name, when=when, loss=loss, tokens=16384)
        if samples: self.write('sample', step, when=when, prompt=PROMPT, text=BEFORE if when == 'before' else AFTER)

    def begin(self, name, interval):
        config = dict(policy=dict(policy='budget', budget=self.budget, pin=[], ban=[]), signal='gain', unit='matrix',
                      interval=interval, offload='second_moment', seed=self.seed)
        versions = dict(alf_nb='0.1.0', torch='2.13.0', transformers='5.23.0', python='3.11.7')
        self.write('run_begin', 0, run_id=f'fake{self.seed}', versions=versions, n_total=self.total,
                   max_steps=self.steps, model=name, device='cpu', seed=self.seed, units=self.units, config=config)

    def step(self, s, every):
        "A step's loss and rate, and every tenth step what was measured"
        loss = 1.38 + .82*math.exp(-s/28) + self.rng.gauss(0, .07)
        rate = self.lr*min(s/6, .5*(1+math.cos(math.pi*max(s-6, 0)/(self.steps-6))))
        if s % every == 0:
            self.write('log', s, loss=loss, learning_rate=rate, grad_norm=self.rng.uniform(.4, .9),
                       seconds_per_step=1.3 + self.rng.uniform(0, .12), tokens_per_second=768/1.35)
        if s % 10: return
        moved = {n: self.true[n]*.02*self.rng.uniform(.9, 1.1) for n in self.current}
        signals = dict(rate=moved, coherence={n: self.rng.uniform(.2, .5) for n in self.current})
        self.write('measure', s, steps=10, sum_lr=rate*10, wall_s=.011, ages=dict.fromkeys(self.current, 0),
                   signals=signals)

    def best(self, gain):
        "Units of the highest gain within the budget, and their share"
        out, used = set(), 0
        for n in sorted(gain, key=gain.get, reverse=True):
            if used + self.size[n] <= self.budget*self.total:
                out.add(n)
                used += self.size[n]
        return [u.name for u in self.units if u.name in out], used/self.total

    def select(self, s):
        "A probe, a selection and what it takes"
        shift, first = .25*s/self.steps, s == 0
        gain = {n: v*self.rng.uniform(.85, 1.15)*1e-6*(1+shift*math.sin(i)) - 2e-8
                for i, (n, v) in enumerate(self.true.items())}
        norms = {n: abs(v)**.5 for n, v in gain.items()}
        batches, wall_s = (8, 2.4) if first else (4, 1.2)
        self.write('probe', s, signals=dict(gain=gain, grad_norm=norms), wall_s=wall_s, batches=batches)
        new, share = self.best(gain)
        entered, left = [n for n in new if n not in self.current], [n for n in self.current if n not in new]
        reason = f'highest gain up to {self.budget:.0%} of the parameters'
        if not first: reason = f'{len(set(entered))} newcomers are clearly better'
        self.write('select', s, names=new, entered=entered, left=left, policy='budget', share=share, reason=reason)
        self.current, self.grad = new, sum(self.size[n] for n in new)*4
        self.write('memory', s+1, grad_bytes=self.grad, optimizer_bytes=2*self.grad, reference_bytes=self.grad,
                   parked_bytes=sum(self.size[n]*4 for n in left), rss_bytes=int(1.9e9) + s*2**20)

    def end(self):
        s = self.steps
        self.write('run_end', s, wall_s=s*1.35 + 6, importance_s=6.3, trainable_share_mean=.2438,
                   trainable_share_peak=.2486, state_bytes_peak=4*self.grad, rss_bytes_peak=int(2.05e9))

def fake_run(
    path,
    blocks=30,
    steps=120,
    interval=30,
    every=1,
    layer='block.{}',
    seed=0,
    stop=None,
    budget=0.25,
    lr=4e-4,
    samples=True,
    name='SmolLM2-135M-Instruct',
    after=1.405,
):
    "Write a run to `path`; `stop`: the process is killed after that step"
    w = Writer(path, fake_units(blocks, layer), blocks, steps, seed, budget, lr)
    w.text('before', 0, samples, domain=2.1893, other=3.2812)
    w.begin(name, interval)
    for s in range(0, steps+1):
        w.t += 1.35
        if s: w.step(s, every)
        if s % interval == 0 and s < steps*.85: w.select(s)
        if s == 60: w.write('eval', 60, name='domain', when='during', loss=1.52, tokens=16384)
        if stop is not None and s >= stop: break
    else:
        w.end()
        w.text('after', steps, samples, domain=after, other=3.2467)
    w.log.close()
    return w.log
