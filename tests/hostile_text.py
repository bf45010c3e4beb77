"""Payloads in every text of everything that shows itself in a notebook: for tests/test_markdown.py and, in a real
JupyterLab, tests/browser/test_hostile_text.py."""
import dataclasses
import importlib
import json
import pkgutil
from pathlib import Path

import numpy as np
import torch

import alf_nb
from alf_nb.study.plan import Plan, Way
from alf_nb.app.tradeoff import Tradeoff
from alf_nb.study.race import Race, Setting
from alf_nb.study.verdict import SignalAudit
from alf_nb.model.delta import Delta
from alf_nb.model.layers import Layers
from alf_nb.model.needs import Held, Needs
from alf_nb.report.maps import cell_table
from alf_nb.report.html import Html
from alf_nb.core.records import Scores, Selection, UnitInfo
from alf_nb.core.shift import AttentionComparison, AttentionShift
from alf_nb.report.page import report_html
from alf_nb.report.results_page import PolicyComparison
from alf_nb.report.comparison import compare_runs
from alf_nb.report.charts import layer_map, loss_chart, memory_chart, role_maps
from alf_nb.core.runlog import RunLog, read_once
from alf_nb.report.attention import shift_map, shift_section
from fake_run import fake_run

RAN = "window.ran=parent.ran=top.ran=1"      # what a test looks for in the page
PAYLOADS = (
    f"<script>{RAN}</script>",
    f"""<iframe srcdoc="<script>{RAN}</script>"></iframe>""",
    f"""<img src=x onerror="{RAN}">""",
    f"[click](javascript:{RAN})",
    "![seen](http://tracker.invalid/a.png)",
    "<http://tracker.invalid/b> <javascript:alert(1)> <me@tracker.invalid>",
    "http://tracker.invalid/c https://tracker.invalid www.tracker.invalid me@tracker.invalid",
    f"a` <svg onload={RAN}> ``b``` <svg onload={RAN}>",
    f"a | b\n\n# big\n\n<script>{RAN}</script>\n\n| c |\n|---|\n| d |",
    (
        rf"$\href{{javascript:{RAN}}}{{x}}$ \(y\) \\(z\\) $$<script>{RAN}</script>$$"
        rf" \begin{{x}}<script>{RAN}</script>\end{{x}} \[w\]"
    ),
    f"&#60;script&#62;{RAN}&#60;/script&#62; &lt;b&gt; &amp;",
    f"<!-- <!--> <script>{RAN}</script> --> <![CDATA[ <?php ?>",
    "===\n- item\n1. one\n> quote\n~~~\n```\n    code\n---",
    "\u202eevil\u2066\x1b[31m\x00\u2028\ud800\u200b end",
    f"[ref]: javascript:{RAN}\n[ref] [^1] [[wiki]]",
    f""""'><svg onload={RAN}></td></table><a href="javascript:{RAN}">x</a><object data=x></object>""",
    "*a* **b** __c__ _d_ ~~e~~ ==f== {=html} {{< include x >}} ::: - [ ] x",
    rf"\[x\](javascript:{RAN}) \<b\> \\",
    (
        f"<details open ontoggle={RAN}><style>*{{display:none}}</style><base href=//tracker.invalid><form"
        f" action=//tracker.invalid><button formaction=javascript:{RAN}>"
    ),
)
SHOWS = (
    "_repr_html_",
    "_repr_markdown_",
    "_repr_svg_",
    "_repr_latex_",
    "_repr_javascript_",
    "_repr_mimebundle_",
    "_ipython_display_",
)


def classes():
    "Every class that shows itself as HTML or Markdown; a widget of its own writes text nodes in the page"
    from ipywidgets import DOMWidget
    found = set()
    for m in pkgutil.walk_packages(alf_nb.__path__, "alf_nb."):
        if m.name.endswith("_modidx"): continue
        for c in vars(importlib.import_module(m.name)).values():
            ours = isinstance(c, type) and c.__module__.startswith("alf_nb") and not issubclass(c, DOMWidget)
            if ours and any(hasattr(c, s) for s in SHOWS): found.add(c)
    return {c.__name__: c for c in sorted(found, key=lambda c: c.__name__)}


def poisoned(x, evil, fixed=("event", "kind", "t", "when", "signal")):
    "The same with the next of `evil` in every text and every key that is free, but for the words that the format fixes"
    if isinstance(x, (list, tuple)): return [poisoned(v, evil, fixed) for v in x]
    if isinstance(x, str): return x + evil(x)
    if not isinstance(x, dict): return x
    free = lambda k: "." in k or k in ("embeddings", "norm", "domain", "other", "alf_nb")
    keep = lambda k, v: k in fixed or k == "policy" and isinstance(v, dict)
    key = lambda k: k + evil(k) if free(k) else k
    return {key(k): v if keep(k, v) else poisoned(v, evil, fixed) for k, v in x.items()}


def the_same(payload): return lambda text: payload


def each_its_own(payloads):
    "A text gets one of the payloads, always the same: names have to stay names"
    return lambda text: payloads[sum(text.encode()) % len(payloads)]


def a_run(folder, evil, name="run"):
    "A run log with it in every text; the folder is named so, too, as far as a folder can be"
    at = Path(folder)/(name + evil("run").replace("/", "∕").replace("\x00", "").replace("\ud800", ""))[:80]
    fake_run(folder/"tame", blocks=2, steps=20, interval=6, every=4)
    events = [json.loads(line) for line in (folder/"tame"/"events.jsonl").read_text(encoding="utf-8").splitlines()]
    events += [
        dict(
            event="attention",
            step=20,
            t=events[-1]["t"],
            shift=json.loads(a_shift(evil).to_json()),
            words=["x" + evil("x")],
        ),
        dict(
            event="error",
            step=20,
            t=events[-1]["t"],
            type="E" + evil("E"),
            message="m" + evil("m"),
            traceback="File\n" + evil("t"),
        ),
        dict(event="k" + evil("k"), step=20, t=events[-1]["t"]),
    ]
    at.mkdir(exist_ok=True)
    (at/"events.jsonl").write_text("".join(json.dumps(poisoned(e, evil)) + "\n" for e in events), encoding="utf-8")
    return at


def a_shift(evil, layers=2, heads=3):
    rows = [[.1*(i+j) for j in range(heads)] for i in range(layers)]
    overall = dict(before=.1, after=.3, change=.2, low=.1, high=.3)
    known = dict(central=rows, entropy=rows)
    return AttentionShift(
        known,
        known,
        known,
        known,
        {k: [(0, 1)] for k in known},
        {k: overall for k in known},
        9,
        999,
        name="tuned" + evil("tuned"),
    )


def an_audit(evil):
    units = [
        UnitInfo(f"block.{i}.q" + evil(str(i)), f"block.{i}" + evil("l"), "matrix", "q" + evil("q"), 10 + i, i)
        for i in range(6)
    ]
    one = dict(total=.1, low=0., high=.2, per_param=.1, repeats=[.1])
    agree = dict(
        total=0.1, total_low=0.0, total_high=0.2, per_param=0.1, per_param_low=0.0, per_param_high=0.2, p=0.5, kept=0.5
    )
    signals, values = ("gain" + evil("gain"), "n_params", "1/n_params"), {u.name: float(i) for i, u in enumerate(units)}
    return SignalAudit(
        units,
        dict.fromkeys(values, one),
        {s: dict(values) for s in signals},
        dict.fromkeys(signals, agree),
        agree,
        dict(total=0.5, per_param=0.5),
        "advice" + evil("advice"),
        dict(
            steps="4" + evil("4"),
            repeats="3" + evil("3"),
            lr=1e-3,
            level=0.95,
            budget=0.25,
            loss=3.0,
            model="m" + evil("m"),
            draws=100,
        ),
    )


def results(evil):
    row = dict(
        about="a" + evil("a"),
        model="m" + evil("m"),
        data="d" + evil("d"),
        rule="steps",
        amount=10,
        other_loss=2.0,
        other_loss_before=2.1,
        steps=10,
        wall_s=3.0,
        importance_s=0.1,
        state_bytes_peak=1e6,
        trainable_share_peak=0.2,
        seconds_per_step=0.3,
        settings="{}",
        versions={"v" + evil("v"): "w" + evil("w")},
        curve=[[0, 0.0, 0, 3.0], [5, 1.0, 9, 2.0], [10, 2.0, 18, 1.5]],
        map={"block.0" + evil("b"): "09", "block.1": "99"},
        date="y" + evil("y"),
        commit="c" + evil("c"),
        task="t" + evil("t"),
    )
    good = [
        dict(row, key=f"{m}{s}", method=m + evil(m), seed=s, lr=1e-3, task_loss=1.0 + s / 10 + len(m) / 100)
        for m in ("full", "random", "alf")
        for s in (0, 1)
    ]
    return good + [dict(row, key="e", method="bad" + evil("bad"), seed=0, lr=1e-3, error="boom" + evil("boom"))]


def a_model(evil):
    units = [UnitInfo(f"block.{i}.q" + evil(str(i)), f"block.{i}" + evil("l"), "matrix", "q", 4, i) for i in range(3)]
    p = torch.nn.Parameter(torch.zeros(2, 2))
    return Layers(
        torch.nn.Linear(2, 2), units, {u.name: {u.name: p} for u in units}, {u.name: u.name for u in units}, "matrix",
        {"": (0, 1, 2)}
    )


def pictures(folder, evil):
    log = RunLog(a_run(folder, evil))
    one, several = a_shift(evil), AttentionComparison({"a" + evil("a"): a_shift(evil), "b" + evil("b"): a_shift(evil)})
    body = report_html(log).partition("<main>")[2].partition("</main>")[0]
    return Html(
        "".join(
            [
                loss_chart(log),
                layer_map(log),
                role_maps(log),
                memory_chart(log),
                shift_map(one),
                shift_section(one, words=["x" + evil("x")]),
                shift_section(several),
                an_audit(evil).plot(),
                compare_runs([log, log]).plot(),
                PolicyComparison(results(evil)).plot(),
                cell_table({("r" + evil("r"), "c"): 0.5}, ["r" + evil("r")], ["c"], "t" + evil("t")),
                body,
            ]
        )
    )


def a_picker(folder, evil):
    from alf_nb.widgets.picker import ThresholdPicker
    return ThresholdPicker(RunLog(a_run(folder, evil)))


def a_map(folder, evil):
    from alf_nb.widgets.map import SelectionMap
    return SelectionMap(RunLog(a_run(folder, evil)))


def a_dashboard(folder, evil):
    from alf_nb.widgets.dashboard import TrainingDashboard
    return TrainingDashboard(RunLog(a_run(folder, evil)))


def a_steering(folder, evil):
    from alf_nb.widgets.steering import Steering
    return Steering(RunLog(a_run(folder, evil)))


def a_viewer(folder, evil):
    from alf_nb.widgets.attention import AttentionViewer
    maps = np.full((2, 2, 3, 3), 1/3)
    return AttentionViewer(
        maps, maps * np.array([0.5, 1, 1.5]), ["a" + evil("a"), "b" + evil("b"), "c"], a_run(folder, evil)
    )


def several_runs(folder, evil):
    from alf_nb.widgets.compare import CompareView
    (folder/"2").mkdir()
    return CompareView([a_run(folder, evil), a_run(folder/"2", evil)])


def a_followed_log(folder, evil):
    from alf_nb.widgets.base import follow
    from alf_nb.widgets.compare import Followed
    follower = follow(a_run(folder, evil))
    follower.update()
    return Followed(follower)


def a_failed_view(folder, evil):
    from alf_nb.widgets.base import View
    v = View(a_run(folder, evil))
    v.open()
    v.fail(ValueError("why" + evil("why")))
    return v


# class → (folder, evil) → an object of it with `evil` in every text; a class that shows itself and is not here fails
# the test
WAY = Way(**dict.fromkeys((f.name for f in dataclasses.fields(Needs)), 1), method="full", budget=None, held=Held())


def a_plan(evil, memory=None): return Plan("m" + evil("m"), 100, 1, 16, True, False, "cpu", memory, (WAY,))


def a_race(evil):
    at = Setting(.25, 1e-3)
    return Race(((6, ((at, 1.),)),), at, "accuracy" + evil("g"), 1., 2.)


def a_plan_view(folder, evil):
    from alf_nb.widgets.plan import PlanView
    return PlanView(a_plan(evil, 1 << 30))

MAKERS = dict(
    RunLog=lambda folder, evil: RunLog(a_run(folder, evil)),
    Selection=lambda folder, evil: Selection.from_dict(
        poisoned(dict(names=["block.0.q", "head"], reason="top", policy="budget", step="3", share=0.1), evil)
    ),
    Scores=lambda folder, evil: Scores(
        "gain" + evil("gain"),
        {"block.0.q" + evil("q"): 0.5, "block.1.q": None},
        {"block.0.q" + evil("q"): "3" + evil("3")},
    ),
    AttentionShift=lambda folder, evil: AttentionShift.from_dict(
        {**a_shift(evil).to_dict(), "n_texts": "9" + evil("9")}
    ),
    AttentionComparison=lambda folder, evil: AttentionComparison(
        {"a" + evil("a"): a_shift(evil), "b" + evil("b"): a_shift(evil)}
    ),
    SignalAudit=lambda folder, evil: an_audit(evil),
    Layers=lambda folder, evil: a_model(evil),
    Delta=lambda folder, evil: Delta("p", "base" + evil("base"), ("a" + evil("a"),), "9" + evil("9"), 10, 100),
    Plan=lambda folder, evil: a_plan(evil),
    Race=lambda folder, evil: a_race(evil),
    Tradeoff=lambda folder, evil: Tradeoff(
        "r" + evil("r"), "b" + evil("b"), (dict(scale=1.0, task=2.0, other=3.0, kl=0.1),)
    ),
    Comparison=lambda folder, evil: compare_runs([a_run(folder, evil)] * 2),
    PolicyComparison=lambda folder, evil: PolicyComparison(results(evil)),
    Followed=a_followed_log,
    RunReading=lambda folder, evil: read_once(a_run(folder, evil)),
    Html=pictures,
    View=a_failed_view,
    PlanView=a_plan_view,
    ThresholdPicker=a_picker,
    SelectionMap=a_map,
    TrainingDashboard=a_dashboard,
    Steering=a_steering,
    AttentionViewer=a_viewer,
    CompareView=several_runs,
)
