"""The quick tests with the oldest and the newest packages that settings.ini allows: `python tools/matrix.py [NAME …]`,
all of its `matrix` without a name.

Each combination gets a virtual environment of its own, which is deleted afterwards: `oldest` has every requirement at
its lower bound, `lock` the versions of requirements.lock,
`newest` what pip finds today. Needs the Pythons that `matrix` names on the path, and some gigabytes of disk for the
time of a run. What was found is appended to RESULTS.

Not `nox`: it would take over `combine`, which makes an environment and fills it, and leave what is most of this file,
the bounds of settings.ini, the versions found and the counts of the tests as a row; and it would keep gigabytes of
environments and have to be installed first, where this needs nothing beside Python.
"""
import configparser, json, os, platform, re, shutil, subprocess, sys, tempfile, time
from pathlib import Path
from xml.etree import ElementTree

root = Path(__file__).resolve().parents[1]
RESULTS = root/'benchmarks'/'results'/'versions.jsonl'
SHOWN = (
    'torch',
    'transformers',
    'accelerate',
    'datasets',
    'safetensors',
    'numpy',
    'numba',
    'triton',
    'fastcore',
    'ipywidgets',
    'tqdm',
)
# what the tests need beside alf_nb itself
TOOLS = [
    'pytest',
    'pytest-timeout',
    'hypothesis',
    'psutil',
    'nbclient',
    'ipykernel',
    'peft',
    'trl;python_version>"3.10"',
]
# where a version can matter: modules that meet torch, transformers, PEFT and ipywidgets. CI runs everything with the
# locked versions
TESTS = [
    f'tests/test_{n}.py'
    for n in (
        'imports',
        'layers_families',
        'training',
        'tools',
        'attention',
        'runlog',
        'reports',
        'sources',
        'widgets_base',
        'widgets_map',
    )
]

config = configparser.ConfigParser(delimiters=['='])
config.read(root/'settings.ini', encoding='utf-8')
settings = config['DEFAULT']


def combinations():
    "name → (Python, which versions), as settings.ini says"
    return {name: (python, which) for name,python,which in (w.split(':') for w in settings['matrix'].split())}


def asked(which):
    "What pip is asked for"
    needs = settings['requirements'].split()
    if which == 'lower': return [*(re.sub(r'>=', '==', n) for n in needs), *TOOLS]
    return [*needs, *TOOLS, *(['-c', str(root/'requirements.lock')] if which == 'lock' else [])]


def output(*command, **kw):
    return subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True, **kw).stdout


def tests(python, folder, more):
    "Run the quick tests; returns the counts and the names of what failed"
    report = folder/'report.xml'
    env = {
        **os.environ,
        'PYTHONPATH': str(root),
        'HF_HUB_OFFLINE': '1',
        'OMP_NUM_THREADS': '1',
        'TOKENIZERS_PARALLELISM': 'false',
        'TRITON_CACHE_DIR': str(folder / 'triton'),
    }
    run = subprocess.run(
        [
            python,
            '-m',
            'pytest',
            '-o',
            'addopts=',
            '-q',
            '-m',
            'not slow',
            '-p',
            'no:cacheprovider',
            f'--junitxml={report}',
            *(more or TESTS),
        ],
        cwd=root,
        env=env,
        capture_output=True,
        text=True,
    )
    if not report.exists(): sys.exit(run.stdout + run.stderr)
    cases = list(ElementTree.parse(report).iter('testcase'))
    ended = lambda *kinds: [c for c in cases if any(c.find(k) is not None for k in kinds)]
    bad, skipped = ended('failure', 'error'), ended('skipped')
    if bad: print(run.stdout[-20_000:])
    return dict(
        passed=len(cases) - len(bad) - len(skipped),
        failed=len(bad),
        skipped=len(skipped),
        failures=[f"{c.get('classname')}::{c.get('name')}" for c in bad],
    )


def row(name, python, folder, more=()):
    "What is installed for this interpreter, and what the tests say"
    versions = {
        p['name']: p['version']
        for p in json.loads(output(python, '-m', 'pip', '--disable-pip-version-check', 'list', '--format=json'))
    }
    start = time.monotonic()
    found = tests(python, folder, more)
    return dict(
        date=time.strftime('%Y-%m-%d', time.gmtime()),
        name=name,
        python=output(python, '-c', 'import platform; print(platform.python_version())').strip(),
        **{k: versions.get(k) for k in SHOWN},
        seconds=round(time.monotonic() - start),
        device=platform.machine(),
        system=platform.system(),
        **found
    )


def combine(name, python, which, more=()):
    "A row for a new environment, which is deleted afterwards"
    exe = shutil.which(f'python{python}')
    if not exe: sys.exit(f"{name} needs python{python} on the path")
    with tempfile.TemporaryDirectory(prefix='matrix-') as tmp:
        venv = Path(tmp)/'venv'
        output(exe, '-m', 'venv', venv)
        py = venv/'bin'/'python'
        pip = [py, '-m', 'pip', '--disable-pip-version-check', '-q']
        output(*pip, 'install', '-U', 'pip')
        got = subprocess.run(
            [*pip, 'install', '--no-cache-dir', '--only-binary=:all:', *asked(which)], capture_output=True, text=True
        )
        if got.returncode: sys.exit(f"{name} cannot be installed: {got.stderr[-3000:]}")
        return row(name, py, Path(tmp), more)


def table(rows):
    "Rows for the terminal"
    heads = ('name', 'python', 'torch', 'transformers', 'passed', 'failed', 'skipped', 'seconds')
    cells = [heads, *([str(r[h]) for h in heads] for r in rows)]
    widths = [max(len(c[i]) for c in cells) for i in range(len(heads))]
    return '\n'.join('  '.join(c.ljust(w) for c,w in zip(row, widths)).rstrip() for row in cells)


def main():
    names, more = [a for a in sys.argv[1:] if a in combinations()], [a for a in sys.argv[1:] if a not in combinations()]
    rows = []
    for name in names or combinations():
        rows.append(combine(name, *combinations()[name], more))
        print(table(rows[-1:]), flush=True)
        if more: continue                                    # a part of the tests is no result
        with RESULTS.open('a', encoding='utf-8') as f: f.write(json.dumps(rows[-1])+'\n')
    print(table(rows))
    sys.exit(any(r['failed'] for r in rows))


if __name__ == '__main__': main()
