"The widgets' tests once more, under Colab's ipywidgets 7.7 and without torch, in an environment of their own."
import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow
TESTS = sorted(str(p.relative_to(root)) for p in (root/"tests").glob("test_widgets_*.py"))


@pytest.fixture(scope="module")
def python():
    "Python of the environment, made once for each list of requirements"
    wanted = root/"tests"/"colab.txt"
    folder = root/"build"/f"colab-{hashlib.sha256(wanted.read_bytes() + sys.version.encode()).hexdigest()[:12]}"
    exe = folder/("Scripts" if os.name == "nt" else "bin")/"python"
    if not (folder/".ready").exists():
        made = subprocess.run(
            f'"{sys.executable}" -m venv --clear "{folder}" && "{exe}" -m pip install -q --no-compile'
            f' --disable-pip-version-check -r "{wanted}"',
            shell=True,
            capture_output=True,
            text=True,
            timeout=600,
        )
        if made.returncode and not os.environ.get("CI"):
            pytest.skip(f"the environment could not be made: {made.stderr[-300:]}")
        assert made.returncode == 0, made.stderr[-2000:]
        (folder/".ready").touch()
    return exe


@pytest.mark.timeout(900)
def test_widgets_under_ipywidgets_7(python):
    p = subprocess.run(
        [python, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", *TESTS],
        cwd=root,
        capture_output=True,
        text=True,
        env=dict(os.environ, PYTHONPATH=str(root)),
        timeout=600,
    )
    assert p.returncode == 0, p.stdout[-4000:]
    n = {what: int(k) for k, what in re.findall(r"(\d+) (passed|skipped)", p.stdout)}
    assert n["passed"] > 50 and n.get("skipped", 0) <= 2, p.stdout[-500:]      # what needs torch is skipped there


def test_no_torch_there(python):
    p = subprocess.run(
        [python, "-c", "import ipywidgets, importlib.util as u; print(ipywidgets.__version__, u.find_spec('torch'))"],
        capture_output=True,
        text=True,
    )
    assert p.stdout.split() == ["7.7.1", "None"]
