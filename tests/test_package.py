"""The wheel: what is in it, that building it again gives the same, and that it works where no notebook tool is
installed."""
import configparser, hashlib, os, shutil, subprocess, sys, zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

root = Path(__file__).resolve().parents[1]
# what notebooks, tests and development need, and a training script must not; `IPython` comes along with ipywidgets, so
# only modules without widgets do without it
TOOLS = [
    'nbdev',
    'execnb',
    'jupyterlab',
    'jupyter_server',
    'notebook',
    'nbclient',
    'nbconvert',
    'nbformat',
    'pytest',
    'hypothesis',
    'peft',
    'trl',
]
SHELL = ['IPython', 'ipykernel', 'ipywidgets']


def build(tmp, name, umask=-1, **env):
    "A wheel from a copy of the sources, with `umask` and these environment variables"
    src = tmp/name
    src.mkdir()
    for d in ('alf_nb', 'nbs', 'tests'):
        shutil.copytree(root/d, src/d, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    for f in ('settings.ini', 'setup.py', 'pyproject.toml', 'MANIFEST.in', 'LICENSE', 'README.md'):
        if (root/f).exists(): shutil.copy(root/f, src)
    if not (src/'README.md').exists(): (src/'README.md').write_text('# alf_nb\n', encoding='utf-8')
    if env:                                       # all that may differ between two machines with the same sources
        for i, p in enumerate(src.rglob('*')):
            os.utime(p, (1_000_000_000+i, 1_000_000_000+i))
            p.chmod(0o777 if p.is_dir() else 0o600)
        (src/'build'/'lib'/'alf_nb').mkdir(parents=True)
        (src/'build'/'lib'/'alf_nb'/'ghost.py').write_text('"of an earlier version"', encoding='utf-8')
    env = {**{k: v for k, v in os.environ.items() if k != 'SOURCE_DATE_EPOCH'}, **env}
    res = subprocess.run(
        [
            sys.executable,
            '-m',
            'pip',
            'wheel',
            '--no-deps',
            '--no-build-isolation',
            '--no-index',
            '--disable-pip-version-check',
            '-w',
            tmp / f'{name}-dist',
            '.',
        ],
        cwd=src,
        env=env,
        umask=umask,
        capture_output=True,
        text=True,
    )
    assert not res.returncode, res.stdout + res.stderr
    wheel, = (tmp/f'{name}-dist').glob('*.whl')
    return wheel


@pytest.fixture(scope='module')
def wheel(tmp_path_factory): return build(tmp_path_factory.mktemp('wheel'), 'src')


def content(wheel):
    with zipfile.ZipFile(wheel) as z:
        return {n: hashlib.sha256(z.read(n)).hexdigest() for n in z.namelist() if not n.endswith('/')}


def test_content(wheel):
    names = set(content(wheel))
    package = {
        p.relative_to(root).as_posix()
        for p in (root / 'alf_nb').rglob('*')
        if p.is_file() and '__pycache__' not in p.parts and p.suffix != '.pyc'
    }
    assert (
        package <= names
    ), f"not in the wheel: {', '.join(sorted(package - names))}; add it to package_data in setup.py"
    extra = [n for n in names - package if '.dist-info/' not in n]
    assert not extra, f"in the wheel by mistake: {', '.join(extra)}"
    assert not [n for n in names if n.endswith('.ipynb')]
    assert any(n.endswith('LICENSE') for n in names)


def test_metadata(wheel):
    config = configparser.ConfigParser(delimiters=['='])
    config.read(root/'settings.ini', encoding='utf-8')
    settings = config['DEFAULT']
    with zipfile.ZipFile(wheel) as z:
        inside = {
            n.rpartition('/')[2]: z.read(n).decode()
            for n in z.namelist()
            if '.dist-info/' in n and n.endswith(('METADATA', 'entry_points.txt', 'WHEEL'))
        }
    meta = Parser().parsestr(inside['METADATA'])
    assert (meta['Name'], meta['Version'], meta['Requires-Python']) == (
        settings['lib_name'],
        settings['version'],
        '>=' + settings['min_python'],
    )
    needs = {str(r) for r in map(Requirement, meta.get_all('Requires-Dist')) if 'extra' not in str(r.marker)}
    assert needs == {str(Requirement(r)) for r in settings['requirements'].split()}
    assert not {Requirement(r).name for r in needs} & {'nbdev', 'jupyterlab', 'pytest'}
    for script in settings['console_scripts'].split():
        assert script.replace('=', ' = ') in inside['entry_points.txt'].replace('=', ' = ').replace('  ', ' ')
    assert 'Tag: py3-none-any' in inside['WHEEL']


@pytest.mark.slow
def test_building_again_gives_the_same_bytes(wheel, tmp_path):
    again = build(tmp_path, 'elsewhere', 0o077, LC_ALL='C', LANG='C', TZ='Asia/Tokyo', PYTHONHASHSEED='7')
    assert content(again) == content(wheel)
    with zipfile.ZipFile(again) as a, zipfile.ZipFile(wheel) as b:
        assert [(z.filename, z.date_time, z.external_attr) for z in a.infolist()] == [
            (z.filename, z.date_time, z.external_attr) for z in b.infolist()
        ]
    assert (
        again.name == wheel.name
        and hashlib.sha256(again.read_bytes()).digest() == hashlib.sha256(wheel.read_bytes()).digest()
    )


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory):
    target = tmp_path_factory.mktemp('installed')
    subprocess.run(
        [
            sys.executable,
            '-m',
            'pip',
            'install',
            '-q',
            '--no-deps',
            '--no-index',
            '--disable-pip-version-check',
            '--target',
            target,
            wheel,
        ],
        check=True,
        capture_output=True,
    )
    return target


def run_installed(installed, modules, blocked, then=''):
    """Import `modules` from the installed wheel in a fresh interpreter where `blocked` cannot be imported, `then`
    run one more statement"""
    code = f"""
import importlib, sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder
class Paths(PathFinder):            # a blocked module is not there at all: who asks whether it is gets the right answer
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split('.')[0] in {blocked} else super().find_spec(name, path, target)
sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Paths]      # without the finder of the editable install
for m in {modules}:
    file = importlib.import_module(m).__file__
    assert file.startswith({str(installed)!r}), f'{{m}} came from {{file}}'
{then}
"""
    env = {**os.environ, 'PYTHONPATH': str(installed), 'HF_HUB_OFFLINE': '1'}
    return subprocess.run([sys.executable, '-c', code], cwd=installed, env=env, capture_output=True, text=True)


def module_names(keep):
    "Modules of the package, by file"
    names = [
        '.'.join(p.relative_to(root).with_suffix('').parts).removesuffix('.__init__')
        for p in sorted((root / 'alf_nb').rglob('*.py'))
        if '__pycache__' not in p.parts
    ]
    return [n for n in names if keep(n)]


@pytest.mark.slow
def test_the_block_works(installed):
    assert "No module named 'nbdev'" in run_installed(installed, ['nbdev'], TOOLS).stderr


@pytest.mark.slow
def test_every_module_works_without_notebook_tools(installed):
    res = run_installed(installed, module_names(lambda n: True), TOOLS)
    assert not res.returncode, res.stderr


@pytest.mark.slow
def test_the_installed_wheel_fine_tunes_from_a_script(installed, tmp_path):
    "A training script on the tiny model, with neither notebook tools nor a shell; all modules but widgets are there"
    (tmp_path / 'text.txt').write_text(
        '\n\n'.join(
            f'Line {i}: the sum of {i} and {i+1} is {2*i+1}, and of {i} and {i+2} it is {2*i+2}.' for i in range(80)
        ),
        encoding='utf-8',
    )
    (tmp_path/'train.py').write_text(f"""
from alf_nb.demo import demo_model, demo_tokenizer
from alf_nb.app.finetune import finetune
s = finetune((demo_model(), demo_tokenizer()), {str(tmp_path/'text.txt')!r}, {str(tmp_path/'run')!r}, steps=8,
             max_length=32, eval_blocks=2, lr=1e-2, bf16=False, progress=False)
assert s['domain_loss_after'] < s['domain_loss_before'], s
""", encoding='utf-8')
    res = run_installed(
        installed,
        module_names(lambda n: 'widgets' not in n and n not in ('alf_nb.all', 'alf_nb.demo')),
        TOOLS + SHELL,
        f"import runpy; runpy.run_path({str(tmp_path/'train.py')!r}, run_name='__main__')",
    )
    assert not res.returncode, res.stderr
    assert {'delta', 'events.jsonl', 'report.html', 'summary.json'} <= {p.name for p in (tmp_path/'run').iterdir()}
