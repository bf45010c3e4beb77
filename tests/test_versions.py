"""Which versions: what is too old is named before anything is imported, public signatures do not change unnoticed,
and what `make matrix` tests is what settings.ini asks for."""
import configparser, importlib.metadata, json, os, subprocess, sys
from pathlib import Path

import pytest
from scripts import script

import alf_nb

root = Path(__file__).resolve().parents[1]
config = configparser.ConfigParser(delimiters=['='])
config.read(root/'settings.ini', encoding='utf-8')
settings = config['DEFAULT']


def tool(name): return script(f'tools/{name}.py')


def least(package):
    return next(
        r.partition('>=')[2].split(';')[0] for r in settings['requirements'].split() if r.startswith(f'{package}>=')
    )


def pretend(folder, **versions):
    "Metadata of packages in `folder`, first on the path: alf_nb as settings.ini describes it, and `versions`"
    for name, version in dict(versions, alf_nb=alf_nb.__version__).items():
        info = folder/f'{name}-{version}.dist-info'
        info.mkdir(parents=True)
        needs = [f'Requires-Dist: {r}\n' for r in settings['requirements'].split()] if name == 'alf_nb' else []
        (info / 'METADATA').write_text(
            f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{"".join(needs)}', encoding='utf-8'
        )


def run(folder, code):
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(folder), str(root)]), 'TRITON_INTERPRET': '0'}
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env, cwd=folder)


@pytest.mark.parametrize(
    'module, package, old',
    [
        ('model.layers', 'torch', '2.1.2+cpu'),
        ('kernels.plan', 'numpy', '1.24.0'),
        ('study.attention', 'torch', '1.13'),
        ('train.trainer', 'transformers', '4.57.6'),
        ('app.finetune', 'accelerate', '1.1.0'),
        ('sources.models', 'safetensors', '0.4.2'),
        ('study.compare', 'transformers', '4.0'),
        ('train.background', 'torch', '2.5.1'),
        ('study.audit', 'transformers', '4.57.6'),
        ('widgets.picker', 'ipywidgets', '7.6.5'),
    ],
)
def test_what_is_too_old_is_named_before_it_is_imported(tmp_path, module, package, old):
    pretend(tmp_path, **{package: old})
    res = run(
        tmp_path,
        f"import sys\ntry: import alf_nb.{module}\nfinally: assert not {{'torch', 'transformers'}} & set(sys.modules)",
    )
    assert (
        res.stderr.splitlines()[-1]
        == f"ImportError: alf_nb {alf_nb.__version__} needs {package}>={least(package)}, found {old}: pip install -U"
        f" '{package}>={least(package)}'"
    )


def test_the_light_side_minds_no_old_torch(tmp_path):
    pretend(tmp_path, torch='1.0', transformers='3.0', accelerate='0.1')
    res = run(tmp_path, "import alf_nb.report.page, alf_nb.widgets.dashboard")
    assert not res.returncode, res.stderr


def test_an_old_optional_backend_is_no_backend(tmp_path):
    pretend(tmp_path, triton='3.0.0', numba='0.59')
    res = run(tmp_path, "import alf_nb.kernels.plan as k; print(*k.available_backends().values(), sep='\\n')")
    assert not res.returncode, res.stderr
    said = res.stdout.splitlines()
    assert said[0] == 'True' and any(f"needs numba>={least('numba')}, found 0.59" in s for s in said)
    if sys.platform == 'linux': assert any(f"needs triton>={least('triton')}, found 3.0.0" in s for s in said)


@pytest.mark.parametrize(
    'version, enough',
    [
        ('2.6', True),
        ('2.6.0', True),
        ('2.6.0a0+ecf3bae', True),
        ('2.13.0+cpu', True),
        ('3', True),
        ('2.5.9', False),
        ('2', False),
        ('unknown', True),
        (None, True),
    ],
)
def test_versions_compare_as_numbers(monkeypatch, version, enough):
    monkeypatch.setattr(importlib.metadata, 'requires', lambda name: ['torch>=2.6', 'peft>=99; extra == "dev"'])
    monkeypatch.setattr(importlib.metadata, 'version', lambda name: version)
    if enough: alf_nb.require_versions('torch')
    else:
        with pytest.raises(ImportError, match='needs torch>=2.6, found'): alf_nb.require_versions('torch')


def test_what_is_not_installed_is_left_to_the_import(monkeypatch):
    def missing(name): raise importlib.metadata.PackageNotFoundError(name)
    monkeypatch.setattr(importlib.metadata, 'requires', lambda name: ['torch>=2.6'])
    monkeypatch.setattr(importlib.metadata, 'version', missing)
    alf_nb.require_versions('torch')
    monkeypatch.setattr(importlib.metadata, 'requires', missing)
    alf_nb.require_versions('torch')


def test_import_alf_nb_reads_no_metadata():
    res = subprocess.run(
        [
            sys.executable,
            '-S',
            '-c',
            (
                "import sys; sys.path.insert(0, '.'); import alf_nb; assert not {'re', 'importlib.metadata'} &"
                " set(sys.modules)"
            ),
        ],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert not res.returncode, res.stderr


@pytest.fixture(scope='module')
def api(): return tool('api')


def test_public_signatures_do_not_change_unnoticed(api):
    was, now = api.LINES.read_text(encoding='utf-8').splitlines(), list(api.lines())
    changed = [f'- {l}' for l in was if l not in now] + [f'+ {l}' for l in now if l not in was]
    assert was == now, '\n'.join(
        [
            (
                "public signatures changed, and others rely on them; if it is meant: python tools/api.py, and a line in"
                " CHANGELOG.md"
            ),
            *changed,
        ]
    )


def test_the_page_of_public_names_is_in_step(api):
    assert (
        api.PAGE.read_text(encoding='utf-8') == api.page()
    ), "nbs/api.ipynb is not what the code says: python tools/api.py"


def test_signatures_are_written_the_same_everywhere(api):
    def f(a, /, b=1, *rest, c='x|y', d=len, e=(1,), g=[None], h=set(), **more): pass
    assert api.call(f, 'f') == "f(a, /, b=1, *rest, c='x|y', d=len, e=(1,), g=[None], h=set(…), **more)"
    assert api.call(lambda *, a=2.5: a, 'f') == 'f(*, a=2.5)'
    assert not [l for l in api.lines() if ' at 0x' in l]


def test_the_matrix_asks_for_what_settings_ini_says():
    matrix = tool('matrix')
    combinations = matrix.combinations()
    assert combinations['oldest'] == (settings['min_python'], 'lower') and {'lower', 'lock', 'free'} == {
        which for _, which in combinations.values()
    }
    lower = matrix.asked('lower')
    assert f"torch=={least('torch')}" in lower and not [r for r in lower if '>=' in r]
    assert matrix.asked('lock')[-2:] == [
        '-c',
        str(root / 'requirements.lock'),
    ] and f"torch>={least('torch')}" in matrix.asked('free')


def test_what_is_claimed_was_run():
    "The newest row of every combination passed, and the oldest has the lower bounds of today"
    rows = {
        r['name']: r
        for r in map(
            json.loads, (root / 'benchmarks' / 'results' / 'versions.jsonl').read_text(encoding='utf-8').splitlines()
        )
    }
    assert {'oldest', 'lock'} <= set(rows) and not [r for r in rows.values() if r['failed'] or r['passed'] < 250]
    same = lambda a, b: a.split('.')[:len(b.split('.'))] == b.split('.')
    stale = [
        f"{p} {rows['oldest'][p]}"
        for p in ('torch', 'transformers', 'accelerate', 'datasets', 'numpy', 'triton')
        if not same(rows['oldest'][p], least(p))
    ]
    assert not stale, f"make matrix ran with {', '.join(stale)}, but settings.ini claims others: run it again"
