"""The run log is deleted, renamed, cut, replaced or moved while a run writes to it: the run goes on at its path, in
a file that can be read alone, and readers follow."""
import errno
import os
import shutil
import warnings

import pytest
from small_run import losses, same, small_trainer, weights
from transformers import TrainerCallback

from alf_nb.core import runlog
from alf_nb.report.page import write_report
from alf_nb.report.summary import summarize
from alf_nb.core.runlog import RunLog
from alf_nb.train.trainer import ALFCallback
from alf_nb.widgets.base import LogReader

pytestmark = pytest.mark.skipif(os.name != "posix", reason="an open file cannot be moved there")


def unlink(p): p.unlink()


def rename(p): p.rename(p.with_name("events.jsonl.1"))


def move_folder(p): p.parent.rename(p.parent.with_name("moved"))


def remove_folder(p): shutil.rmtree(p.parent)


def cut(p): os.truncate(p, 0)


def cut_half(p): os.truncate(p, p.stat().st_size//2)


def copy_and_cut(p):
    shutil.copy(p, p.with_name("events.jsonl.1"))
    os.truncate(p, 0)


def other_longer(p):
    p.with_name("new").write_bytes(b'{"event":"log","step":1}\n'*10000)
    p.with_name("new").replace(p)


def folder_became_a_file(p):
    shutil.rmtree(p.parent)
    p.parent.write_text("")


ACCIDENTS = [unlink, rename, move_folder, remove_folder, cut, cut_half, copy_and_cut, other_longer]


def begun(folder, **kw):
    log = RunLog(folder/"run")
    log.write(
        "run_begin",
        step=0,
        run_id="a",
        units=[dict(name="u", layer="u", role="q", kind="matrix", n_params=4, depth=1)],
        n_total=4,
        max_steps=9,
        config=dict(budget=0.5),
    )
    log.write("log", step=1, loss=3.)
    return log


@pytest.mark.parametrize("accident", ACCIDENTS)
def test_the_run_goes_on_in_a_file_that_can_be_read_alone(tmp_path, accident):
    log = begun(tmp_path)
    accident(log.path)
    with pytest.warns(
        UserWarning,
        match="the run log .*events.jsonl (is gone|was cut short|is another file now): the run goes on in a new one",
    ):
        log.write("log", step=2, loss=2.)
    with warnings.catch_warnings():
        warnings.simplefilter("error")                                   # said once
        log.write("log", step=3, loss=1.)
        accident(log.path) if accident not in (move_folder, other_longer) else None
        log.write("log", step=4, loss=.5)
        log.write("run_end", step=4)
    log.close()
    alone = RunLog(log.path)
    assert alone.begin["run_id"] == "a" and alone.units[0].name == "u" and alone.status == "complete" and log.lost == 0
    assert alone.series("log", "loss")[1][-1:] == [.5]
    assert summarize(alone)["n_total"] == 4 and write_report(alone).exists()


@pytest.mark.parametrize("accident", [rename, copy_and_cut])
def test_both_files_together_are_one_run(tmp_path, accident):
    log = begun(tmp_path)
    accident(log.path)
    with pytest.warns(UserWarning): log.write("log", step=2, loss=2.)
    log.close()
    (tmp_path/"all.jsonl").write_bytes((tmp_path/"run"/"events.jsonl.1").read_bytes() + log.path.read_bytes())
    both = RunLog(tmp_path/"all.jsonl")
    assert both.series("log", "loss")[1] == [3., 2.] and both.events(run=0) == both.events(run=-1) and both.damaged == 0


def test_a_copy_in_its_place_is_written_on_without_a_word(tmp_path):
    "An editor saves so, and a file system of the network may number a file anew"
    log = begun(tmp_path)
    shutil.copy(log.path, tmp_path/"copy")
    (tmp_path/"copy").replace(log.path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log.write("log", step=2, loss=2.)
    assert RunLog(log.path).series("log", "loss")[1] == [3., 2.] and len(RunLog(log.path).events("run_begin")) == 1


def test_another_writer_at_the_end_of_the_file_is_no_accident(tmp_path):
    log = begun(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with RunLog(log.path) as other: other.write("eval", step=1, name="domain", when="after", loss=1.)
        log.write("log", step=2, loss=2.)
    assert len(RunLog(log.path).events()) == 4


def test_a_log_that_is_closed_deleted_and_written_again_begins_again(tmp_path):
    log = begun(tmp_path)
    log.close()
    log.path.unlink()
    with pytest.warns(UserWarning, match="is gone"): log.write("log", step=2, loss=2.)
    assert RunLog(log.path).begin["run_id"] == "a"


def test_a_second_writer_finds_the_first_line_in_the_file_that_was_deleted(tmp_path):
    "It did not write it itself, and holds the file open"
    begun(tmp_path).close()
    log = RunLog(tmp_path/"run")
    log.write("eval", step=1, name="domain", when="after", loss=1.)
    log.path.unlink()
    with pytest.warns(UserWarning): log.write("log", step=2, loss=2.)
    assert RunLog(log.path).begin["run_id"] == "a"


def test_where_no_new_file_can_be_made(tmp_path, monkeypatch):
    """A file that was moved is written on; of one that is gone each event is counted, and the first that can be
    written says so"""
    log, real = begun(tmp_path), os.open

    def refuse(path, *a, **kw):
        if str(path) == str(log.path): raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, *a, **kw)
    log.path.rename(tmp_path/"moved.jsonl")
    monkeypatch.setattr(runlog.os, "open", refuse)
    with pytest.warns(UserWarning, match="cannot be made there"): log.write("log", step=2, loss=2.)
    assert RunLog(tmp_path/"moved.jsonl").series("log", "loss")[1] == [3., 2.]
    (tmp_path/"moved.jsonl").unlink()
    with pytest.raises(OSError, match="cannot write 'log' to the run log"): log.write("log", step=3, loss=1.)
    log.write("log", step=4, loss=1.)
    monkeypatch.setattr(runlog.os, "open", real)
    log.write("log", step=5, loss=.5)
    assert [(e["step"], e.get("lost")) for e in RunLog(log.path).events("log")] == [(5, 2)] and RunLog(log.path).begin[
        "run_id"
    ] == "a"


class Accident(TrainerCallback):
    def __init__(self, step, accident): self.step, self.accident = step, accident

    def on_step_begin(self, args, state, control, **kw):
        from pathlib import Path
        if state.global_step == self.step: self.accident(Path(args.output_dir)/"events.jsonl")


@pytest.mark.parametrize("accident", [unlink, rename, move_folder, copy_and_cut])
def test_a_training_learns_the_same_and_is_reported(tmp_path, accident):
    plain = small_trainer(tmp_path/"plain", ALFCallback(budget=.3, interval=4))
    plain.train()
    t = small_trainer(tmp_path/"run", ALFCallback(budget=.3, interval=4), Accident(6, accident))
    with pytest.warns(UserWarning, match="the run goes on in a new one"): t.train()
    assert same(weights(t), weights(plain)) and losses(t) == losses(plain)
    s = summarize(tmp_path/"run")
    assert s["status"] == "complete" and s["steps"] == 12 and s["n_total"] == summarize(tmp_path/"plain")["n_total"]
    assert (
        RunLog(tmp_path / "run").series("log", "loss")[0] == list(range(7, 13))
        and write_report(tmp_path / "run").exists()
    )


def test_a_run_that_is_resumed_without_its_log_begins_one(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kw): control.should_training_stop = state.global_step == 6
    kw = dict(save_strategy="steps", save_steps=4)
    small_trainer(tmp_path, ALFCallback(budget=.3, interval=4), Stop(), **kw).train()
    (tmp_path/"events.jsonl").unlink()
    small_trainer(tmp_path, ALFCallback(budget=.3, interval=4), **kw).train(resume_from_checkpoint=True)
    s = summarize(tmp_path)
    assert (
        s["status"] == "complete"
        and s["n_total"]
        and s["resumed"] == 1
        and RunLog(tmp_path).units
        and RunLog(tmp_path).series("log", "loss")[0] == list(range(5, 13))
    )


def longer(p, keep):
    "Another file in the place of `p`, longer than it"
    p.with_name("new").write_bytes(keep + b'{"event":"log","step":7,"loss":1.0}\n'*200)
    p.with_name("new").replace(p)


@pytest.mark.parametrize("change", ["longer", "same size", "cut and longer", "deleted and made again", "longer copy"])
def test_poll_reads_what_stands_there_now(tmp_path, change):
    log = begun(tmp_path)
    log.close()
    reader, kept = RunLog(log.path), log.path.read_bytes()
    assert len(reader.poll()) == 2 and reader.poll() == []
    other = b'{"event":"log","step":7,"loss":1.0}\n'
    if change == "longer": longer(log.path, b"")
    if change == "same size": log.path.write_bytes(other*3 + b"\n"*(len(kept) - 3*len(other)))
    if change == "cut and longer": log.path.write_bytes(other*200)
    if change == "deleted and made again":
        log.path.unlink()
        assert reader.poll() == []
        log.path.write_bytes(other*200)
    if change == "longer copy": longer(log.path, kept)
    # of a copy only what is new
    assert len(reader.poll()) == dict({"same size": 3}).get(change, 200) and reader.poll() == []
    with open(log.path, "ab") as f: f.write(other)
    assert len(reader.poll()) == 1


def test_views_follow_into_the_new_file(tmp_path):
    log = begun(tmp_path)
    seen = LogReader(log.path)
    seen.update()
    log.path.unlink()
    with pytest.warns(UserWarning): log.write("log", step=2, loss=2.)
    assert seen.update() and seen.state.series("log", "loss")[1] == [3., 2.] and seen.state.units[0].name == "u"
    longer(log.path, b'{"event":"run_begin","step":0,"run_id":"b"}\n')
    assert seen.update() and seen.state.begin["run_id"] == "b" and len(seen.state.events("log")) == 200


@pytest.mark.parametrize(
    "odd", [lambda p: os.mkfifo(p), lambda p: p.symlink_to(p.with_name("elsewhere")), lambda p: p.mkdir()]
)
def test_what_is_no_file_in_its_place_does_not_end_the_run(tmp_path, odd):
    """Nothing is written through it: the run goes on in the file that was moved; if that is gone, too, each event is
    counted"""
    log = begun(tmp_path)
    log.path.rename(tmp_path/"moved.jsonl")
    odd(log.path)
    with pytest.warns(UserWarning, match="cannot be made there"): log.write("log", step=2, loss=2.)
    assert (
        RunLog(tmp_path / "moved.jsonl").series("log", "loss")[1] == [3.0, 2.0]
        and not log.path.with_name("elsewhere").exists()
    )
    (tmp_path/"moved.jsonl").unlink()
    with pytest.raises(OSError, match="cannot write 'log' to the run log"): log.write("log", step=3, loss=1.)
    log.write("log", step=4, loss=1.)
    assert log.lost == 2
