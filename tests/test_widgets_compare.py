"Runs side by side: sorting, hiding, curves over steps and seconds, and runs that still go on."
import re, sys

import pytest

from alf_nb.report.comparison import compare_runs
from alf_nb.core import runlog
from alf_nb.core.runlog import RunLog
from alf_nb.widgets.base import LogReader, follow, ticker
from alf_nb.widgets.parts import all_widgets
from alf_nb.widgets.compare import CURVES, CompareView, Followed, _points, differences, short_names

sys.path.insert(0, __file__.rpartition('/')[0])
from fake_run import fake_run, fake_units  # noqa: E402
from live_run import LiveRun, Sent, leave_lock, wait_for  # noqa: E402


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    t = tmp_path_factory.mktemp('runs')
    fake_run(t/'a', blocks=4, steps=60, after=1.5)
    fake_run(t/'b', blocks=4, steps=60, after=1.4, budget=.1, seed=1)
    fake_run(t/'c', blocks=4, steps=120, after=1.6, seed=2, stop=80)
    return [t/n for n in 'abc']


@pytest.fixture
def view():
    made = []
    yield lambda *args, **kw: made.append(CompareView(*args, **kw)) or made[-1]
    for v in made: v.close()
    wait_for(lambda: ticker._thread is None)


def rows(v): return re.findall(r'</i>([^<]*)</th>', v.table.value)


def test_figures_are_those_of_compare_runs(runs, view):
    v = view(runs)
    for mine, theirs in zip(v.figures(), compare_runs(runs).rows):
        assert all(mine[k] == theirs[k] for k in theirs if k not in ('run', 'status'))
    assert [r['status'] for r in v.figures()] == ['complete', 'complete', 'interrupted'] and not v.live


def test_a_followed_log_reads_as_its_file(runs):
    f = follow(runs[0])
    f.update()
    a, b = Followed(f), RunLog(runs[0])
    for kind in (None, 'log', ('select', 'eval')): assert a.events(kind) == b.events(kind)
    assert (a.status, a.units, a.selections(), a.series('log', 'loss')) == (
        b.status,
        b.units,
        b.selections(),
        b.series('log', 'loss'),
    )


def test_sorting(runs, view):
    v = view(runs)
    assert v.by.value == 'domain_loss_after' and rows(v) == ['b', 'a', 'c']          # c does not know its figure: last
    v.order.value = 'descending'
    assert rows(v) == ['a', 'b', 'c'] and 'aria-sort="descending"' in v.table.value and '▼' in v.table.value
    v.by.value = 'run'
    assert rows(v) == ['c', 'b', 'a']
    v.order.value = 'ascending'
    for _, key in v.by.options:
        v.by.value = key
        assert sorted(rows(v)) == ['a', 'b', 'c'] and v.table.value.count('aria-sort') == 1 and not v.error.value
        known = [v.figures()['abc'.index(n)][key] for n in rows(v)]
        known = [k for k in known if k is not None]
        assert known == sorted(known)


def test_the_best_stands_out(runs, view):
    v = view(runs)
    assert '<strong>1.400</strong>' in v.table.value and '1.500</td>' in v.table.value
    assert '<b>b</b> has the lowest held-out loss (1.400)' in v.said.value
    v.shown[1].value = False
    assert '1.400' not in v.table.value and 'Of 2 runs' in v.said.value


def test_hiding(runs, view):
    v = view(runs)
    v.shown[0].value = False
    # colours stay
    assert (
        rows(v) == ['b', 'c']
        and '</i>a <b>' not in v.chart.value
        and 'alf-c1' not in v.chart.value
        and 'alf-c2' in v.chart.value
    )
    for c in v.shown: c.value = False
    assert (
        'All runs are hidden' in v.table.value
        and 'No run has logged' in v.chart.value
        and v.said.value == ''
        and not v.error.value
    )
    v.shown[2].value = True
    assert rows(v) == ['c']


@pytest.mark.parametrize('curve', CURVES)
@pytest.mark.parametrize('over', ['steps', 'seconds'])
def test_every_curve(runs, view, curve, over):
    v = view(runs)
    v.curve.value, v.over.value = curve, over
    assert (
        not v.error.value
        and 'role="img"' in v.chart.value
        and f'{curve[1:]} by {"step" if over == "steps" else "seconds"}' in v.chart.value
    )
    x = _points(v, 0)[0]
    assert x == sorted(x) and max(x) == (60 if over == 'steps' else pytest.approx(60*1.35, abs=4))


def test_what_differs_is_named(runs, view):
    v = view(runs)
    assert (
        [r['differs'] for r in v.figures()] == [{'seed': '0'}, {'seed': '1'}, {'seed': '2'}]
        and 'differs in' in v.table.value
        and 'seed 1' in v.table.value
    )
    v = view(runs[:1])
    assert 'differs in' not in v.table.value and rows(v) == ['a']
    assert differences([dict(a=dict(b=1, c=2)), dict(a=dict(b=1))]) == [{'a.c': '2'}, {'a.c': '–'}]


def test_a_run_that_goes_on(tmp_path, runs, view):
    live = LiveRun(tmp_path/'live', blocks=4, steps=40)
    live.begin()
    v = view([live, runs[0]])
    assert v.live and v.status == ('running', 'complete') and v.names == ['live', 'a']
    live.train(20)
    wait_for(lambda: re.search(r'live</th>.*?<td>20</td>', v.table.value))
    live.train(20)
    wait_for(lambda: 'complete' in v.table.value.partition('live</th>')[2][:40])
    assert not v.live and not v.error.value
    live.close()


@pytest.mark.parametrize('paused', [False, True])
def test_a_run_whose_process_was_killed_is_interrupted_at_once(tmp_path, view, paused):
    for name in ('dead', 'unknown'):
        log = RunLog(tmp_path/name)
        log.write('run_begin', step=0, units=fake_units(2), config={}, max_steps=10)
        if paused: log.write('pause', step=0)
    leave_lock(tmp_path/'dead')
    v = view([tmp_path/'dead', tmp_path/'unknown'])
    assert v.status == ('interrupted', 'paused' if paused else 'unfinished') and v.live
    assert not view([tmp_path/'dead']).live


def test_a_live_update_is_small_and_reads_nothing_again(tmp_path, view, monkeypatch):
    live = LiveRun(tmp_path/'live')
    live.begin()
    live.train(498)
    others = [fake_run(tmp_path/f'r{i}', steps=500, seed=i) for i in range(3)]
    v = view([live, *others])
    sent = Sent(v.box)
    monkeypatch.setattr(runlog, '_lines', lambda path: pytest.fail('the file was read again'))
    live.train(1)
    v.follower.update()
    v.at_once()
    assert 3000 < sent.take() <= 20_000
    v.refresh()
    v.tick()
    assert sent.take() == 0
    live.close()


def test_names_tell_runs_apart(tmp_path, view):
    for p in ('x/run', 'y/run'): fake_run(tmp_path/p, blocks=1, steps=10)
    v = view([tmp_path/'x/run', tmp_path/'y/run', tmp_path/'y/run'])
    assert v.names == ['x/run', 'y/run (1)', 'y/run (2)'] and len(rows(v)) == 3
    assert short_names([tmp_path/'x/run']) == ['run']


def test_runs_of_other_shapes(tmp_path, view):
    empty = RunLog(tmp_path/'empty')
    empty.write('run_begin', step=0, units=fake_units(1), config={})
    odd = RunLog(tmp_path/'<script>')
    odd.write('run_begin', step=0, units=[], config=dict(policy='<b>'))
    odd.write('eval', name='<i>', when='after', loss=1.)
    v = view([empty, odd])
    assert (
        not v.error.value
        and v.by.value == 'run'
        and '<script>' not in v.static_html() + v.table.value
        and '<b>' not in v.table.value
    )
    v.curve.value = 'held-out loss'
    assert not v.error.value


def test_what_is_refused(tmp_path, runs):
    for bad in ([], ()):
        with pytest.raises(ValueError, match='no runs to compare'): CompareView(bad)
    with pytest.raises(FileNotFoundError, match='no run here'): CompareView([runs[0], tmp_path/'none'])
    with pytest.raises(ValueError, match='a view is made of'): CompareView([3])


def test_one_run_need_not_be_a_list(runs, view):
    assert view(runs[0]).names == view(str(runs[0])).names == view(RunLog(runs[0])).names == ['a']


def test_picture_and_close(runs):
    v = CompareView(runs)
    p = v.picture()
    assert v.table.value in p and v.chart.value in p and 'http' not in v.static_html() and 'id=' not in v.static_html()
    ws = all_widgets(v.box)
    v.close()
    assert all(w.comm is None for w in ws) and repr(v) == 'CompareView of a, b, c'


def test_damaged_lines_are_counted_by_who_follows(tmp_path):
    log = fake_run(tmp_path/'r', steps=20)
    path = log.path if isinstance(log, RunLog) else tmp_path/'r'/'events.jsonl'
    with open(path, 'a') as f: f.write('{"torn\n\n')
    follower = LogReader(RunLog(path))
    follower.update()
    assert Followed(follower).damaged == RunLog(path).damaged == 1
