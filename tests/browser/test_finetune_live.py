"""A run of `finetune(live=True)` as a person steers it: a prompt while it is paused, another learning rate, a
checkpoint, stop and resume, stop without saving, and what is left when the kernel is gone."""
import re

START = """
import time, warnings; warnings.simplefilter('ignore')
from pathlib import Path
import alf_nb.app.finetune as app
from alf_nb.all import *
from alf_nb.demo import demo_model, demo_tokenizer
app.Bar.on_step_begin = lambda *args, **kw: time.sleep(.05)
text = Path('text.txt')
says = 'The cat follows the dog, and {} times {} is {}, says the sun.'
text.write_text('\\n\\n'.join(says.format(i, i, i*i) for i in range(200)))
def live(out, steps=2000, **kw):
    net = demo_model(), demo_tokenizer()
    return finetune(net, text, out, other=text, steps=steps, max_length=32, eval_blocks=4,
                    lr=1e-2, interval=20, bf16=False, live=True, **kw)
"""


def ask(nb, i, timeout=90): return nb.ask(i, timeout)


def dashboard_of(notebook, out, *cells):
    "Start a run, and its dashboard in the second cell: the notebook, that cell, and its buttons by name"
    nb = notebook(START + f"run = live({out!r})", "TrainingDashboard(run)", *cells)
    nb.run(0, timeout=120)
    nb.run(1)
    cell = nb.cell(1)
    button = lambda name: cell.get_by_role("button", name=re.compile(rf"\b{name}$"))
    button("Pause").wait_for(timeout=60_000)
    return nb, cell, button


def test_a_prompt_a_rate_a_checkpoint_a_stop_and_a_resume(notebook, shot):
    nb, cell, button = dashboard_of(
        notebook,
        "steered",
        "run.status, run.step",
        "run.log.events('scale_lr')[-1]['factor'], Path(f'steered/checkpoint-{run.step}/alf/state.json').is_file()",
        "[p.name for p in Path('steered').glob('delta')], run.status, run.line[:40]",
        "run.status, run.alive, run.error",
    )
    see = lambda text, timeout=60_000: cell.get_by_text(re.compile(text)).first.wait_for(timeout=timeout)
    cell.get_by_text(re.compile(r"at step \d+0\b")).first.wait_for(timeout=60_000)     # a sample at a selection
    shot(nb, "live_running", 1)
    button("Pause").click()
    button("Resume").wait_for(timeout=60_000)
    button("Try & steer").click()
    cell.get_by_placeholder("The beginning of a text").fill("The cat")
    cell.get_by_placeholder("The beginning of a text").blur()
    button("Try it").click()
    held = eval(ask(nb, 2))
    cell.locator("[role=status] .sample").filter(has_text="The cat").first.wait_for(timeout=90_000)
    rate = cell.locator(".widget-text input[type=number]").first
    rate.fill("0.5")
    rate.press("Enter")
    button("Set").click()
    see(r"× 0\.5 since step \d+")
    assert ask(nb, 3) == "(0.5, False)"
    button("Save").click()
    see("Paused")
    assert eval(ask(nb, 2)) == held and held[0] == "paused"
    assert ask(nb, 3) == "(0.5, True)"
    shot(nb, "live_steering", 1)
    button("Stop").click()
    see("can be taken up from")
    assert "['delta'], 'stopped', 'finetune((model, tokenizer)" in ask(nb, 4).replace('"', "'")
    shot(nb, "live_stopped", 1)
    button("Resume").click()
    see(r"^Training$")
    assert ask(nb, 5) == "('running', True, None)"
    shot(nb, "live_resumed", 1)
    button("Stop").click()
    see("can be taken up from")


def test_stop_without_saving_and_a_kernel_that_is_gone(notebook, shot):
    nb, cell, button = dashboard_of(
        notebook,
        "discarded",
        "run.status, Path('discarded/delta').exists(), Path('discarded/report.html').exists()",
        "other = live('gone'); TrainingDashboard(other)",
    )
    button("Try & steer").click()
    button("Stop without saving").click()
    button("No, go on").click()
    button("Stop without saving").click()
    button("Yes, keep nothing").click()
    cell.get_by_text(re.compile("nothing of it is kept")).first.wait_for(timeout=60_000)
    for _ in range(100):
        if ask(nb, 2) == "('stopped', False, True)": break
        nb.page.wait_for_timeout(300)
    assert ask(nb, 2) == "('stopped', False, True)"
    shot(nb, "live_discarded", 1)
    nb.run(3)
    cell = nb.cell(3)
    cell.get_by_text(re.compile(r"step \d+ of 2000")).first.wait_for(timeout=60_000)
    nb.restart()
    cell.get_by_text("The kernel of this view is gone").wait_for(timeout=20_000)
    assert cell.get_by_text("TrainingDashboard('gone')").locator("visible=true").count() == 1
    assert not cell.locator(".jupyter-widgets-disconnected").first.is_visible()
    shot(nb, "kernel_gone", 3)
