"""What a person does: start a training in the background, move sliders by key and mouse, press buttons, change the
theme, restart the kernel."""
import re
from pathlib import Path

import pytest

TUTORIALS = Path(__file__).parents[2]/"nbs"/"tutorials"

START = """
import time, torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from alf_nb.all import *
from alf_nb.widgets.dashboard import TrainingDashboard
from alf_nb.widgets.map import SelectionMap
from alf_nb.widgets.picker import ThresholdPicker
from alf_nb.demo import demo_dataset, demo_model
class Slow(TrainerCallback):
    def on_step_begin(self, *args, **kw): time.sleep(.05)
def start(out, steps=2000):
    torch.manual_seed(0); torch.set_num_threads(1)
    args = TrainingArguments(out, max_steps=steps, report_to=[], use_cpu=True, save_strategy='no', logging_steps=1)
    callbacks = [ALFCallback(budget=.25, interval=100), Slow()]
    return train_in_background(Trainer(demo_model(), args, train_dataset=demo_dataset(), callbacks=callbacks))
def share(step=None): return round(run.callback.selection.share, 3)
"""


def ask(nb, i, timeout=20): return nb.ask(i, timeout)


def said(nb, i, pattern): return nb.cell(i).locator("[role=status]").filter(has_text=re.compile(pattern)).first
def slider(nb, i, n=0): return nb.cell(i).get_by_role("slider").nth(n)


def test_what_the_slider_says_is_what_trains(notebook, shot):
    "By keyboard, then by mouse, while training runs"
    nb = notebook(
        START + "run = start('steered')",
        "picker = ThresholdPicker(run); picker",
        "run.step",
        "picker.budget, share(), run.log.events('choose')[-1]['policy']['budget']",
        "picker.threshold, run.callback.run.policy.threshold, share()",
        "run.alive, run.step",
        "run.stop(); run.wait(); run.status",
    )
    nb.run(0)
    nb.run(1)
    assert int(ask(nb, 2)) >= 0
    budget = slider(nb, 1, 1)
    budget.wait_for()
    budget.focus()
    for _ in range(10): nb.page.keyboard.press("ArrowLeft")
    nb.cell(1).get_by_text(re.compile(r"budget of 15 %")).first.wait_for(timeout=10_000)
    nb.cell(1).get_by_role("button", name="Apply now").click()
    said(nb, 1, r"A budget of 15 %: taken at step \d+, trains since").wait_for(timeout=10_000)
    wanted, trains, logged = eval(ask(nb, 3))
    assert abs(wanted - .15) < .005 and 0 < trains <= .15 and logged == wanted
    shot(nb, "picker_live", 1)
    # the mouse: drag the threshold to about 0.9
    threshold = slider(nb, 1, 0)
    nb.cell(1).locator(".noUi-base").first.scroll_into_view_if_needed()  # the slider is not redrawn, the read-outs are
    h, track = threshold.bounding_box(), nb.cell(1).locator(".noUi-base").first.bounding_box()
    nb.page.mouse.move(h["x"] + h["width"]/2, h["y"] + h["height"]/2)
    nb.page.mouse.down()
    nb.page.mouse.move(track["x"] + track["width"]*.9, track["y"] + track["height"]/2, steps=8)
    nb.page.mouse.up()
    # while the kernel is busy the page holds the last value of a drag back, and would send a click before it
    nb.cell(1).get_by_text(re.compile(r"importance ≥ 0\.(8[6-9]|9)")).first.wait_for(timeout=10_000)
    nb.cell(1).get_by_role("button", name="Apply now").click()
    said(nb, 1, r"Importance ≥ 0[.\d]+: taken at step \d+, trains since").wait_for(timeout=10_000)
    wanted, logged, trains = eval(ask(nb, 4))
    assert abs(wanted - .9) < .05 and logged == wanted and 0 < trains < .15
    alive, step = eval(ask(nb, 5))
    assert alive and step > 5
    assert ask(nb, 6, 60) == "'stopped'"


def test_pause_resume_stop(notebook, shot):
    "By the dashboard's buttons; the stop leaves a checkpoint"
    nb = notebook(
        START + "run = start('buttons')",
        "dash = TrainingDashboard(run); dash",
        "run.status, run.step",
        "time.sleep(.5); run.status, run.step",
        "time.sleep(.5); run.status, run.step",
        "import pathlib; run.status, run.step < 2000,"
        " len(list(pathlib.Path('buttons').glob('checkpoint-*/alf/state.json')))",
    )
    nb.run(0)
    nb.run(1)
    button = lambda name: nb.cell(1).get_by_role("button", name=name)
    button("Pause").click(timeout=20_000)
    button("Resume").wait_for(timeout=20_000)
    shot(nb, "dashboard_paused", 1)
    held = ask(nb, 2)
    assert held.startswith("('paused'") and ask(nb, 3) == held
    button("Resume").click()
    button("Pause").wait_for(timeout=20_000)
    status, step = eval(ask(nb, 4))
    assert status == "running" and step > eval(held)[1]
    shot(nb, "dashboard_live", 1)
    button("Stop").click()
    nb.cell(1).get_by_text(re.compile("stopped", re.I)).first.wait_for(timeout=30_000)
    assert ask(nb, 5) == "('stopped', True, 1)"
    shot(nb, "dashboard_stopped", 1)


@pytest.mark.slow
def test_two_on_a_page_dark_narrow_and_after_a_restart(notebook, shot):
    nb = notebook(
        START + "run = start('shown', 60)",
        "TrainingDashboard(run)",
        "ThresholdPicker(run)",
        "run.wait(); run.status",
        "SelectionMap('shown')",
        "from alf_nb.widgets.dashboard import TrainingDashboard; TrainingDashboard('shown')",
    )
    for i in range(3): nb.run(i)
    assert ask(nb, 3, 60) == "'complete'"
    nb.run(4)
    colour = lambda: nb.page.evaluate("() => getComputedStyle(document.querySelector('.jp-OutputArea .alf')).color")
    light = colour()
    for i, name in (1, "dashboard"), (2, "picker"), (4, "map"): shot(nb, f"{name}_light", i)
    nb.theme("Dark")
    assert colour() != light
    for i, name in (1, "dashboard"), (2, "picker"), (4, "map"): shot(nb, f"{name}_dark", i)
    nb.page.set_viewport_size(dict(width=700, height=1500))
    for i in (1, 2, 4):
        out = nb.cell(i).locator(".jp-OutputArea-output").first
        assert out.evaluate("e => e.scrollWidth - e.clientWidth") <= 1, f"cell {i} does not fit into 700 px"
    for i, name in (1, "dashboard"), (2, "picker"), (4, "map"): shot(nb, f"{name}_narrow", i)
    nb.page.set_viewport_size(dict(width=1280, height=1500))
    nb.theme("Light")
    nb.restart()
    nb.run(5)
    nb.cell(5).get_by_text(re.compile("complete", re.I)).first.wait_for(timeout=20_000)
    assert (
        nb.cell(5).get_by_role("button", name="Pause").count() == 0
        or not nb.cell(5).get_by_role("button", name="Pause").is_visible()
    )
    shot(nb, "after_restart", 5)


@pytest.mark.slow
def test_the_live_tutorial_in_the_page(notebook, shot):
    "Run all, as a student does, with the real model"
    nb = notebook(path=TUTORIALS/"2_choose_live.ipynb")
    n = nb.page.evaluate(
        "() => window.jupyterapp.shell.currentWidget.content.widgets.filter(c => c.model.type === 'code').length"
    )
    live = [i for i in range(n) if "eval: false" not in nb.source(i)]       # the install cell is for Colab
    for i in live: nb.run(i, timeout=180)
    for i in live: assert "Traceback" not in nb.output(i)
    views = [i for i in live if nb.cell(i).locator(".alf-view").count()]
    assert len(views) == 5
    for k, i in enumerate(views): shot(nb, f"tutorial_2_{k}", i)
