"""One process writes in a run folder: the second is told who the first is, and a killed one is followed at once. Of
processes that a launcher started, see test_processes.py."""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings

import forks
import pytest
import torch
from small_run import same, small_trainer, weights
from transformers import TrainerCallback

from alf_nb.train.background import train_in_background
from alf_nb.core.checkpoints import find_checkpoint
from alf_nb.study.compare import compare_policies
from alf_nb.study.task import Task
from alf_nb.demo import demo_dataset, demo_model, demo_tokenizer
from alf_nb.app.finetune import finetune
from alf_nb.core.lock import RunLock
from alf_nb.train.loop import ALFLoop
from alf_nb.core.runlog import RunLog
from alf_nb.train.trainer import ALFCallback

ENV = {
    k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
} | dict(OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore")
def alf(**kw): return ALFCallback(**{**dict(budget=.3, interval=4), **kw})


def make(folder, *callbacks, **kw):
    return small_trainer(folder, *(callbacks or [alf()]), **{**dict(save_strategy="steps", save_steps=4), **kw})


def own(folder, workers, training):
    "In a process of its own: train behind the third step, and stay there"
    class Wait(TrainerCallback):
        def on_step_end(self, args, state, control, **kw):
            if state.global_step != 3: return
            training.set()
            time.sleep(600)
    torch.set_num_threads(1)
    how = dict(dataloader_num_workers=workers, save_strategy="steps", save_steps=2)
    small_trainer(folder, ALFCallback(budget=.3), Wait(), **how).train()


def owner(folder, workers=0):
    "Another process that trains there, behind its third step"
    training = forks.event()
    p = forks.begin(own, folder, workers, training)
    while not training.wait(.1): assert p.is_alive(), "it died"
    return p


def writers(folder):
    "All that would write there, each with what it needs"
    rows = [{k: torch.tensor([v]) for k, v in r.items()} for r in demo_dataset(4)]
    notes = folder.with_name("notes.txt")
    notes.write_text("\n\n".join(f"note {i}: the quick brown fox." for i in range(20)))

    def loop():
        m = demo_model(blocks=2)
        return ALFLoop(m, torch.optim.SGD(m.parameters(), lr=.1), rows, 2, out=folder, budget=.4, probe_batches=2)
    return dict(
        trainer=lambda: make(folder).train(),
        log_there=lambda: make(folder.with_name("other"), alf(out=str(folder))).train(),
        checkpoints_there=lambda: make(folder, alf(out=str(folder.with_name("other")))).train(),
        background=lambda: train_in_background(make(folder)).wait(),
        loop=loop,
        finetune=lambda: finetune(
            (demo_model(blocks=2), demo_tokenizer()), str(notes), folder, steps=2, max_length=32, progress=False
        ),
    )


def test_a_second_process_is_refused_and_told_who_the_first_is_and_a_killed_one_is_followed_at_once(tmp_path):
    folder = tmp_path/"run"
    p = owner(folder, workers=1)
    try:
        before = {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}
        for name, write in writers(folder).items():
            with pytest.raises(
                RuntimeError,
                match=(
                    rf"process {p.pid} on {re.escape(socket.gethostname())} \(a training run, since .*\) is writing to"
                    rf" {re.escape(str(folder))}: wait for it, end it, or give another folder"
                ),
            ):
                write()
            assert {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()} == before, name
        assert RunLog(folder).status == "unfinished" and find_checkpoint(folder)  # who reads needs no lock
    finally:
        p.kill()
        p.join()
    assert (folder/"alf.lock").exists()
    make(folder).train(resume_from_checkpoint=find_checkpoint(folder))  # at once: its worker, a fork, may still live
    assert RunLog(folder).status == "complete" and not (folder/"alf.lock").exists()


def test_a_forked_child_does_not_keep_the_lock_of_its_killed_parent(tmp_path):
    script = (
        "import os, time\nfrom alf_nb.core.lock import RunLock\n"
        f"lock = RunLock({str(tmp_path)!r}).acquire()\nready, begun = os.pipe()\n"
        "if not (pid := os.fork()):\n    os.write(begun, b'.')\n    time.sleep(600)\n"      # the child has begun
        "os.read(ready, 1)\nprint(pid, flush=True)\ntime.sleep(600)"
    )
    p = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=ENV)
    pid = int(p.stdout.readline())
    with pytest.raises(RuntimeError, match=f"process {p.pid} on"): RunLock(tmp_path).acquire()
    p.kill()
    p.wait()
    p.stdout.close()
    try:
        with RunLock(tmp_path): os.kill(pid, 0)
    finally: os.kill(pid, signal.SIGKILL)


def test_a_child_that_is_started_from_a_run_does_not_write_beside_it(tmp_path):
    with RunLock(tmp_path):
        p = subprocess.run(
            [sys.executable, "-c", f"from alf_nb.core.lock import RunLock; RunLock({str(tmp_path)!r}).acquire()"],
            capture_output=True,
            text=True,
            env=ENV,
        )
        assert f"process {os.getpid()} on" in p.stderr
        if pid := os.fork(): assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        else:
            try: RunLock(tmp_path).acquire()
            except RuntimeError: os._exit(7)
            os._exit(0)


def test_many_that_start_at_once_are_one(tmp_path):
    script = (
        "import sys, time\nfrom alf_nb.core.lock import RunLock\nsys.stdin.readline()\ntry: lock ="
        f" RunLock({str(tmp_path)!r}).acquire()\nexcept RuntimeError: print('no', flush=True)\nelse: print('yes',"
        " flush=True)\nsys.stdin.readline()"
    )
    ps = [
        subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENV
        )
        for _ in range(8)
    ]
    for _ in range(2):
        for p in ps:
            p.stdin.write("\n")
            p.stdin.flush()
        said = [p.stdout.readline().strip() for p in ps] if _ == 0 else said
    for p in ps: p.communicate()
    assert sorted(said) == ["no"]*7 + ["yes"]


@pytest.mark.parametrize("fcntl", ["there", "without locks"])
def test_the_owner_on_another_machine_and_a_number_that_is_used_again(tmp_path, monkeypatch, fcntl):
    from alf_nb.core import lock as room
    # as some network file systems
    if fcntl == "without locks": monkeypatch.setattr(room, "_grab", lambda fd: None)
    me, path = room._me("a run"), tmp_path/"alf.lock"
    for change, taken in (
        (dict(host="node7", boot="x"), False),
        (dict(host="renamed", pid=2**22 + 5), True),
        (dict(boot="x", pid=2**22 + 5), True),
        (dict(started=1), True),
        (dict(pid=1, started=5), True),
        ({}, fcntl == "there"),
    ):
        path.write_text(json.dumps(me | change))
        if taken:
            with RunLock(tmp_path): assert json.loads(path.read_text())["pid"] == os.getpid()
        else:
            with pytest.raises(
                RuntimeError,
                match=(
                    "node7.*another machine, which cannot be asked from here.*if that process is gone, delete"
                    " .*alf.lock"
                    if change
                    else "wait for it, end it"
                ),
            ):
                RunLock(tmp_path).acquire()
            path.unlink()


def test_a_run_that_failed_is_started_again_in_the_same_process(tmp_path):
    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **kw):
            if state.global_step == 2: raise MemoryError
    first = make(tmp_path, alf(), Fails())
    # e keeps the frames, and with them the callback
    with pytest.raises(MemoryError) as e: first.train()
    # another thread, as the first does not train any more
    with pytest.raises(MemoryError): train_in_background(make(tmp_path, alf(), Fails())).wait()
    make(tmp_path).train()
    assert e and first and RunLog(tmp_path).status == "complete" and not (tmp_path/"alf.lock").exists()


class Fails(TrainerCallback):
    def on_step_end(self, args, state, control, **kw):
        if state.global_step == 2: raise MemoryError("no memory left, said the test")


def test_a_run_that_failed_gives_its_folder_back_and_leaves_the_model_trainable(tmp_path):
    failing = alf()
    trainer = make(tmp_path, failing, Fails())
    with pytest.raises(MemoryError): trainer.train()
    assert not (tmp_path/"alf.lock").exists() and not failing.training
    assert all(p.requires_grad for p in trainer.model.parameters())


def test_settings_that_do_not_fit_leave_no_lock(tmp_path):
    with pytest.raises(ValueError): make(tmp_path, alf(pin="nothing")).train()
    with pytest.raises(ValueError):
        make(
            tmp_path,
            alf(preset="probe"),
            data=[dict(r, labels=[-100]*len(r["labels"])) for r in demo_dataset(8)],
        ).train()
    assert not (tmp_path/"alf.lock").exists()


def test_two_threads_do_not_write_in_one_folder(tmp_path):
    go, here = threading.Event(), threading.Event()

    class Wait(TrainerCallback):
        def on_step_end(self, args, state, control, **kw):
            here.set()
            go.wait(60)
    run = train_in_background(make(tmp_path, alf(), Wait()))
    here.wait(60)
    try:
        for name, write in writers(tmp_path).items():
            if name not in ("background", "log_there", "checkpoints_there"):
                with pytest.raises(
                    RuntimeError, match="a training run in thread 'alf_nb training' of this process is writing to"
                ):
                    write()
    finally: go.set()
    run.wait()
    assert run.status == "complete"


def test_two_comparisons_do_not_write_one_file(tmp_path):
    rows = demo_dataset(8)
    task = Task(demo_model(blocks=2), rows, rows, bf16=False)
    (tmp_path / "p.jsonl.lock").write_text(
        json.dumps(dict(host="node7", boot="x", pid=4, started=5, what="compare_policies()", since="today"))
    )
    go = lambda: compare_policies(
        task, methods="full", amount=1, seeds=0, lrs=(1e-3,), out=tmp_path / "p.jsonl", progress=False
    )
    with pytest.raises(RuntimeError, match=r"process 4 on node7 \(compare_policies\(\), since today\)"): go()
    assert not (tmp_path/"p.jsonl").exists()
    (tmp_path/"p.jsonl.lock").unlink()
    go()
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix in (".jsonl", ".lock")) == ["p.jsonl"]


# ---------------------------------------------------------------- checkpoints belong to a run

def stop_at(step):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kw):
            if state.global_step == step: raise KeyboardInterrupt
    return Stop()


def used_twice(folder, **kw):
    "A first run of 12 steps, and a second one of another seed that died at step 6; their ids"
    ids = []
    for seed, end in ((1, None), (2, 6)):
        t = make(folder, alf(), *([stop_at(end)] if end else []), seed=seed, **kw)
        try: t.train()
        except KeyboardInterrupt: pass
        ids.append(RunLog(folder).begin["run_id"])
    return ids


def test_trainer_alone_would_go_on_from_the_first_run_and_is_told_the_right_checkpoint(tmp_path):
    first, second = used_twice(tmp_path)
    with pytest.raises(
        RuntimeError,
        match=(
            rf"checkpoint-12 belongs to run {first}, and a newer run, {second}, was begun in .* since: go on from it"
            r" with resume_from_checkpoint='.*checkpoint-4'.*ALFCallback\(resume_from='.*checkpoint-12'\)"
        ),
    ):
        make(tmp_path).train(resume_from_checkpoint=True)
    assert not RunLog(tmp_path).events("resume")
    with pytest.warns(
        UserWarning,
        match=(
            rf"passed over checkpoint-12 \(of run {first}, and the newest run is {second}\).*going on from checkpoint-4"
        ),
    ):
        right = find_checkpoint(tmp_path)
    t = make(tmp_path, seed=2)
    t.train(resume_from_checkpoint=right)
    whole = make(tmp_path/"whole", seed=2)
    whole.train()
    assert same(weights(t), weights(whole)) and RunLog(tmp_path).begin["run_id"] == second


def test_an_old_checkpoint_that_is_named_is_meant(tmp_path):
    first, second = used_twice(tmp_path)
    for i, (name, kw) in enumerate(
        (("checkpoint-8", {}), ("checkpoint-12", dict(resume_from=str(tmp_path / "checkpoint-12"))))
    ):
        shutil.copytree(tmp_path, folder := tmp_path.with_name(f"{tmp_path.name}-{i}"))
        kw = {k: v.replace(str(tmp_path), str(folder)) for k, v in kw.items()}
        with pytest.warns(
            UserWarning,
            match=rf"{name} belongs to run {first}, and a newer run, {second}, was begun in .* since: was it meant",
        ):
            make(folder, alf(**kw), max_steps=14).train(resume_from_checkpoint=str(folder/name))
        log = RunLog(folder)
        # it is the newest now
        assert (
            log.begin["run_id"] == first
            and log.events("resume")[-1]["run_id"] == first
            and log.events("run_end")[-1]["step"] == 14
        )
        assert log.events("run_begin", run=0)[0]["run_id"] == second
        make(folder, max_steps=16).train(resume_from_checkpoint=True)
        assert RunLog(folder).begin["run_id"] == first


def test_in_the_background_the_newest_run_goes_on(tmp_path):
    _, second = used_twice(tmp_path)
    with pytest.warns(UserWarning, match="passed over"):
        train_in_background(make(tmp_path, seed=2), resume_from_checkpoint=True).wait()
    assert (
        RunLog(tmp_path).begin["run_id"] == second and RunLog(tmp_path).events("resume")[-1]["path"] == "checkpoint-4"
    )
    third = make(tmp_path, alf(), stop_at(2), seed=3)
    with pytest.raises(KeyboardInterrupt): third.train()
    with warnings.catch_warnings(), pytest.raises(
        ValueError, match="has no whole checkpoint yet, and checkpoint-12 is of run"
    ):
        warnings.simplefilter("ignore")
        train_in_background(make(tmp_path), resume_from_checkpoint=True)


def test_a_limit_on_checkpoints_deletes_none_of_an_earlier_run_and_none_of_the_new(tmp_path):
    with pytest.warns(
        UserWarning,
        match="holds checkpoints of an earlier run, which save_total_limit=2 would have deleted: they are in .*earlier",
    ):
        first, second = used_twice(tmp_path, save_total_limit=2)
    assert sorted(p.name for p in (tmp_path / "earlier" / first).iterdir()) == ["checkpoint-12", "checkpoint-8"] and [
        p.name for p in tmp_path.glob("checkpoint-*")
    ] == ["checkpoint-4"]
    t = make(tmp_path, seed=2, save_total_limit=2)
    t.train(resume_from_checkpoint=True)
    whole = make(tmp_path/"whole", seed=2)
    whole.train()
    assert same(weights(t), weights(whole))
    old = tmp_path/"earlier"/first/"checkpoint-8"
    with pytest.warns(UserWarning, match="was it meant"):
        make(tmp_path, alf(resume_from=str(old))).train(resume_from_checkpoint=str(old))


def test_a_loop_does_not_go_on_from_the_state_of_an_earlier_run(tmp_path):
    rows = [{k: torch.tensor([v]) for k, v in r.items()} for r in demo_dataset(4)]

    def begin(model, out, resume=None, opt=None):
        opt = opt or torch.optim.SGD(model.parameters(), lr=.1)
        return ALFLoop(model, opt, rows, 4, out=out, resume=resume, budget=.4, probe_batches=2), opt
    m = demo_model(blocks=2)
    alf, opt = begin(m, tmp_path/"run")
    m(**rows[0]).loss.backward()
    alf.step()
    state, kept = alf.state_dict(), {k: v.clone() for k, v in m.state_dict().items()}
    first = alf.run.run_id
    alf.close(ValueError("it failed"))
    again, _ = begin(demo_model(blocks=2), tmp_path/"run")
    again.close(ValueError("it failed, too"))
    m = demo_model(blocks=2)
    m.load_state_dict(kept)
    with pytest.raises(
        RuntimeError,
        match=(
            rf"belongs to run {first}, and a newer run, {again.run.run_id}, was begun in .*run since: give another"
            r" out="
        ),
    ):
        begin(m, tmp_path/"run", state)
    begin(m, tmp_path/"other", state)[0].close()
    assert not (tmp_path/"run"/"alf.lock").exists()
