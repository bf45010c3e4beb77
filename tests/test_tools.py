"""With the tools people use, the real packages: TRL's SFTTrainer, early stopping with the best model at the end, a
compiled model, 8-bit optimizers, a search for hyperparameters."""
import sys
import warnings

import pytest
import torch
from datasets import Dataset
from small_run import losses, same, small_trainer, weights
from transformers import EarlyStoppingCallback, TrainerCallback

from alf_nb.core.checkpoints import find_checkpoint
from alf_nb.demo import demo_dataset, demo_model, demo_tokenizer
from alf_nb.model.states import unwrap_optimizer
from alf_nb.core.runlog import RunLog
from alf_nb.train.trainer import ALFCallback
from alf_nb.train.engine import graphs_see_freezing


@pytest.mark.skipif(sys.version_info < (3, 11), reason="TRL needs Python 3.11")
@pytest.mark.parametrize("packing", [False, True])
def test_sft_trainer(tmp_path, packing):
    from trl import SFTConfig, SFTTrainer
    texts = Dataset.from_list([dict(text=f"number {i} is a number, and so is {i+1}.") for i in range(60)])

    def sft(folder, resume=None, **kw):
        alf = ALFCallback(budget=.3, interval=4)
        t = small_trainer(
            folder,
            alf,
            data=texts,
            kind=SFTTrainer,
            config=SFTConfig,
            max_steps=10,
            max_length=64,
            packing=packing,
            bf16=False,
            more=dict(processing_class=demo_tokenizer()),
            **kw
        )
        before = weights(t)
        t.train(resume_from_checkpoint=resume)
        return t, alf, before
    t, alf, before = sft(tmp_path/"a", save_strategy="steps", save_steps=5)
    after, chosen = weights(t), {n for s in RunLog(tmp_path/"a").selections() for n in s.names}
    moved = {alf.run.layers.unit_of(k) for k in before if not torch.equal(before[k], after[k])}
    assert moved == chosen and 0 < alf.summary()["trainable_share_peak"] <= .3
    again, _, _ = sft(tmp_path/"a", resume=str(tmp_path/"a"/"checkpoint-5"))
    assert same(after, weights(again))


def test_the_best_model_at_the_end_and_early_stopping(tmp_path):
    torch.manual_seed(0)
    alf = ALFCallback(budget=.3, interval=4)
    # what training makes worse
    noise = [
        dict(r, input_ids=ids, labels=ids) for r in demo_dataset(8) for ids in [torch.randint(64, 258, (32,)).tolist()]
    ]
    t = small_trainer(
        tmp_path,
        alf,
        EarlyStoppingCallback(3),
        max_steps=60,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        save_total_limit=2,
        more=dict(eval_dataset=noise),
    )
    t.train()
    assert t.state.global_step < 60 and RunLog(tmp_path).events("run_end")[-1]["stopped"]
    # and the best weights are in the model
    assert t.evaluate()["eval_loss"] == pytest.approx(t.state.best_metric, rel=1e-5)
    assert all(p.requires_grad for p in t.model.parameters()) and find_checkpoint(tmp_path)


def test_a_compiled_model(tmp_path):
    """Losses and selections of the eager model, and a graph is made once per selection, not once per step. Inductor
    gets the same graphs; it only takes longer to make code of each"""
    from torch._dynamo.utils import counters
    every = 4

    class Count(TrainerCallback):
        "Graphs compiled so far, after each step"
        def __init__(self): self.graphs = []
        def on_step_end(self, *args, **kw): self.graphs.append(counters["stats"]["unique_graphs"])

    def train(folder, **kw):
        torch._dynamo.reset()
        counters.clear()
        alf, count = ALFCallback(policy="rotate", budget=.3, interval=every, select_until=1.), Count()
        t = small_trainer(folder, alf, count, model=demo_model(blocks=2), max_steps=20, **kw)
        t.train()
        return losses(t), [s.names for s in RunLog(folder).selections()], count.graphs
    (plain, names, none), (compiled, same, graphs) = train(tmp_path / "a"), train(
        tmp_path / "b", torch_compile=True, torch_compile_backend="aot_eager"
    )
    assert same == names and len(set(names)) > 3 and compiled == pytest.approx(plain, rel=1e-4)
    assert not any(none) and all(
        graphs[i] == graphs[i // every * every] for i in range(20)
    ), "one selection needs no second graph"
    if graphs_see_freezing():
        assert [n - graphs[0] for n in graphs] == [
            len(set(names[: i // every + 1])) - 1 for i in range(20)
        ], "nor does one that was there before"
    torch._dynamo.reset()


def test_more_selections_than_torch_compile_makes_graphs_are_pointed_out(tmp_path):
    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kw):
            control.should_training_stop = control.should_epoch_stop = True

    def said(folder, interval, model=None, **kw):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            small_trainer(
                tmp_path / folder,
                ALFCallback(policy="rotate", budget=0.3, interval=interval, select_until=1.0),
                Stop(),
                model=model or demo_model(blocks=1),
                max_steps=20,
                **kw
            ).train()
        return [str(w.message) for w in caught if "makes a graph" in str(w.message)]
    assert not said("a", 2), "a model that is not compiled"
    if not graphs_see_freezing(): return        # every selection begins anew there, so nothing piles up
    told, = said("b", 2, torch_compile=True, torch_compile_backend="eager")
    assert "gives up after 8" in told and "may select 10 times" in told
    assert not said("c", 3, torch_compile=True, torch_compile_backend="eager")
    model = demo_model(blocks=1)
    model.compile(backend="eager")
    assert said("d", 2, model)


@pytest.mark.parametrize("optim", ["adamw_8bit", "lion_8bit", "rmsprop_bnb"])
def test_optimizers_of_bitsandbytes(tmp_path, optim):
    pytest.importorskip("bitsandbytes")
    # matrices of 4,096 weights: the least that are held in 8 bits
    model = lambda: demo_model(hidden_size=64, intermediate_size=128)

    def train(folder, *callbacks, resume=None, **kw):
        alf = ALFCallback(budget=.25, signal="rate", interval=4, measure_every=2, explore=.6, offload="full",
                          select_until=1.)
        t = small_trainer(
            folder, alf, *callbacks, model=model(), optim=optim, learning_rate=1e-3, weight_decay=0.1, **kw
        )
        t.train(resume_from_checkpoint=resume)
        return t, alf
    sizes = []

    class Frozen(TrainerCallback):
        "No frozen bit moves, and none of them has optimizer state"
        def on_pre_optimizer_step(self, args, state, control, model=None, **kw):
            self.before = {k: p.detach().clone() for k, p in model.named_parameters() if not p.requires_grad}
        def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kw):
            assert (
                all(torch.equal(p, self.before[k]) for k, p in model.named_parameters() if k in self.before)
                and self.before
            )
            held = unwrap_optimizer(optimizer).state
            assert not any(
                isinstance(v, torch.Tensor) and v.numel()
                for p in model.parameters()
                if not p.requires_grad
                for v in held.get(p, {}).values()
            )
            sizes.append({v.dtype for s in held.values() for k, v in s.items() if k.startswith("state")})
    whole, _ = train(tmp_path/"a", Frozen())
    assert len({s.names for s in RunLog(tmp_path/"a").selections()}) > 1, "the selection changes"
    assert (torch.uint8 in sizes[-1]) == ("8bit" in optim), "8-bit states are really 8-bit"
    train(tmp_path/"b", save_strategy="steps", save_steps=6)
    again, _ = train(tmp_path/"b", resume=str(tmp_path/"b"/"checkpoint-6"))
    assert same(weights(whole), weights(again))


def test_a_search_for_hyperparameters(tmp_path):
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    alf = ALFCallback(budget=.3, interval=4, measure_every=2)
    t = small_trainer(
        tmp_path / "search",
        alf,
        max_steps=6,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
        save_total_limit=2,
        more=dict(model_init=lambda trial: demo_model(), eval_dataset=demo_dataset(8)),
    )
    best = t.hyperparameter_search(
        lambda trial: dict(learning_rate=trial.suggest_categorical("learning_rate", [1e-2, 1e-3])),
        direction="minimize",
        backend="optuna",
        n_trials=2,
        compute_objective=lambda m: m["eval_loss"],
        sampler=optuna.samplers.GridSampler(dict(learning_rate=[1e-2, 1e-3]), seed=0),
    )
    log = RunLog(tmp_path/"search")
    for run in range(2):  # each trial is a run of its own, in one log
        begin, = log.events("run_begin", run=run)
        assert (
            all(e["share"] <= 0.3 for e in log.events("select", run=run))
            and log.events("run_end", run=run)[0]["step"] == 6
        )
    assert best.hyperparameters["learning_rate"] == 1e-2
    lone = small_trainer(
        tmp_path / "lone",
        ALFCallback(budget=0.3, interval=4, measure_every=2),
        max_steps=6,
        more=dict(eval_dataset=demo_dataset(8)),
    )
    lone.train()
    assert lone.evaluate()["eval_loss"] == best.objective, "nothing of one trial is in the next"
