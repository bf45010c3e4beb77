"""A run that re-selects after every step, with views attached, leaves nothing behind but its log: 60 steps here,
5,000 by benchmarks/bench_long.py, whose rows are committed."""
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]/"benchmarks"))
from bench_long import long_run  # noqa: E402


def check(rows, row, steps):
    assert row["selections"] == steps and len(rows) > 5
    # it swings by those that train; a leak would be 1 at least
    assert row["begin"]["threads"] == row["end"]["threads"] and row["tensors_per_selection"] < .3
    if row["files_per_selection"] is not None: assert row["begin"]["files"] == row["end"]["files"]
    # bytes: three signals, scores and ages of a unit, with its name, once per selection and once per measurement
    per_unit = 150
    assert row["log_per_selection"] < 1000 + per_unit*row["units"]
    first, second = rows[0], rows[len(rows)//2]
    a, b = ((y["log"]-x["log"])/(y["step"]-x["step"]) for x, y in ((first, second), (second, rows[-1])))
    assert b < 1.15*a  # a late selection writes no more than an early one


@pytest.mark.slow
def test_nothing_grows_without_views(tmp_path):
    rows, row = long_run(tmp_path, 60, views=False, places=8)
    check(rows, row, 60)
    assert row["objects_per_selection"] < .5  # none per selection: one would give 1.0


@pytest.mark.slow
def test_only_events_grow_with_views(tmp_path):
    rows, row = long_run(tmp_path, 60, places=8)
    check(rows, row, 60)
    assert row["objects_per_selection"] < 40  # the events themselves, which views keep


def test_the_committed_rows():
    "What the page says was measured over thousands of selections"
    rows = [
        json.loads(l)
        for l in (
            (Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "long.jsonl")
            .read_text(encoding="utf-8")
            .splitlines()
        )
    ]
    assert any(r["selections"] >= 5000 for r in rows)
    for r in rows:
        assert (
            abs(r["tensors_per_selection"]) < 0.01
            and r["threads_per_selection"] == 0 == r["files_per_selection"]
            and (r["views"] or abs(r["objects_per_selection"]) < 0.05 and r["rss_per_selection"] < 1000)
        )
