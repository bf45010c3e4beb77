"""`finetune` killed anywhere behind its last step, or with a full disk there: a resume finishes what is missing
without training again, and the result is that of a run that nobody killed."""
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import forks
import pytest
import torch
from transformers import Trainer

from alf_nb.app import disk as saves, finetune as finetuning, job as jobs
from alf_nb.app.publish import card_text
from alf_nb.core.checkpoints import verify_checkpoint
from alf_nb.model.delta import apply_delta, read_delta
from alf_nb.demo import demo_model, demo_tokenizer
from alf_nb.app.finetune import finetune
from alf_nb.core.runlog import RunLog

STEPS = 4
# the size of card and description depends on the times in them
TIMES = (
    "_s",
    "_per_step",
    "_per_second",
    "rss_bytes_peak",
    "importance_overhead_share",
    "date",
    "run_id",
    "run",
    "delta_bytes",
)


@pytest.fixture(scope="module")
def notes(tmp_path_factory):
    f = tmp_path_factory.mktemp("data")/"notes.txt"
    f.write_text("\n\n".join(f"note {i}: the quick brown fox jumps over the lazy dog. "*6 for i in range(20)))
    return str(f)


def job(notes, out, net=None, **kw):
    settings = dict(
        steps=STEPS,
        max_length=32,
        eval_blocks=2,
        probe_batches=2,
        measure_every=2,
        interval=2,
        budget=0.4,
        lr=1e-2,
        bf16=False,
        progress=False,
        attention=6,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return finetune((net or demo_model(blocks=2), demo_tokenizer()), notes, out, other=notes, **{**settings, **kw})


def figures(summary): return {k: v for k, v in summary.items() if not k.endswith(TIMES)}


def parts(folder):
    "What the report is made of: headings, rows, pictures, and whether it says that something is amiss"
    text = (folder/"report.html").read_text()
    return (
        [p.split("</h2>")[0] for p in text.split("<h2>")[1:]],
        text.count("<tr"),
        text.count("<svg"),
        text.count('class="warning"'),
    )


def what(folder):
    "All that a run leaves, but for times"
    tensors = demo_model(blocks=2)
    apply_delta(tensors, folder/"delta")
    log = RunLog(folder)
    kinds = [(e["event"], e["step"]) for e in log.events() if e["event"] not in ("resume", "note")]
    evals = [(e["name"], e["when"], e["loss"]) for e in log.events("eval")]
    evals += [e["text"] for e in log.events("sample")]
    evals += [e["shift"] for e in log.events("attention")]
    summary = json.loads((folder/"summary.json").read_text())
    meta = read_delta(folder/"delta").metadata
    assert (
        meta == json.loads((folder / "delta" / "delta.json").read_text())["metadata"]
        and meta["run_id"] == log.begin["run_id"] == summary["run_id"]
    )
    assert (folder/"delta"/"README.md").read_text() == card_text(folder/"delta", folder)
    return figures(summary), kinds, evals, parts(folder), [t.tolist() for t in tensors.state_dict().values()]


def states(folder, run):
    "Copies of the folder at each moment behind the last step at which something in it had changed"
    kept, armed, busy, names = [], [], [], set()

    def look(*args):
        if not armed or busy: return
        busy.append(1)
        mark = tuple(
            sorted(
                (str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns)
                for p in folder.rglob("*")
                if p.is_file() and p.name != "alf.lock"
            )
        )
        if mark not in names:
            names.add(mark)
            kept.append(
                shutil.copytree(
                    folder, folder.with_name(f"state{len(kept)}"), ignore=shutil.ignore_patterns("alf.lock")
                )
            )
        busy.clear()

    def hook(event, args):
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"): look()
    on_step_end, write = finetuning.Bar.on_step_end, RunLog.write

    def last(self, args, state, control, **kw):
        on_step_end(self, args, state, control, **kw)
        if state.global_step == STEPS: armed.append(1)

    def writes(self, *args, **kw):
        look()
        write(self, *args, **kw)
        look()
    sys.addaudithook(lambda event, args: HOOK and HOOK[0](event, args))
    finetuning.Bar.on_step_end, RunLog.write = last, writes
    HOOK.append(hook)
    try: run()
    finally:
        HOOK.clear()
        finetuning.Bar.on_step_end, RunLog.write = on_step_end, write
    return kept


HOOK = []


@pytest.mark.parametrize("save_steps", [0, 2])
def test_killed_anywhere_behind_the_last_step_a_resume_finishes_without_training(
    tmp_path, notes, monkeypatch, save_steps
):
    whole, copies = tmp_path/"whole", []
    copies = states(whole, lambda: job(notes, whole, save_steps=save_steps))
    assert len(copies) > 12
    wanted, trained, trains = what(whole), [], Trainer.train

    def train(self, *args, **kw):
        trained.append(1)
        return trains(self, *args, **kw)
    monkeypatch.setattr(Trainer, "train", train)
    n_trained = n_lost = n_done = 0
    for folder in copies:
        trained.clear()
        shutil.move(folder, again := tmp_path/"again")
        saved = (again/"delta"/"delta.safetensors").exists() or not verify_checkpoint(again/f"checkpoint-{STEPS}")
        try: job(notes, again, save_steps=save_steps, resume=True)
        except ValueError as e:
            if saved:
                assert "its delta is written" in str(e) and (again/"summary.json").exists()
                n_done += 1
            else:
                assert not save_steps and "nothing to resume" in str(e)      # the weights were in memory only
                n_lost += 1
                shutil.rmtree(again)
                continue
        assert bool(trained) == (not saved)
        n_trained += bool(trained)
        got = what(again)
        if trained: assert got[0] | dict(resumed=0) == wanted[0] and got[2] == wanted[2] and got[4] == wanted[4]
        else: assert got == wanted
        shutil.rmtree(again)
    assert n_done == 1 and (n_trained if save_steps else n_lost) < len(copies)


def child(folder, notes, place, save_steps):
    "A run in a process of its own that is killed at a place"
    torch.set_num_threads(1)
    here = lambda: os.kill(os.getpid(), signal.SIGKILL)
    name, before = place

    def dying(f):
        def g(*args, **kw):
            if before: here()
            f(*args, **kw)
            here()
        return g
    where = dict(evaluate_loss=jobs, save_delta=saves).get(name, finetuning)
    setattr(where, name, dying(getattr(where, name)))
    job(notes, Path(folder), save_steps=save_steps)


PLACES = [
    ("evaluate_loss", True),
    ("save_delta", True),
    ("save_delta", False),
    ("write_card", True),
    ("write_card", False),
    ("write_report", False),
    ("write_whole", True),
    ("write_whole", False),
]


@pytest.mark.parametrize("place", PLACES[1:], ids=lambda p: f"{'before' if p[1] else 'after'}-{p[0]}")
def test_a_killed_process_leaves_what_a_resume_finishes(tmp_path, notes, place):
    save_steps = 2 if place == ("save_delta", True) else 0
    assert forks.run(child, str(tmp_path/"run"), notes, place, save_steps) == -signal.SIGKILL
    assert (tmp_path/"run"/"alf.lock").exists()
    if place == ("write_whole", False):
        with pytest.raises(
            ValueError, match=f"has made {STEPS} steps, and its delta is written, with report and summary"
        ):
            job(notes, tmp_path/"run", resume=True, save_steps=save_steps)
    else: job(notes, tmp_path/"run", resume=True, save_steps=save_steps)
    job(notes, tmp_path/"whole", save_steps=save_steps)
    assert what(tmp_path/"run") == what(tmp_path/"whole") and not (tmp_path/"run"/"alf.lock").exists()


def test_a_resume_wants_the_base_that_the_run_began_with(tmp_path, notes):
    net = demo_model(blocks=2)
    job(notes, tmp_path, net)
    shutil.rmtree(tmp_path/"delta")
    # the weights are gone
    with pytest.raises(ValueError, match="nothing to resume: no whole checkpoint"): job(notes, tmp_path, resume=True)
    job(notes, tmp_path, save_steps=2)
    (tmp_path/"summary.json").unlink()
    with pytest.raises(ValueError, match="is not the one that the run in .* began with"):
        job(notes, tmp_path, net, resume=True, save_steps=2)
    job(notes, tmp_path, resume=True, save_steps=2)
    assert (tmp_path/"summary.json").exists()


# ---------------------------------------------------------------- a folder that is used again

def test_a_second_run_in_a_folder_keeps_what_the_first_one_left(tmp_path, notes):
    job(notes, tmp_path, save_steps=2)
    first = RunLog(tmp_path).begin["run_id"]
    kept = {
        n: (tmp_path / n).read_bytes()
        for n in ("summary.json", "report.html", "delta/delta.safetensors", f"checkpoint-{STEPS}/model.safetensors")
    }
    with pytest.warns(UserWarning) as said:
        finetune(
            (demo_model(blocks=2), demo_tokenizer()),
            notes,
            tmp_path,
            steps=6,
            save_steps=2,
            other=notes,
            max_length=32,
            eval_blocks=2,
            probe_batches=2,
            interval=2,
            budget=0.4,
            lr=1e-2,
            bf16=False,
            progress=False,
        )
    assert sum(f"earlier/{first}" in str(w.message) for w in said) == 2  # of results, and of checkpoints
    assert {n: (tmp_path/"earlier"/first/n).read_bytes() for n in kept} == kept
    log = RunLog(tmp_path)
    second = log.begin["run_id"]
    assert second != first and [log.events("run_begin", run=k)[0]["run_id"] for k in (0, 1)] == [first, second]
    assert (
        read_delta(tmp_path / "delta").metadata["run_id"]
        == second
        == json.loads((tmp_path / "summary.json").read_text())["run_id"]
    )
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"] and not any(
        verify_checkpoint(p) for p in tmp_path.glob("checkpoint-*")
    )


@pytest.mark.parametrize("save_steps", [0, 3])
def test_a_second_run_that_dies_does_not_go_on_from_the_first(tmp_path, notes, monkeypatch, save_steps):
    job(notes, tmp_path, save_steps=2)
    first, on_step_end = RunLog(tmp_path).begin["run_id"], finetuning.Bar.on_step_end

    def die(self, args, state, control, **kw):
        if state.global_step == 5: raise KeyboardInterrupt
    monkeypatch.setattr(finetuning.Bar, "on_step_end", die)
    with pytest.raises(KeyboardInterrupt): job(notes, tmp_path, steps=8, save_steps=save_steps)
    monkeypatch.setattr(finetuning.Bar, "on_step_end", on_step_end)
    second = RunLog(tmp_path).begin["run_id"]
    assert second != first
    if save_steps:
        job(notes, tmp_path, steps=8, save_steps=save_steps, resume=True)
        assert (
            RunLog(tmp_path).events("resume")[-1]["path"] == "checkpoint-3"
            and read_delta(tmp_path / "delta").metadata["run_id"] == second
        )
    else:
        with pytest.raises(
            ValueError,
            match=f"the newest run in .*, {second}, has no whole checkpoint yet, and checkpoint-2 is of run {first}",
        ), pytest.warns(UserWarning, match="passed over"):
            finetune((demo_model(blocks=2), demo_tokenizer()), notes, tmp_path, steps=8, resume=True, progress=False)


# ---------------------------------------------------------------- a disk that is full: a real one, of its own

@pytest.fixture
def disk(tmp_path):
    "A small disk, and a function that fills it but for so many bytes"
    where = tmp_path/"disk"
    where.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(where)], capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")

    def fill(left):
        (where/"others").unlink(missing_ok=True)
        with open(where/"others", "wb") as f: f.write(bytes(max(0, shutil.disk_usage(where).free - left)))
    yield where, fill
    subprocess.run(["umount", "-l", str(where)], check=True)


def pad(log, page=4096):
    "End a log with a page of the disk: the next line needs a new one"
    room = -log.stat().st_size % page
    head, tail = b'{"event":"note","step":0,"text":"', b'"}\n'
    if room < len(head + tail): room += page
    with open(log, "ab") as f: f.write(head + b"x"*(room - len(head + tail)) + tail)


def full_at(monkeypatch, fill, step, left):
    on_step_end = finetuning.Bar.on_step_end

    def later(self, args, state, control, **kw):
        on_step_end(self, args, state, control, **kw)
        if state.global_step != step: return
        if not left: pad(Path(args.output_dir)/"events.jsonl")
        fill(left)
    monkeypatch.setattr(finetuning.Bar, "on_step_end", later)


def test_a_disk_that_is_full_at_the_delta_loses_no_training(tmp_path, notes, disk, monkeypatch):
    where, fill = disk
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    full_at(monkeypatch, fill, STEPS, 48 << 10)  # room for the log, not for the delta
    net = demo_model(blocks=2)
    with pytest.raises(
        OSError,
        match=(
            "the training is not lost, the delta was written to .* instead: make room, move that folder to"
            " .*resume=True"
        ),
    ) as e:
        job(notes, where/"run", net)
    assert e.value.errno == errno.ENOSPC and e.value.model is net and not list((where/"run").rglob("*.safetensors"))
    kept, = tmp_path.glob("alf_nb-*/delta")
    assert same(apply(kept), net)
    fill(1 << 30)
    (where/"others").unlink()
    shutil.move(kept, where/"run"/"delta")
    job(notes, where/"run", resume=True)
    job(notes, tmp_path/"whole")
    assert what(where/"run") == what(tmp_path/"whole")


def test_a_disk_that_is_full_at_the_last_line_of_the_log_loses_no_training(tmp_path, notes, disk, monkeypatch):
    where, fill = disk
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    full_at(monkeypatch, fill, STEPS, 0)
    net = demo_model(blocks=2)
    with pytest.raises(
        OSError, match=rf"what was learnt in {STEPS} of {STEPS} steps is kept as a delta in .*resume=True.*finishes"
    ) as e:
        job(notes, where/"run", net)
    kept, = tmp_path.glob("alf_nb-*/delta")
    assert e.value.model is net and same(apply(kept), net)
    (where/"others").unlink()
    shutil.move(kept, where/"run"/"delta")
    job(notes, where/"run", resume=True)
    job(notes, tmp_path/"whole")
    got, wanted = what(where/"run"), what(tmp_path/"whole")
    assert got[2] == wanted[2] and got[4] == wanted[4]
    differ = {k for k in wanted[0] if got[0][k] != wanted[0][k]}
    assert differ <= {"damaged_lines", "seconds_per_step"}  # the line that did not fit


def test_a_disk_that_is_full_while_it_trains_keeps_what_was_learnt(tmp_path, notes, disk, monkeypatch):
    where, fill = disk
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    full_at(monkeypatch, fill, 2, 0)
    net = demo_model(blocks=2)
    with pytest.raises(OSError, match=rf"what was learnt in \d of {STEPS} steps is kept as a delta in") as e:
        job(notes, where/"run", net)
    kept, = tmp_path.glob("alf_nb-*/delta")
    assert same(apply(kept), net) and e.value.model is net


def test_without_any_room_the_error_carries_the_model(tmp_path, notes, disk, monkeypatch):
    where, fill = disk
    monkeypatch.setenv("TMPDIR", str(where))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.chdir(where)
    full_at(monkeypatch, fill, STEPS, 48 << 10)
    net = demo_model(blocks=2)
    with pytest.raises(OSError, match="no other place with room: the trained model is this error's .model") as e:
        job(notes, where/"run", net)
    assert e.value.model is net and not list(where.rglob("alf_nb-*"))


def test_what_cannot_fit_is_refused_before_the_first_step(tmp_path, notes, disk):
    where, fill = disk
    fill(16 << 10)
    with pytest.raises(
        OSError,
        match=(
            "no room for the delta of what is selected: it takes at least .*, and .* are free. Make room, or give a"
            " folder on another disk"
        ),
    ):
        job(notes, where/"a")
    with pytest.raises(OSError, match="no room for the delta and 2 checkpoints"): job(notes, where/"b", save_steps=2)
    assert not RunLog(where/"a").events("memory") and not (where/"b"/"events.jsonl").exists()
    fill(300 << 10)
    with pytest.warns(
        UserWarning, match="the disk of .* may be too small: the delta and 2 checkpoints may take .*, and .* are free"
    ), pytest.raises((OSError, RuntimeError)):
        finetune(
            (demo_model(blocks=2), demo_tokenizer()),
            notes,
            where / "c",
            steps=STEPS,
            save_steps=2,
            max_length=32,
            eval_blocks=2,
            probe_batches=2,
            budget=0.4,
            bf16=False,
            progress=False,
        )


def apply(folder):
    model = demo_model(blocks=2)
    apply_delta(model, folder)
    return model


def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
