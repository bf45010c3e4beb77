"The runner of the notebooks: a process for each, and what fails is named."
import os, runpy, sys
from pathlib import Path

import forks
import nbformat

root = Path(__file__).resolve().parents[1]
CHANGES = "from alf_nb.core.policy import Policy\nassert not hasattr(Policy, 'changed')\nPolicy.changed = True"


def main(out, *paths):
    "In a process of its own"
    with open(out, 'w') as f:
        for fd in (1, 2): os.dup2(f.fileno(), fd)
    os.environ['OMP_NUM_THREADS'] = '1'
    os.chdir(root)
    sys.path.insert(0, str(root/'tools'))
    sys.argv = ['notebooks.py', '--workers', '1', *map(str, paths)]
    runpy.run_path('tools/notebooks.py', run_name='__main__')


def run(folder, **cells):
    "Exit code and lines"
    paths = [folder/f'{name}.ipynb' for name in cells]
    for path, cell in zip(paths, cells.values()):
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)]), path)
    code = forks.run(main, folder/'out.txt', *paths)
    return code, (folder/'out.txt').read_text().splitlines()


def test_no_notebook_sees_what_another_changed_and_one_that_fails_is_named(tmp_path):
    code, lines = run(tmp_path, a=CHANGES, b="assert 1 + 1 == 3, 'not this'", c=CHANGES)
    assert code == 1 and 'not this' in '\n'.join(lines)
    assert lines[-1] == 'failed: b.ipynb'


def test_all_that_ran_are_counted(tmp_path):
    code, lines = run(tmp_path, a=CHANGES, c=CHANGES)
    assert (code, lines[-1]) == (0, '2 notebooks ran'), lines


def test_what_is_begun_first_is_there(monkeypatch):
    "A notebook or a test file that was renamed would be begun last, and leave the other workers idle"
    monkeypatch.syspath_prepend(root/'tools')
    import notebooks
    begun_first = runpy.run_path(root/'tests'/'conftest.py')['SECONDS']
    assert len(notebooks.LONGEST) == len({p for p in (root/'nbs').rglob('*.ipynb') if p.stem in notebooks.LONGEST}) > 0
    assert not [f for f in begun_first if not (root/'tests'/f).is_file()]
