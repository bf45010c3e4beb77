"""Links, pipes, devices, sockets and folders in the place of every file that is read, written or sent: refused in
words, at once, and nothing outside the folder is touched."""
import json
import os
import re
import shutil
import signal
import socket
import stat
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from alf_nb.app.publish import card_text, write_card
from alf_nb.core.checkpoints import MANIFEST, verify_checkpoint, find_checkpoint, write_manifest
from alf_nb.app.cli import main
from alf_nb.study.compare import _append
from alf_nb.model.delta import apply_delta, read_delta, save_delta
from alf_nb.model.fingerprint import fingerprint
from alf_nb.core.files import write_whole
from alf_nb.app.tuned import load_tuned
from alf_nb.core.shift import AttentionShift
from alf_nb.train.saving import read_state, read_tensors
from alf_nb.report.page import report_html
from alf_nb.report.results_page import compare_results
from alf_nb.report.results import read_results
from alf_nb.report.attention import write_attention
from alf_nb.report.comparison import compare_runs
from alf_nb.report.summary import summarize
from alf_nb.report.page import write_report
from alf_nb.report.results_page import write_comparison
from alf_nb.core.runlog import RunLog
from fake_run import fake_run
from hostile_text import a_shift, results, the_same

pytestmark = pytest.mark.skipif(os.name != "posix", reason="links and pipes are made differently there")
SECRET = "private words"


@contextmanager
def at_once(seconds=20):
    "What waits for a pipe or a device is stopped, and fails"
    def stop(*args): raise TimeoutError("it hangs")
    was = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try: yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, was)


def a_socket(path):
    s = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(path.parent)       # the path of a socket has at most 107 bytes
    try: s.bind(path.name)
    finally:
        os.chdir(here)
        s.close()


def a_device(path):
    try: os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 5))     # /dev/zero: endless
    except PermissionError: pytest.skip("only root makes devices")


def a_link(target): return lambda path: path.symlink_to(target(path) if callable(target) else target)


def outside(path):
    "A private file elsewhere"
    secret = next(p for p in path.parents if (p/"secret").exists())/"secret"
    return secret


# what lies there instead of the file → (how it is made, what the error calls it)
ODD = {
    "link-out": (a_link(outside), "a link"),
    "relative-link-out": (a_link(lambda p: os.path.relpath(outside(p), p.parent)), "a link"),
    "link-in": (a_link("beside"), "a link"),
    "dangling-link": (a_link("nobody"), "a link"),
    "loop": (a_link(lambda p: p.name), "a link"),
    "link-to-a-device": (a_link("/dev/zero"), "a link"),
    "link-to-stdin": (a_link("/dev/stdin"), "a link"),
    "link-to-a-folder": (a_link("."), "a link"),
    "pipe": (os.mkfifo, "a named pipe"),
    "device": (a_device, "a device"),
    "socket": (a_socket, "a socket"),
    "folder": (Path.mkdir, "a folder"),
}


def put(path, odd):
    "The odd thing in the place of the file, which then lies beside"
    if path.exists(): path.rename(path.parent/"beside")
    else: (path.parent/"beside").write_text("{}")
    ODD[odd][0](path)


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = torch.nn.Linear(3, 2)


@pytest.fixture(scope="module")
def goods(tmp_path_factory):
    "A run, a delta, a checkpoint and results, all whole"
    at = tmp_path_factory.mktemp("goods")
    fake_run(at/"run", blocks=1, steps=12, interval=6, every=4)
    m = Small()
    base = fingerprint(m, name="someone/tiny")
    with torch.no_grad(): m.a.weight += 1
    save_delta(m, base, at/"run"/"delta")
    c = at/"run"/"checkpoint-3"
    (c/"alf").mkdir(parents=True)
    for n in ("model.safetensors", "trainer_state.json", "alf/state.json", "alf/tensors.safetensors"):
        (c/n).write_text(n)
    write_manifest(c)
    (at/"run"/"policies.jsonl").write_text("".join(json.dumps(r) + "\n" for r in results(the_same(""))))
    return at


@pytest.fixture
def run(goods, tmp_path):
    (tmp_path/"secret").write_text(SECRET)
    shutil.copytree(goods/"run", tmp_path/"run", symlinks=True)
    return tmp_path/"run"


def watched(run):
    from alf_nb.widgets.base import LogReader
    LogReader(run).update()


def from_the_terminal(run):
    assert main(["report", str(run)]) == 2
    raise ValueError("events.jsonl is refused, see what was printed")


READERS = {
    "RunLog.events": ("events.jsonl", lambda run: RunLog(run).events()),
    "RunLog.poll": ("events.jsonl", lambda run: RunLog(run).poll()),
    "RunLog.damaged": ("events.jsonl", lambda run: RunLog(run).damaged),
    "RunLog.status": ("events.jsonl", lambda run: RunLog(run).status),
    "RunLog in a notebook": ("events.jsonl", lambda run: RunLog(run)._repr_markdown_()),
    "summarize": ("events.jsonl", summarize),
    "report_html": ("events.jsonl", report_html),
    "compare_runs": ("events.jsonl", lambda run: compare_runs([run, run])),
    "a view": ("events.jsonl", watched),
    "the card's run": ("events.jsonl", lambda run: card_text(run / "delta", run)),
    "read_delta": ("delta/delta.safetensors", lambda run: read_delta(run / "delta")),
    "apply_delta": ("delta/delta.safetensors", lambda run: apply_delta(Small(), run / "delta")),
    "write_card": ("delta/delta.safetensors", lambda run: write_card(run / "delta")),
    "read_results": ("policies.jsonl", lambda run: read_results(run / "policies.jsonl")),
    "compare_results": ("policies.jsonl", lambda run: compare_results(run / "policies.jsonl")),
    "write_comparison": ("policies.jsonl", lambda run: write_comparison(run / "policies.jsonl")),
    "state of a checkpoint": ("checkpoint-3/alf/state.json", lambda run: read_state(run / "checkpoint-3")),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("reader", READERS)
def test_a_reader_refuses_in_words(run, reader, odd):
    name, read = READERS[reader]
    put(run/name, odd)
    with at_once(), pytest.raises((ValueError, RuntimeError, OSError)) as e: read(run)
    said = str(e.value)
    assert (
        not isinstance(e.value, TimeoutError)
        and Path(name).name in said
        and f"is {ODD[odd][1]}, not a file" in said
        and SECRET not in said
    ), said
    assert (run.parent/"secret").read_text() == SECRET


@pytest.mark.parametrize("odd", ODD)
def test_tensors_of_a_checkpoint_are_refused_before_safetensors_opens_them(run, odd, monkeypatch):
    import alf_nb.train.saving as T
    put(run/"checkpoint-3"/"alf"/"tensors.safetensors", odd)
    monkeypatch.setattr(T, "load_file", lambda f: pytest.fail("it was opened"))
    with at_once(), pytest.raises(RuntimeError, match=rf"tensors.safetensors.* is {ODD[odd][1]}, not a file"):
        read_tensors(run/"checkpoint-3")


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize(
    "name", ["model.safetensors", "alf/state.json", "alf/tensors.safetensors", MANIFEST, "more.bin"]
)
def test_a_checkpoint_with_more_than_plain_files_is_not_whole(run, name, odd):
    folder = run/"checkpoint-3"
    put(folder/name, odd)
    if (folder/"beside").exists() and name != "more.bin": (folder/"beside").unlink()
    if odd == "folder" and name == "more.bin": return       # that is none of a checkpoint's business
    with at_once(): why = verify_checkpoint(folder)
    assert (
        Path(name).name in why
        and SECRET not in why
        and (f"is {ODD[odd][1]}" in why or "is missing" in why or "cannot be read" in why)
    ), why
    with at_once(), pytest.warns(UserWarning, match="passed over checkpoint-3"): assert find_checkpoint(run) is None


@pytest.mark.parametrize("odd", ODD)
def test_the_terminal_says_it_in_one_line(run, odd, capsys):
    put(run/"events.jsonl", odd)
    with at_once(): assert main(["report", str(run)]) == 2
    assert re.fullmatch(rf"alf: error: .*events.jsonl is {ODD[odd][1]}, not a file.*\n", capsys.readouterr().err)


def test_a_checkpoint_that_is_a_link_is_passed_over(run):
    (run/"checkpoint-9").symlink_to(run/"checkpoint-3")
    with pytest.warns(
        UserWarning, match=r"passed over checkpoint-9 \(it is a link, not a folder\): going on from checkpoint-3"
    ):
        assert find_checkpoint(run) == str(run/"checkpoint-3")


def test_a_delta_that_is_a_link_is_refused(run):
    (run/"delta").rename(run.parent/"elsewhere")
    (run/"delta").symlink_to(run.parent/"elsewhere")
    with pytest.raises(ValueError, match="delta is a link, not a folder: name the folder that it points to"):
        load_tuned(run)
    assert read_delta(run/"delta").base == "someone/tiny"        # named, it may be a link


@pytest.mark.parametrize("odd", ["pipe", "socket", "device"])
@pytest.mark.parametrize("kind,name", [("adapter", "adapter_config.json"), ("model", "config.json")])
def test_other_tuned_models_are_looked_through_before_others_load_them(tmp_path, kind, name, odd):
    (tmp_path/name).write_text("{}")
    put(tmp_path/"weights.bin", odd)
    with at_once(), pytest.raises(
        ValueError, match=f"the {kind} in .* is not loaded: weights.bin is {ODD[odd][1]}, not a file"
    ):
        load_tuned(tmp_path)


# ---------------------------------------------------------------- writers

def a_log(run):
    with RunLog(run) as log: log.write("log", step=99, loss=1.)


def a_delta(run):
    m = Small()
    base = fingerprint(m)
    with torch.no_grad(): m.a.bias += 1
    save_delta(m, base, run/"delta")


REPLACED = {  # writer → (file, write): a new file takes the place
    "write_report": ("report.html", write_report),
    "write_attention": ("attention.html", lambda run: write_attention(a_shift(the_same("")), run / "attention.html")),
    "write_card": ("delta/README.md", lambda run: write_card(run / "delta")),
    "write_card over": ("delta/README.md", lambda run: write_card(run / "delta", overwrite=True)),
    "delta.safetensors": ("delta/delta.safetensors", a_delta),
    "delta.json": ("delta/delta.json", a_delta),
    "seal": (f"checkpoint-3/{MANIFEST}", lambda run: write_manifest(run / "checkpoint-3")),
    "comparison.html": ("comparison.html", lambda run: write_comparison(run / "policies.jsonl")),
    "comparison.md": ("comparison.md", lambda run: write_comparison(run / "policies.jsonl")),
    "comparison.ipynb": ("comparison.ipynb", lambda run: write_comparison(run / "policies.jsonl")),
    "summary.json": ("summary.json", lambda run: write_whole(run / "summary.json", "{}")),
}
# refused: what they append to has to be a file
APPENDED = {
    "RunLog.write": ("events.jsonl", a_log),
    "a row of results": ("policies.jsonl", lambda run: _append(run / "policies.jsonl", dict(key="x"))),
}


def everything(folder): return {p: p.read_bytes() for p in folder.rglob("*") if stat.S_ISREG(p.lstat().st_mode)}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("writer", REPLACED)
def test_a_writer_puts_a_new_file_in_the_place_of_a_link(run, writer, odd):
    name, write = REPLACED[writer]
    put(run/name, odd)
    beside = (run/name).with_name("beside").read_bytes()
    with at_once():
        if odd == "folder":
            with pytest.raises(OSError, match=f"{re.escape(Path(name).name)}|Is a directory"): write(run)
            assert (run/name).is_dir()
        else:
            write(run)
            assert stat.S_ISREG((run/name).lstat().st_mode) and (run/name).stat().st_size
    assert (
        (run.parent / "secret").read_text() == SECRET
        and (run / name).with_name("beside").read_bytes() == beside
        and not (run / name).with_name("nobody").exists()
    )
    assert not [p for p in run.rglob(".*")]      # no parts are left


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("writer", APPENDED)
def test_a_writer_that_appends_refuses_in_words(run, writer, odd):
    name, write = APPENDED[writer]
    put(run/name, odd)
    before = everything(run.parent)
    with at_once(), pytest.raises(ValueError, match=rf"{re.escape(name)} is {ODD[odd][1]}, not a file"): write(run)
    assert everything(run.parent) == before and not (run/"nobody").exists()


def test_a_folder_that_is_a_link_works(run):
    "runs -> /big/disk/runs: read, written, resumed and reported through it"
    (short := run.parent/"short").symlink_to(run)
    a_log(short)
    _append(short/"policies.jsonl", dict(key="x"))
    write_report(short)
    write_card(short/"delta")
    write_comparison(short/"policies.jsonl")
    write_manifest(short/"checkpoint-3")
    assert (
        RunLog(short).events()[-1]["step"] == 99
        and find_checkpoint(short) == str(short / "checkpoint-3")
        and summarize(short)["steps"] == 99
    )
    assert apply_delta(Small(), short/"delta").base == "someone/tiny"


def test_a_delta_in_the_hubs_cache_works_and_leads_nowhere_else(run):
    "There, files are links to blobs of the same repository"
    repo = run.parent/"hub"/"models--me--delta"
    (snapshot := repo/"snapshots"/"0a1b").mkdir(parents=True)
    (repo/"blobs").mkdir()
    shutil.copy(run/"delta"/"delta.safetensors", repo/"blobs"/"1234")
    (snapshot/"delta.safetensors").symlink_to("../../blobs/1234")
    assert apply_delta(Small(), snapshot).base == "someone/tiny" and read_delta(snapshot).changed == ("a.weight",)
    (run.parent/"short").symlink_to(snapshot)
    assert read_delta(run.parent/"short").base == "someone/tiny"
    for target in (run.parent/"secret", "../../../../secret", "../../../other/blobs/1234", "/dev/zero", "nobody"):
        (repo.parent/"other"/"blobs").mkdir(parents=True, exist_ok=True)
        shutil.copy(run/"delta"/"delta.safetensors", repo.parent/"other"/"blobs"/"1234")
        (snapshot/"delta.safetensors").unlink()
        (snapshot/"delta.safetensors").symlink_to(target)
        with at_once(), pytest.raises(ValueError, match="is a link, not a file"): read_delta(snapshot)
    (repo/"blobs"/"1234").unlink()
    (repo/"blobs"/"1234").symlink_to(run.parent/"secret")
    (snapshot/"delta.safetensors").unlink()
    (snapshot/"delta.safetensors").symlink_to("../../blobs/1234")
    with pytest.raises(ValueError, match="is a link, not a file"): read_delta(snapshot)
    shutil.rmtree(repo/"blobs")
    (repo/"blobs").symlink_to("/etc")
    (snapshot/"delta.safetensors").unlink()
    (snapshot/"delta.safetensors").symlink_to("../../blobs/passwd")
    with pytest.raises(ValueError, match="is a link, not a file"): read_delta(snapshot)
