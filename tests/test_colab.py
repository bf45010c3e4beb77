"The first tutorials with the versions of packages that Colab has, in an environment that `make colab` makes."
import configparser
import json
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from scripts import script

root = Path(__file__).resolve().parents[1]
colab = script("tools/colab.py")
WIDGET = "application/vnd.jupyter.widget-view+json"


def listed():
    "What Colab has, by name"
    lines = [l for f in colab.LISTS for l in f.read_text(encoding="utf-8").splitlines() if l and l[0] not in "#-"]
    return {canonicalize_name(r.name): str(r.specifier)[2:] for r in map(Requirement, lines)
            if str(r.specifier).startswith("==")}


def test_nothing_of_colab_has_to_be_upgraded():
    "An upgrade of ipywidgets or ipykernel breaks Colab's page"
    config = configparser.ConfigParser(delimiters=["="])
    config.read(root/"settings.ini", encoding="utf-8")
    needs = [Requirement(r) for r in config["DEFAULT"]["requirements"].split()]
    has = listed()
    found = [r for r in needs if canonicalize_name(r.name) in has]
    assert {"torch", "transformers", "datasets", "numpy", "ipywidgets", "anywidget"} <= {r.name for r in found}
    for r in found: assert r.specifier.contains(has[canonicalize_name(r.name)]), f"{r}, but Colab has {has[r.name]}"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("notebook", colab.TUTORIALS, ids=lambda p: p.stem)
def test_a_tutorial_runs_there_and_its_views_are_drawn(notebook):
    if not colab.ready(): pytest.skip("`make colab` makes the environment, of some gigabytes")
    text, wrong = colab.run(notebook, colab.environment())
    assert not wrong, wrong[-3000:]
    shown = [o["data"] for c in json.loads(text)["cells"] for o in c.get("outputs", []) if WIDGET in o.get("data", {})]
    names = {"".join(d["text/plain"]).split(":")[0].split(" ")[0] for d in shown}
    assert {"TrainingDashboard", "SelectionMap"} <= names
    assert all("".join(d["text/html"]).count("<") > 50 for d in shown), "a picture stands beside each view"
    if "choose" in notebook.stem: assert "ThresholdPicker" in names, "with its grid, an anywidget"
