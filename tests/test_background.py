"Training in a thread: steered at random it stays exact, and a real kernel shows what went wrong in it."
import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging as hf_logging

from alf_nb.train.background import train_in_background
from alf_nb.demo import demo_dataset, demo_model
from alf_nb.train.loop import ALFLoop
from alf_nb.core.runlog import RunLog
from alf_nb.train.trainer import ALFCallback

SETUP = """
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from alf_nb.train.background import train_in_background
from alf_nb.demo import demo_dataset, demo_model
from alf_nb.train.trainer import ALFCallback
def make(out, *callbacks, steps=30):
    args = TrainingArguments(output_dir=out, max_steps=steps, report_to=[], use_cpu=True, disable_tqdm=True,
                             save_strategy='no', logging_steps=1)
    alf = ALFCallback(budget=.3, interval=8)
    return Trainer(demo_model(), args, train_dataset=demo_dataset(), callbacks=[alf, *callbacks])
class Fails(TrainerCallback):
    def on_step_begin(self, args, state, control, **kw):
        if state.global_step == 2: raise MemoryError('no memory left, said the test')
"""


def trainer(folder, alf, *callbacks, steps=60):
    torch.manual_seed(0)
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        seed=3,
    )
    return Trainer(demo_model(), args, train_dataset=demo_dataset(), callbacks=[alf, *callbacks])


class Slow(TrainerCallback):
    "Gives the other thread time to steer"
    def on_step_begin(self, args, state, control, **kw): time.sleep(.01)


class Replay(TrainerCallback):
    "Makes the choices of another run at the same steps, in the foreground"
    def __init__(self, alf, log): self.alf, self.choices = alf, {e["step"]: e for e in log.events("choose")}

    def on_step_end(self, args, state, control, **kw):
        if e := self.choices.get(state.global_step): self.alf.choose(policy=e["policy"], now=e["now"])


def test_steered_at_random_is_replayed_exactly(tmp_path):
    "What the log says happened is what happened: the same choices made at the same steps give the same bits"
    rng = random.Random(0)
    live = ALFCallback(budget=.3, interval=8, select_until=1.)
    run = train_in_background(trainer(tmp_path/"live", live, Slow()))
    while run.alive:
        try:
            run.choose(
                **rng.choice([dict(budget=rng.uniform(0.1, 0.5)), dict(threshold=rng.uniform(0, 0.9))]),
                now=rng.random() < 0.3,
            )
        except RuntimeError: pass       # not begun yet, over, or no re-selection is left
        time.sleep(rng.random()*.05)
    run.wait()
    assert len(run.log.events("choose")) > 5
    again = ALFCallback(budget=.3, interval=8, select_until=1.)
    plain = trainer(tmp_path/"again", again)
    plain.callback_handler.callbacks.insert(0, Replay(again, run.log))
    plain.train()
    assert [(e["step"], e["names"]) for e in RunLog(tmp_path / "again").events("select")] == [
        (e["step"], e["names"]) for e in run.log.events("select")
    ]
    assert all(
        torch.equal(a, b) for a, b in zip(plain.model.state_dict().values(), run.trainer.model.state_dict().values())
    )


def test_paused_at_random_nothing_changes(tmp_path):
    rng = random.Random(1)
    run = train_in_background(trainer(tmp_path/"live", ALFCallback(budget=.3, interval=8), Slow()))
    while run.alive:
        try:
            run.pause()
            time.sleep(rng.random()*.1)
            run.resume()
        except RuntimeError: pass       # over
        time.sleep(rng.random()*.05)
    run.wait()
    assert len(run.log.events("pause")) == len(run.log.events("unpause")) > 0
    plain = trainer(tmp_path/"plain", ALFCallback(budget=.3, interval=8))
    plain.train()
    assert all(
        torch.equal(a, b) for a, b in zip(plain.model.state_dict().values(), run.trainer.model.state_dict().values())
    )


def test_the_thread_uses_torchs_threads(tmp_path):
    seen = []

    class Look(TrainerCallback):
        def on_step_begin(self, *args, **kw): seen.append(torch.get_num_threads())
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try: train_in_background(trainer(tmp_path, ALFCallback(budget=.3), Look(), steps=2)).wait()
    finally: torch.set_num_threads(before)
    assert seen == [3, 3]


@pytest.fixture
def bars():
    "transformers shows progress bars, whatever ran before"
    were = hf_logging.is_progress_bar_enabled()
    hf_logging.enable_progress_bar()
    yield
    if not were: hf_logging.disable_progress_bar()


def test_a_checkpoint_prints_nothing_into_the_cell_that_runs_meanwhile(tmp_path, capfd, bars):
    alf = ALFCallback(budget=.3, interval=8)
    run = train_in_background(trainer(tmp_path, alf, Slow()))
    run.save()
    run.wait(60)
    out, err = capfd.readouterr()
    assert list(tmp_path.glob("checkpoint-*")) and "shards" not in out + err
    assert hf_logging.is_progress_bar_enabled()


def test_stop_before_the_first_step(tmp_path):
    run = train_in_background(trainer(tmp_path, ALFCallback(budget=.3)))
    run.stop()
    run.wait()
    assert run.status == "stopped" and run.step == 1 and (tmp_path/"checkpoint-1"/"alf"/"state.json").exists()


def test_waiting_has_an_end(tmp_path):
    run = train_in_background(trainer(tmp_path, ALFCallback(budget=.3), Slow()))
    assert run.wait(timeout=.05) is False and run.alive
    run.stop()
    assert run.wait(timeout=30) is True


def interrupted(wait):
    "Call `wait`, which Ctrl-C ends"
    timer = threading.Timer(.2, os.kill, (os.getpid(), signal.SIGINT))
    gc.disable()     # hypothesis listens to the collector: there Python forgets what Ctrl-C raises
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt): wait()
    finally:
        timer.join()
        gc.enable()


def until(run, step):
    "Wait until the run is there"
    while run.step < step:
        assert run.alive, run
        time.sleep(.001)


@pytest.mark.timeout(180)
@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_ctrl_c_ends_the_waiting_and_not_the_run(tmp_path):
    "The run is alive, trains on, takes wishes and stops; a second run of its model is refused"
    run = train_in_background(trainer(tmp_path, ALFCallback(budget=.3), Slow(), steps=100_000))
    try:
        until(run, 1)
        for _ in range(3):
            interrupted(run.wait)
            assert run.alive and run.status == "running"
            until(run, run.step + 2)
        with pytest.raises(RuntimeError, match="this model is training"): train_in_background(run.trainer)
        run.pause()
        run.resume()
    finally: run.stop()      # or it would train on beside all other tests, and draw their random numbers
    assert run.wait(timeout=60) and not run.alive and run.status == "stopped"
    train_in_background(trainer(tmp_path/"again", ALFCallback(budget=.3), steps=2)).wait()


def test_a_second_training_of_the_model_is_refused_and_the_first_goes_on(tmp_path):
    """The same Trainer, another one with ALF and one without, a wrapped model, a loop, the callback elsewhere; bit
    for bit nothing has happened"""
    plain = trainer(tmp_path/"plain", ALFCallback(budget=.3, interval=8))
    plain.train()
    live = trainer(tmp_path/"live", ALFCallback(budget=.3, interval=8), Slow())
    args = trainer(tmp_path/"other", ALFCallback()).args
    model, free = live.model, demo_model()

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, **kw): return self.inner(**kw)

    def other(m, *c): return Trainer(m, args, train_dataset=demo_dataset(), callbacks=list(c))
    same_callback = other(free, *[c for c in live.callback_handler.callbacks if isinstance(c, ALFCallback)])
    assert sum(isinstance(c, ALFCallback) for c in same_callback.callback_handler.callbacks) == 1
    trainers = dict(
        same=live,
        other=other(model, ALFCallback()),
        without=other(model),
        wrapped=other(Wrapped()),
        inside=other(model.model),
        callback=same_callback,
    )
    seconds = dict(
        loop=lambda: ALFLoop(model, torch.optim.AdamW(model.parameters()), [], max_steps=2),
        background=lambda: train_in_background(run.trainer),
    )
    torch.manual_seed(3)                                                 # as making the plain one left it
    run = train_in_background(live)
    until(run, 3)
    for name, second in (seconds | {k: lambda t=t: t.train() for k, t in trainers.items()}).items():
        with pytest.raises(
            RuntimeError,
            match=f"this {'ALFCallback' if name == 'callback' else 'model'} is training in the background.*run.stop()",
        ):
            second()
    run.wait()
    assert run.status == "complete" and RunLog(tmp_path/"live").status == "complete"
    assert all(torch.equal(a, b) for a, b in zip(plain.model.state_dict().values(), model.state_dict().values()))
    other(model, ALFCallback()).train()                                  # when it is over, the model trains again
    trainer(tmp_path/"free", ALFCallback(), steps=2).train()


def test_the_next_training_is_prepared_while_one_runs(tmp_path):
    """New TrainingArguments empty what accelerate knows of the process, and a new callback thaws what a dead run
    left frozen: neither may reach the run"""
    plain = trainer(tmp_path/"plain", ALFCallback(budget=.3, interval=8))
    plain.train()
    run, made = train_in_background(trainer(tmp_path/"live", ALFCallback(budget=.3, interval=8), Slow())), 0
    while run.step < 1 and run.alive: time.sleep(.001)
    while run.alive:
        args, made = TrainingArguments(output_dir=str(tmp_path/"next"), report_to=[], use_cpu=True), made + 1
        ALFCallback().on_init_end(args, None, None, model=run.trainer.model)
    assert run.wait() and made > 5
    assert all(
        torch.equal(a, b) for a, b in zip(plain.model.state_dict().values(), run.trainer.model.state_dict().values())
    )


def test_of_six_threads_that_start_at_once_one_starts(tmp_path, monkeypatch):
    shared = trainer(tmp_path, ALFCallback(budget=.3), Slow(), steps=400)
    gate = threading.Barrier(6)
    runs = []
    refused = []
    begin = threading.Thread.start

    def slowly(self):
        # so that all are there before the first has begun
        if self.name == "alf_nb training": time.sleep(.2)
        begin(self)
    monkeypatch.setattr(threading.Thread, "start", slowly)

    def start():
        gate.wait()
        try: runs.append(train_in_background(shared))
        except RuntimeError as e: refused.append(str(e))
    threads = [threading.Thread(target=start) for _ in range(6)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(runs) == 1 and len(refused) == 5 and all("this model is training" in r for r in refused)
    runs[0].stop()
    assert runs[0].wait(timeout=60)


def test_when_no_thread_is_to_be_had_nothing_is_left_behind(tmp_path, monkeypatch):
    run_of = trainer(tmp_path, ALFCallback(budget=.3), steps=2)

    def none(self): raise RuntimeError("can't start new thread")
    with monkeypatch.context() as m:
        m.setattr(threading.Thread, "start", none)
        with pytest.raises(RuntimeError, match="can't start new thread"): train_in_background(run_of)
    assert train_in_background(run_of).wait()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_forked_child_has_no_run(tmp_path):
    "Threads do not come along: there the model is free"
    run = train_in_background(trainer(tmp_path, ALFCallback(budget=.3), Slow(), steps=100_000))
    pid = os.fork()
    if not pid: os._exit(int(run.alive))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    run.stop()
    run.wait()
    assert code == 0


def test_a_run_does_not_wait_for_itself(tmp_path):
    class Waits(TrainerCallback):
        def on_step_begin(self, args, state, control, **kw): runs[0].wait()
    runs = []
    gated = trainer(tmp_path, ALFCallback(budget=.3), Slow(), Waits())
    run = train_in_background(gated)
    runs.append(run)
    with pytest.raises(RuntimeError, match="cannot wait for its own end"): run.wait()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_script_waits_for_its_run(tmp_path):
    """Without wait() a script ends when the run does, also when it left the run paused and failed; its fork is another
    script, which did neither"""
    (tmp_path/"train.py").write_text(SETUP + """
import os
fork = os.fork()
run = train_in_background(make('paused' if fork else 'plain', steps=12))
if fork:
    run.pause()
    assert os.waitpid(fork, 0)[1] == 0
    1/0
""")
    p = subprocess.run(
        [sys.executable, "train.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
    )
    assert p.returncode == 1 and "ZeroDivisionError" in p.stderr, p.stderr
    assert RunLog(tmp_path/"plain").status == RunLog(tmp_path/"paused").status == "complete"
    assert RunLog(tmp_path/"paused").events("pause")


def cells(tmp_path, *sources):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in (SETUP, *sources)])
    NotebookClient(nb, timeout=120, kernel_name="python3", resources=dict(metadata=dict(path=str(tmp_path)))).execute()
    return [
        "".join(o.get("text", "") + o.get("data", {}).get("text/plain", "") for o in c.outputs) for c in nb.cells[1:]
    ]


@pytest.mark.timeout(180)
def test_in_a_real_kernel(tmp_path, monkeypatch):
    "A failure is shown once, under the next cell; the training thread prints nothing anywhere; the kernel stays free"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")     # a tiny model on many threads mostly waits
    out = cells(
        tmp_path,
        "run = train_in_background(make('out', Fails()))",
        "import time\nwhile run.alive: time.sleep(.01)",
        "1 + 1",
        "2 + 2",
        "good = train_in_background(make('good'))\nfree = good.alive\ngood.wait()\nfree, good.status",
        "3 + 3",
    )
    assert "no memory left, said the test" in out[1] and "on_step_begin" in out[1]
    assert out[0] == "" and out[2] == "2" and out[3] == "4" and out[4] == "(True, 'complete')" and out[5] == "6"
