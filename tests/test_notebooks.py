"The runner of the notebooks: a process for each, and what fails is named."
import os, subprocess, sys
from pathlib import Path

import nbformat

root = Path(__file__).resolve().parents[1]
CHANGES = "from alf_nb.core.policy import Policy\nassert not hasattr(Policy, 'changed')\nPolicy.changed = True"


def run(folder, **cells):
    paths = [folder/f'{name}.ipynb' for name in cells]
    for path, cell in zip(paths, cells.values()):
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)]), path)
    command = [sys.executable, root/'tools'/'notebooks.py', '--workers', '1', *paths]
    return subprocess.run(command, capture_output=True, text=True, cwd=root, env=os.environ | dict(OMP_NUM_THREADS='1'))


def test_no_notebook_sees_what_another_changed_and_one_that_fails_is_named(tmp_path):
    res = run(tmp_path, a=CHANGES, b="assert 1 + 1 == 3, 'not this'", c=CHANGES)
    assert res.returncode == 1 and 'not this' in res.stderr
    assert res.stderr.splitlines()[-1] == 'failed: b.ipynb'


def test_all_that_ran_are_counted(tmp_path):
    res = run(tmp_path, a=CHANGES, c=CHANGES)
    assert (res.returncode, res.stdout.splitlines()[-1]) == (0, '2 notebooks ran'), res.stderr


def test_what_is_begun_first_is_there(monkeypatch):
    "A notebook or a test file that was renamed would be begun last, and leave the other workers idle"
    monkeypatch.syspath_prepend(root/'tools')
    import conftest, notebooks
    assert len(notebooks.LONGEST) == len({p for p in (root/'nbs').rglob('*.ipynb') if p.stem in notebooks.LONGEST}) > 0
    assert not [f for f in conftest.SECONDS if not (root/'tests'/f).is_file()]
