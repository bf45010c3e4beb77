"A busy machine: who asks torch's threads to wait briefly, who does not, and what is said where it is too late."
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from fastcore.nbio import read_nb

from alf_nb.core.runlog import RunLog
from alf_nb.core.system import SPINS, Slowdown
from alf_nb.train import tracking
from alf_nb.train.guards import Journal
from alf_nb.widgets.dashboard import TrainingDashboard

sys.path.insert(0, __file__.rpartition('/')[0])
from live_run import LiveRun  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
KEYS = 'OMP_WAIT_POLICY', 'GOMP_SPINCOUNT', 'KMP_BLOCKTIME'
TELL = "print('torch' in sys.modules, os.environ.get('GOMP_SPINCOUNT'))"
COMMAND = f"""import os, sys
from alf_nb.app import cli
def about_to_load():
    {TELL}
    sys.exit()
cli.quiet_imports = about_to_load
cli.main(sys.argv[1:])"""
PLAN = 'plan', 'gpt2', '--memory', 'large'


def python(code, *argv, **env):
    "A process in whose environment nobody says how threads wait, but `env`"
    own = {k: v for k, v in os.environ.items() if k not in KEYS}
    own |= dict(PYTHONPATH=str(ROOT), HF_HUB_OFFLINE='1', OMP_NUM_THREADS='2', PYTHONWARNINGS='ignore')
    return subprocess.run([sys.executable, '-c', code, *argv], env=own | env, capture_output=True, text=True)


def test_the_command_line_asks_before_torch_is_loaded():
    assert python(COMMAND, *PLAN).stdout.split() == ['False', SPINS]


@pytest.mark.parametrize('key', KEYS)
def test_the_command_line_leaves_what_the_user_set(key):
    kept = '7' if key == 'GOMP_SPINCOUNT' else 'None'
    assert python(COMMAND, *PLAN, **{key: '7'}).stdout.split() == ['False', kept]


def test_openmp_hears_what_the_command_line_asks():
    said = python('import sys; from alf_nb.app.cli import main; main(sys.argv[1:])', *PLAN, OMP_DISPLAY_ENV='verbose')
    found = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", said.stderr)
    if 'OPENMP DISPLAY ENVIRONMENT' not in said.stderr or not found: pytest.skip('torch has another OpenMP here')
    assert set(found) == {SPINS}


@pytest.mark.parametrize('kernel', [True, False])
@pytest.mark.parametrize('module', ['all', 'app.finetune'])
def test_what_notebooks_begin_with_asks_in_a_kernel_only(module, kernel):
    shell = 'SimpleNamespace(kernel=1)' if kernel else 'None'
    code = f"""import os, sys, IPython
from types import SimpleNamespace
IPython.get_ipython = lambda: {shell}
class Tell:
    def find_spec(self, name, path=None, target=None):
        if name != 'torch': return
        print(os.environ.get('GOMP_SPINCOUNT'), flush=True)
        os._exit(0)
sys.meta_path.insert(0, Tell())
import alf_nb.{module}"""
    assert python(code).stdout.split() == [SPINS if kernel else 'None']


@pytest.mark.parametrize('tutorial', sorted((ROOT/'nbs'/'tutorials').glob('*.ipynb')), ids=lambda p: p.stem)
def test_a_tutorial_that_trains_loads_ours_before_torch(tutorial):
    code = '\n'.join(c.source for c in read_nb(tutorial).cells if c.cell_type == 'code')
    first = lambda words: min((m.start() for m in re.finditer(words, code, re.M)), default=len(code))
    ours = first(r'^from alf_nb\.(all|app\.finetune) import')
    if ours == len(code): pytest.skip('it trains in other processes')
    assert ours < first(r'^(import|from) (torch|transformers|datasets|peft|alf_nb\.(?!all|app\.finetune))')


@pytest.mark.skipif(not shutil.which('make'), reason='no make here')
@pytest.mark.parametrize('key', [None, *KEYS])
def test_make_lab_asks_unless_the_user_set_it(key):
    env = {k: v for k, v in os.environ.items() if k not in KEYS} | ({key: ''} if key else {})
    said = subprocess.run(['make', '-n', 'lab'], cwd=ROOT, env=env, capture_output=True, text=True).stdout
    line = next(l for l in said.splitlines() if 'jupyter lab' in l)
    assert (f'GOMP_SPINCOUNT={SPINS} ' in line) == (key is None), line


@pytest.fixture
def run(tmp_path, monkeypatch):
    "What `log_numbers` asks of a run, on two threads of a crowded machine where nobody says how they wait"
    for k in KEYS: monkeypatch.delenv(k, raising=False)
    monkeypatch.setattr(tracking, 'is_crowded', lambda: True)
    monkeypatch.setattr(tracking.torch, 'get_num_threads', lambda: 2)
    return SimpleNamespace(
        journal=Journal(RunLog(tmp_path)), slowdown=Slowdown(), crowded=False, engine=SimpleNamespace(device='cpu'),
        step_s=[], tokens_seen=0, forget_time=lambda: None,
    )


def train(run, *seconds):
    "The warnings of steps that took so long, a log after each"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        for i, s in enumerate(seconds):
            run.step_s.append(s)
            tracking.log_numbers(run, dict(loss=1.), i+1)
    return [str(w.message) for w in told]


SLOW = *[1.]*6, *[20.]*6


def test_a_run_that_becomes_slow_beside_others_says_so_once(run):
    told, = train(run, *SLOW, *SLOW)
    event, = run.journal.log.events('slow')
    assert event['message'] == told and f'GOMP_SPINCOUNT={SPINS}' in told and '20 times' in told and 'restart' in told
    assert (event['seconds_per_step'], event['best_s']) == (20, 1)


def test_nothing_is_said_where_nothing_can_be_done(run, monkeypatch):
    monkeypatch.setattr(tracking, 'is_crowded', lambda: False)
    assert not train(run, *SLOW)                    # nobody else: the steps are what they are
    monkeypatch.setattr(tracking, 'is_crowded', lambda: True)
    run.engine.device = 'cuda:0'
    assert not train(run, *SLOW)
    run.engine.device = 'cpu'
    monkeypatch.setenv('OMP_WAIT_POLICY', 'ACTIVE')
    assert not train(run, *SLOW)
    monkeypatch.delenv('OMP_WAIT_POLICY')
    monkeypatch.setattr(tracking.torch, 'get_num_threads', lambda: 1)
    assert not train(run, *SLOW) and not run.journal.log.events('slow')


def test_a_selection_that_costs_more_is_not_taken_for_a_busy_machine(run):
    assert not train(run, *[1.]*6, *[3.2]*9, 40., *[1.]*5)


def test_the_dashboard_says_what_could_be_done(tmp_path):
    live = LiveRun(tmp_path/'live')
    live.begin()
    d = TrainingDashboard(live)
    assert d.said.value == ''
    live._out.write('slow', step=9, message='set <i>this</i>', seconds_per_step=20., best_s=1.)
    d.follower.update()
    d.refresh()
    assert 'set &lt;i&gt;this&lt;/i&gt;' in d.said.value and d.said.value in d.static_html()
    live.alive, live.status = False, 'complete'
    d.refresh()
    assert d.said.value == ''       # it is over, and nobody can do anything
    d.close()
