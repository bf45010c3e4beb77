"What `RunLog` promises when many threads write, a process is killed, or the disk is full."
import errno, json, os, subprocess, sys, threading, time
import pytest
from alf_nb.core import runlog
from alf_nb.core.runlog import RunLog
from alf_nb.core.events import effective_events

def run(code, *args):
    return subprocess.Popen(
        [sys.executable, '-c', code, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )

def test_threads_never_mix_lines(tmp_path):
    log = RunLog(tmp_path)
    def work(i):
        for k in range(200): log.write('log', step=k, who=i, text='x'*(k*7%900))
    ts = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in ts: t.start()
    for t in ts: t.join()
    lines = log.path.read_text().splitlines()
    assert len(lines) == 1600 and all(json.loads(l)['event'] == 'log' for l in lines)
    for i in range(8): assert [e['step'] for e in log.events('log', who=i)] == list(range(200))

def test_two_writers_share_a_file(tmp_path):
    a, b = RunLog(tmp_path), RunLog(tmp_path)
    for i in range(50): (a if i % 2 else b).write('log', step=i)
    assert [e['step'] for e in a.events('log')] == list(range(50))

def test_killed_process_loses_nothing_written(tmp_path):
    p = run("import sys, time\nfrom alf_nb.core.runlog import RunLog\nl = RunLog(sys.argv[1])\n"
            "for i in range(100): l.write('log', step=i)\nprint('ready', flush=True)\ntime.sleep(60)", tmp_path)
    assert p.stdout.readline() == 'ready\n'
    p.kill()
    p.wait()
    assert len(RunLog(tmp_path).events('log')) == 100

@pytest.mark.parametrize(
    'tear',
    [b'{"event":"log","st', b'{"event":"log","step":99,"loss":1.5}', b'\x00\x00\xff\xfe', b'{"event":', b'[1,2]'],
)
def test_torn_line_is_ended_by_the_next_writer(tmp_path, tear):
    with RunLog(tmp_path) as l: l.write('log', step=1)
    with open(l.path, 'ab') as f: f.write(tear)
    assert [e['step'] for e in l.events('log')] == [1]          # a line without its end is not there yet
    with RunLog(tmp_path) as l: l.write('log', step=2)
    steps = [e['step'] for e in l.events('log')]
    assert steps in ([1, 2], [1, 99, 2]) and (99 in steps) == (b'1.5}' in tear)
    assert b'\n\n' not in l.path.read_bytes()

def test_poll_waits_for_the_end_of_a_line(tmp_path):
    l = RunLog(tmp_path)
    seen = RunLog(tmp_path)
    assert seen.poll() == []
    l.write('log', step=1)
    line = b'{"event":"log","step":2,"t":0}\n'
    with open(l.path, 'ab', buffering=0) as f:
        f.write(line[:9])
        assert [e['step'] for e in seen.poll()] == [1]
        assert seen.poll() == []
        f.write(line[9:])
    assert [e['step'] for e in seen.poll()] == [2]
    l.path.write_bytes(b'')
    assert seen.poll() == []
    l.write('log', step=7)
    assert [e['step'] for e in seen.poll()] == [7]

def test_poll_follows_a_live_writer(tmp_path):
    p = run(
        "import sys\nfrom alf_nb.core.runlog import RunLog\nl = RunLog(sys.argv[1])\n"
        "for i in range(3000): l.write('log', step=i, pad='y'*(i%50))",
        tmp_path,
    )
    l, got, end = RunLog(tmp_path), [], time.time()+30
    while len(got) < 3000 and time.time() < end:
        got += [e['step'] for e in l.poll()]
        time.sleep(.002)
    p.wait()
    assert got == list(range(3000))

@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no /dev/full')
def test_full_disk_raises_once_then_counts(tmp_path):
    l = RunLog(tmp_path)
    l.write('log', step=1)
    real, l._file.fd = l._file.fd, os.open('/dev/full', os.O_WRONLY)
    with pytest.raises(OSError, match='earlier events are safe') as e: l.write('log', step=2)
    assert e.value.errno == errno.ENOSPC and str(l.path) in str(e.value)
    # quiet, but counted
    l.write('log', step=3)
    l.write('log', step=4)
    assert l.lost == 3
    os.close(l._file.fd)
    l._file.fd = real
    l.write('log', step=5)
    l.write('log', step=6)
    assert [(e['step'], e.get('lost')) for e in l.events('log')] == [(1, None), (5, 3), (6, None)]

def test_partly_written_line_does_not_corrupt_the_file(tmp_path):
    pytest.importorskip('resource')
    p = run(
        "import sys, resource\nfrom alf_nb.core.runlog import RunLog\nl = RunLog(sys.argv[1])\nsoft, hard ="
        " resource.getrlimit(resource.RLIMIT_FSIZE)\nl.write('log', step=0)\nresource.setrlimit(resource.RLIMIT_FSIZE,"
        " (300, hard))\nn = 0\nfor i in range(1, 20):\n    try: l.write('log', step=i, pad='z'*40)\n    except OSError:"
        " n += 1\nresource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))\nl.write('log', step=20)\nprint(n,"
        " l.path.read_bytes().count(b'\\n\\n'))",
        tmp_path,
    )
    out, err = p.communicate(timeout=60)
    assert out.split() == ['1', '0'], err
    ev = RunLog(tmp_path).events('log')
    steps = [e['step'] for e in ev]
    assert (
        steps[0] == 0
        and steps[-1] == 20
        and steps[1:-1] == list(range(1, len(steps) - 1))
        and ev[-1]['lost'] == 20 - len(steps) + 1
    )

def test_unwritable_places_are_named(tmp_path):
    f = tmp_path/'file'
    f.write_text('')
    with pytest.raises(OSError, match='cannot write the run log') as e: RunLog(f).write('log')
    assert str(f) in str(e.value)

def test_resume_supersedes_and_filters_agree(tmp_path):
    with RunLog(tmp_path) as l:
        l.write('run_begin', run_id='a', step=0)
        for s in range(1, 9): l.write('log', step=s, loss=s)
        l.write('select', step=8, names=['x'])
    with RunLog(tmp_path) as l:
        l.write('run_begin', run_id='a')
        l.write('resume', step=4)
        for s in range(5, 7): l.write('log', step=s, loss=-s)
        l.write('resume', step=5)
        l.write('log', step=6, loss=60)
    assert l.series('log', 'loss') == ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, -5, 60])
    assert l.selections() == [] and l.status == 'unfinished'
    for k in ('log', 'select', 'resume', 'run_begin'): assert l.events(k) == [e for e in l.events() if e['event'] == k]

def test_a_second_run_in_the_same_folder(tmp_path):
    with RunLog(tmp_path) as l:
        for r, n in (('a', 5), ('b', 3)):
            l.write('run_begin', run_id=r, step=0)
            for s in range(1, n): l.write('log', step=s)
    assert len(l.events('log')) == 2 and len(l.events('log', run=0)) == 4 and l.begin['run_id'] == 'b'

def test_what_was_measured_before_belongs_to_the_run_that_follows(tmp_path):
    with RunLog(tmp_path) as l:
        for r in 'ab':
            l.write('eval', step=0, when='before', loss=ord(r))
            l.write('sample', step=0, when='before', text=r)
            l.write('run_begin', step=0, run_id=r)
            for s in range(1, 4): l.write('log', step=s, run=r)
            l.write('run_end', step=3)
            l.write('eval', step=3, when='after', loss=ord(r))
        l.write('run_begin', step=0, run_id='c')
        l.write('log', step=1)
        l.write('resume', step=1)
    for r, name in ((0, 'a'), (1, 'b')):
        for k in ('eval', 'sample', 'log', 'run_end'):
            assert l.events(k, run=r) == [e for e in l.events(run=r) if e['event'] == k] != []
        assert [e['loss'] for e in l.events('eval', run=r)] == [ord(name)]*2
    assert l.events('eval') == [] and len(l.events('log')) == 1 and l.status == 'unfinished'

def test_resume_joins_even_with_a_new_run_id():
    e = lambda k, s, **kw: dict(event=k, step=s, **kw)
    runs = effective_events(
        [
            e('run_begin', 0, run_id='a'),
            e('log', 1),
            e('log', 2),
            e('run_begin', 0, run_id='b'),
            e('eval', 0),
            e('resume', 1),
            e('log', 2),
        ]
    )
    assert [x['step'] for x in runs[0] if x['event'] == 'log'] == [1, 2] and len(runs) == 1

def test_odd_numbers_are_named_never_hidden(tmp_path):
    np = pytest.importorskip('numpy')
    with RunLog(tmp_path) as l:
        l.write(
            'log',
            step=np.int64(3),
            loss=np.float32('inf'),
            a={'b.c': [1.0, float('nan')]},
            flag=np.bool_(True),
            n=np.int32(4),
        )
    e = l.events()[0]
    assert e['step'] == 3 and e['loss'] is None and e['flag'] is True and e['n'] == 4
    assert e['nonfinite'] == {'loss': 'inf', 'a.b.c.1': 'nan'}
    assert 'NaN' not in l.path.read_text() and 'Inf' not in l.path.read_text()

def test_foreign_spacing_is_read_with_and_without_a_filter(tmp_path):
    (tmp_path/'events.jsonl').write_text('{"step": 3, "event": "log", "loss": NaN}\n\n')
    l = RunLog(tmp_path)
    assert len(l.events()) == len(l.events('log')) == 1 and l.events()[0]['loss'] is None

def test_a_filter_does_not_parse_the_rest(tmp_path):
    l = RunLog(tmp_path)
    for i in range(5000):
        l.write('log' if i % 50 == 0 else 'measure', step=i, signals={'rate': {f'block.{j}': .1 for j in range(20)}})
    t = time.perf_counter()
    assert len(l.events('log')) == 100
    fast = time.perf_counter()-t
    t = time.perf_counter()
    assert len(l.events()) == 5000
    assert fast < time.perf_counter()-t          # lines of other kinds are not parsed

class Counted:
    "Counts how often a file is opened for reading"
    def __init__(self, monkeypatch, path):
        self.n, real = 0, os.open
        def counting(file, *args, **kw):
            self.n += str(file) == str(path)
            return real(file, *args, **kw)
        monkeypatch.setattr(os, 'open', counting)

def test_a_report_reads_the_log_once(tmp_path, monkeypatch):
    from fake_run import fake_run
    from alf_nb.report.page import write_report
    from alf_nb.report.summary import summarize
    log = fake_run(tmp_path)
    opened = Counted(monkeypatch, log.path)
    for read in (write_report, summarize, lambda l: l._repr_markdown_()):
        opened.n = 0
        read(log)
        assert opened.n == 1, read

def test_a_report_of_blank_and_broken_lines_is_as_quick_as_reading_them(tmp_path):
    from fake_run import fake_run
    from alf_nb.report.page import write_report
    log = fake_run(tmp_path)
    with open(log.path, 'ab') as f: f.write(b'\n'*40_000 + b'{"event":\n'*5_000)
    begun = time.process_time()
    page = write_report(log).read_text()
    assert time.process_time() - begun < 5
    assert '5,000 lines of the run log are damaged' in page

def many_units(path, n):
    from alf_nb.core.records import UnitInfo
    units = [
        UnitInfo(f'block.{i//8}.w{i%8}', f'block.{i//8}', 'matrix', f'w{i%8}', 1000, i // 8, ((10, 100),))
        for i in range(n)
    ]
    with RunLog(path) as log:
        log.write('run_begin', run_id='a', units=units, n_total=1000*n, max_steps=20, config=dict(signal='gain'))
        for step in (0, 10):
            names = [u.name for u in units[step::3]]
            log.write('probe', step=step, signals=dict(gain={u.name: i % 97 for i,u in enumerate(units)}))
            log.write('select', step=step, names=names, entered=names, left=[], reason='r', policy='budget', share=.3)
        log.write('run_end', step=20)
    return log

def test_a_report_of_forty_thousand_units_takes_seconds(tmp_path):
    from alf_nb.report.page import write_report
    took = {}
    for n in (20_000, 40_000):
        log, begun = many_units(tmp_path/str(n), n), time.process_time()
        page = write_report(log)
        took[n] = time.process_time() - begun
        assert page.stat().st_size < 20e6
    assert took[40_000] < 30 and took[40_000] < 4*took[20_000], took
    assert len(RunLog(tmp_path/'40000').units) == 40_000 and RunLog(tmp_path/'40000').damaged == 0

def test_a_report_of_as_many_roles_as_units_takes_seconds(tmp_path):
    from alf_nb.core.records import UnitInfo
    from alf_nb.report.page import write_report
    units = [UnitInfo(f'layer{i}', f'layer{i}', 'matrix', f'role{i}', 1000, i, ((10, 100),)) for i in range(8_000)]
    with RunLog(tmp_path) as log:
        log.write('run_begin', units=units, n_total=8_000_000)
        log.write('select', names=[u.name for u in units], entered=[], left=[], reason='r', policy='full', share=1.)
    begun = time.process_time()
    write_report(log)
    assert time.process_time() - begun < 15

HOSTILE = {
    'brackets beside each other': b'{"event":"log","x":[' + b'[],' * (8 << 20) + b'[]]}',
    'a list of brackets': b'[]' * (30 << 20),
    'sixty MiB of text': b'{"event":"sample","text":"' + b'x' * (60 << 20) + b'"}',
    'brackets inside each other': b'{"event":"log","x":' + b'[' * (10 << 20) + b']' * (10 << 20) + b'}',
    'numbers': b'{"event":"log","x":[' + b'0.5,' * (7 << 20) + b'1]}',
    'keys': b'{"event":"log","x":{' + b','.join(b'"%d":{}' % i for i in range(2 << 20)) + b'}}',
}

@pytest.mark.parametrize('what', HOSTILE)
def test_a_line_that_would_cost_much_is_passed_over(tmp_path, what):
    import tracemalloc
    log = RunLog(tmp_path)
    log.path.write_bytes(
        b'{"event":"log","step":1,"loss":1.5}\n' + HOSTILE[what] + b'\n{"event":"log","step":2,"loss":1.25}\n'
    )
    tracemalloc.start()
    try:
        assert log.series('log', 'loss') == ([1, 2], [1.5, 1.25])
        assert [e['step'] for e in log.poll()] == [1, 2]
        assert log.damaged == 1
        peak = tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()
    assert peak < 130 << 20, f'{peak >> 20} MiB'

@pytest.mark.parametrize('deep,counts', [(31, True), (32, False), (900, False), (200_000, False)])
def test_nesting_is_bounded(tmp_path, deep, counts):
    log = RunLog(tmp_path)
    log.path.write_bytes(
        b'{"event":"log","x":'
        + b'[' * deep
        + b']' * deep
        + b'}\n{"event":"log","x":'
        + b'{"a":' * deep
        + b'1'
        + b'}' * deep
        + b'}\n{"event":"log"}\n'
    )
    assert len(log.events('log')) == (3 if counts else 1) and log.damaged == (0 if counts else 2)

def test_a_log_resumed_thousands_of_times_is_read_in_seconds():
    at = lambda kind, step: dict(event=kind, step=step)
    events = [at('log', 0)]*20_000 + [at('log', 5), at('resume', 1)]*10_000
    begun = time.process_time()
    (run,) = effective_events(events)
    assert time.process_time() - begun < 5
    assert len(run) == 30_000 and all(e['step'] < 5 for e in run)

def test_a_reader_of_one_moment_does_not_mix_moments(tmp_path):
    from alf_nb.core.runlog import read_once
    log = RunLog(tmp_path)
    log.write('log', step=1)
    once = read_once(log)
    assert len(once.events()) == 1
    log.write('log', step=2)
    assert len(once.events()) == 1 and once.damaged == 0 and len(log.events()) == 2
    with pytest.raises(FileNotFoundError, match='no run here'): read_once(tmp_path/'nowhere').events()
    assert read_once(tmp_path/'nowhere').damaged == 0

def test_an_event_that_readers_would_pass_over_is_warned_about(tmp_path):
    with RunLog(tmp_path) as log, pytest.warns(UserWarning, match="'sample' takes 33 MiB"):
        log.write('sample', text='x'*(33 << 20))
    assert log.damaged == 1


@pytest.mark.parametrize(
    "clock",
    [
        lambda i: -1e6 + i,
        lambda i: 3e11 + i,
        lambda i: 1e9 - 3600 * i,
        lambda i: (-1) ** i * 1e9,
        lambda i: [0.0, 1e308, -1e308][i % 3],
    ],
)
def test_a_clock_that_is_wrong_costs_the_times_and_nothing_else(tmp_path, monkeypatch, clock):
    "Before 1970, after 8307, backwards and to and fro: each event counts, and no duration is negative"
    from alf_nb.report.page import write_report
    from alf_nb.report.summary import summarize, summary_table
    from alf_nb.report.run_state import RunState
    from alf_nb.widgets.dashboard import TrainingDashboard
    from alf_nb.report.run_state import _ticks
    ticks = iter(range(99))
    with monkeypatch.context() as m:
        m.setattr(runlog.time, "time", lambda: clock(next(ticks)))
        with RunLog(tmp_path) as log:
            log.write("run_begin", step=0, run_id="a", max_steps=9, units=[], n_total=4, config={})
            log.write("select", names=[], share=0., policy="full", reason="all")
            for i in range(6): log.write("log", step=i+1, loss=2., seconds_per_step=.1)
            log.write("pause", step=6)
            log.write("unpause", step=6, paused_s=1.)
    log = RunLog(tmp_path)
    assert len(log.events()) == 10 and log.damaged == 0 and log.series("log", "loss")[0] == [1, 2, 3, 4, 5, 6]
    assert all(0 <= e["t"] < 2e11 for e in log.events() if "t" in e)
    s = summarize(log)
    assert (s["wall_s"] or 0) >= 0 and s["damaged_lines"] == 0 and summary_table(s) and write_report(log).exists()
    spent = [x for _, x in _ticks(RunState(log.events()))]
    assert all(x >= 0 for x in spent)
    view = TrainingDashboard(log)
    assert view.picture()
    view.close()


def test_a_time_that_is_no_number_is_still_damage(tmp_path):
    (tmp_path/"events.jsonl").write_text('{"event":"log","step":1,"t":"noon"}\n{"event":"log","step":2,"t":-5}\n')
    assert RunLog(tmp_path).damaged == 1 and [e["step"] for e in RunLog(tmp_path).events()] == [2]
