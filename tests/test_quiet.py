"What a terminal shows is ours, and a check leaves files as they were."
import importlib.util, logging, os, re, shutil, subprocess, sys
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
        '--length',
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

def test_only_while_trainer_is_imported_is_it_silenced(monkeypatch, caplog):
    import transformers.trainer
    from alf_nb.app.cli import _import_quietly
    log = logging.getLogger('bitsandbytes.backends')
    class Finder:
        "A module in place of the Trainer's, which is there already"
        def find_spec(self, name, path=None, target=None):
            if name == 'transformers.trainer': return importlib.util.spec_from_loader(name, self)
        def create_module(self, spec): return None
        def exec_module(self, module): log.warning('a kernel is missing')
    monkeypatch.setattr(transformers, 'trainer', transformers.trainer)
    monkeypatch.delitem(sys.modules, 'transformers.trainer')
    monkeypatch.setattr(sys, 'meta_path', [Finder(), *sys.meta_path])
    _import_quietly()
    assert not caplog.messages
    log.warning('heard again')
    assert caplog.messages == ['heard again']

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
