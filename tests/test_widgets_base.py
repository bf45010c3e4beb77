"What live views rest on: a followed log, sources, the thread that refreshes, a view under both ipywidgets."
import json, random, sys, threading, time

import ipywidgets as W
import pytest

from alf_nb.core.runlog import RunLog

from alf_nb.core.events import effective_events
from alf_nb.widgets.base import LogReader, View, as_source, follow, put, ticker
from alf_nb.report.run_state import RunState

sys.path.insert(0, __file__.rpartition('/')[0])
from fake_run import fake_run, fake_units  # noqa: E402
from live_run import wait_for  # noqa: E402


class Shown(View):
    "Shows the step and counts its drawings"
    def __init__(self, source, fails=()):
        super().__init__(source)
        self.label, self.button, self.n, self.fails = W.HTML(), W.Button(), 0, set(fails)
        self.on(self.button, lambda b: 1/0)
        self.open(self.label, self.button)

    def draw(self):
        self.n += 1
        if self.state.step in self.fails: raise ValueError('no <ink>')
        put(self.label, value=self.static_html())

    def static_html(self): return f'step {self.state.step} {self.status}'


@pytest.fixture
def views():
    made = []
    yield lambda *args, **kw: made.append(Shown(*args, **kw)) or made[-1]
    for v in made: v.close()
    wait_for(lambda: ticker._thread is None)


def begin(log, **kw): log.write('run_begin', step=0, run_id='a', max_steps=9, units=fake_units(2), config={}, **kw)


def made_up(rng):
    "Lines of a file with several runs, resumes and repeated steps"
    out, step = [], 0
    for _ in range(60):
        kind = rng.choice(
            [
                'run_begin',
                'resume',
                'select',
                *['log'] * 6,
                'measure',
                'eval',
                'save',
                'pause',
                'unpause',
                'choose',
                'run_end',
                'error',
            ]
        )
        if kind == 'run_begin':
            step = 0
            out.append(
                dict(
                    event=kind,
                    step=0,
                    run_id=rng.choice(['a', 'b', None]),
                    config=dict(policy=dict(policy='budget', budget=0.1)),
                    units=[u.to_dict() for u in fake_units(1)],
                )
            )
        elif kind == 'resume':
            step = rng.randint(0, step)
            out.append(dict(event=kind, step=step))
        else:
            step += rng.randint(0, 3)
            more = dict(
                log=dict(loss=rng.random(), seconds_per_step=1.0),
                select=dict(names=['norm'], share=0.1, signal='gain', scores={'norm': 1.0}, ages={}),
                measure=dict(signals=dict(gain={'norm': rng.random()})),
                choose=dict(policy=dict(policy='budget', budget=rng.random())),
                eval=dict(when=rng.choice(['before', 'during', 'after'])),
            )
            out.append(dict(event=kind, step=step, **more.get(kind, {})))
    return out


@pytest.mark.parametrize('seed', range(25))
def test_following_in_pieces_equals_reading_at_once(tmp_path, seed):
    rng = random.Random(seed)
    events = made_up(rng)
    data = b''.join(json.dumps(e).encode() + b'\n' for e in events)
    log, f, at = RunLog(tmp_path), LogReader(tmp_path), 0
    while at < len(data):
        n = rng.randint(1, 900)
        with open(log.path, 'ab') as o: o.write(data[at:at+n])      # torn anywhere
        at += n
        f.update()
    whole = RunState((effective_events(events) or [()])[-1])
    for kind in ('log', 'select', 'choose', 'measure', 'eval'):
        assert f.state.events(kind) == log.events(kind) == whole.events(kind)
    for k in ('step', 'status', 'policy', 'selections', 'units', 'seconds_per_step'):
        assert getattr(f.state, k) == getattr(whole, k), k
    assert f.state.series('log', 'loss') == tuple(map(list, log.series('log', 'loss')))
    assert f.state.scores() == whole.scores()
    if f.state.status != 'paused' and f.state.events('run_begin') and log.status != 'unfinished':
        assert f.state.status in (log.status, 'stopped', 'unfinished')


def test_status_follows_the_run():
    seen = []
    s = RunState()
    for e in ('run_begin', 'log', 'pause', 'unpause', 'log', 'run_end'):
        s.add(dict(event=e, step=1, **(dict(stopped=True) if e == 'run_end' else {})))
        seen.append(s.status)
    assert seen == ['unfinished', 'unfinished', 'paused', 'unfinished', 'unfinished', 'stopped']
    assert RunState([dict(event='error', type='OSError', message='full')]).error == 'OSError: full'


def test_a_file_is_read_once_for_all_views(tmp_path, views, monkeypatch):
    polls = []
    poll = RunLog.poll
    monkeypatch.setattr(RunLog, 'poll', lambda self: polls.append(len(got := poll(self))) or got)
    log = fake_run(tmp_path, blocks=2, steps=20, stop=10)
    a, b = views(log), views(str(tmp_path))
    assert a.follower is b.follower and a.label.value == b.label.value == 'step 10 unfinished'
    log.write('log', step=11, loss=1.)
    wait_for(lambda: 'step 11' in a.label.value and 'step 11' in b.label.value)
    assert sum(polls) == len(RunLog(tmp_path).events())


def test_every_write_is_shown_at_most_five_times_a_second(tmp_path, views):
    log = RunLog(tmp_path)
    begin(log)
    v = views(log)
    n, t = v.n, time.monotonic()
    while time.monotonic() - t < 1.5:
        log.write('log', step=(v.state.step + 1))
        time.sleep(.01)
    assert v.n - n <= 5*(time.monotonic() - t) + 2
    assert v.n - n >= 3
    log.write('run_end', step=10**6, stopped=True)
    wait_for(lambda: v.label.value == 'step 1000000 stopped')


def test_a_thread_ends_with_its_views(tmp_path, monkeypatch):
    log = RunLog(tmp_path)
    begin(log)
    a, b = Shown(log), Shown(log)
    assert sum(t.name == 'alf-views' for t in threading.enumerate()) == 1
    a.close()
    a.close()
    assert ticker._thread is not None
    n = a.n
    log.write('log', step=1)
    wait_for(lambda: 'step 1' in b.label.value)
    assert a.n == n and a.button.comm is None
    monkeypatch.setattr(ticker, 'linger', .1)
    log.write('run_end', step=9)
    wait_for(lambda: ticker._thread is None)        # the run is over, and nobody closed b
    assert b.label.value == 'step 9 complete'
    b.close()


def test_what_fails_is_shown_and_not_printed(tmp_path, views, capfd):
    log = RunLog(tmp_path)
    begin(log)
    v = views(log, fails=[2])
    v.button.click()
    assert 'ZeroDivisionError' in v.error.value and v.error.layout.display is None
    log.write('log', step=1)
    wait_for(lambda: 'step 1' in v.label.value)
    assert v.error.value == '' and v.error.layout.display == 'none'
    log.write('log', step=2)
    wait_for(lambda: 'no &lt;ink&gt;' in v.error.value)
    log.write('log', step=3)
    wait_for(lambda: 'step 3' in v.label.value)
    assert v.error.value == ''
    assert capfd.readouterr() == ('', '')


def test_a_log_that_cannot_be_read_is_said(tmp_path, views, monkeypatch):
    log = RunLog(tmp_path)
    begin(log)
    v = views(log)
    monkeypatch.setattr(RunLog, 'poll', lambda self: (_ for _ in ()).throw(PermissionError('not yours')))
    wait_for(lambda: 'not yours' in v.error.value)
    monkeypatch.undo()
    log.write('log', step=4)
    wait_for(lambda: 'step 4' in v.label.value and not v.error.value)


def test_what_nobody_sees_is_not_drawn(tmp_path, views):
    log = RunLog(tmp_path)
    begin(log)
    v = views(log)
    # shown once, then its cell was run again
    v.box.set_state({'_view_count': 1})
    v.box.set_state({'_view_count': 0})
    other = views(log)
    n = v.n
    log.write('log', step=1)
    wait_for(lambda: 'step 1' in other.label.value)
    assert v.n == n
    v.box.set_state({'_view_count': 1})
    wait_for(lambda: 'step 1' in v.label.value)


def test_a_newer_run_in_the_same_file_takes_over(tmp_path, views):
    log = fake_run(tmp_path, blocks=2, steps=20)
    v = views(log)
    assert v.label.value == 'step 20 complete'
    log.write('run_begin', step=0, run_id='later', units=fake_units(3), config={})
    v.follower.update()
    v.refresh()
    assert v.label.value == 'step 0 unfinished' and len(v.state.units) == len(fake_units(3))


class Bg:
    "What a run in the background looks like"
    status, alive = 'running', True
    def __init__(self, log): self.log = log
    def choose(self, **kw): pass


def test_sources(tmp_path, views):
    log = RunLog(tmp_path)
    with pytest.raises(FileNotFoundError, match='no run here'): as_source(tmp_path)
    begin(log)
    for x in (log, tmp_path, str(tmp_path), log.path):
        assert as_source(x)[0].path == log.path and as_source(x)[1] is None
    bg = Bg(log)
    assert as_source(bg) == (log, bg)
    v = views(bg)
    assert v.status == 'running' and v.live
    bg.status, bg.alive = 'stopped', False
    wait_for(lambda: v.label.value == 'step 0 stopped')
    assert not v.live
    with pytest.raises(ValueError, match='begin training first'): as_source(Bg(None))
    trainer = type('Trainer', (), dict(train=0, args=0))()
    with pytest.raises(ValueError, match='train_in_background'): as_source(trainer)
    for bad in (None, 3, {}, [log]):
        with pytest.raises(ValueError, match='a view is made of'): as_source(bad)
    assert follow(log) is follow(str(tmp_path))


def test_displayed_by_one_path(tmp_path, views, monkeypatch):
    import IPython.display
    log = RunLog(tmp_path)
    begin(log)
    v = views(log)
    shown, updates = [], []
    class Handle:
        def __init__(self, i): self.i = i
        def update(self, d, raw): updates.append((self.i, d))
    monkeypatch.setattr(IPython.display, 'display', lambda d, raw, display_id: shown.append(d) or Handle(len(shown)-1))
    monkeypatch.setattr('alf_nb.widgets.base.in_kernel', lambda: True)
    v._ipython_display_()
    v._ipython_display_()
    assert [set(d) for d in shown] == [
        {'text/plain', 'application/vnd.jupyter.widget-view+json'},
        {'text/plain', 'text/html'},
    ] * 2
    assert shown[0]['application/vnd.jupyter.widget-view+json']['model_id'] == v.box.model_id
    html = shown[1]['text/html']
    assert (
        'step 0' in html and '<style>' in html and ' id=' not in html and 'http' not in html and '<script' not in html
    )
    # the live widgets hide the picture
    assert v.box_id in html and f'.alf-still-{v.box_id} {{ display:none }}' in v.box.children[0].value
    log.write('run_end', step=9)
    wait_for(lambda: 'step 9' in v.label.value)
    # what is saved is the last state
    wait_for(lambda: {i for i, d in updates if 'step 9' in d.get('text/html', '')} == {1, 3})
    del updates[:]
    v.close()
    assert [i for i, d in updates] == [1, 3, 0, 2] and all(
        'application/vnd.jupyter.widget-view+json' not in d for _, d in updates
    )
    v._ipython_display_()
    assert set(shown[-1]) == {'text/plain', 'text/html'} and len(shown) == 5


def test_put_sends_only_what_changed():
    w = W.HTML('a')
    seen = []
    w.observe(seen.append, 'value')
    assert not put(w, value='a') and put(w, value='b') and not put(w, value='b') and len(seen) == 1
