"""Peers: BAdam beside its authors' own package, LISA and GRASS beside the rules of their papers.

LISA and GRASS have no package to install (LISA's code is a callback inside LMFlow, GRASS has published none), so ours
stand in for them.
"""
import math
import warnings
from collections import Counter
from itertools import combinations

import pytest
import torch
from badam import BlockOptimizer
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from alf_nb.core.config import ALFConfig
from alf_nb.demo import demo_dataset, demo_model
from alf_nb.model.layers import partition_layers
from alf_nb.core.peers import GRASSPolicy, LISAPolicy
from alf_nb.core.policy import Policy
from alf_nb.signals.probe import probe_gradients
from alf_nb.core.records import Scores
from alf_nb.core.runlog import RunLog
from alf_nb.train.trainer import ALFCallback

BLOCKS, K = 4, 3
SWEEP = BLOCKS*K
# tied: the shape of SmolLM2, the head is the embeddings
MODELS = {"own head": {}, "tied head": dict(tie_word_embeddings=True)}
BASE = dict(lr=1e-2, betas=(.9, .95), eps=1e-8, weight_decay=.1)


# Watching any training, ours or a peer's

class Watch(TrainerCallback):
    "After every step: which parameters moved, how old Adam's state is, and the weights"
    def __init__(self): self.moved, self.ages, self.weights = [], [], []

    def on_train_begin(self, args, state, control, model=None, **kw): self.before = self.take(model)

    def take(self, model): return {n: p.detach().clone() for n, p in model.named_parameters()}

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kw):
        now, last = self.take(model), self.weights[-1] if self.weights else self.before
        self.moved.append({n for n in now if not torch.equal(now[n], last[n])})
        self.weights.append(now)

    @property
    def blocks(self):
        return [
            sorted({int(n.split("layers.")[1].split(".")[0]) for n in names if "layers." in n}) for names in self.moved
        ]


def train(folder, *callbacks, model, steps, wrap=lambda adam: adam, **kw):
    watch, adam = Watch(), torch.optim.AdamW(model.parameters(), **BASE)
    # before a switch clears them
    adam.register_step_post_hook(lambda o, *_: watch.ages.append({int(s["step"]) for s in o.state.values()}))
    args = TrainingArguments(
        **{
            **dict(
                output_dir=str(folder),
                max_steps=steps,
                per_device_train_batch_size=4,
                logging_steps=1,
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
                save_strategy="no",
                lr_scheduler_type="linear",
                max_grad_norm=0.0,
                seed=3,
            ),
            **kw,
        }
    )
    trainer = Trainer(
        model, args, train_dataset=demo_dataset(), callbacks=[watch, *callbacks], optimizers=(wrap(adam), None)
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return watch


def block_params(watch, i): return {n for n in watch.before if f".layers.{i}." in n}


# BAdam, https://arxiv.org/abs/2404.02827: the package `badam` of its authors

def badam_package(folder, order, steps, like_paper, **config):
    """Train with the authors' BlockOptimizer, in the same Trainer: the same data, the same schedule, the same AdamW
    inside.

    It switches when (its step count + 1) is a multiple of K, so its first block trains K-1 steps and every later one K.
    Counting from -1 instead of 0 gives
    the first block K steps as well, which is what the paper says (Algorithm 1) and what ours does. It wants bf16
    weights and keeps fp32 copies of the active
    block; our weights are fp32 already, so its copies change no number and it warns. It has one weight decay for all,
    norms too: so has ours here.
    """
    model = demo_model(blocks=BLOCKS, **config)
    def wrap(adam):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="BAdam expect model to be loaded in fp16/bf16")
            optimizer = BlockOptimizer(adam, list(model.named_parameters()), switch_block_every=K, switch_mode=order)
        if like_paper: optimizer.global_step = -1
        return optimizer
    return train(folder, model=model, steps=steps, wrap=wrap)


def badam_ours(folder, order, steps, **config):
    alf = ALFCallback(preset="badam", policy=dict(policy="badam", order=order), interval=K, references="none")
    return train(folder, alf, model=demo_model(blocks=BLOCKS, **config), steps=steps)


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_badam_has_the_weights_of_the_authors_package(tmp_path, order, config):
    "Two sweeps, weight decay and a falling learning rate: the same bits after every step"
    theirs = badam_package(tmp_path/"theirs", order, 2*SWEEP, True, **config)
    ours = badam_ours(tmp_path/"ours", order, 2*SWEEP, **config)
    turns = list(range(BLOCKS))[::1 if order == "ascending" else -1]
    assert ours.blocks == theirs.blocks == [[turns[t//K % BLOCKS]] for t in range(2*SWEEP)]
    # all of the block, and nothing else
    assert ours.moved == theirs.moved == [block_params(ours, b) for b, in ours.blocks]
    assert ours.ages == theirs.ages == [{t % K + 1} for t in range(2*SWEEP)]  # Adam starts anew with every block
    for t, (a, b) in enumerate(zip(ours.weights, theirs.weights)):
        assert a.keys() == b.keys()
        for n in a:
            assert torch.equal(a[n], b[n]), f"{n} differs by {float((a[n]-b[n]).abs().max()):.2g} after step {t+1}"


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_badam_package_as_it_comes_is_one_step_ahead(tmp_path, order):
    "What the package does from its step 1 on is what ours does from step 2 on, over two sweeps"
    theirs = badam_package(tmp_path/"theirs", order, 2*SWEEP - 1, False)
    ours = badam_ours(tmp_path/"ours", order, 2*SWEEP)
    assert theirs.blocks == ours.blocks[1:]
    assert theirs.moved == ours.moved[1:]
    assert theirs.ages == [{t+1} for t in range(K-1)] + ours.ages[K:]


def test_badam_at_random_takes_every_block_once_a_sweep(tmp_path):
    "Both shuffle anew for every sweep, each with its own source of chance"
    torch.manual_seed(5)     # the package draws from torch's
    for watch in (
        badam_package(tmp_path / "theirs", "random", 3 * SWEEP, True),
        badam_ours(tmp_path / "ours", "random", 3 * SWEEP),
    ):
        turns = [b for b, in watch.blocks]
        assert all(len(set(turns[t:t+K])) == 1 for t in range(0, 3*SWEEP, K))
        sweeps = [turns[s*SWEEP:(s+1)*SWEEP:K] for s in range(3)]
        assert all(sorted(s) == list(range(BLOCKS)) for s in sweeps)
        assert len(set(map(tuple, sweeps))) > 1
        assert watch.ages == [{t % K + 1} for t in range(3*SWEEP)]


# LISA, https://arxiv.org/abs/2403.17919: embeddings and head always, and γ = 2 blocks drawn uniformly without
# replacement every K steps

# upper tails of χ² at 1e-4, by degrees of freedom: a right sampler fails for one seed in ten thousand, and these seeds
# are fixed
CHI2 = {2: 18.42, 4: 23.51, 9: 33.72, 14: 42.58}


def chi2(counts, expected):
    assert set(counts) <= set(expected)
    return sum((counts.get(k, 0) - e)**2/e for k, e in expected.items())


def blocks_only(n): return [u for u in partition_layers(demo_model(blocks=n), unit="block").units if u.kind == "block"]


@pytest.mark.parametrize("how", ["steps", "seeds"])
def test_lisa_draws_every_pair_of_blocks_equally_often(how):
    units, n = blocks_only(6), 6000
    draws = (
        [LISAPolicy(2).select(None, units, 20 * i).names for i in range(n)]
        if how == "steps"
        else [LISAPolicy(2, seed=i).select(None, units, 20).names for i in range(n)]
    )
    assert {len(set(d)) for d in draws} == {2}
    pairs = list(combinations([u.name for u in units], 2))
    assert chi2(Counter(draws), dict.fromkeys(pairs, n/len(pairs))) < CHI2[14]
    # and a draw does not know the one before it: two blocks in common, one or none, as chance has it
    common = Counter(len({*a} & {*b}) for a, b in zip(draws[::2], draws[1::2]))
    expected = {0: 6/15, 1: 8/15, 2: 1/15}
    assert chi2(common, {k: v*n/2 for k, v in expected.items()}) < CHI2[2]


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_lisa_trains_embeddings_head_and_two_blocks(tmp_path, config):
    alf, model, steps = ALFCallback(preset="lisa", interval=K), demo_model(blocks=BLOCKS, **config), 10*K
    watch = train(tmp_path, alf, model=model, steps=steps)
    always = {n for n in watch.before if ".layers." not in n}
    assert any("embed_tokens" in n for n in always) and any("lm_head" in n for n in always) == (not config)
    for names, drawn in zip(watch.moved, watch.blocks):
        assert len(drawn) == 2
        assert names == always | block_params(watch, drawn[0]) | block_params(watch, drawn[1])
    draws = [watch.blocks[t] for t in range(0, steps, K)]
    assert watch.blocks == [d for d in draws for _ in range(K)]                 # the same two for K steps
    assert len(set(map(tuple, draws))) > 3 and {b for d in draws for b in d} == set(range(BLOCKS))  # and then others
    selects = [e for e in RunLog(tmp_path).events() if e["event"] == "select"]
    assert [e["step"] for e in selects] == list(range(0, steps, K))


def test_lisa_has_the_paper_s_settings():
    "γ = 2 blocks, K = 20 steps, until the last step"
    c = ALFConfig.from_args(preset="lisa")
    assert (c.policy.k, c.interval, c.select_until, c.policy.pin) == (2, 20, 1., ("embeddings", "head"))


# GRASS, https://arxiv.org/abs/2604.07808: p = softmax(mean gradient norm / τ), drawn without replacement.
# Ours divides the norms by the largest first, so that a temperature means the same for every model: τ of the paper is
# temperature · the largest norm.

NORMS = dict(zip((u.name for u in blocks_only(5)), (.021, .004, .017, .030, .011)))


def softmax(norms, tau):
    w = {n: math.exp((v - max(norms.values()))/tau) for n, v in norms.items()}
    return {n: x/sum(w.values()) for n, x in w.items()}


def grass(n, units=None, norms=None, **kw):
    units = units or blocks_only(5)
    policy = GRASSPolicy(**kw)
    return [policy.select(Scores("grad_norm", norms or NORMS), units, 50*i).names for i in range(n)]


@pytest.mark.parametrize("temperature", [.1, .25, 1.])
def test_grass_draws_by_the_softmax_of_the_mean_gradient_norms(temperature):
    n, p = 6000, softmax(NORMS, temperature*max(NORMS.values()))
    first = Counter(name for name, in grass(n, k=1, temperature=temperature))
    rare = {k for k, v in p.items() if v*n < 10}               # χ² wants some ten of each: the rare ones count together
    lump = lambda d: {
        **{k: v for k, v in d.items() if k not in rare},
        **({"rare": sum(d.get(k, 0) for k in rare)} if rare else {}),
    }
    assert chi2(lump(first), {k: v*n for k, v in lump(p).items()}) < CHI2[4]


def test_grass_draws_the_second_without_replacement():
    "Of two drawn, a pair (a, b) in either order: p(a)·p(b)/(1−p(a)) + p(b)·p(a)/(1−p(b))"
    n, p = 6000, softmax(NORMS, .5*max(NORMS.values()))
    pairs = {(a, b): n*p[a]*p[b]*(1/(1-p[a]) + 1/(1-p[b])) for a, b in combinations(NORMS, 2)}
    assert sum(pairs.values()) == pytest.approx(n)
    assert chi2(Counter(grass(n, k=2, temperature=.5)), pairs) < CHI2[9]


def test_grass_temperature_goes_from_the_largest_to_a_uniform_draw():
    best = sorted(NORMS, key=NORMS.get)[-2:]
    assert set(grass(300, k=2, temperature=1e-3)) == {tuple(n for n in NORMS if n in best)}
    n = 5000
    assert chi2(Counter(name for name, in grass(n, k=1, temperature=1e4)), dict.fromkeys(NORMS, n/5)) < CHI2[4]


def test_grass_draws_the_same_whatever_the_scale_of_the_gradients():
    assert grass(200, k=2) == grass(200, k=2, norms={n: 1000*v for n, v in NORMS.items()})


def test_grass_within_a_budget_takes_the_same_draws_in_turn():
    "Blocks of one size: a budget of two fifths is k=2"
    assert grass(300, budget=.4) == grass(300, k=2)


def test_grass_norm_is_the_mean_over_batches_of_the_norm_per_root_parameter():
    "The probe's one fused pass beside plain autograd"
    model, data = demo_model(blocks=BLOCKS), demo_dataset(16)
    columns = {k: torch.tensor([row[k] for row in data]) for k in data[0]}
    batches = [{k: v[i:i+4] for k, v in columns.items()} for i in range(0, 16, 4)]
    layers = partition_layers(model, unit="block")
    found = probe_gradients(layers, batches).grad_norm
    for i, block in enumerate(model.model.layers):
        norms, n = [], sum(p.numel() for p in block.parameters())
        for batch in batches:
            model.zero_grad()
            model(**batch).loss.backward()
            norms.append(math.sqrt(sum(float(p.grad.double().square().sum()) for p in block.parameters())/n))
        assert found[f"block.{i}"] == pytest.approx(sum(norms)/len(norms), rel=1e-5)


def test_grass_trains_what_it_drew_from_norms_it_measured(tmp_path):
    """On real steps: the run log's norms make the run log's draw, and just that moves. Ours measures frozen blocks
    too, at every draw; the paper keeps their old norm"""
    watch = train(
        tmp_path,
        ALFCallback(preset="grass", policy=dict(policy="grass", k=2, temperature=2.0), interval=K),
        model=demo_model(blocks=BLOCKS),
        steps=8 * K,
    )
    events = RunLog(tmp_path).events()
    units = partition_layers(demo_model(blocks=BLOCKS), unit="block").units
    policy = Policy.from_dict(next(e for e in events if e["event"] == "run_begin")["config"]["policy"])
    selects = [e for e in events if e["event"] == "select"]
    assert [e["step"] for e in selects] == list(range(0, 8*K, K))
    # every block was drawn, and left out
    assert all(0 < sum(b.name in e["names"] for e in selects) < 8 for b in units if b.kind == "block")
    for e in selects:
        assert e["signal"] == "grad_norm" and len(e["names"]) == 2
        assert len({e["scores"][f"block.{i}"] for i in range(BLOCKS)} - {None}) == BLOCKS
        assert policy.select(Scores("grad_norm", e["scores"]), units, e["step"]).names == tuple(e["names"])
        for t in range(e["step"], e["step"] + K):
            assert watch.moved[t] == set().union(*(block_params(watch, int(n.split(".")[1])) for n in e["names"]))
    norms = [[e["scores"][f"block.{i}"] for i in range(BLOCKS)] for e in selects]
    assert all(a[i] != b[i] for a, b in zip(norms, norms[1:]) for i in range(BLOCKS))      # looked again each time
