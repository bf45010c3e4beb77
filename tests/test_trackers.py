"""What ALF knows, in the trackers people use, the real packages: TensorBoard files, trackio's database, a W&B run
written offline."""
import json
import sqlite3
import struct
import sys

import pytest
from small_run import small_trainer
from transformers import TrainerCallback

from alf_nb.core.runlog import RunLog
from alf_nb.train.trainer import ALFCallback


def train(folder, *callbacks, resume=None, **kw):
    t = small_trainer(
        folder, ALFCallback(budget=0.3, interval=4, measure_every=2), *callbacks, **{**dict(max_steps=8), **kw}
    )
    t.train(resume_from_checkpoint=resume)
    return t


def expected(folder):
    "What the run log says that a tracker should have: logged step → share of the selection that trains then"
    shares = {e["step"]: e["share"] for e in RunLog(folder).events("select")}
    # after the first selection, and wherever something was measured
    return {s: [v for k, v in shares.items() if k <= s][-1] for s in (1, 2, 4, 6, 8)}


def scalars(path):
    "Records of a TensorBoard file: length, checksum, event, checksum"
    from tensorboardX.proto.event_pb2 import Event
    raw, at, res = path.read_bytes(), 0, {}
    while at < len(raw):
        n, = struct.unpack_from("<Q", raw, at)
        event = Event.FromString(raw[at+12:at+12+n])
        at += 16+n
        for v in event.summary.value: res.setdefault(v.tag, {})[event.step] = v.simple_value
    return res


def test_tensorboard(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path/"tb"))
    t = train(tmp_path, report_to=["tensorboard"])
    found = {}
    for f in (tmp_path/"tb").rglob("events.out*"): found |= scalars(f)
    want = expected(tmp_path)
    assert found["train/alf/share"] == pytest.approx(want) and set(found["train/alf/n_units"]) == set(want)
    layers = {u.layer for u in RunLog(tmp_path).units}
    assert {k.rpartition("/")[2] for k in found if k.startswith("train/alf/trains/")} == layers
    # the prior, which is all that is known at first, tells of embeddings and head too
    blocks = [v for k, v in found.items() if k.startswith("train/alf/importance/block.")]
    assert len(blocks) == 4 and max(v[8] for v in blocks) == 1
    assert not any("alf" in k for h in t.state.log_history for k in h)


def test_trackio(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path/"trackio"))  # read at import, and another test may have imported it
    for m in [m for m in sys.modules if m.split(".")[0] == "trackio"]: monkeypatch.delitem(sys.modules, m)
    pytest.importorskip("trackio")
    train(tmp_path, report_to=["trackio"], project="alf")
    db, = (tmp_path/"trackio").rglob("alf.db")
    rows = [json.loads(m) for m, in sqlite3.connect(db).execute("select metrics from metrics")]
    assert {m["train/global_step"]: m["train/alf/share"] for m in rows if "train/alf/share" in m} == pytest.approx(
        expected(tmp_path)
    )


def wandb_records(path):
    """A W&B file: 7 bytes of header, then LevelDB's log format, blocks of 32 KiB with pieces of records: checksum,
    length, kind (1 whole, 2 first, 3 middle, 4 last)"""
    raw, at, part = path.read_bytes(), 7, b""
    while at + 7 <= len(raw):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        n, kind = struct.unpack_from("<HB", raw, at+4)
        part += raw[at+7:at+7+n]
        at += 7+n
        if kind in (1, 4):
            yield part
            part = b""


def test_wandb_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record
    for k, v in dict(
        WANDB_MODE="offline",
        WANDB_DIR=str(tmp_path),
        WANDB_SILENT="true",
        WANDB_DISABLE_GIT="true",
        WANDB_CONSOLE="off",
    ).items():
        monkeypatch.setenv(k, v)
    train(tmp_path, report_to=["wandb"])
    # its writer is another process
    wandb.finish()
    wandb.teardown()
    file, = tmp_path.rglob("run-*.wandb")
    found = {}
    for raw in wandb_records(file):
        items = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in Record.FromString(raw).history.item}
        if "train/alf/share" in items: found[items["train/global_step"]] = items["train/alf/share"]
    assert found == pytest.approx(expected(tmp_path))


class Reads(TrainerCallback):
    def __init__(self): self.seen = []
    def on_log(self, args, state, control, logs=None, **kw): self.seen.append(dict(logs))


def test_who_reads_logs_behind_alf_sees_what_the_trainer_logged(tmp_path):
    reads = Reads()
    t = train(tmp_path/"a", reads, save_strategy="steps", save_steps=4)
    assert [{k: v for k, v in h.items() if k != "step"} for h in t.state.log_history] == reads.seen
    again = train(
        tmp_path / "a",
        resume=str(tmp_path / "a" / "checkpoint-4"),
        restore_callback_states_from_checkpoint=True,
        save_strategy="steps",
        save_steps=4,
    )
    assert again.state.log_history[:-1] == t.state.log_history[:-1]
    first = again.callback_handler.callbacks[0]
    assert (
        type(first).__name__ == "_Metrics" and first.alf in again.callback_handler.callbacks
    ), "the callback made anew is the one that is asked"
    assert sum(type(c).__name__ == "_Metrics" for c in again.callback_handler.callbacks) == 1
