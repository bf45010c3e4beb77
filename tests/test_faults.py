"What goes wrong in real training: each fault is told by name, and what was there before it is still there."
import errno
import os
import shutil
import warnings

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from alf_nb import trainer as room
from alf_nb.checkpoints import find_checkpoint
from alf_nb.demo import demo_dataset, demo_model
from alf_nb.runlog import RunLog
from alf_nb.trainer import ALFCallback


def make(folder, *callbacks, model=None, data=None, **kw):
    torch.manual_seed(0)
    args = TrainingArguments(**{**dict(output_dir=str(folder), max_steps=12, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
                                       save_strategy="steps", save_steps=4, seed=3), **kw})
    t = Trainer(model or demo_model(), args, train_dataset=demo_dataset() if data is None else data, callbacks=list(callbacks))
    t.remove_callback(PrinterCallback)
    return t


def alf(**kw): return ALFCallback(**{**dict(budget=.3, interval=4), **kw})


class At(TrainerCallback):
    "Does something to the training after a step, or before the optimizer's"
    def __init__(self, step, f, when="step_end"): self.step, self.f, self.when = step, f, when

    def on_step_end(self, args, state, control, **kw):
        if self.when == "step_end" and state.global_step == self.step: self.f(kw)

    def on_pre_optimizer_step(self, args, state, control, **kw):
        if self.when == "pre_step" and state.global_step == self.step: self.f(kw)


def weights(t): return {k: v.clone() for k, v in t.model.state_dict().items()}


def resumed(folder):
    t = make(folder, alf())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        t.train(resume_from_checkpoint=find_checkpoint(folder))
    return weights(t)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    t = make(tmp_path_factory.mktemp("whole"), alf()); t.train()
    return weights(t)


def same(a, b): return all(torch.equal(a[k], b[k]) for k in a)


def test_a_full_disk_while_saving(tmp_path, whole, monkeypatch):
    write, calls = room.save_file, []

    def full(tensors, path, **kw):
        calls.append(path)
        if len(calls) == 2: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(tensors, path, **kw)
    monkeypatch.setattr(room, "save_file", full)
    with pytest.raises(OSError, match="No space left"): make(tmp_path, alf()).train()
    monkeypatch.undo()
    with pytest.warns(UserWarning, match=r"passed over checkpoint-8 \(its writing was cut off\): going on from checkpoint-4"): assert find_checkpoint(tmp_path)
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
    with pytest.raises(RuntimeError, match="hold NaN or infinity after step"): make(tmp_path, alf(measure_every=2), At(5, poison)).train()
    last = RunLog(tmp_path).events("error")[-1]
    assert last["message"].startswith("weights of ") and RunLog(tmp_path).status == "failed"


def test_a_loss_that_is_nan(tmp_path):
    def poison(kw):
        for p in kw["model"].parameters():
            if p.grad is not None: p.grad.fill_(float("nan"))
    with pytest.raises(RuntimeError, match=r"NaN or infinity after step \d+ \(and \d+ more units\)"): make(tmp_path, alf(measure_every=2), At(5, poison, "pre_step"), max_grad_norm=0).train()
    best = find_checkpoint(tmp_path)
    assert best.endswith("checkpoint-4")                                                            # none was saved with NaN in it


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
    now, jumps = room.time.time, iter([0, -7200, 86400]*10000)
    monkeypatch.setattr(room.time, "time", lambda: now() + next(jumps))
    t = make(tmp_path, alf()); t.train()
    assert same(weights(t), whole)                                                                  # nothing is decided by the clock
    log = RunLog(tmp_path)
    assert log.status == "complete" and log.series("log", "loss")[0] == list(range(1, 13))


def test_one_kept_checkpoint_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="save_total_limit=1.*keep 2"): make(tmp_path, alf(), save_total_limit=1).train()


def test_a_checkpoint_that_vanishes(tmp_path, whole):
    with pytest.raises(KeyboardInterrupt): make(tmp_path, alf(), At(10, lambda kw: (_ for _ in ()).throw(KeyboardInterrupt()))).train()
    shutil.rmtree(tmp_path/"checkpoint-8"/"alf")
    with pytest.raises(RuntimeError, match=r"cannot resume from checkpoint-8: it was saved without ALFCallback.*newest whole checkpoint here is checkpoint-4"): make(tmp_path, alf()).train(resume_from_checkpoint=str(tmp_path/"checkpoint-8"))
    assert same(resumed(tmp_path), whole)
