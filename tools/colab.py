"""Run the first two tutorials with the versions of packages that Colab has: `python tools/colab.py [notebook …]`.

They run without a browser, in an environment of their own under build/, which is made once for each list of versions
(tests/colab.txt and tests/colab-models.txt) and takes some gigabytes. Needs python3.13, as Colab does.
"""
import hashlib, os, shutil, subprocess, sys, tempfile, time
from pathlib import Path

root = Path(__file__).resolve().parents[1]
PYTHON = 'python3.13'
LISTS = [root/'tests'/f for f in ('colab.txt', 'colab-models.txt')]
MODELS = root/'requirements-models.txt'
TUTORIALS = [root/'nbs'/'tutorials'/f'{n}.ipynb' for n in ('1_quickstart', '2_choose_live')]
# in the environment: execute a notebook in its folder, and write it back with its outputs
RUN = """
import sys, nbformat
from nbclient import NotebookClient
path = sys.argv[1]
nb = nbformat.read(path, 4)
NotebookClient(nb, timeout=600, kernel_name='python3').execute()
nbformat.write(nb, path)
"""


def folder():
    "Where the environment of these lists is"
    text = b''.join(f.read_bytes() for f in [*LISTS, MODELS])
    return root/'build'/f'colab-models-{hashlib.sha256(text).hexdigest()[:12]}'


def ready(): return (folder()/'.ready').exists()


def environment():
    "The Python of the environment, which is made where there is none"
    at = folder()
    python = at/'bin'/'python'
    if ready(): return python
    exe = shutil.which(PYTHON) or sys.exit(f"Colab runs {PYTHON}, which is not on the path")
    print(f"Setting up {at.name}: some minutes, most of them for downloading torch", flush=True)
    pip = [python, '-m', 'pip', 'install', '-q', '--no-compile', '--disable-pip-version-check']
    for command in (
        [exe, '-m', 'venv', '--clear', at],
        [*pip, *(a for f in LISTS for a in ('-r', f))],
        [*pip, '--no-deps', '-r', MODELS],
    ):
        if subprocess.run(list(map(str, command))).returncode: sys.exit(f"{at.name} could not be made")
    (at/'.ready').touch()
    return python


def run(notebook, python):
    "Execute a copy of the notebook; returns it with its outputs, and what was said where it failed"
    env = os.environ | dict(
        PYTHONPATH=str(root), HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false', JUPYTER_PREFER_ENV_PATH='1'
    )
    with tempfile.TemporaryDirectory(prefix='colab-') as tmp:
        copy = shutil.copy(notebook, tmp)
        done = subprocess.run([python, '-c', RUN, copy], cwd=tmp, env=env, capture_output=True, text=True)
        return Path(copy).read_text(encoding='utf-8'), done.stderr if done.returncode else ''


def main():
    python = environment()
    for notebook in list(map(Path, sys.argv[1:])) or TUTORIALS:
        start = time.monotonic()
        _, wrong = run(notebook, python)
        if wrong: sys.exit(f"{notebook.name} fails with Colab's versions:\n{wrong[-4000:]}")
        print(f"{notebook.name} ran with Colab's versions in {time.monotonic() - start:.0f} s", flush=True)


if __name__ == '__main__': main()
