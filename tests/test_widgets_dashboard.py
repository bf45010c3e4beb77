"The training dashboard: what it says of every state of a run, what its buttons do, and how little it sends."
import re, sys, threading, time
from html import unescape

import pytest

from alf_nb.core.runlog import RunLog
from alf_nb.report.page import report_html
from alf_nb.widgets import base
from alf_nb.widgets.base import ticker
from alf_nb.widgets.parts import all_widgets
from alf_nb.widgets.dashboard import TrainingDashboard, last_line

sys.path.insert(0, __file__.rpartition('/')[0])
from fake_run import fake_run, fake_units  # noqa: E402
from live_run import LiveRun, Sent, leave_lock, wait_for  # noqa: E402

TRACE = (
    'Traceback (most recent call last):\n  File "a.py", line 1, in f\n    g()\n  File "train.py", line 12, in loss\n   '
    ' return x/0\n           ~^~\nZeroDivisionError: division by zero\n'
)


@pytest.fixture
def view():
    made = []
    yield lambda *args, **kw: made.append(TrainingDashboard(*args, **kw)) or made[-1]
    for v in made: v.close()
    wait_for(lambda: ticker._thread is None)


@pytest.fixture
def live(tmp_path):
    run = LiveRun(tmp_path/'live')
    yield run
    run.close()


def words(d): return d.happening()[:2]
def buttons(d): return [b.disabled for b in (d.pause, d.stop)]


def test_a_complete_run(tmp_path, view):
    fake_run(tmp_path, steps=120)
    d = view(tmp_path)
    assert words(d) == ('complete', 'Complete') and not d.live
    assert [b.layout.display for b in (d.pause, d.stop)] == ['none']*2 and d.choose.description == 'What if'
    text = d.tiles.value
    assert (
        '1.405' in text
        and '2.189 at step 0' in text
        and 'tokens/s' in text
        and 'trained last' in text
        and 'of full fine-tuning' in text
    )
    assert 'time left' not in text and 'width:100.00%' in d.progress.value and 'step 120 of 120' in d.progress.value
    assert d.curve.value.count('role="img"') == 2 and d.side.value.count('role="img"') == 2
    # another text has another scale
    assert 'Held out: 2.189 to 1.405' in d.curve.value and 'other' not in d.curve.value
    for w in ('gradients', 'optimizer', 'references', 'parked'): assert w in d.side.value
    assert not d.error.value and repr(d) == f'TrainingDashboard of {tmp_path.name}: complete, step 120 of 120'


def test_a_killed_run_is_not_called_complete(tmp_path, view):
    "As after a restart of the kernel: the folder is all there is"
    fake_run(tmp_path, steps=120, stop=70)
    d = view(str(tmp_path))
    assert words(d) == ('interrupted', 'Interrupted')
    assert 'at step 70 of 120: its log has no end' in d.what.value and 'UTC' in d.what.value
    assert 'time left' not in d.tiles.value and 'width:58.33%' in d.progress.value
    assert 'Interrupted' in d.picture() and 'Since step 60' in d.picture()


@pytest.mark.parametrize('paused', [False, True])
def test_a_run_whose_process_was_killed_is_interrupted_at_once_and_says_how_it_goes_on(tmp_path, view, paused):
    leave_lock(tmp_path)
    log = RunLog(tmp_path)
    about = dict(resume="finetune(data='a.txt', resume=True)")
    log.write('run_begin', step=0, units=fake_units(2), config={}, max_steps=10, about=about)
    log.write('save', step=3, path='checkpoint-3')
    log.write('log', step=4, loss=1., seconds_per_step=2.)
    if paused: log.write('pause', step=4)
    d = view(tmp_path)
    assert words(d) == ('interrupted', 'Interrupted') and 'at step 4 of 10: its process has ended' in d.what.value
    assert 'taken up from <b>checkpoint-3</b>: run <code>finetune(data=' in d.what.value
    assert 'taken up from checkpoint-3: finetune(data=' in unescape(report_html(tmp_path))


def test_the_lock_of_another_process_is_asked_once_for_each_picture(tmp_path, view, monkeypatch):
    log, asked = RunLog(tmp_path), []
    log.write('run_begin', step=0, units=fake_units(2), config={}, max_steps=10)
    d = view(tmp_path)
    monkeypatch.setattr(base, 'writer_ended', lambda folder: asked.append(folder) or False)
    log.write('log', step=3, loss=1., seconds_per_step=2.)
    d.follower.update()
    assert d.tick() and len(asked) == 1


def test_no_time_is_left_once_all_steps_are_made_or_it_stops(tmp_path, view):
    "Also while what was learnt is still saved and measured"
    run = LiveRun(tmp_path/'run', steps=4)
    run.begin()
    run.train(3)
    d = view(run)
    assert 'time left' in d.tiles.value
    run.status = 'stopping'
    d.refresh()
    assert 'time left' not in d.picture()
    run.train(1)
    run.alive, run.status, run.activity = True, 'running', 'measuring after training'
    d.follower.update()
    assert 'step 4 of 4' in d.picture() and 'time left' not in d.picture()
    run.close()


def test_a_run_of_another_process(tmp_path, view):
    log = RunLog(tmp_path)
    d0 = time.time()
    log.write('run_begin', step=0, units=fake_units(2), config={}, max_steps=10)
    log.write('log', step=3, loss=1., seconds_per_step=2.)
    d = view(tmp_path)
    assert words(d) == ('running', 'Training') and d.pause.layout.display == 'none'
    log.write('pause', step=3)
    d.follower.update()
    d.at_once()
    assert words(d) == ('paused', 'Paused')
    log.write('unpause', step=3, paused_s=1.)
    log.write('log', step=4, loss=.9, t=d0 - 1)
    log.write('run_end', step=4, stopped=True)
    wait_for(lambda: 'Stopped' in d.what.value)
    assert words(d) == ('stopped', 'Stopped') and 'after step 4 of 10' in d.what.value


def test_going_silent_is_noticed_without_an_event(tmp_path, view, monkeypatch):
    log = RunLog(tmp_path)
    log.write('run_begin', step=0, units=fake_units(2), config={}, max_steps=10)
    d = view(tmp_path)
    assert 'another process' in d.what.value
    real = time.time
    monkeypatch.setattr(time, 'time', lambda: real() + 100)
    wait_for(lambda: 'Interrupted' in d.what.value)


@pytest.mark.parametrize(
    'status, activity, kind, says, off',
    [
        ('starting', 'starting', 'probing', 'Starting', [True, False]),
        ('running', 'training', 'running', 'Training', [False, False]),
        ('running', 'probing 3/8', 'probing', 'batch 3 of 8', [False, False]),
        ('paused', 'training', 'paused', 'Paused', [False, False]),
        ('stopping', 'training', 'stopping', 'with a checkpoint', [True, True]),
    ],
)
def test_what_happens_now(live, view, status, activity, kind, says, off):
    live.begin()
    live.train(3)
    live.status, live.activity = status, activity
    d = view(live)
    assert d.happening()[0] == kind and says in d.what.value and buttons(d) == off
    assert d.pause.description == ('Resume' if status == 'paused' else 'Pause')
    assert f'alf-dot {kind}' in d.what.value and 'role="status"' in d.what.value


def test_a_new_activity_is_shown_without_an_event(live, view):
    live.begin()
    d = view(live)
    live.activity = 'probing 1/2'
    wait_for(lambda: 'batch 1 of 2' in d.what.value)
    live.activity = 'training'
    wait_for(lambda: 'Training' in d.what.value)


def test_a_failure_is_told_with_its_place(live, view):
    live.begin()
    live.train(5)
    d = view(live)
    live.fail(ZeroDivisionError('division by <zero>'), TRACE)
    wait_for(lambda: 'Failed at step 5' in d.what.value)
    assert 'ZeroDivisionError: division by &lt;zero&gt;' in d.what.value
    assert 'File &quot;train.py&quot;, line 12, in loss: return x/0' in d.what.value and '<details>' in d.what.value
    assert buttons(d) == [True, True]


def test_a_recorded_failure(tmp_path, view):
    log = fake_run(tmp_path, blocks=2, steps=20, stop=10)
    log.write('error', step=10, type='ValueError', message='a loss that is no number')
    d = view(tmp_path)
    assert (
        words(d) == ('failed', 'Failed at step 10 of 20')
        and 'ValueError: a loss that is no number' in d.what.value
        and '<code>' not in d.what.value
    )
    log.write('error', step=10, type='ZeroDivisionError', message='x', traceback=TRACE)
    d.follower.update()
    d.at_once()
    assert 'line 12, in loss' in d.what.value


def test_last_line():
    assert last_line(TRACE) == 'File "train.py", line 12, in loss: return x/0'
    assert last_line('') == last_line('ValueError: x') == ''
    assert last_line('  File "<string>", line 1, in <module>\nValueError: x') == 'File "<string>", line 1, in <module>'


def test_pause_resume_stop(live, view):
    live.begin()
    d = view(live)
    live.start()
    wait_for(lambda: d.state.step > 5)
    d.pause.click()
    assert d.pause.description == 'Resume'          # at once, though the step under way goes on
    wait_for(lambda: live.status == 'paused' and 'Paused' in d.what.value)
    step = live.step
    time.sleep(.1)
    assert live.step == step and d.pause.icon == 'play'
    d.pause.click()
    wait_for(lambda: live.step > step + 3 and 'Training' in d.what.value)
    assert d.pause.description == 'Pause'
    d.stop.click()
    assert 'Stopping' in d.what.value or live.status == 'stopped'
    wait_for(lambda: 'Stopped' in d.what.value)
    assert buttons(d) == [True, True] and live.step < 500
    for b in (d.pause, d.stop):
        b.click()                                   # too late, and no harm
        assert not d.error.value


def test_a_pause_can_be_taken_back_before_it_holds(live, view):
    live.begin()
    d = view(live)
    d.pause.click()
    assert words(d) == ('paused', 'Pausing')
    d.pause.click()
    assert words(d) == ('running', 'Training') and live._go.is_set() and d.pause.description == 'Pause'


def test_the_threshold_opens_below(live, view):
    live.begin()
    live.train(2)
    d = view(live)
    assert d._picker is None and d.choose.description == 'Threshold'
    d.choose.value = True
    picker = d._picker
    assert d.picker_box.children == (picker.box,) and picker.control is live
    picker.threshold = .5
    picker.apply_now.click()
    live.train(1)
    wait_for(lambda: d.state.policy and d.state.policy.get('threshold') == .5)
    d.choose.value = False
    assert d.picker_box.children == ()
    d.choose.value = True
    assert d._picker is picker
    d.close()
    assert picker.closed and d.map.closed


@pytest.mark.parametrize('interval', [30, 1])
def test_a_tick_is_small(tmp_path, view, interval):
    "30 layers × 7 matrices × 500 steps: everything drawn anew, map and all"
    run = LiveRun(tmp_path/'a', interval=interval)
    run.begin()
    run.train(489)
    d = view(run)
    sent = Sent(d.box)
    run.train(1)
    d.follower.update()
    d.at_once()
    d.map.at_once()
    n = sent.take()
    assert 5000 < n <= 20_000, (n, sent.last)
    run.close()


def test_a_live_run_sends_little_in_all(live, view, monkeypatch):
    live.begin()
    d = view(live)
    per_tick, sent = [], Sent(d.box)
    tick = ticker.tick
    def counted(views):
        sent.take()
        changed = tick(views)
        per_tick.append(sent.take())
        return changed
    monkeypatch.setattr(ticker, 'tick', counted)
    live.start(rate=400)
    wait_for(
        lambda: 'Complete' in d.what.value
        and 'up to step 500' in d.map.drawing.value
        and 'step 500' in d.tiles.value + d.curve.value,
        20,
    )
    assert max(per_tick) <= 20_000
    assert not d.error.value and not d.map.error.value


def test_only_what_changed_is_sent(live, view):
    live.begin()
    live.train(40)
    d = view(live)
    sent = Sent(d.box)
    for _ in range(3):
        d.refresh()
        d.tick()
        d.map.tick()
    assert sent.take() == 0
    live.status = 'paused'
    d.refresh()
    assert 0 < sent.take() < 3000          # the words, the button, the bar and the tiles


def test_steps_are_counted_with_the_tiles_and_what_happens_is_said_at_once(live, view):
    "Every message has the page lay itself out anew, on the cores that train"
    live.begin()
    d, told = view(live), []
    d.what.observe(lambda c: told.append(c['new']), 'value')
    for _ in range(5):
        live.train(1)
        d.follower.update()
        d.refresh()
    assert len(told) <= 1
    for status, word in (('paused', 'Paused'), ('stopping', 'Stopping'), ('running', 'Training')):
        live.status = status
        d.refresh()
        assert word in d.what.value and d.happening()[0] in d.progress.value
    wait_for(lambda: 'step 5' in d.what.value and 'step 5' in d.progress.value)


def test_time_does_not_run_while_paused(tmp_path, view):
    log = RunLog(tmp_path)
    for kind, step, t in (
        ('run_begin', 0, 0),
        ('log', 1, 10),
        ('log', 2, 20),
        ('pause', 2, 21),
        ('unpause', 2, 5000),
        ('log', 3, 5010),
        ('run_begin', 0, 9000),
        ('resume', 2, 9001),
        ('log', 3, 9011),
        ('run_end', 3, 9012),
    ):
        log.write(kind, step=step, t=t, run_id='a', loss=1., units=[], config={})
    d = view(tmp_path)
    assert d.state.spent_s == 32.0        # 0…21, 9001…9012: what was done after the checkpoint was done again
    assert d.state.clock()[3] == 31.0


def test_unlogged_and_odd_values(tmp_path, view):
    log = RunLog(tmp_path)
    log.write('run_begin', step=0, units=fake_units(1), config={})
    d = view(log)
    assert 'No loss was logged yet' in d.curve.value and not d.error.value and d.side.value == ''
    log.write('log', step=1, loss=float('nan'))
    log.write('log', step=2, loss=float('inf'), learning_rate=None)
    log.write('memory', step=2, grad_bytes=None)
    log.write('eval', step=2, loss=None, when='during')
    log.write('select', step=2, names=[], share=0.)
    d.follower.update()
    d.at_once()
    d.map.at_once()
    assert not d.error.value and not d.map.error.value and 'nan' not in d.curve.value
    d.picture()


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(FileNotFoundError, match='no run here'): TrainingDashboard(tmp_path)
    with pytest.raises(ValueError, match='a view is made of'): TrainingDashboard(3)


def test_names_are_escaped(tmp_path, view):
    log = RunLog(tmp_path)
    log.write('run_begin', step=0, model='<script>', units=fake_units(1), config={})
    log.write(
        'error',
        step=0,
        type='<b>',
        message='<script>',
        traceback='  File "<script>", line 1, in <script>\n    <script>\nX: y',
    )
    d = view(tmp_path)
    assert '<script' not in d.what.value + d.static_html()


def test_pictures_hold_what_the_widgets_show(live, view):
    live.begin()
    live.train(35)
    d = view(live)
    p = d.picture()
    for part in (
        'step 35 of 500',
        'Training',
        'tokens/s',
        'Training loss, averaged',
        'Training state in memory',
        'Share of the parameters that train',
        'colour: score of what trains',
        'Since step 30',
    ):
        assert part in p, part
    assert (
        '<script' not in p
        and 'id=' not in re.sub(r'(model_)?id="?alf', '', p)
        and not re.search(r'(src|href)="http', p)
    )


def test_nothing_is_left_after_close(live):
    before = threading.active_count()
    live.begin()
    d = TrainingDashboard(live)
    live.start()
    wait_for(lambda: d.state.step > 3)
    ws = all_widgets(d.box)
    d.close()
    d.close()
    assert all(w.comm is None for w in ws)
    live._end = True
    wait_for(lambda: ticker._thread is None and threading.active_count() <= before)
