"What a terminal shows is ours, and a check leaves files as they were."
import ast, importlib.util, logging, os, re, shutil, subprocess, sys, warnings
from pathlib import Path
import pytest
from alf_nb.demo import demo_model, demo_tokenizer

ROOT = Path(__file__).resolve().parents[1]
LOGS = '''
import logging, sys
class Finder:
    "Logs while bitsandbytes is imported, as it does on a CPU that has bf16 and where a kernel is missing"
    def find_spec(self, name, path=None, target=None):
        if name == 'bitsandbytes.backends.cpu.ops':
            logging.getLogger(name).warning('Failed to load CPU gemm_4bit_forward from kernels-community')
sys.meta_path.insert(0, Finder())
'''

def alf(where, *argv, **env):
    (where/'sitecustomize.py').write_text(LOGS)
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(where), str(ROOT)]), HF_HUB_OFFLINE='1', **env)
    return subprocess.run(
        [sys.executable, '-c', 'import sys; from alf_nb.app.cli import main; sys.exit(main())', *map(str, argv)],
        capture_output=True,
        text=True,
        env=env,
        cwd=where,
    )

def of_trainer(node):
    "Does it import what brings PEFT and bitsandbytes in?"
    if not isinstance(node, ast.ImportFrom): return False
    return node.module in ('transformers.trainer', 'transformers.trainer_callback') or any(
        node.module == 'transformers' and a.name.startswith('Train') for a in node.names)


def test_what_others_log_when_they_are_imported_is_nowhere_shown():
    loud = []
    for path in sorted((ROOT/'alf_nb').rglob('*.py')):
        for node in ast.parse(path.read_text(encoding='utf-8')).body:      # a `with` is no import
            if of_trainer(node): loud.append(f'{path.name}:{node.lineno}')
    assert not loud


@pytest.mark.parametrize('module', ['train.loop', 'study.runs'])
def test_an_import_prints_nothing_that_is_not_ours(module, tmp_path):
    (tmp_path/'sitecustomize.py').write_text(LOGS)
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]), HF_HUB_OFFLINE='1')
    done = subprocess.run([sys.executable, '-c', f'import alf_nb.{module}'], capture_output=True, text=True, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')


def test_finetune_prints_nothing_that_is_not_ours(tmp_path):
    demo_model(blocks=2).save_pretrained(tmp_path/'model')
    demo_tokenizer().save_pretrained(tmp_path/'model')
    (tmp_path/'text.txt').write_text('the cat sat on the mat. '*200)
    res = alf(
        tmp_path,
        'finetune',
        '--model',
        'model',
        '--data',
        'text.txt',
        '--steps',
        2,
        '--max-length',
        16,
        '--eval-blocks',
        2,
        '--out',
        'run',
    )
    assert res.returncode == 0, res.stderr
    lines = [l.strip() for l in re.split('[\r\n]', res.stderr) if l.strip()]
    assert (
        lines
        and [
            l
            for l in lines
            if not re.match(r'(training|measuring( \d+/\d+)?|(domain|other) loss (before|after)):\s+\d+%', l)
        ]
        == []
    )
    assert res.stdout.lstrip().startswith('model · budget policy')

def test_help_prints_help_only(tmp_path):
    res = alf(tmp_path, 'finetune', '--help')
    assert res.returncode == 0 and res.stderr == '' and res.stdout.startswith('usage: alf finetune')

@pytest.mark.skipif(
    not (importlib.util.find_spec('bitsandbytes') and importlib.util.find_spec('peft')),
    reason='needs bitsandbytes and peft',
)
def test_without_alf_bitsandbytes_says_a_line(tmp_path):
    (tmp_path/'sitecustomize.py').write_text(LOGS)
    res = subprocess.run(
        [sys.executable, '-c', 'import transformers.trainer'],
        capture_output=True,
        text=True,
        env=dict(os.environ, PYTHONPATH=str(tmp_path)),
    )
    assert 'gemm_4bit_forward' in res.stderr

@pytest.mark.skipif(
    not (importlib.util.find_spec('bitsandbytes') and importlib.util.find_spec('peft')),
    reason='needs bitsandbytes and peft',
)
@pytest.mark.parametrize('line', [
    'from alf_nb.all import *',
    'from alf_nb.app.finetune import finetune',
    'from alf_nb.app.tradeoff import tradeoff',
])
def test_what_other_libraries_say_while_they_are_imported_is_not_shown(tmp_path, line):
    "In a notebook it would stand in pink above the first view"
    (tmp_path/'sitecustomize.py').write_text(LOGS)
    res = subprocess.run(
        [sys.executable, '-c', line],
        capture_output=True,
        text=True,
        env=dict(os.environ, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)])),
    )
    assert (res.returncode, res.stderr) == (0, '')

def test_only_other_libraries_are_silenced_and_only_while_they_are_imported(caplog):
    from alf_nb.core.system import quiet_imports
    log = logging.getLogger('bitsandbytes.backends')
    with pytest.warns(UserWarning) as seen:
        with quiet_imports():
            log.warning('a kernel is missing')
            log.error('no kernel at all')
        warnings.warn('heard again')
    log.warning('heard again')
    assert caplog.messages == ['no kernel at all', 'heard again'] and [str(w.message) for w in seen] == ['heard again']

def test_our_warnings_are_shown_while_others_are_imported(capsys):
    from alf_nb.core.system import quiet_imports
    with quiet_imports():
        for module in ('peft.tuners', 'alf_nb_like', 'alf_nb.train.trainer'):
            with warnings.catch_warnings():
                warnings.showwarning = lambda message, *args: print(message)
                warnings.warn_explicit(f'of {module}', UserWarning, 'there.py', 1, module=module)
    assert capsys.readouterr().out.splitlines() == ['of alf_nb.train.trainer']

def test_a_check_leaves_what_make_depends_on_untouched(tmp_path):
    """A file that is written again, even with what it held, is newer than the stamp of the environment: `make` would
    set it up again"""
    if not importlib.util.find_spec('nbdev'): pytest.skip('needs nbdev')
    copy = tmp_path/'copy'
    keep = subprocess.run(
        ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if keep.returncode: pytest.skip('needs a git checkout')
    for name in filter(None, keep.stdout.split('\0')):
        if not (ROOT/name).is_file() or name.startswith(('benchmarks/results', 'tests/')): continue
        (copy/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT/name, copy/name)
    needed = re.search(r'^\$\(READY\): (.+)$', (copy/'Makefile').read_text(), re.M)[1].split()
    for name in needed: os.utime(copy/name, (1e9, 1e9))
    res = subprocess.run(
        [sys.executable, 'tools/check.py'],
        cwd=copy,
        capture_output=True,
        text=True,
        env=dict(os.environ, PYTHONPATH=str(copy)),
    )
    assert res.returncode == 0, res.stdout + res.stderr
    assert 'pyproject.toml' in needed and {n: os.stat(copy/n).st_mtime for n in needed} == dict.fromkeys(needed, 1e9)
    stamp = copy/'venv/.ready'
    stamp.parent.mkdir()
    stamp.touch()
    plain = {k: v for k,v in os.environ.items() if not k.startswith(('MAKE', 'MFLAGS'))}     # of the make that tests
    made = subprocess.run(['make', '-n', 'setup', 'VENV=venv'], cwd=copy, capture_output=True, text=True, env=plain)
    assert made.stdout.strip() in ('', "make: Nothing to be done for 'setup'.")
