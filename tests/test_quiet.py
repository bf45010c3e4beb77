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


IMPORTS = '''
import os, sys
# once, before the processes part; none of them brings PEFT or bitsandbytes in
import datasets, torch._inductor.compile_fx, torch.distributed.tensor, transformers.core_model_loading
assert not {'peft', 'bitsandbytes', 'transformers.trainer', 'alf_nb'} & set(sys.modules)
for i, line in enumerate(sys.argv[1:]):
    if pid := os.fork():
        os.waitpid(pid, 0)
        continue
    said = os.open(f'said.{i}', os.O_WRONLY | os.O_CREAT)
    for fd in (1, 2): os.dup2(said, fd)
    exec(line)
    sys.stdout.flush()
    open(f'done.{i}', 'w').close()
    os._exit(0)
'''

@pytest.mark.skipif(
    not (importlib.util.find_spec('bitsandbytes') and importlib.util.find_spec('peft') and hasattr(os, 'fork')),
    reason='needs bitsandbytes, peft and forks',
)
def test_an_import_shows_nothing_of_what_others_log(tmp_path):
    "In a notebook it would stand in pink above the first view; without our modules it is there"
    lines = [
        'import transformers.trainer',
        'import alf_nb.train.loop',
        'import alf_nb.study.runs',
        'from alf_nb.all import *',
        'from alf_nb.app.finetune import finetune',
        'from alf_nb.app.tradeoff import tradeoff',
    ]
    (tmp_path/'sitecustomize.py').write_text(LOGS)
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]), HF_HUB_OFFLINE='1')
    subprocess.run([sys.executable, '-c', IMPORTS, *lines], env=env, cwd=tmp_path, check=True)
    said = {l: (tmp_path/f'said.{i}').read_text() for i, l in enumerate(lines) if (tmp_path/f'done.{i}').exists()}
    assert 'gemm_4bit_forward' in said.pop(lines[0]) and said == dict.fromkeys(lines[1:], '')


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
