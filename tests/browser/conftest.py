import os
from pathlib import Path

import nbformat
import pytest

from lab import CHROMIUM, Notebook, browser, jupyterlab

SHOTS = Path(os.environ.get("ALF_SHOTS", Path(__file__).parents[2]/"build"/"screenshots"))       # kept to be looked at
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"       # the tutorials' own, in markdown
# JupyterLab's own
HARMLESS = (
    "favicon",
    "/api/contents/",
    "Failed to load resource: the server responded with a status of 404",
    "ResizeObserver loop",
    BADGE,
)


def pytest_collection_modifyitems(items):
    try: import playwright      # noqa: F401
    except ImportError: why = "playwright is not installed (pip install playwright)"
    else: why = None if CHROMIUM else "no Chromium on the path"
    if why:
        for i in items: i.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope="session")
def root(tmp_path_factory): return tmp_path_factory.mktemp("lab")


@pytest.fixture(scope="session")
def lab(root):
    with jupyterlab(root) as base: yield base


@pytest.fixture(scope="session")
def context():
    with browser() as c: yield c


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item, call):
    report = yield
    setattr(item, f"report_{report.when}", report)
    return report


@pytest.fixture
def notebook(root, lab, context, request):
    "notebook(cell, cell, …) or notebook(path=…): opened in a page of its own; the browser's console has to stay clean"
    SHOTS.mkdir(parents=True, exist_ok=True)
    opened = []

    def open_(*cells, path=None):
        nb = (
            nbformat.read(path, 4)
            if path
            else nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
        )
        nb.metadata.kernelspec = dict(name="python3", display_name="Python 3", language="python")
        for c in nb.cells:
            if c.cell_type == "code": c.outputs, c.execution_count = [], None
        name = f"{request.node.name.replace('/', '_').replace('[', '_').replace(']', '')}{len(opened) or ''}.ipynb"
        nbformat.write(nb, root/name)
        opened.append(Notebook(context, lab, name))
        return opened[-1]

    yield open_
    failed = getattr(request.node, "report_call", None) is not None and request.node.report_call.failed
    errors = []
    for n in opened:
        if failed: n.page.screenshot(path=SHOTS/f"FAILED_{request.node.name}.png")
        errors += [e for e in n.errors if not any(h in e for h in HARMLESS)]
        away = [
            u for u in n.requests if not u.startswith((lab[0], lab[0].replace("http", "ws"), "data:", "blob:", BADGE))
        ]
        n.close()
        if not failed: assert not away, f"the page went to the network: {away[:3]}"
    if not failed: assert not errors, f"errors in the browser's console: {errors[:3]}"


@pytest.fixture
def shot():
    "shot(notebook, name, i): a picture of code cell `i` and its output, kept to be looked at"
    return lambda nb, name, i: nb.cell(i).screenshot(path=SHOTS/f"{name}.png")
