"What goes wrong in real training: each fault is told by name, and what was there before it is still there."
import errno
import os
import shutil
import time
import warnings

import pytest
import torch
from small_run import same, small_trainer, weights
from transformers import Trainer, TrainerCallback

from alf_nb.train import trainer as training
from alf_nb.core.checkpoints import find_checkpoint
from alf_nb.demo import demo_dataset, demo_model
from alf_nb.core.runlog import RunLog
from alf_nb.train.trainer import ALFCallback


def make(folder, *callbacks, **kw):
    return small_trainer(folder, *callbacks, **{**dict(save_strategy="steps", save_steps=4), **kw})


def alf(**kw): return ALFCallback(**{**dict(budget=.3, interval=4), **kw})


class At(TrainerCallback):
    "Does something to the training after a step, or before the optimizer's"
    def __init__(self, step, f, when="step_end"): self.step, self.f, self.when = step, f, when

    def on_step_end(self, args, state, control, **kw):
        if self.when == "step_end" and state.global_step == self.step: self.f(kw)

    def on_pre_optimizer_step(self, args, state, control, **kw):
        if self.when == "pre_step" and state.global_step == self.step: self.f(kw)


def resumed(folder):
    t = make(folder, alf())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        t.train(resume_from_checkpoint=find_checkpoint(folder))
    return weights(t)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    t = make(tmp_path_factory.mktemp("whole"), alf())
    t.train()
    return weights(t)



def test_a_full_disk_while_saving(tmp_path, whole, monkeypatch):
    write, calls = training.save_file, []

    def full(tensors, path, **kw):
        calls.append(path)
        if len(calls) == 2: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(tensors, path, **kw)
    monkeypatch.setattr(training, "save_file", full)
    with pytest.raises(OSError, match="No space left"): make(tmp_path, alf()).train()
    monkeypatch.undo()
    with pytest.warns(
        UserWarning, match=r"passed over checkpoint-8 \(its writing was cut off\): going on from checkpoint-4"
    ):
        assert find_checkpoint(tmp_path)
    assert same(resumed(tmp_path), whole)


def test_out_of_memory_in_a_step(tmp_path, whole):
    def burst(kw): raise torch.OutOfMemoryError("no memory left, said the test")
    with pytest.raises(torch.OutOfMemoryError): make(tmp_path, alf(), At(6, burst)).train()
    assert RunLog(tmp_path).status != "complete"
    assert same(resumed(tmp_path), whole)


def test_an_interrupted_kernel(tmp_path, whole):
    def stop(kw): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): make(tmp_path, alf(), At(6, stop)).train()
    assert same(resumed(tmp_path), whole)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_layer_blows_up(tmp_path, value):
    def poison(kw):
        p = next(p for n, p in kw["model"].named_parameters() if p.requires_grad)
        p.data.view(-1)[3] = value
    with pytest.raises(RuntimeError, match="hold NaN or infinity after step"):
        make(tmp_path, alf(measure_every=2), At(5, poison)).train()
    last = RunLog(tmp_path).events("error")[-1]
    assert last["message"].startswith("weights of ") and RunLog(tmp_path).status == "failed"


def test_a_loss_that_is_nan(tmp_path):
    def poison(kw):
        for p in kw["model"].parameters():
            if p.grad is not None: p.grad.fill_(float("nan"))
    with pytest.raises(RuntimeError, match=r"NaN or infinity after step \d+ \(and \d+ more units\)"):
        make(tmp_path, alf(measure_every=2), At(5, poison, "pre_step"), max_grad_norm=0).train()
    best = find_checkpoint(tmp_path)
    assert best.endswith("checkpoint-4")  # none was saved with NaN in it


def test_two_callbacks_are_refused_and_the_model_trains_again(tmp_path):
    model = demo_model()
    with pytest.raises(ValueError, match="two ALFCallbacks"): make(tmp_path, alf(), alf(), model=model).train()
    one = alf()
    with pytest.raises(ValueError, match="two ALFCallbacks"): make(tmp_path/"b", one, one, model=model).train()
    make(tmp_path/"c", alf(), model=model).train()
    assert all(p.requires_grad for p in model.parameters())


def test_an_empty_dataset(tmp_path):
    with pytest.raises(ValueError): make(tmp_path, alf(), data=[]).train()


def test_an_unwritable_folder(tmp_path):
    (tmp_path/"file").write_text("not a folder")
    with pytest.raises(OSError, match="file"): make(tmp_path/"a", alf(out=str(tmp_path/"file"/"log"))).train()


def test_a_clock_that_jumps(tmp_path, whole, monkeypatch):
    now, jumps = time.time, iter([0, -7200, 86400]*10000)
    monkeypatch.setattr(time, "time", lambda: now() + next(jumps))
    t = make(tmp_path, alf())
    t.train()
    assert same(weights(t), whole)  # nothing is decided by the clock
    log = RunLog(tmp_path)
    assert log.status == "complete" and log.series("log", "loss")[0] == list(range(1, 13))


def test_one_kept_checkpoint_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="save_total_limit=1.*keep 2"):
        make(tmp_path, alf(), save_total_limit=1).train()


def test_a_checkpoint_that_vanishes(tmp_path, whole):
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, alf(), At(10, lambda kw: (_ for _ in ()).throw(KeyboardInterrupt()))).train()
    shutil.rmtree(tmp_path/"checkpoint-8"/"alf")
    with pytest.raises(
        RuntimeError,
        match=(
            r"cannot resume from checkpoint-8: it was saved without ALFCallback.*newest whole checkpoint here is"
            r" checkpoint-4"
        ),
    ):
        make(tmp_path, alf()).train(resume_from_checkpoint=str(tmp_path/"checkpoint-8"))
    assert same(resumed(tmp_path), whole)


# ---------------------------------------------------------------- the model changes under our feet

def test_a_model_that_is_cast_while_training(tmp_path):
    with pytest.raises(
        RuntimeError,
        match=r"the model was moved while it trains: \S+ was torch.float32 on cpu, and is torch.bfloat16 on cpu",
    ):
        make(tmp_path, alf(check="off"), At(5, lambda kw: kw["model"].to(torch.bfloat16))).train()
    log = RunLog(tmp_path)
    assert (
        log.status == "failed"
        and "moved" in log.events("error")[-1]["message"]
        and find_checkpoint(tmp_path).endswith("checkpoint-4")
    )


def test_a_model_that_is_moved_while_training(tmp_path):
    one = alf()

    def move(kw):       # as it looks from another device; there is only one here
        k, (p, _, dtype) = next(iter(one.run.guards.places.items()))
        one.run.guards.places[k] = p, torch.device("cuda", 0), dtype
    with pytest.raises(RuntimeError, match=r"was torch.float32 on cuda:0, and is torch.float32 on cpu"):
        make(tmp_path, one, At(5, move)).train()


@pytest.mark.parametrize(
    "kw", [dict(measure_every=2), dict(measure_every=100, interval=8), dict(measure_every=2, references="none")]
)
def test_replaced_parameters(tmp_path, kw):
    def replace(kw):
        m = kw["model"].model.layers[1].mlp
        m.up_proj.weight = torch.nn.Parameter(m.up_proj.weight.detach().clone())
    with pytest.raises(
        RuntimeError,
        match=(
            r"1 parameters of the model were replaced while it trains, the first is \S*layers.1.mlp.up_proj.weight: the"
            r" optimizer still trains the old"
        ),
    ):
        make(tmp_path, alf(**kw), At(5, replace)).train()
    assert RunLog(tmp_path).events("error")[-1]["step"] <= 8


# ---------------------------------------------------------------- rates that jump

@pytest.mark.parametrize("references", ["device", "8bit"])
def test_a_rate_that_jumps_is_told_once(tmp_path, references):
    unit = []

    def kick(kw):
        u = next(n for n in one.selection.names if n not in unit) if not unit else unit[0]
        unit.append(u)
        for p in one.run.layers.params(u): p.data.mul_(3 if len(unit) == 1 else 100)
    one = alf(measure_every=2, interval=0, references=references)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        make(tmp_path, one, At(7, kick), At(9, kick), max_steps=14).train()
    told = [str(w.message) for w in seen if "jumped" in str(w.message)]
    assert len(told) == 1 and unit[0] in told[0]
    e, = RunLog(tmp_path).events("jump")
    assert e["unit"] == unit[0] and e["rate"] > 10*e["before"] and e["moved"] > 1


def test_ordinary_training_has_no_jump(tmp_path):
    for i, kw in enumerate([dict(learning_rate=.1, optim="sgd"), dict(lr_scheduler_type="cosine", warmup_steps=4)]):
        make(tmp_path/str(i), alf(measure_every=2), max_steps=16, save_strategy="no", **kw).train()
        assert not RunLog(tmp_path/str(i)).events("jump")


# ---------------------------------------------------------------- NaN in one unit, frozen by choice

class Poison(TrainerCallback):
    "Writes NaN into the gradient of one unit at one step, after clipping: the optimizer spreads it"
    def __init__(self, one, step, every=False, value=float("nan")):
        self.one, self.step, self.every, self.value, self.units = one, step, every, value, []

    def on_pre_optimizer_step(self, args, state, control, **kw):
        if state.global_step + 1 != self.step: return
        self.units = list(self.one.selection.names) if self.every else self.one.selection.names[:1]
        for u in self.units:
            for p in self.one.run.layers.params(u): p.grad.view(-1)[1] = self.value


@pytest.mark.parametrize("references", ["device", "host"])
@pytest.mark.parametrize(
    "kw",
    [dict(), dict(pin=("block.0",)), dict(measure_every=3), dict(start="warm-up", warm_up=8), dict(policy="rotate")],
)
def test_a_unit_that_blows_up_is_put_back_and_frozen(tmp_path, kw, references):
    if references == "host" and kw: pytest.skip("one is enough")
    one, kept = alf(check="freeze", references=references, **kw), {}
    bad = Poison(one, 6)
    class Keep(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 0: self.on_step_end(args, state, control)

        def on_step_end(self, args, state, control, **_):
            if state.global_step <= 6:
                params = one.run.layers.params
                kept[state.global_step] = {n: [p.detach().clone() for p in params(n)] for n in one.run.names}
    with pytest.warns(
        UserWarning, match="got NaN or infinity at step 6: put back to the weights of step .*frozen for the rest"
    ):
        make(tmp_path, one, bad, Keep(), max_steps=16).train()
    (u,), log = bad.units, RunLog(tmp_path)
    e, = log.events("freeze")
    assert e["units"] == [u] and e["step"] == 6 and log.status == "complete"
    # the weights of its last reference, bit by bit
    assert all(torch.equal(a, b) for a, b in zip(kept[6][u], kept[e["since"][u]][u]))
    assert all(torch.equal(a, p) for a, p in zip(kept[6][u], one.run.layers.params(u)))  # and it never trained again
    assert all(u not in s.names for s in log.selections() if s.step >= 6) and len(log.selections()[-1].names) > 0
    assert all(p.isfinite().all() for p in one.run.layers.model.parameters())
    assert all(v is not None for v in log.series("log", "loss")[1])


@pytest.mark.parametrize("kw", [dict(), dict(max_grad_norm=0), dict(gradient_accumulation_steps=2)])
def test_nan_in_a_gradient_freezes_its_unit_before_clipping_spreads_it(tmp_path, kw):
    one, at6, kept = alf(check="freeze", measure_every=3), [], {}
    class Bad(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            kept[state.global_step] = {n: [p.detach().clone() for p in one.run.layers.params(n)] for n in one.run.names}
            if state.global_step == 5:
                at6.append(one.selection.names[-1])
                spoil = lambda g: g*(float("nan") if state.global_step == 5 else 1)
                one.run.layers.params(at6[0])[0].register_hook(spoil)
    with pytest.warns(
        UserWarning,
        match="got NaN or infinity in its gradient at step 6: this step changes nothing, and it is frozen for the rest",
    ):
        make(tmp_path, one, Bad(), max_steps=16, **kw).train()
    log, u = RunLog(tmp_path), at6[0]
    assert [(e["step"], e["units"]) for e in log.events("freeze")] == [(6, [u])] and log.status == "complete"
    assert all(torch.equal(a, b) for n in one.run.names for a, b in zip(kept[5][n], kept[6][n])) and any(
        not torch.equal(a, b) for n in one.run.names for a, b in zip(kept[6][n], kept[7][n])
    )
    assert all(u not in s.names for s in log.selections() if s.step >= 6) and all(
        torch.equal(a, p) for a, p in zip(kept[6][u], one.run.layers.params(u))
    )
    assert (
        all(v is not None for v in log.series("log", "loss")[1])
        and not one.run.layers.params(u)[0]._post_accumulate_grad_hooks
    )


def test_what_was_frozen_stays_frozen_after_a_resume(tmp_path):
    def make_one(step):
        one = alf(check="freeze")
        bad = Poison(one, step)
        return one, bad
    one, bad = make_one(3)
    with pytest.warns(UserWarning, match="frozen for the rest"): make(tmp_path/"whole", one, bad).train()
    u, end = bad.units[0], weights(type("T", (), dict(model=one.run.layers.model)))
    one, bad = make_one(3)
    def stop(kw): raise KeyboardInterrupt
    with pytest.warns(UserWarning, match="frozen for the rest"), pytest.raises(KeyboardInterrupt):
        make(tmp_path/"cut", one, bad, At(6, stop)).train()
    again = alf(check="freeze")
    t = make(tmp_path/"cut", again)
    t.train(resume_from_checkpoint=find_checkpoint(tmp_path/"cut"))
    assert again.run.banned == {u} and all(u not in s.names for s in RunLog(tmp_path/"cut").selections() if s.step >= 3)
    assert same(weights(t), end)
    # another policy, even one that pins it
    other = ALFCallback(budget=.5, interval=2, check="freeze", pin=u)
    t = make(tmp_path/"cut", other)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        t.train(resume_from_checkpoint=str(tmp_path/"cut"/"checkpoint-8"))
    assert u not in other.selection.names and u in other.run.policy.ban


def test_when_every_unit_blows_up_the_weights_are_put_back(tmp_path):
    one = alf(check="freeze", measure_every=2)
    with pytest.raises(
        RuntimeError, match="every unit that trains got NaN or infinity at step 6.*weights are those of step"
    ):
        make(tmp_path, one, Poison(one, 6, every=True, value=float("inf"))).train()
    assert all(p.isfinite().all() for p in one.run.layers.model.parameters())
    assert RunLog(tmp_path).status == "failed"


@pytest.mark.parametrize("references", ["8bit", "none"])
def test_freezing_needs_exact_references(references):
    with pytest.raises(
        ValueError, match=f"check='freeze' puts back the weights of the last window, which references='{references}'"
    ):
        ALFCallback(check="freeze", references=references)


# ---------------------------------------------------------------- batches without anything to learn

def masked(rows): return [dict(r, labels=[-100]*len(r["labels"])) for r in rows]


def test_empty_batches_in_the_probe_are_left_out(tmp_path):
    rows = demo_dataset()
    data = [r for i, r in enumerate(rows) if i % 8] + masked(rows[:8])
    with pytest.warns(UserWarning, match="batch(es)? of the probe left out.*all labels masked"): _probe_only(data)
    with pytest.raises(ValueError, match=r"at least 2, got 0; 8 batches of the probe left out"):
        make(tmp_path, alf(preset="probe"), data=masked(rows)).train()


def _probe_only(data):
    from alf_nb.model.layers import partition_layers
    from alf_nb.signals.probe import probe_gradients
    batch = lambda r: {k: torch.tensor([v]) for k, v in r.items()}
    found = probe_gradients(partition_layers(demo_model()), [batch(data[i]) for i in (0, -1, 1, 2)])
    clean = probe_gradients(partition_layers(demo_model()), [batch(data[i]) for i in (0, 1, 2)])
    assert found.batches == 3 and found.gain == clean.gain


def test_an_empty_batch_in_training_teaches_nothing_and_breaks_nothing(tmp_path):
    class Empty(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            if self.state.global_step == 5:
                # as Trainer counts them
                inputs["labels"], num_items_in_batch = torch.full_like(inputs["labels"], -100), torch.tensor(0)
            return super().training_step(model, inputs, num_items_in_batch)
    t = make(tmp_path, alf(measure_every=2))
    t.__class__ = Empty
    t.train()
    log = RunLog(tmp_path)
    assert log.status == "complete" and len(log.events("log")) == 12
    assert all(p.isfinite().all() for p in t.model.parameters())
