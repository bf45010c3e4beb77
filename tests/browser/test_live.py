"""What a person does: start a training in the background, move sliders by key and mouse, press buttons, change the theme, restart the kernel."""
import re

START = """
import time, torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from alf_nb.all import *
from alf_nb.widgets.picker import ThresholdPicker
from alf_nb.demo import demo_dataset, demo_model
class Slow(TrainerCallback):
    def on_step_begin(self, *args, **kw): time.sleep(.05)
def start(out, steps=2000):
    torch.manual_seed(0); torch.set_num_threads(1)
    args = TrainingArguments(out, max_steps=steps, report_to=[], use_cpu=True, save_strategy='no', logging_steps=1)
    return train_in_background(Trainer(demo_model(), args, train_dataset=demo_dataset(), callbacks=[ALFCallback(budget=.25, interval=100), Slow()]))
def share(step=None): return round(run.callback.selection.share, 3)
"""


def ask(nb, i, timeout=20):
    "Run the cell and return its one-line answer"
    nb.run(i, timeout=timeout)
    said = nb.cell(i).locator(".jp-OutputArea-output").last.inner_text().strip()
    assert "Traceback" not in said, said
    return said


def said(nb, i, pattern): return nb.cell(i).locator("[role=status]").filter(has_text=re.compile(pattern)).first
def slider(nb, i, n=0): return nb.cell(i).get_by_role("slider").nth(n)


def test_what_the_slider_says_is_what_trains(notebook, shot):
    "By keyboard, then by mouse, while training runs"
    nb = notebook(START + "run = start('steered')", "picker = ThresholdPicker(run); picker", "run.step", "picker.budget, share(), run.log.events('choose')[-1]['policy']['budget']",
                  "picker.threshold, run.callback.policy.threshold, share()", "run.alive, run.step", "run.stop(); run.wait(); run.status")
    nb.run(0); nb.run(1)
    assert int(ask(nb, 2)) >= 0
    budget = slider(nb, 1, 1)
    budget.wait_for()
    budget.focus()
    for _ in range(10): nb.page.keyboard.press("ArrowLeft")
    nb.cell(1).get_by_text(re.compile(r"budget of 0\.15")).first.wait_for(timeout=10_000)
    nb.cell(1).get_by_role("button", name="Apply now").click()
    said(nb, 1, r"budget 0.15: taken at step \d+, trains since").wait_for(timeout=10_000)
    wanted, trains, logged = eval(ask(nb, 3))
    assert abs(wanted - .15) < .005 and 0 < trains <= .15 and logged == wanted
    shot(nb, "picker_live")
    # the mouse: drag the threshold to about 0.9
    threshold = slider(nb, 1, 0)
    nb.cell(1).get_by_text("would train").first.scroll_into_view_if_needed()
    h, track = threshold.bounding_box(), nb.cell(1).locator(".noUi-base").first.bounding_box()
    nb.page.mouse.move(h["x"] + h["width"]/2, h["y"] + h["height"]/2)
    nb.page.mouse.down()
    nb.page.mouse.move(track["x"] + track["width"]*.9, track["y"] + track["height"]/2, steps=8)
    nb.page.mouse.up()
    nb.cell(1).get_by_role("button", name="Apply now").click()
    said(nb, 1, r"importance ≥ 0[.\d]+: taken at step \d+, trains since").wait_for(timeout=10_000)
    wanted, logged, trains = eval(ask(nb, 4))
    assert abs(wanted - .9) < .05 and logged == wanted and 0 < trains < .15
    alive, step = eval(ask(nb, 5))
    assert alive and step > 5
    assert ask(nb, 6, 60) == "'stopped'"
