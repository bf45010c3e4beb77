"""How many faults were tried, and how many were held: runs the tests of faults, a row for each kind in
results/faults.jsonl.

    python benchmarks/bench_faults.py                    # runs them, about ten minutes
    python benchmarks/bench_faults.py --junit REPORT.xml … # counts what `pytest --junitxml=REPORT.xml` has run

A test is one case, or as many as it says itself (`record_property('tried', n)`).
"""
import argparse
import json
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from datetime import date
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT/'benchmarks'/'results'/'faults.jsonl'
KINDS = {
    'tampered checkpoints and states': ['test_tampered'],
    'text that would be markup or script': ['test_markdown', 'browser.test_hostile_text'],
    'links, pipes, devices in the place of files': ['test_plain_files'],
    'logs, results, deltas that are lies': ['test_hostile', 'test_runlog'],
    'texts that are no text': ['test_texts', 'test_sources'],
    'killed and resumed, full disks, power cuts': ['test_resume', 'test_finish', 'test_files'],
    'logs that go away, clocks': ['test_log_moved', 'test_faults'],
    'two writers, threads': ['test_two_writers', 'test_background'],
    'units that do not move': ['test_moved'],
    'batches of other trainers': ['test_probe'],
    'optimizers of others, quantised bases': ['test_optimizers', 'test_quantised', 'test_peft'],
    'models: pins and running order': ['test_pins', 'test_running_order'],
}


def run(folder):
    "Run the tests of all kinds; returns the report"
    report = Path(folder)/'report.xml'
    files = [f"tests/{name.replace('.', '/')}.py" for names in KINDS.values() for name in names]
    command = [sys.executable, '-m', 'pytest', '-o', 'addopts=', '-q', f'--junitxml={report}', *files]
    subprocess.run(command, cwd=ROOT)
    return report


def cases(report):
    "(module, cases, held) of each test that was not skipped"
    for case in ET.parse(report).iter('testcase'):
        if case.get('classname') is None or case.find('skipped') is not None: continue      # cut off, or skipped
        tried = [p.get('value') for p in case.iter('property') if p.get('name') == 'tried']
        n = int(tried[0]) if tried else 1
        failed = any(case.find(k) is not None for k in ('failure', 'error'))
        yield case.get('classname').removeprefix('tests.'), n, 0 if failed else n


def rows(reports):
    "A row for each kind"
    found = [case for report in reports for case in cases(report)]
    versions = dict(torch=torch.__version__, transformers=transformers.__version__, python=platform.python_version())
    for kind, names in KINDS.items():
        mine = [(n, held) for module, n, held in found if module in names]
        if not mine: continue
        ran = [name for name in names if any(module == name for module, *_ in found)]
        tried, held = (sum(row[i] for row in mine) for i in (0, 1))
        yield dict(kind=kind, tests=len(mine), tried=tried, held=held, files=ran, device=f'{platform.machine()}, cpu',
                   date=date.today().isoformat(), versions=versions)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--junit', nargs='+', help='reports of pytest, instead of running the tests')
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = list(rows(given.junit or [run(folder)]))
    with open(RESULTS, 'a', encoding='utf-8') as f:
        for row in made: f.write(json.dumps(row, ensure_ascii=False)+'\n')
    for row in made: print(f"{row['kind']}: {row['tried']} tried, {row['held']} held")


if __name__ == '__main__': main()
