"The selection map: what it shows of live and recorded runs, how it is zoomed, and how little it sends."
import re, sys

import pytest

import alf_nb.widgets.map
from alf_nb.core.peers import LISAPolicy
from alf_nb.core.records import UnitInfo
from alf_nb.core.runlog import RunLog
from alf_nb.widgets.base import ticker
from alf_nb.report.run_state import RunState
from alf_nb.widgets.map import COLOURS, SelectionMap, map_rows
from alf_nb.report.run_state import axis_end

sys.path.insert(0, __file__.rpartition('/')[0])
from fake_run import fake_run, fake_units  # noqa: E402
from live_run import LiveRun, Sent, wait_for  # noqa: E402


@pytest.fixture
def view():
    made = []
    yield lambda *args, **kw: made.append(SelectionMap(*args, **kw)) or made[-1]
    for v in made: v.close()
    wait_for(lambda: ticker._thread is None)


@pytest.fixture
def live(tmp_path):
    run = LiveRun(tmp_path/'live')
    yield run
    run.close()


def test_a_recorded_run_stands_still(tmp_path, view):
    fake_run(tmp_path, steps=120)
    m = view(tmp_path)
    # the map fills its axis
    assert 'up to step 120 of 120' in m.drawing.value and not re.search(r'<img[^>]*width:', m.drawing.value)
    assert m.drawing.value.count('<img') == 2 and 'role="img"' in m.drawing.value
    assert 'trained (2' in m.said.value                        # it is over
    n = m.drawing.value
    m.refresh()
    assert m.drawing.value is n
    assert '<table' in m.static_html() and 'title="block.3: ' in m.static_html()


@pytest.mark.parametrize('zoom, rows', [('all layers', 30), ('kinds of matrix', 7), ('block.3', 7)])
@pytest.mark.parametrize('colour', COLOURS)
def test_every_zoom_and_colour(tmp_path, view, zoom, rows, colour):
    fake_run(tmp_path, steps=60)
    m = view(tmp_path)
    m.zoom.value, m.colour.value, m.table_on.value = zoom, colour, True
    assert m.hints.value.count('<i ') == rows and m.table.value.count('scope="row"') == rows
    assert f'colour: {colour}' in m.drawing.value
    assert not m.error.value


def test_colours_say_what_was_chosen_then(tmp_path, view):
    log = RunLog(tmp_path)
    units = [UnitInfo(f'b.{i}.{r}', f'b.{i}', 'matrix', r, 100, i+1) for i in range(2) for r in 'qv']
    log.write('run_begin', step=0, units=units, n_total=400, max_steps=8, config=dict(signal='gain'))
    log.write(
        'select',
        step=0,
        names=['b.0.q'],
        share=0.25,
        signal='gain',
        scores={'b.0.q': 1.0, 'b.0.v': 0.2, 'b.1.q': 0.5, 'b.1.v': None},
        ages={},
    )
    log.write(
        'select',
        step=4,
        names=['b.1.v', 'b.0.v'],
        share=0.5,
        signal='gain',
        scores={'b.0.q': 0.3, 'b.0.v': 0.4, 'b.1.q': 0.2, 'b.1.v': 0.8},
        ages={},
    )
    log.write(
        'select',
        step=6,
        names=['b.0.q', 'b.1.q'],
        share=0.5,
        signal='gain',
        scores={'b.0.q': 0.0, 'b.0.v': 1.0, 'b.1.q': None, 'b.1.v': 0.5},
        ages={},
    )
    log.write('run_end', step=8)
    m = view(tmp_path)
    groups = map_rows(m.state)
    # of what trains, the largest is 1; what is worth nothing or unknown did train all the same
    assert m.values(groups, 'importance') == [[1., 0], [.5, 1.], [.02, .5]]
    assert m.values(groups, 'share') == [[.5, 0], [.5, .5], [.5, .5]]
    assert m.values(groups, 'all') == [[1., .5/.6], [.7, 1.], [1., 1.]]         # b.1.v was not known at first
    m.zoom.value = 'b.1'
    assert m.values(map_rows(m.state, 'b.1'), 'importance') == [[0, 0], [0, 1.], [1., 0]]
    m.zoom.value = 'b.0'
    assert m.values(map_rows(m.state, 'b.0'), 'importance') == [[1., 0], [0, .5], [.02, 0]]


def test_a_policy_without_scores(tmp_path, view):
    units = fake_units(4)
    log = RunLog(tmp_path)
    log.write('run_begin', step=0, units=units, n_total=1, max_steps=20, config={})
    for s in range(0, 20, 5):
        log.write('select', step=s, names=list(LISAPolicy(2).select(None, units, s)), share=.1, policy='lisa')
    log.write('run_end', step=20)
    m = view(tmp_path)
    assert '<img' in m.drawing.value and not m.error.value
    m.colour.value = 'score, frozen too'
    assert not m.error.value


def test_it_follows_a_run_from_another_thread(live, view):
    live.begin()
    m = view(live)
    assert 'Since step 0' in m.said.value
    live.train(45)
    wait_for(lambda: 'Since step 30' in m.said.value and 'up to step 45' in m.drawing.value)
    assert 'width:56.25%' in m.drawing.value                    # step 45 of an axis that ends at 80
    live.train(455)
    wait_for(lambda: 'up to step 500' in m.drawing.value)
    assert not m.error.value


def test_what_was_zoomed_stays_zoomed(live, view):
    live.begin()
    m = view(live)
    m.zoom.value = 'block.7'
    # a layer that is new to the map
    live._out.write('select', step=1, names=['embeddings', 'block.7.self_attn.q_proj'], share=.2)
    live.train(40)
    wait_for(lambda: 'up to step 40' in m.drawing.value)
    assert len(map_rows(m.state)) == 31 and m.zoom.value == 'block.7' and 'q_proj' in m.drawing.value


@pytest.mark.parametrize('interval', [30, 1])
def test_updates_are_small(tmp_path, view, interval):
    "30 layers × 7 matrices × 500 steps, even when every step selects anew"
    run = LiveRun(tmp_path/'a', interval=interval)
    run.begin()
    run.train(498)
    m = view(run)
    m.table_on.value = True
    sent = Sent(m.box)
    run.train(1)
    m.follower.update()
    m.at_once()
    assert 2000 < sent.take() <= 20_000
    for z in ('block.20', 'kinds of matrix', 'all layers'):
        m.zoom.value = z
        assert sent.take() <= 20_000
    run.close()


def test_nothing_new_sends_nothing(live, view, monkeypatch):
    live.begin()
    live.train(40)
    m = view(live)
    sent = Sent(m.box)
    again = lambda m: pytest.fail('drawn again')
    for part in ('_picture', '_hover'): monkeypatch.setattr(alf_nb.widgets.map, part, again)
    for _ in range(5):
        # nothing has to wait, but nothing is new
        m.at_once()
        m.tick()
    assert sent.take() == 0 and not m.error.value


def test_a_resumed_run_forgets_what_came_later(tmp_path, view):
    log = fake_run(tmp_path, blocks=4, steps=120, stop=70)
    m = view(tmp_path)
    assert 'up to step 70' in m.drawing.value
    log.write('resume', step=30, path='checkpoint-30')
    m.follower.update()
    m.at_once()
    assert (
        'up to step 31' in m.drawing.value
        and len(m.state.selections) == len(m.values(map_rows(m.state), 'share')) == 2
    )


def test_before_anything_happened(tmp_path, view):
    log = RunLog(tmp_path)
    log.write('run_begin', step=0, units=fake_units(2), config={})
    m = view(tmp_path)
    assert 'Nothing was selected yet' in m.drawing.value and m.said.value == ''
    assert 'Nothing was selected yet' in m.picture()
    assert map_rows(RunState()) == {}


def test_names_are_escaped(tmp_path, view):
    log = RunLog(tmp_path)
    log.write(
        'run_begin',
        step=0,
        units=[UnitInfo(f'<b>.{r}', '<b>', 'matrix', r, 10, 1) for r in ('<i>', 'v')],
        config={},
        n_total=20,
    )
    log.write('select', step=0, names=['<b>.<i>'], share=.5, reason='<script>')
    m = view(tmp_path)
    m.table_on.value = True
    assert '<b>' not in m.drawing.value + m.table.value + m.hints.value and '<script>' not in m.static_html()


def test_two_on_a_page_know_nothing_of_each_other(live, view):
    live.begin()
    live.train(10)
    a, b = view(live), view(live)
    a.zoom.value = 'block.2'
    assert b.zoom.value == 'all layers' and a.follower is b.follower
    assert 'id=' not in a.static_html()
    a.close()
    live.train(25)
    wait_for(lambda: 'up to step 35' in b.drawing.value)


def test_axes_end_where_the_run_ends():
    assert (
        [axis_end(s, 500) for s in (0, 21, 400)] == [20, 40, 500]
        and axis_end(700, 500) == 700
        and axis_end(7, None, over=True) == 7
    )
