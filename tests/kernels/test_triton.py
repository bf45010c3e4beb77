"""Runs interpreted.py and compiled.py, each in a process of its own, and shows each of their tests as one here. Cases
that are slow run there when slow tests run here.

The choice between interpreter and compiler is made when triton is imported, and anything in this process may have
imported it already."""
import ast, os, subprocess, sys
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree
import pytest

HERE = Path(__file__).parent
pytest.importorskip('triton', reason='no triton for this system')

def names(file):
    return [
        f.name
        for f in ast.parse((HERE / file).read_text()).body
        if isinstance(f, ast.FunctionDef) and f.name.startswith('test_')
    ]

@pytest.fixture(scope='session')
def results(tmp_path_factory, pytestconfig):
    "Outcomes of a file's tests, run once: test name → list of (case, what went wrong or None)"
    done = {}
    def run(file):
        if file in done: return done[file]
        tmp = tmp_path_factory.mktemp(file[:-3])
        xml = tmp/'junit.xml'
        env = os.environ | dict(
            TRITON_INTERPRET=str(int(file == 'interpreted.py')),
            TRITON_CACHE_DIR=str(tmp / 'cache'),
            OMP_NUM_THREADS='1',
        )
        p = subprocess.run(
            [
                sys.executable,
                '-m',
                'pytest',
                '-q',
                '-o',
                'addopts=',
                '-p',
                'no:cacheprovider',
                f'--junitxml={xml}',
                '-m',
                pytestconfig.option.markexpr,
                file,
            ],
            cwd=HERE,
            env=env,
            capture_output=True,
            text=True,
        )
        assert xml.exists(), f'{file} died with status {p.returncode}:\n{p.stdout[-3000:]}\n{p.stderr[-3000:]}'
        out = done[file] = defaultdict(list)
        for case in ElementTree.parse(xml).iter('testcase'):
            wrong = [x.text or x.get('message') for tag in ('failure', 'error', 'skipped') for x in case.iter(tag)]
            out[case.get('name').split('[')[0]].append((case.get('name'), wrong[0] if wrong else None))
        return out
    return run

@pytest.mark.parametrize('file,test', [(f, n) for f in ('interpreted.py', 'compiled.py') for n in names(f)])
def test_triton(results, file, test):
    cases = results(file)[test]
    assert cases, f'{file} did not run {test}'
    bad = [f'{case}\n{why}' for case,why in cases if why]
    assert not bad, f'{len(bad)} of {len(cases)} cases of {test} failed; the first:\n{bad[0]}'
