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
    rng, units = random.Random(seed), fake_units(blocks, layer)
    log, total, t = RunLog(path), sum(u.n_params for u in units), 1.79e9
    true = {
        u.name: (
            math.exp(-(((u.depth / blocks - 0.62) / 0.3) ** 2))
            * {'v_proj': 1.6, 'o_proj': 1.2, 'down_proj': 1.0, 'up_proj': 0.8, 'gate_proj': 0.6}.get(u.role, 0.5)
            * rng.uniform(0.6, 1.4)
        )
        for u in units
        if u.eligible
    }
    size = {u.name: u.n_params for u in units}
    def signals(shift):
        return {n: v*rng.uniform(.85, 1.15)*1e-6*(1+shift*math.sin(i)) - 2e-8 for i,(n,v) in enumerate(true.items())}
    def choose(gain):
        out, used = [], 0
        for n in sorted(gain, key=gain.get, reverse=True):
            if used + size[n] <= budget*total:
                out.append(n)
                used += size[n]
        return [u.name for u in units if u.name in set(out)], used/total
    log.write('eval', step=0, t=t, name='domain', when='before', loss=2.1893, tokens=16384)
    log.write('eval', step=0, t=t, name='other', when='before', loss=3.2812, tokens=16384)
    if samples:
        log.write(
            'sample',
            step=0,
            t=t,
            when='before',
            prompt='The with statement is used to',
            text=(
                'The with statement is used to describe the state of a person, place or thing. It can also be used as a'
                ' verb.'
            ),
        )
    log.write(
        'run_begin',
        t=t,
        step=0,
        run_id=f'fake{seed}',
        versions=dict(alf_nb='0.1.0', torch='2.13.0', transformers='5.23.0', python='3.11.7'),
        n_total=total,
        max_steps=steps,
        model=name,
        device='cpu',
        seed=seed,
        units=units,
        config=dict(
            policy=dict(policy='budget', budget=budget, pin=[], ban=[]),
            signal='gain',
            unit='module',
            interval=interval,
            state='v',
            seed=seed,
        ),
    )
    current, opt = [], 0
    for s in range(0, steps+1):
        t += 1.35
        if s:
            loss = 1.38 + .82*math.exp(-s/28) + rng.gauss(0, .07)
            lrate = lr*min(s/6, .5*(1+math.cos(math.pi*max(s-6, 0)/(steps-6))))
            if s % every == 0:
                log.write(
                    'log',
                    t=t,
                    step=s,
                    loss=loss,
                    learning_rate=lrate,
                    grad_norm=rng.uniform(0.4, 0.9),
                    seconds_per_step=1.3 + rng.uniform(0, 0.12),
                    tokens_per_second=768 / 1.35,
                )
            if s % 10 == 0:
                log.write(
                    'measure',
                    t=t,
                    step=s,
                    steps=10,
                    sum_lr=lrate * 10,
                    wall_s=0.011,
                    ages={n: 0 for n in current},
                    signals=dict(
                        rate={n: true[n] * 0.02 * rng.uniform(0.9, 1.1) for n in current},
                        coherence={n: rng.uniform(0.2, 0.5) for n in current},
                    ),
                )
        if s % interval == 0 and s < steps*.85:
            gain = signals(.25*s/steps)
            log.write(
                'probe',
                t=t,
                step=s,
                signals=dict(gain=gain, grad_norm={n: abs(v) ** 0.5 for n, v in gain.items()}),
                wall_s=2.4 if s == 0 else 1.2,
                batches=8 if s == 0 else 4,
            )
            new, share = choose(gain)
            log.write(
                'select',
                t=t,
                step=s,
                names=new,
                entered=[n for n in new if n not in current],
                left=[n for n in current if n not in new],
                policy='budget',
                share=share,
                reason=(
                    f'highest gain up to {budget:.0%} of the parameters'
                    if s == 0
                    else f'{len(set(new)-set(current))} newcomers are clearly better'
                ),
            )
            parked = sum(size[n]*4 for n in current if n not in new)
            current = new
            grad = sum(size[n] for n in current)*4
            log.write(
                'memory',
                t=t,
                step=s + 1,
                grad_bytes=grad,
                optimizer_bytes=2 * grad,
                reference_bytes=grad,
                parked_bytes=parked,
                rss_bytes=int(1.9e9) + s * 2**20,
            )
        if s == 60: log.write('eval', t=t, step=60, name='domain', when='during', loss=1.52, tokens=16384)
        if stop is not None and s >= stop:
            log.close()
            return log
    log.write(
        'run_end',
        t=t,
        step=steps,
        wall_s=steps * 1.35 + 6,
        importance_s=6.3,
        trainable_share_mean=0.2438,
        trainable_share_peak=0.2486,
        state_bytes_peak=4 * grad,
        rss_bytes_peak=int(2.05e9),
    )
    log.write('eval', step=steps, t=t, name='domain', when='after', loss=after, tokens=16384)
    log.write('eval', step=steps, t=t, name='other', when='after', loss=3.2467, tokens=16384)
    if samples:
        log.write(
            'sample',
            step=steps,
            t=t,
            when='after',
            prompt='The with statement is used to',
            text=(
                'The with statement is used to wrap the execution of a block with methods defined by a context manager.'
                ' This allows common try…except…finally usage patterns to be encapsulated for convenient reuse.'
            ),
        )
    log.close()
    return log
