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
    "`make evidence` compares run with run: each method needs a row of the same rule, settings and seed"
    monkeypatch.syspath_prepend(root/'benchmarks')
    import bench_policies as bench
    rows = bench.read_results(bench.RESULTS)
    assert {name for name, *_ in bench.AGAIN} <= set(bench.PLAN)
    for name, rule, methods in bench.AGAIN:
        data, pin = ('chapters of python-reference', ('head',)) if name == 'chapters' else ('gsm8k', ())
        for m in methods:
            settings = bench.METHODS[m].describe(60, 30, pin)['settings']
            found = [
                r
                for r in rows
                if r['data'] == data
                and r['task'].endswith(f'|{rule}')
                and (r['method'], r['settings'], r['seed']) == (m, settings, 0)
            ]
            assert found, f"{name}, {rule}: no committed run of {m} with {settings}"
