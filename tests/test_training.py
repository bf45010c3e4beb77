"""ALFCallback inside a real Trainer: equal to training by hand, bytes counted, bits compared."""
import json
import random
import shutil

import pytest
import torch
from small_run import losses, same, small_trainer, weights
from transformers import TrainerCallback

from alf_nb.core.checkpoints import write_manifest
from alf_nb.demo import demo_model
from alf_nb.model.states import optimizer_bytes
from alf_nb.core.runlog import RunLog
from alf_nb.train.trainer import ALFCallback
from alf_nb.core.config import PRESETS
from alf_nb.core.schedule import rotation


def run(tmp_path, *callbacks, model=None, steps=12, freeze=None, resume=None, data=None, **kw):
    "Train a tiny model for a few steps; `freeze(name)` says which parameters to freeze by hand"
    model = model if model is not None else demo_model()
    for n, p in model.named_parameters():
        if freeze is not None and freeze(n): p.requires_grad_(False)
    trainer = small_trainer(tmp_path, *callbacks, model=model, data=data, max_steps=steps, **kw)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


TRICKS = {
    "plain": {},
    "accumulation": dict(gradient_accumulation_steps=3),
    "checkpointing": dict(gradient_checkpointing=True, gradient_checkpointing_kwargs=dict(use_reentrant=False)),
    "bf16": dict(bf16=True),
    "decay": dict(weight_decay=.1),
    "clipping": dict(max_grad_norm=.05),
    "cosine": dict(lr_scheduler_type="cosine", warmup_steps=4),
}


@pytest.mark.parametrize("trick", TRICKS)
def test_full_policy_is_full_training(tmp_path, trick):
    plain = run(tmp_path / "plain", **TRICKS[trick])
    alf = run(tmp_path / "alf", ALFCallback(preset="full"), **TRICKS[trick])
    assert losses(plain) == losses(alf)
    assert same(weights(plain), weights(alf))


@pytest.mark.parametrize("trick", TRICKS)
def test_a_static_choice_is_freezing_by_hand(tmp_path, trick):
    "One selection for the whole run gives the bits of a Trainer whose other parameters never required grad"
    alf = ALFCallback(policy=dict(policy="static", where="last"), budget=.3, interval=0, measure_every=4)
    a = run(tmp_path / "alf", alf, **TRICKS[trick])
    trained = {k for n in alf.selection for k in alf.run.layers.named_params(n)}
    b = run(tmp_path / "hand", freeze=lambda n: n not in trained, **TRICKS[trick])
    assert losses(a) == losses(b)
    assert same(weights(a), weights(b))


class Witness(TrainerCallback):
    "Compares every bit of every parameter with the step before, and counts every byte"
    def __init__(self, alf):
        self.alf, self.before, self.moved, self.peak_share, self.max_state = alf, None, set(), 0., 0

    def on_pre_optimizer_step(self, args, state, control, model=None, **kw):
        self.before = {k: p.detach().clone() for k, p in model.named_parameters()}
        self.should = {k for n in self.alf.selection for k in self.alf.run.layers.named_params(n)}
        assert {
            k for k, p in model.named_parameters() if p.grad is not None
        } <= self.should, "a frozen parameter has a gradient"

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kw):
        sizes = {k: p.numel() for k, p in model.named_parameters()}
        for k, p in model.named_parameters():
            if k not in self.should:
                assert torch.equal(p, self.before[k]), f"{k} is frozen and moved at step {state.global_step}"
            elif not torch.equal(p, self.before[k]): self.moved.add(k)
        share = sum(sizes[k] for k in self.should) / sum(sizes.values())
        self.peak_share = max(self.peak_share, share)
        n = sum(sizes[k] for k in self.should)
        # Adam: two fp32 moments, beside them only step counts
        self.max_state = max(self.max_state, optimizer_bytes(optimizer) - 8 * n)


@pytest.mark.parametrize("mode", ["second_moment", "full", "none"])
@pytest.mark.parametrize("signal", ["gain", "grad_norm", "rate", "coherence", "prior"])
def test_every_signal_keeps_to_the_budget(tmp_path, signal, mode):
    alf = ALFCallback(
        budget=0.25,
        signal=signal,
        interval=4,
        measure_every=2,
        offload=mode,
        explore=0.5 if signal in ("rate", "coherence") else None,
        select_until=1.0,
    )
    eye = Witness(alf)
    run(tmp_path, alf, eye, steps=16, weight_decay=.1)
    ever = {n for e in RunLog(tmp_path).events("select") for n in e["names"]}
    assert eye.peak_share <= .25 and alf.run.totals.share_peak <= .25
    assert eye.moved == {k for n in ever for k in alf.run.layers.named_params(n)}, "each selected unit moves"
    assert eye.max_state <= 4 * 200, "optimizer state of frozen units is gone"
    assert (alf.run.offloaded.nbytes > 0) == (mode != "none" and len(ever) > len(alf.selection))
    full = 12 * sum(p.numel() for p in alf.run.layers.model.parameters())
    assert alf.run.totals.state_bytes_peak <= .35 * full


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_run_and_resume(tmp_path, preset):
    kw = dict(interval=4) if preset in ("default", "paper", "lisa", "badam", "grass") else {}
    kw |= dict(warm_up=6) if preset == "paper" else {}
    if preset in ("paper", "static-top"): kw["budget"] = .45          # a block of the tiny model is a fifth of it
    if preset == "grass": kw["budget"] = .45
    make = lambda: ALFCallback(preset=preset, measure_every=2, **kw)
    whole = run(tmp_path / "whole", make(), steps=14)
    run(tmp_path / "cut", make(), steps=14, save_strategy="steps", save_steps=7)
    shutil.rmtree(tmp_path / "cut" / "checkpoint-14")
    again = run(tmp_path / "cut", make(), steps=14, resume=str(tmp_path / "cut" / "checkpoint-7"))
    assert losses(again) == losses(whole)
    assert same(weights(again), weights(whole))
    chosen = lambda d: [(e["step"], e["names"]) for e in RunLog(tmp_path / d).events("select")]
    assert chosen("cut") == chosen("whole")


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", "adafactor"])
def test_any_optimizer_of_trainer(tmp_path, optim):
    make = lambda: ALFCallback(
        budget=0.25, signal="rate", interval=4, measure_every=2, explore=0.6, offload="full", select_until=1.0
    )
    kw = dict(optim=optim, steps=14, **(dict(optim_args="momentum=0.9") if optim == "sgd" else {}))
    alf = make()
    whole = run(tmp_path / "whole", alf, Witness(alf), **kw)
    assert len({tuple(e["names"]) for e in RunLog(tmp_path / "whole").events("select")}) > 1, "the selection changes"
    run(tmp_path / "cut", make(), save_strategy="steps", save_steps=7, **kw)
    again = run(tmp_path / "cut", make(), resume=str(tmp_path / "cut" / "checkpoint-7"), **kw)
    assert losses(again) == losses(whole) and same(weights(again), weights(whole))


@pytest.mark.parametrize("references", ["device", "host", "8bit", "none"])
def test_references_anywhere_resume_exactly(tmp_path, references):
    make = lambda: ALFCallback(
        budget=0.25, signal="rate", interval=4, measure_every=2, explore=0.6, references=references, select_until=1.0
    )
    alf = make()
    whole = run(tmp_path / "whole", alf, Witness(alf), steps=14, weight_decay=.1)
    assert len({tuple(e["names"]) for e in RunLog(tmp_path / "whole").events("select")}) > 1, "the selection changes"
    held = max(e["reference_bytes"] for e in RunLog(tmp_path / "whole").events("memory"))
    assert (held > 0) == (references in ("device", "8bit"))
    run(tmp_path / "cut", make(), steps=14, weight_decay=.1, save_strategy="steps", save_steps=7)
    again = run(tmp_path / "cut", make(), steps=14, weight_decay=.1, resume=str(tmp_path / "cut" / "checkpoint-7"))
    assert losses(again) == losses(whole) and same(weights(again), weights(whole))


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_other_families(tmp_path, family):
    alf = ALFCallback(budget=.25, interval=4, measure_every=2)
    run(tmp_path, alf, Witness(alf), model=demo_model(family))
    assert 0 < alf.run.totals.share_peak <= .25


def test_peft_adapters_are_the_units(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(demo_model(), peft.LoraConfig(r=2, target_modules="all-linear"))
    base = {k: p.detach().clone() for k, p in model.named_parameters() if not p.requires_grad}
    alf = ALFCallback(budget=.25, interval=4, measure_every=2)
    run(tmp_path, alf, model=model)
    assert {alf.run.layers[n].kind for n in alf.selection} == {"adapter"}
    assert alf.run.totals.share_peak <= .25                                     # of the adapters
    assert all(torch.equal(p, base[k]) for k, p in model.named_parameters() if k in base)


def test_pins_and_bans(tmp_path):
    alf = ALFCallback(budget=.3, pin="block.1.mlp.up_proj", ban=["block.0", "*.q_proj"], interval=4, measure_every=2)
    run(tmp_path, alf)
    for e in RunLog(tmp_path).events("select"):
        assert "block.1.mlp.up_proj" in e["names"]
        assert not any(n.startswith("block.0.") or n.endswith(".q_proj") for n in e["names"])


def test_a_pattern_that_means_nothing_is_named(tmp_path):
    with pytest.raises(ValueError, match="block.99"): run(tmp_path, ALFCallback(pin="block.99"))


def test_the_probe_never_holds_the_gradients(tmp_path):
    alf = ALFCallback(budget=.1, interval=4, measure_every=2)
    run(tmp_path, alf)
    full = 12 * sum(p.numel() for p in alf.run.layers.model.parameters())
    assert alf.run.totals.state_bytes_peak <= .14 * full


def test_training_data_is_untouched_by_probes(tmp_path):
    "The same batches in the same order, with and without ALF"
    def seen(*callbacks):
        ids, model, inside = [], demo_model(), []
        model.register_forward_pre_hook(
            lambda m, a, kw: ids.append(kw["input_ids"].tolist()) if inside else None, with_kwargs=True
        )
        class Switch(TrainerCallback):
            def on_step_begin(self, *a, **kw): inside.append(1)
            def on_step_end(self, *a, **kw): inside.clear()
        run(tmp_path / str(len(callbacks)), Switch(), *callbacks, model=model)
        return ids
    assert seen() == seen(ALFCallback(budget=.25, interval=3))


def test_reentrant_checkpointing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="use_reentrant"):
        run(
            tmp_path, ALFCallback(), gradient_checkpointing=True, gradient_checkpointing_kwargs=dict(use_reentrant=True)
        )


def test_an_optimizer_of_too_few_parameters_is_refused(tmp_path):
    "LMFlow #726: what the optimizer never got can be selected but cannot move"
    model = demo_model()
    optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if "layers.0." in n])
    trainer = small_trainer(tmp_path, ALFCallback(), model=model, max_steps=2, more=dict(optimizers=(optimizer, None)))
    with pytest.raises(RuntimeError, match="not in the optimizer"): trainer.train()


def test_nan_weights_are_named(tmp_path):
    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, **kw):
            with torch.no_grad(): alf.run.layers.params(alf.selection.names[0])[0][0, 0] = float("nan")
    alf = ALFCallback(budget=.25, measure_every=3)
    with pytest.raises(RuntimeError, match="hold NaN or infinity"): run(tmp_path, alf, Poison())


def test_a_model_with_everything_frozen_is_refused(tmp_path):
    model = demo_model()
    with pytest.raises((ValueError, RuntimeError), match="requires? grad|frozen|empty parameter list"):
        run(tmp_path, ALFCallback(), model=model, freeze=lambda n: True)


def test_a_crash_leaves_a_model_that_trains_again(tmp_path):
    model = demo_model()
    class Crash(TrainerCallback):
        def on_step_end(self, args, state, control, **kw): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): run(tmp_path / "a", ALFCallback(budget=.2), Crash(), model=model)
    alf = ALFCallback(budget=.25)
    run(tmp_path / "b", alf, model=model)
    assert alf.run.totals.share_peak > .2 and all(p.requires_grad for p in model.parameters())


def test_resume_as_a_new_object_from_the_checkpoint(tmp_path):
    "Trainer may rebuild callbacks from the checkpoint (restore_callback_states_from_checkpoint)"
    kw = dict(steps=14, save_strategy="steps", save_steps=7)
    whole = run(tmp_path / "whole", ALFCallback(budget=.3, interval=4, measure_every=2), steps=14)
    run(tmp_path / "cut", ALFCallback(budget=.3, interval=4, measure_every=2), **kw)
    again = run(
        tmp_path / "cut",
        ALFCallback(),
        resume=str(tmp_path / "cut" / "checkpoint-7"),
        restore_callback_states_from_checkpoint=True,
        **kw
    )
    assert losses(again) == losses(whole)


def test_a_changed_model_at_resume_is_refused(tmp_path):
    run(tmp_path, ALFCallback(budget=.3), steps=8, save_strategy="steps", save_steps=4)
    state = json.loads((tmp_path / "checkpoint-4" / "alf" / "state.json").read_text())
    state["weights"] = "0" * 64
    (tmp_path / "checkpoint-4" / "alf" / "state.json").write_text(json.dumps(state))
    write_manifest(tmp_path / "checkpoint-4")
    with pytest.raises(ValueError, match="weights of this model are not those"):
        run(tmp_path, ALFCallback(budget=.3), steps=8, resume=str(tmp_path / "checkpoint-4"))


def test_same_seed_same_run_and_other_seed_other_run(tmp_path):
    policy = dict(policy="rotate", budget=.25)
    names = lambda d: [e["names"] for e in RunLog(tmp_path / d).events("select")]
    for d, seed in (("a", 1), ("b", 1), ("c", 2)):
        random.seed(seed * 77)                                                # global random state decides nothing
        run(tmp_path / d, ALFCallback(policy=policy, interval=3, seed=seed))
    assert names("a") == names("b") != names("c")


@pytest.mark.parametrize(
    "settings, metered",
    [
        (dict(preset="probe", interval=8, references="device"), set()),
        (dict(preset="probe", interval=8), set()),
        (dict(interval=0, warm_up=2), {1, 2}),
    ],
    ids=["device", "none", "meter"],
)
def test_ordinary_steps_cost_no_tensor_operation(tmp_path, settings, metered):
    "So nothing waits for a device either: only steps that measure, meter or select touch a tensor"
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            Count.n += 1
            return f(*args, **(kwargs or {}))

    class Counted(ALFCallback):
        touched = {}
    for event in ("on_pre_optimizer_step", "on_optimizer_step", "on_step_end"):
        def counted(self, args, state, control, _event=event, **kw):
            before = Count.n
            with Count(): getattr(ALFCallback, _event)(self, args, state, control, **kw)
            step = state.global_step + (_event != "on_step_end")
            self.touched[step] = self.touched.get(step, 0) + Count.n - before
        setattr(Counted, event, counted)
    alf = Counted(budget=.25, measure_every=4, **settings)
    alf.touched = {}
    run(tmp_path, alf, steps=14)
    assert {s for s, n in alf.touched.items() if n} == {4, 8, 12, 14} | metered


@pytest.mark.parametrize("start", ["rotate", "warm-up"])
def test_a_start_of_some_steps_keeps_to_ban_pin_reach_and_budget(tmp_path, start):
    """What never trains does not train at the start either, what always trains does, and only a warm-up exceeds the
    budget"""
    alf = ALFCallback(
        budget=0.2,
        signal="rate",
        start=start,
        warm_up=8,
        interval=4,
        kinds=("matrix", "embedding"),
        ban=("block.2", "*.v_proj"),
        pin="block.3.mlp.up_proj",
        freeze_bottom=0.25,
    )
    run(tmp_path, alf, steps=9)
    begin = [s for s in RunLog(tmp_path).selections() if s.step < 8]
    assert {n for s in begin for n in s.names} == {
        u.name for u in alf.run.units if u.kind == "matrix" and u.layer in ("block.1", "block.3") and u.role != "v_proj"
    }
    assert all("block.3.mlp.up_proj" in s.names for s in begin)
    assert len(begin) == 1 if start == "warm-up" else len(begin) > 1 and all(s.share <= .2 for s in begin)


def test_a_rotating_start_leaves_out_what_alone_exceeds_the_budget(tmp_path):
    alf = ALFCallback(budget=.1, signal="rate", start="rotate", warm_up=30, kinds=("matrix", "embedding"))
    run(tmp_path, alf, steps=1)
    of, groups = alf.run, rotation(alf.run.policy, alf.run.units)
    assert sorted(n for g in groups for n in g) == sorted(u.name for u in of.units if u.kind == "matrix")
    assert all(sum(of.layers[n].n_params for n in g) <= .1*of.n_total for g in groups)


@pytest.mark.parametrize("start", ["rotate", "warm-up"])
def test_what_does_not_fit_is_refused_before_a_start_of_some_steps(tmp_path, start):
    for kw, words in (
        (dict(ban="*"), "nothing to choose from"),
        (dict(budget=1e-6), "too small for any unit"),
        (dict(budget=0.1, pin=("block.0", "block.1")), "the pinned units hold"),
        (dict(ban="block.99"), "matches no unit"),
    ):
        with pytest.raises(ValueError, match=words):
            run(tmp_path, ALFCallback(signal="rate", start=start, **kw), steps=2)


def test_a_policy_chosen_while_training_keeps_to_the_reach(tmp_path):
    class Wish(TrainerCallback):
        def on_step_end(self, args, state, control, **kw):
            if state.global_step == 2: alf.choose(policy=dict(policy="full"), now=True)
    alf = ALFCallback(budget=.3, freeze_bottom=.5, probe_batches=2)
    run(tmp_path, alf, Wish(), steps=4)
    last = RunLog(tmp_path).selections()[-1]
    assert set(last.names) == {u.name for u in alf.run.units if u.eligible and u.depth > 2} and last.policy == "full"
