"Training in a thread: steered at random it stays exact, and a real kernel shows what went wrong in it."
import os
import random
import subprocess
import sys
import time

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from transformers import Trainer, TrainerCallback, TrainingArguments

from alf_nb.background import train_in_background
from alf_nb.demo import demo_dataset, demo_model
from alf_nb.runlog import RunLog
from alf_nb.trainer import ALFCallback

SETUP = """
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from alf_nb.background import train_in_background
from alf_nb.demo import demo_dataset, demo_model
from alf_nb.trainer import ALFCallback
def make(out, *callbacks, steps=30):
    args = TrainingArguments(output_dir=out, max_steps=steps, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy='no', logging_steps=1)
    return Trainer(demo_model(), args, train_dataset=demo_dataset(), callbacks=[ALFCallback(budget=.3, interval=8), *callbacks])
class Fails(TrainerCallback):
    def on_step_begin(self, args, state, control, **kw):
        if state.global_step == 2: raise MemoryError('no memory left, said the test')
"""


def trainer(folder, alf, *callbacks, steps=60):
    torch.manual_seed(0)
    args = TrainingArguments(output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1, report_to=[], use_cpu=True,
                             disable_tqdm=True, save_strategy="no", seed=3)
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
    live = ALFCallback(budget=.3, interval=8, lock=1.)
    run = train_in_background(trainer(tmp_path/"live", live, Slow()))
    while run.alive:
        try: run.choose(**rng.choice([dict(budget=rng.uniform(.1, .5)), dict(threshold=rng.random())]), now=rng.random() < .3)
        except RuntimeError: pass       # not begun yet, over, or no re-selection is left
        time.sleep(rng.random()*.05)
    run.wait()
    assert len(run.log.events("choose")) > 5
    again = ALFCallback(budget=.3, interval=8, lock=1.)
    plain = trainer(tmp_path/"again", again)
    plain.callback_handler.callbacks.insert(0, Replay(again, run.log))
    plain.train()
    assert [(e["step"], e["names"]) for e in RunLog(tmp_path/"again").events("select")] == [(e["step"], e["names"]) for e in run.log.events("select")]
    assert all(torch.equal(a, b) for a, b in zip(plain.model.state_dict().values(), run.trainer.model.state_dict().values()))


def test_paused_at_random_nothing_changes(tmp_path):
    rng = random.Random(1)
    run = train_in_background(trainer(tmp_path/"live", ALFCallback(budget=.3, interval=8), Slow()))
    while run.alive:
        try: run.pause(); time.sleep(rng.random()*.1); run.resume()
        except RuntimeError: pass       # over
        time.sleep(rng.random()*.05)
    run.wait()
    assert len(run.log.events("pause")) == len(run.log.events("unpause")) > 0
    plain = trainer(tmp_path/"plain", ALFCallback(budget=.3, interval=8))
    plain.train()
    assert all(torch.equal(a, b) for a, b in zip(plain.model.state_dict().values(), run.trainer.model.state_dict().values()))


def test_the_thread_uses_torchs_threads(tmp_path):
    seen = []

    class Look(TrainerCallback):
        def on_step_begin(self, *args, **kw): seen.append(torch.get_num_threads())
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try: train_in_background(trainer(tmp_path, ALFCallback(budget=.3), Look(), steps=2)).wait()
    finally: torch.set_num_threads(before)
    assert seen == [3, 3]


def test_stop_before_the_first_step(tmp_path):
    run = train_in_background(trainer(tmp_path, ALFCallback(budget=.3)))
    run.stop(); run.wait()
    assert run.status == "stopped" and run.step == 1 and (tmp_path/"checkpoint-1"/"alf"/"state.json").exists()


def test_waiting_has_an_end(tmp_path):
    run = train_in_background(trainer(tmp_path, ALFCallback(budget=.3), Slow()))
    assert run.wait(timeout=.05) is False and run.alive
    run.stop()
    assert run.wait(timeout=30) is True


@pytest.mark.parametrize("end", ["", "run.pause(); 1/0"])
def test_a_script_waits_for_its_run(tmp_path, end):
    "Without wait() a script ends when the run does, also when it left the run paused"
    (tmp_path/"train.py").write_text(SETUP + f"run = train_in_background(make('out', steps=12))\n{end}\n")
    p = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120, env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert p.returncode == bool(end), p.stderr
    assert RunLog(tmp_path/"out").status == "complete"


def cells(tmp_path, *sources):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in (SETUP, *sources)])
    NotebookClient(nb, timeout=120, kernel_name="python3", resources=dict(metadata=dict(path=str(tmp_path)))).execute()
    return ["".join(o.get("text", "") + o.get("data", {}).get("text/plain", "") for o in c.outputs) for c in nb.cells[1:]]


@pytest.mark.timeout(180)
def test_in_a_real_kernel(tmp_path, monkeypatch):
    "A failure is shown once, under the next cell; the training thread prints nothing anywhere; the kernel stays free"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")     # a tiny model on many threads mostly waits
    out = cells(tmp_path, "run = train_in_background(make('out', Fails()))", "import time\nwhile run.alive: time.sleep(.01)", "1 + 1", "2 + 2",
                "good = train_in_background(make('good'))\nfree = good.alive\ngood.wait()\nfree, good.status", "3 + 3")
    assert "no memory left, said the test" in out[1] and "on_step_begin" in out[1]
    assert out[0] == "" and out[2] == "2" and out[3] == "4" and out[4] == "(True, 'complete')" and out[5] == "6"
