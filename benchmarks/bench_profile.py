"""Where a step's time goes, what the callback adds to a step of a run by hand, and what autocast's casts cost.

    python benchmarks/bench_profile.py parts [--steps 24] [--label before] [--append]
    python benchmarks/bench_profile.py callback [--pairs 40] [--append]
    python benchmarks/bench_profile.py casts [--steps 30] [--shape 1.7B] [--append]

parts: `make demo` (SmolLM2-135M on the Python language reference, 3 × 256 tokens, `ALFCallback` with its defaults, a
run of 120 steps) for so many steps, its parts timed by wrapping what Trainer calls: data, forward, backward, clipping,
optimizer, callback, the rest. Backward by depth: from the gradient of a block's output to that of the block below.
Before: the time until the first step, with probes. callback: a Trainer with `ALFCallback` and one whose same units were
frozen by hand, in turns, a step of each, in one process; and the seconds that the callback's own calls take. casts:
frozen weights in fp32 against bf16 under autocast, in turns; a CPU without bf16 has no such step, and says so. Prints
a row, and adds it with --append to results/profile.jsonl; a row of a label replaces an earlier one of that label.
"""
import argparse
import copy
import functools
import json
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from datetime import datetime, timezone
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainerCallback, TrainingArguments
from transformers import default_data_collator

from alf_nb.core.policies import StaticPolicy
from alf_nb.core.system import versions
from alf_nb.model.layers import partition_layers
from alf_nb.model.optim import apply_selection
from alf_nb.sources.blocks import holdout_split, token_blocks
from alf_nb.sources.losses import supports_bf16, wants_autocast
from alf_nb.sources.models import load_model
from alf_nb.sources.texts import load_texts
from alf_nb.study.runs import device_name
from alf_nb.train.trainer import ALFCallback

BEGUN = time.perf_counter()
RESULTS = Path(__file__).parent/'results'/'profile.jsonl'
RUN, BATCH, LENGTH = 120, 3, 256
QUARTER = dict(where='random', budget=.25, strata=3)
# hidden size, blocks, heads, key-value heads, width of the MLP: of SmolLM2
SHAPES = {'135M': (576, 30, 9, 3, 1536), '1.7B': (2048, 24, 32, 32, 8192)}
CALLS = ('on_train_begin', 'on_step_begin', 'on_pre_optimizer_step', 'on_optimizer_step', 'on_step_end', 'on_log')


def arguments(out, steps=RUN, bf16=False):
    "As `finetune` has them"
    return TrainingArguments(
        str(out),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=4e-4,
        lr_scheduler_type='cosine',
        warmup_steps=max(1, steps//20),
        weight_decay=0.,
        logging_steps=max(1, steps//60),
        save_strategy='no',
        bf16=bf16,
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        include_num_input_tokens_seen='all',
    )


def model_and_rows():
    model, tokenizer = load_model(progress=False)
    if torch.cuda.is_available(): model.to('cuda')
    return model, token_blocks(holdout_split(load_texts())[0], tokenizer, LENGTH)


def about(**more):
    return dict(
        **more, model='SmolLM2-135M-Instruct', tokens_per_step=BATCH*LENGTH, seed=0, threads=torch.get_num_threads(),
        device=device_name(), versions=versions(), date=datetime.now(timezone.utc).isoformat(timespec='seconds'),
    )


class Clock:
    "Seconds of what it wraps, step by step; what is inside of something else counts for itself"

    def __init__(self): self.steps, self.now, self.open = [], defaultdict(float), []

    def wrap(self, thing, name, part):
        real = getattr(thing, name)

        @functools.wraps(real)
        def timed(*args, **kw):
            t = time.perf_counter()
            self.open.append(0.)
            try: return real(*args, **kw)
            finally:
                took, inner = time.perf_counter() - t, self.open.pop()
                self.now[part] += took - inner
                if self.open: self.open[-1] += took

        setattr(thing, name, timed)

    def close(self, seconds):
        "A step is over"
        self.steps.append((seconds, dict(self.now)))
        self.now.clear()


class Steps(TrainerCallback):
    "Ends the run after so many steps; hands each step to the clock"

    def __init__(self, clock, n, until): self.clock, self.n, self.until = clock, n, until

    def on_train_begin(self, *args, **kw):
        "Last of all callbacks"
        self.begun = time.perf_counter()
        self.start = dict(self.clock.now)
        self.clock.now.clear()

    def on_step_end(self, args, state, control, **kw):
        now = time.perf_counter()
        self.clock.close(now - self.begun)
        self.begun = now
        if state.global_step >= self.n or now > self.until: control.should_training_stop = True


class Depth:
    "When the gradient of each block's output is there"

    def __init__(self, model):
        self.blocks, self.marks, self.steps = model.model.layers, [], []
        for i, b in enumerate(self.blocks): b.register_forward_hook(functools.partial(self.forward, i))

    def forward(self, i, block, args, out):
        out = out[0] if isinstance(out, tuple) else out
        if torch.is_grad_enabled() and out.requires_grad:
            out.register_hook(lambda g: self.marks.append((i, time.perf_counter())))

    def backward(self, real):
        "Wraps the backward pass: seconds of the head, and of each block that it reaches"
        def timed(*args, **kw):
            self.marks, t = [], time.perf_counter()
            res = real(*args, **kw)
            ends = [*self.marks[1:], (None, time.perf_counter())]
            spent = {'head': self.marks[0][1] - t} if self.marks else {}
            self.steps.append(spent | {str(i): b - a for (i, a), (_, b) in zip(self.marks, ends)})
            return res
        return timed


def parts(a):
    "One row: median seconds of each part of a step"
    model, rows = model_and_rows()
    clock, depth = Clock(), Depth(model)
    with tempfile.TemporaryDirectory() as out:
        alf = ALFCallback(out=out)
        steps = Steps(clock, a.steps, BEGUN + a.limit)
        trainer = Trainer(model, arguments(out, bf16=wants_autocast(model)), train_dataset=rows,
                          data_collator=default_data_collator, callbacks=[alf, steps])
        for name in CALLS: clock.wrap(alf, name, 'callback')
        trainer.accelerator.backward = depth.backward(trainer.accelerator.backward)
        for thing, name, part in (
            (trainer, 'get_batch_samples', 'data'), (trainer, '_prepare_inputs', 'data'),
            (trainer, 'compute_loss', 'forward'), (trainer.accelerator, 'backward', 'backward'),
            (trainer, '_clip_grad_norm', 'clipping'),
        ): clock.wrap(thing, name, part)
        create = trainer.create_scheduler

        def created(num_training_steps, optimizer=None):
            made = create(num_training_steps, optimizer)
            clock.wrap(trainer.optimizer, 'step', 'optimizer')      # a scheduler wraps it, too
            return made

        trainer.create_scheduler = created
        trainer.train()
        summary = alf.summary()
    ordinary = clock.steps[2:]        # the first ones warm up
    names = ('data', 'forward', 'backward', 'clipping', 'optimizer', 'callback')
    found = {k: statistics.median(p.get(k, 0.) for _, p in ordinary) for k in names}
    whole = statistics.median(s for s, _ in ordinary)
    found['rest'] = statistics.median(s - sum(p.values()) for s, p in ordinary)
    reached = sorted({k for d in depth.steps[-len(ordinary):] for k in d}, key=lambda k: (k != 'head', k))
    by_depth = {k: statistics.median(d.get(k, 0.) for d in depth.steps[-len(ordinary):]) for k in reached}
    total = sum(s for s, _ in clock.steps)
    return about(
        kind='parts', label=a.label, step_s=whole, parts=found, backward_by_depth=by_depth,
        callback_s_mean=statistics.fmean(p.get('callback', 0.) for _, p in clock.steps),
        before_s=sum(steps.start.values()), steps=len(clock.steps), run_steps=RUN, wall_s=total,
        share=summary['trainable_share_mean'], n_blocks=len(depth.blocks),
    )


class Turn(TrainerCallback):
    "From one step's begin to the next it is our turn, then the other training's; keeps the seconds of ours"

    def __init__(self, mine, other, until, clock=None):
        self.mine, self.other, self.until, self.clock, self.times, self.began = mine, other, until, clock, [], None

    def on_step_begin(self, args, state, control, **kw):
        if self.began is not None:
            self.times.append(time.perf_counter() - self.began)
            if self.clock: self.clock.close(self.times[-1])
            self.other.release()
        self.mine.acquire()
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kw):
        if time.perf_counter() > self.until: control.should_training_stop = True


def interval(values, draws=2000):
    "95 % of what the median would be if other pairs had been seen"
    g = torch.Generator().manual_seed(0)
    v = torch.tensor(values)
    found = v[torch.randint(len(v), (draws, len(v)), generator=g)].median(1).values.sort().values
    return [found[int(.025*draws)].item(), found[int(.975*draws)].item()]


def callback(a):
    "One row: a step with the callback over one by hand, in turns"
    model, rows = model_and_rows()
    clock, locks, errors = Clock(), (threading.Semaphore(1), threading.Semaphore(0)), []
    n_threads, both = torch.get_num_threads(), []
    with tempfile.TemporaryDirectory() as out:
        for i in (0, 1):
            net, turn = copy.deepcopy(model), Turn(locks[i], locks[1-i], BEGUN + a.limit, None if i else clock)
            if i == 0:
                alf = ALFCallback(out=out, interval=0, policy=dict(QUARTER, policy='static'))
                first, last = [alf], [turn]
                for name in CALLS[1:]: clock.wrap(alf, name, 'callback')
            else:
                layers = partition_layers(net)
                apply_selection(layers, StaticPolicy(**QUARTER).select(None, layers.units).names)
                first, last = [], [turn]
            trainer = Trainer(net, arguments(f'{out}/{i}', a.pairs + 4), train_dataset=rows,
                              data_collator=default_data_collator, callbacks=first + last)
            both.append((trainer, turn))

        def train(trainer, turn):
            torch.set_num_threads(n_threads)
            try: trainer.train()
            except BaseException as e: errors.append(e)
            finally: turn.other.release()

        threads = [threading.Thread(target=train, args=pair) for pair in both]
        for t in threads: t.start()
        for t in threads: t.join()
    if errors: raise errors[0]
    ours, hand = (turn.times[3:-1] for _, turn in both)      # the first ones warm up, the last one ends alone
    ratios = [x/y - 1 for x, y in zip(ours, hand)]
    own = [p.get('callback', 0.) for _, p in clock.steps[3:-1]]
    return about(
        kind='callback', with_s=statistics.median(ours), by_hand_s=statistics.median(hand),
        share=statistics.median(ratios), share_95=interval(ratios), pairs=len(ratios),
        own_s=statistics.median(own), own_mean_s=statistics.fmean(own),
        own_share=statistics.fmean(own)/statistics.median(hand),
    )


def casts(a):
    "One row: frozen weights in bf16 against fp32, under autocast; weights of this shape, drawn at random"
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if device == 'cpu' and not supports_bf16(): raise SystemExit('this processor has no bf16: nothing was measured')
    hidden, blocks, heads, kv, wide = SHAPES[a.shape]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=blocks, num_attention_heads=heads, num_key_value_heads=kv,
        intermediate_size=wide, vocab_size=49152, tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(device)
    ids, ways = torch.randint(1000, 40000, (BATCH, LENGTH), device=device), {}
    batch = dict(input_ids=ids, labels=ids)
    for way in ('fp32', 'bf16'):
        net = copy.deepcopy(model)
        layers = partition_layers(net)
        apply_selection(layers, StaticPolicy(**QUARTER).select(None, layers.units).names)
        for p in net.parameters():
            if p.requires_grad or way == 'fp32': p.data = p.data.float()
        ways[way] = net, torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-5), []

    def step(net, optimizer, times):
        if device == 'cuda': torch.cuda.synchronize()
        t = time.perf_counter()
        with torch.autocast(device, torch.bfloat16): loss = net(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == 'cuda': torch.cuda.synchronize()
        times.append(time.perf_counter() - t)

    for i in range(a.steps + 3):
        for way in (list(ways), list(ways)[::-1])[i % 2]: step(*ways[way])
    narrow, wide = (ways[w][2][3:] for w in ('bf16', 'fp32'))
    ratios = [x/y - 1 for x, y in zip(narrow, wide)]
    row = about(
        kind='casts', shape=a.shape, fp32_s=statistics.median(wide), bf16_s=statistics.median(narrow),
        share=statistics.median(ratios), share_95=interval(ratios), pairs=len(ratios),
        weight_bytes={w: sum(p.nbytes for p in net.parameters()) for w, (net, *_) in ways.items()},
    )
    return row | dict(model=f'Llama of {a.shape}, random weights')


def main():
    ap = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    ap.add_argument('what', choices=('parts', 'callback', 'casts'))
    ap.add_argument('--steps', type=int, default=24)
    ap.add_argument('--pairs', type=int, default=40)
    ap.add_argument('--shape', choices=SHAPES, default='135M')
    ap.add_argument('--limit', type=float, default=3600, help='seconds after which no further step begins')
    ap.add_argument('--label', default='now', help='name of the row, such as before')
    ap.add_argument('--append', action='store_true')
    a = ap.parse_args()
    row = dict(parts=parts, callback=callback, casts=casts)[a.what](a)
    print(json.dumps(row), flush=True)
    if a.append:
        with open(RESULTS, 'a', encoding='utf-8') as f: f.write(json.dumps(row) + '\n')


if __name__ == '__main__': main()
