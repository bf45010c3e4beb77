"""What is written whole: killed at any moment there is the old or the new, what is left is cleared by the next
writer, and the disk has everything before the name says so."""
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from small_run import small_trainer

from alf_nb.core import files
from alf_nb.app import finetune as room
from alf_nb.core.checkpoints import MANIFEST, verify_checkpoint, write_manifest
from alf_nb.model.delta import save_delta
from alf_nb.model.fingerprint import fingerprint
from alf_nb.demo import demo_model, demo_tokenizer
from alf_nb.report.page import write_report
from alf_nb.core.runlog import RunLog
from alf_nb.sources.packaged import _is_whole, _publish
from alf_nb.train.trainer import ALFCallback

posix = pytest.mark.skipif(os.name != "posix", reason="needs fork")


def parts(folder): return [p for p in Path(folder).rglob("*") if files.is_part(p)]


def died(work, name, nth):
    "Do `work` in a child that is killed in the `nth` call of os.`name`; True: it came that far"
    pid = os.fork()
    if not pid:
        try:
            real, left = getattr(os, name), [nth]

            def call(*a, **kw):
                left[0] -= 1
                if not left[0]: os.kill(os.getpid(), signal.SIGKILL)
                return real(*a, **kw)
            setattr(os, name, call)
            work()
        finally: os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def changed():
    m = demo_model()
    with torch.no_grad(): next(m.parameters()).add_(1)
    return m


def delta(folder): save_delta(changed(), fingerprint(demo_model()), folder)


def seal(folder):
    for n in ("model.safetensors", "alf/state.json"):
        (folder/n).parent.mkdir(exist_ok=True)
        (folder/n).write_bytes(bytes(100))
    write_manifest(folder)


def report(folder):
    with RunLog(folder) as log: log.write("run_begin", step=0, run_id="a", max_steps=1)
    write_report(folder)


def cache(folder): _publish(lambda new: (new/"config.json").write_text("{}"), folder/"model")


def fresh_cache(folder):
    shutil.rmtree(folder/"model", ignore_errors=True)
    cache(folder)


def state(folder):
    with files.replacing(folder/"alf") as part:
        part.mkdir()
        (part/"state.json").write_text("{}")


WRITERS = dict(delta=delta, seal=seal, report=report, cache=fresh_cache, state=state)


@posix
@pytest.mark.parametrize("name", WRITERS)
def test_what_a_killed_writer_leaves_is_cleared_by_the_next(tmp_path, name):
    write, left = WRITERS[name], []
    for call in ("fsync", "replace"):
        for nth in range(1, 20):
            if not died(lambda: write(tmp_path), call, nth): break
            left.append(len(parts(tmp_path)))
    assert any(left) and max(left) <= 2  # what the last death left: a folder that is replaced is two for a moment
    assert died(lambda: write(tmp_path), "replace", 1) and parts(tmp_path)
    write(tmp_path)
    assert parts(tmp_path) == []


@posix
def test_a_part_is_neither_sealed_nor_missed(tmp_path):
    folder = tmp_path/"checkpoint-4"
    folder.mkdir()
    seal(folder)
    assert died(lambda: files.write_whole(folder/"alf"/"big.bin", bytes(1000)), "replace", 1)
    left, = parts(folder)
    assert verify_checkpoint(folder) == ""                                # nothing is missing, and nothing too many
    write_manifest(folder)
    assert left.name not in (folder/MANIFEST).read_text() and verify_checkpoint(folder) == ""
    left.unlink()
    assert verify_checkpoint(folder) == ""


@posix
def test_the_part_of_a_living_writer_is_never_cleared(tmp_path):
    "A slow writer in another process, and one in another thread, while others write beside them"
    code = f"""
import sys
sys.path.insert(0, {str(Path(files.__file__).parents[1])!r})
from alf_nb.core.files import replacing
with replacing({str(tmp_path/'slow')!r}) as part:
    part.write_text('whole'); print('writing', flush=True); input()
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "writing\n"
    go, ready = threading.Event(), threading.Event()

    def slow():
        with files.replacing(tmp_path/"thread") as part:
            part.write_text("whole")
            ready.set()
            go.wait()
    thread = threading.Thread(target=slow)
    thread.start()
    ready.wait()
    for p in parts(tmp_path): os.utime(p, (1, 1))                        # however old it looks
    for i in range(3): files.write_whole(tmp_path/"quick", f"{i}")
    assert len(parts(tmp_path)) == 2
    go.set()
    thread.join()
    child.communicate("\n")
    assert [(tmp_path / n).read_text() for n in ("slow", "thread", "quick")] == ["whole", "whole", "2"] and parts(
        tmp_path
    ) == []


@posix
def test_a_number_that_is_used_again_does_not_keep_a_part(tmp_path):
    "Processes in a container often have the number of the one that was killed before"
    if not files.process_start(os.getpid()): pytest.skip("this system does not say when a process began")
    mine = files._part(tmp_path/"a")
    began = files.process_start(os.getpid())
    before = mine.with_name(mine.name.replace(f"-{began}-", f"-{began-1}-"))
    before.write_text("half")
    mine.write_text("half")
    files.clear_parts(tmp_path)
    assert not before.exists() and mine.exists()


@posix
def test_a_child_that_nobody_waited_for_is_dead(tmp_path):
    pid = os.fork()
    if not pid:
        with files.replacing(tmp_path/"a") as part:
            part.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    for _ in range(500):
        if files.process_start(pid) < 0: break
        time.sleep(.01)
    else: pytest.skip("this system does not tell a process that has ended and was not waited for")
    files.clear_parts(tmp_path)
    assert parts(tmp_path) == []
    os.waitpid(pid, 0)


def test_names_of_others_are_left_alone(tmp_path):
    "Only what carries our whole mark goes"
    names = [
        ".a.part-12345678",
        "a.part-12345678-1-1-1",
        ".part-1",
        ".a.part-1234567g-1-1-1",
        "x.tmp",
        ".delta.safetensors.9.tmp",
    ]
    for n in names: (tmp_path/n).write_text("theirs")
    files.write_whole(tmp_path/"mine", "mine")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*names, "mine"])


class Recorder:
    "Every flush and rename, with what was flushed and its last change"
    def __init__(self, patch):
        self.calls, fsync, replace = [], os.fsync, os.replace

        def flushed(fd):
            s = os.fstat(fd)
            self.calls.append(("fsync", s.st_ino, s.st_mtime_ns))
            return fsync(fd)

        def renamed(a, b, **kw):
            self.calls.append(("replace", os.stat(a).st_ino, str(b)))
            return replace(a, b, **kw)
        patch.setattr(os, "fsync", flushed)
        patch.setattr(os, "replace", renamed)

    def rename_to(self, path):
        return max(i for i, c in enumerate(self.calls) if c[0] == "replace" and c[2] == str(path))

    def last(self, path, before=None):
        "When `path` was flushed for the last time, and in which state"
        return max(
            ((i, c[2]) for i, c in enumerate(self.calls[:before]) if c[:2] == ("fsync", os.stat(path).st_ino)),
            default=(-1, 0),
        )


def durable_when(seen, file):
    "The file was flushed as it is, then renamed, then the folder that names it"
    at = seen.rename_to(file)
    assert seen.last(file, at) == (seen.last(file)[0], file.stat().st_mtime_ns) and seen.last(file)[0] >= 0, file
    assert seen.last(file.parent)[0] > at, f"{file.parent} after {file}"
    return at


@posix
def test_a_checkpoint_is_on_the_disk_before_its_seal(tmp_path, monkeypatch):
    seen, sealed = Recorder(monkeypatch), []

    class Look(ALFCallback):
        def on_save(self, args, state, control, **kw):
            super().on_save(args, state, control, **kw)
            folder = Path(args.output_dir)/f"checkpoint-{state.global_step}"
            at = durable_when(seen, folder/MANIFEST)
            inside = [p for p in folder.rglob("*") if p.name != MANIFEST]
            assert {p.name for p in inside} >= {
                "model.safetensors",
                "optimizer.pt",
                "rng_state.pth",
                "trainer_state.json",
                "alf",
                "state.json",
                "tensors.safetensors",
            }
            for p in inside:
                i, when = seen.last(p, at)
                assert (
                    i >= 0 and when == p.stat().st_mtime_ns
                ), f"{p} was not flushed after its last change and before the seal's rename"
                assert p.parent == folder or i < seen.last(p.parent, at)[0], f"{p.parent} before {p}"
            for above in (folder, folder.parent, folder.parent.parent): assert seen.last(above)[0] > at, above
            sealed.append((folder.name, len([c for c in seen.calls if c[0] == "fsync"])))
            seen.calls.clear()
    small_trainer(
        tmp_path / "run", Look(budget=0.3, interval=4, offload="full"), save_strategy="steps", save_steps=4
    ).train()
    assert [s[0] for s in sealed] == ["checkpoint-4", "checkpoint-8", "checkpoint-12"]


@posix
def test_a_seal_needs_so_many_flushes(tmp_path, monkeypatch):
    """Three files, two folders, the seal and its folder, output_dir and the folder that names it: each once, the
    checkpoint's folder before the seal, too"""
    folder = tmp_path/"run"/"checkpoint-4"
    (folder/"alf").mkdir(parents=True)
    for n in ("a", "b", "alf/c"): (folder/n).write_text(n)
    seen = Recorder(monkeypatch)
    write_manifest(folder)
    assert [c[0] for c in seen.calls] == ["fsync"]*3 + ["fsync"]*2 + ["fsync", "replace", "fsync"] + ["fsync"]*2


@posix
def test_a_delta_and_a_report_are_on_the_disk_before_their_names(tmp_path, monkeypatch):
    seen = Recorder(monkeypatch)
    delta(tmp_path)
    report(tmp_path)
    first, second, _ = (durable_when(seen, tmp_path/n) for n in ("delta.safetensors", "delta.json", "report.html"))
    assert first < second


@posix
def test_a_flush_that_fails_is_told_and_one_that_cannot_be_is_not(tmp_path, monkeypatch):
    real = os.fsync

    def fail(number):
        def call(fd): raise OSError(number, os.strerror(number))
        return call
    files.write_whole(tmp_path/"a", "old")
    monkeypatch.setattr(os, "fsync", fail(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"): files.write_whole(tmp_path/"a", "new")
    assert (tmp_path/"a").read_text() == "old" and parts(tmp_path) == []
    monkeypatch.setattr(os, "fsync", fail(errno.EINVAL))                 # a file system without flush
    files.write_whole(tmp_path/"a", "new")
    monkeypatch.setattr(os, "fsync", real)
    assert (tmp_path/"a").read_text() == "new"


@posix
def test_what_was_left_is_not_counted_as_the_delta(tmp_path, monkeypatch):
    "A part of a writer that lives, so that it stays, and a file of somebody's, both there when the bytes are counted"
    rows = [dict(text=f"the {w} fox and the {w} dog " * 12) for w in ("red", "blue", "old", "quick") * 15]
    (text := tmp_path/"texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folder, write = tmp_path/"run"/"delta", room.write_card

    def beside(*args, **kw):
        files._part(folder/"delta.safetensors").write_bytes(bytes(10**6))
        (folder/"notes.bin").write_bytes(bytes(10**6))
        return write(*args, **kw)
    monkeypatch.setattr(room, "write_card", beside)
    few = dict(steps=2, max_length=32, eval_blocks=1, bf16=False, progress=False)
    s = room.finetune((demo_model(), demo_tokenizer()), text, tmp_path/"run", other=text, **few)
    ours = [folder/n for n in ("delta.safetensors", "delta.json", "README.md")]
    assert s["delta_bytes"] == sum(p.stat().st_size for p in ours) < 10**6
    assert len(parts(folder)) == 1


def test_two_processes_publish_one_cache(tmp_path):
    "Who comes second keeps what is there and whole, and replaces what is not"
    cache(tmp_path)
    first = (tmp_path/"model"/"config.json").stat().st_ino
    cache(tmp_path)
    assert (tmp_path/"model"/"config.json").stat().st_ino == first
    (tmp_path/"model"/"config.json").write_text("{")
    cache(tmp_path)
    assert _is_whole(tmp_path/"model") and [p.name for p in tmp_path.iterdir()] == ["model"]


def test_where_nothing_can_be_mounted_the_power_cut_says_so(monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1]/"benchmarks")
    import power_cut
    monkeypatch.setattr(power_cut, "logging", Mock())
    monkeypatch.setattr(sys, "argv", ["power_cut.py"])
    monkeypatch.setenv("PATH", "")
    none = r"no loop device can be mounted here \(there is no mkfs.ext4\): nothing was cut"
    with pytest.raises(SystemExit, match=none): power_cut.main()
    assert capsys.readouterr().out == ""


def test_the_rows_of_the_power_cut_say_what_is_promised():
    """Made by benchmarks/power_cut.py: with the flushes each cut left a whole checkpoint, with the seal alone
    flushed none"""
    rows = [
        json.loads(l)
        for l in (
            (Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "power_cut.jsonl")
            .read_text(encoding="utf-8")
            .splitlines()
        )
    ]
    cut = [r for r in rows if r["cuts_behind_the_seal"]]
    assert {r["flushed"] for r in cut} == {"all", "seal"}
    for r in cut:
        assert (r["new_one_whole"], r["older_one_whole"]) == (
            (r["cuts_behind_the_seal"], r["cuts_before_it"]) if r["flushed"] == "all" else (0, 0)
        )
