"What is written down twice says the same in both places."
import configparser, json, re, sys
from pathlib import Path

import pytest
from scripts import script
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import alf_nb

if sys.version_info >= (3, 11): import tomllib
else: import tomli as tomllib

root = Path(__file__).resolve().parents[1]
PYTHONS = ['3.10', '3.11', '3.12', '3.13']


def read(name): return (root/name).read_text(encoding='utf-8')


@pytest.fixture(scope='module')
def settings():
    config = configparser.ConfigParser(delimiters=['='])
    config.read_string(read('settings.ini'))
    return config['DEFAULT']


@pytest.fixture(scope='module')
def pyproject(): return tomllib.loads(read('pyproject.toml'))


def locked(python):
    "Pins of requirements.lock for this Python on Linux: name → version"
    env = dict(python_version=python, python_full_version=f'{python}.0', platform_system='Linux', sys_platform='linux')
    pins = [Requirement(l) for l in read('requirements.lock').splitlines() if l and not l.startswith('#')]
    assert all(
        re.fullmatch(r'==[\w.]+', str(p.specifier)) for p in pins
    ), "every line of requirements.lock pins with =="
    here = [p for p in pins if not p.marker or p.marker.evaluate(env)]
    assert len({p.name for p in here}) == len(here), f"requirements.lock pins a package twice for Python {python}"
    return {canonicalize_name(p.name): str(p.specifier)[2:] for p in here}


def test_settings_and_pyproject_agree(settings, pyproject):
    project, nbdev = pyproject['project'], pyproject['tool']['nbdev']
    assert (settings['lib_name'], settings['description']) == (project['name'], project['description'])
    assert project['requires-python'] == '>=' + settings['min_python']
    assert project['urls']['Repository'] == settings['git_url']
    assert project['urls']['Documentation'] == settings['doc_host'] + settings['doc_baseurl']
    assert settings['lib_path'] == nbdev['lib_path'] and settings['tst_flags'].split() == nbdev['tst_flags']
    assert project['authors'] == [dict(name=settings['author'], email=settings['author_email'])]
    assert settings['version'] == alf_nb.__version__


def test_one_owner_everywhere(settings):
    "What tools/address.py writes: every file that names the repository names its owner"
    address = script('tools/address.py')
    owners = address.owners()
    assert {'README.md', 'pyproject.toml', 'nbs/index.ipynb', 'alf_nb/all.py'} <= set(owners)
    assert not [f'{f}: {found}' for f, found in owners.items() if found != {settings['user']}]
    found = address.places(settings['repo'])
    for url in (settings['git_url'], settings['doc_host'] + settings['doc_baseurl']):
        assert found.sub('somebody', url) == url.replace(settings['user'], 'somebody')


def test_the_citation_names_this_version(settings): assert f"\nversion: {settings['version']}\n" in read('CITATION.cff')


def test_version_stands_in_the_changelog(settings):
    log = read('CHANGELOG.md')
    assert '<!-- do not remove -->' in log
    assert f"## {settings['version']}" in log, f"CHANGELOG.md has no entry for {settings['version']}"


@pytest.mark.parametrize('python', PYTHONS)
def test_lock_fulfils_settings(settings, python):
    pins = locked(python)
    for text in ' '.join(settings.get(f'{k}requirements', '') for k in ('', 'offline_', 'dev_', 'lock_')).split():
        r = Requirement(text)
        if r.marker and not r.marker.evaluate(dict(python_version=python, platform_system='Linux')): continue
        assert (
            canonicalize_name(r.name) in pins
        ), f"{text} of settings.ini is not in requirements.lock for Python {python}: run `make lock`"
        assert r.specifier.contains(
            pins[canonicalize_name(r.name)]
        ), f"{text} of settings.ini, but requirements.lock has {pins[canonicalize_name(r.name)]}: run `make lock`"


def test_models_are_pinned():
    pins = [l for l in read('requirements-models.txt').splitlines() if not l.startswith('#')]
    assert pins and all(re.fullmatch(r'[\w-]+==[\w.]+', l) for l in pins)


def test_pythons_agree(settings, pyproject):
    workflow = read('.github/workflows/test.yml')
    assert re.search(r'matrix: \{python: \[(.+?)\]\}', workflow)[1] == ', '.join(f'"{p}"' for p in PYTHONS)
    assert settings['min_python'] == PYTHONS[0]
    first, last = (p.split('.')[1] for p in (PYTHONS[0], PYTHONS[-1]))
    assert f'(3, {first}) <= sys.version_info[:2] <= (3, {last})' in read('tools/python_ok.py')
    assert f'for Python {PYTHONS[0]} to {PYTHONS[-1]}' in read('requirements.lock')


def test_ci_runs_the_command_of_the_readme():
    assert 'make test' in read('.ci/run') and 'bash .ci/run' in read('.github/workflows/test.yml')
    if (root/'README.md').exists(): assert 'make demo' in read('README.md') and 'make test' in read('README.md')


def test_no_two_files_of_tests_have_one_name():
    names = [p.name for p in (root/'tests').rglob('test_*.py')]
    assert len(set(names)) == len(names), "pytest cannot collect two modules of one name in folders without packages"


def test_nothing_of_one_machine_is_written_down():
    "No registry, no address, no path of a home directory in what sets the project up"
    for name in (
        'Makefile',
        'requirements.lock',
        'requirements-models.txt',
        'settings.ini',
        'pyproject.toml',
        '.ci/run',
        'tools/lock.py',
    ):
        assert not re.search(r'--(extra-)?index-url|--find-links|file://|/home/|/root/|/opt/', read(name)), name


NOTEBOOKS = sorted(p for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_fit_to_commit(path):
    nb = json.loads(path.read_text(encoding='utf-8'))
    assert 'widgets' not in nb['metadata'], "stored widget state shows nothing offline"
    ids = [c['id'] for c in nb['cells']]
    assert len(set(ids)) == len(ids), "two cells have the same id"
    for c in nb['cells']:
        assert not [o for o in c.get('outputs', []) if o['output_type'] == 'error'], "a cell ends in an error"
        shown = json.dumps(c.get('outputs', []))
        assert len(shown) < 200_000, f"an output of {len(shown)} bytes"
        local = rf'{re.escape(str(root))}|/home/\w|/root/|/tmp/|0x[0-9a-f]{{8}}'
        assert not re.search(
            local, shown
        ), f"an output shows a path or an address of one machine: {re.search(rf'.{{0,30}}({local}).{{0,20}}', shown)}"
