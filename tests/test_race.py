"""Successive halving: what is asked for is checked first, what was run is not run again, and the command says it."""
import json
import re
from pathlib import Path

import pytest

from alf_nb.app.cli import main
from alf_nb.demo import demo_dataset, demo_model
from alf_nb.study.race import race, rounds
from alf_nb.study.task import Task


@pytest.fixture(scope='module')
def task():
    rows = demo_dataset(96), demo_dataset(12, seed=7)
    return Task(demo_model(), *rows, None, 'demo', 'made-up', batch_size=4, bf16=False)


SMALL = dict(budgets=(.1, .25), lrs=(1e-4, 1e-3, 8e-3), steps=54, progress=False)


def test_the_best_third_goes_on_and_the_last_is_the_best(task, tmp_path, capsys):
    found = race(task, **SMALL | dict(progress=True), out=tmp_path/'race.jsonl')
    (first, six), (second, two) = found.rounds
    assert (first, len(six), second, len(two)) == (6, 6, 18, 2)
    assert [s for s, _ in six[:2]] == sorted((s for s, _ in two), key=[s for s, _ in six].index)
    assert found.best == two[0][0] == found.order[0] and two[0][1] < two[1][1]
    rows = [json.loads(line) for line in (tmp_path/'race.jsonl').read_text().splitlines()]
    assert {(r['budget'], r['lr']) for r in rows if r['amount'] == 18} == {(s.budget, s.lr) for s, _ in two}
    assert re.search(r'6 settings: about .+, where whole runs of all take .+', capsys.readouterr().out)
    assert 0 < found.seconds and found.grid_s > 0
    assert f'| {found.best.name} | {found.best.lr:g} |' in found._repr_markdown_()


def test_all_start_from_a_warm_model_and_the_task_s_own_stays_as_it_was(task, tmp_path):
    was = {n: p.clone() for n, p in task.model.named_parameters()}
    warm = race(task, **SMALL, warm=12, out=tmp_path/'a.jsonl')
    cold = race(task, **SMALL, warm=0, out=tmp_path/'b.jsonl')
    assert all(p.equal(was[n]) for n, p in task.model.named_parameters())
    low = lambda found: min(v for _, v in found.rounds[0][1])
    assert low(warm) < low(cold), "a warm model is further at the same step"


def test_what_cannot_be_raced_is_refused_before_anything_trains(task, tmp_path):
    for bad, said in ((dict(steps=20), 'give at least 54'), (dict(keep=1), 'at least two goes on'),
                      (dict(budgets=(2.,)), 'budget'), (dict(lrs=(1e-3,), budgets=.1), 'at least two'),
                      (dict(warm=-1), 'warm')):
        with pytest.raises(ValueError, match=said): race(task, **SMALL | bad, out=tmp_path/'b.jsonl')
    assert not (tmp_path/'b.jsonl').exists()
    assert rounds(9, 120) == [(9, 13), (3, 40)] and sum(n*k for n, k in rounds(9, 120)) < 9*120/4


def test_the_command_refuses_what_a_race_does_not_know(capsys):
    for more, said in ((['--methods', 'full'], 'leave --methods out'), (['--rule', 'wall'], 'leave --rule out')):
        assert main(['compare', '--race', *more]) == 2
        assert said in capsys.readouterr().err


def test_every_setting_of_the_grid_runs_with_every_seed(task, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1]/'benchmarks')
    import bench_race
    monkeypatch.setattr(bench_race, 'BUDGETS', (.25, .5))
    for _ in range(2):      # what is there is not made again
        grid = bench_race.whole_grid(task, 2, [0, 1], tmp_path, (1e-3, 1e-4))
        assert {k: [r['seed'] for r in rows] for k, rows in grid.items()} == {
            (b, lr): [0, 1] for b in (.25, .5) for lr in (1e-4, 1e-3)
        }
