"""The pages that quote numbers say what the committed result files say, and nothing else; and what they are made
from can be run again."""
from pathlib import Path

import pytest
from fastcore.nbio import read_nb
from execnb.shell import CaptureShell

root = Path(__file__).resolve().parents[1]


def said(cells):
    return [
        ''.join(o['data']['text/markdown'])
        for c in cells
        for o in c.get('outputs', [])
        if 'text/markdown' in o.get('data', {})
    ]


@pytest.mark.parametrize('page', ['index', 'evidence', 'costs', 'speed', 'faults', 'several_gpus'])
def test_a_page_says_what_its_files_say(page, monkeypatch):
    monkeypatch.chdir(root/'nbs')
    kept, now = (read_nb(root/'nbs'/f'{page}.ipynb') for _ in range(2))
    assert said(kept.cells), f"{page} has no tables: run it and save its outputs"
    shell = CaptureShell()
    shell.run_all(now, exc_stop=True, preproc=lambda c: c.cell_type != 'code' or 'eval: false' in c.source)
    assert said(now.cells) == said(
        kept.cells
    ), f"nbs/{page}.ipynb is older than its result files: run it again and save it"


def test_what_is_run_again_has_committed_rows(monkeypatch):
    "`make evidence` compares run with run: each method needs rows of the same data, weights and length"
    monkeypatch.syspath_prepend(root/'benchmarks')
    import bench_again as bench
    a = bench.options('').parse_args([])
    task = bench.ready('MAWPS', a)
    known = bench.runs_of(bench.read_results(bench.RESULTS), bench.METHODS, f'{task.key}|steps {a.steps}')
    assert set(known) == set(bench.METHODS) and all(len(rows) == 4 for rows in known.values())
    of = bench.figures(known)
    assert {'alf, learnt', 'lora, forgot', 'alf less full, learnt'} <= set(of)
    assert all(inside for *_, inside in bench.judged(of, of))
    off = {what: {seed: v+30 for seed, v in values.items()} for what, values in of.items()}
    assert len(bench.judged(of, off)) == len(of) and not any(inside for *_, inside in bench.judged(of, off))
