"A foreign run, delta or result shown in a real JupyterLab: nothing of it runs, fetches or leads elsewhere."
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from hostile_text import MAKERS, PAYLOADS      # noqa: E402

SET_UP = f"""
import sys, tempfile, traceback; sys.path[:0] = {[p for p in sys.path if Path(p, 'hostile_text.py').exists()]!r}
from pathlib import Path
from IPython.display import display
from hostile_text import MAKERS, PAYLOADS, each_its_own, the_same
kept = []
def show(name, *evils):
    for evil in evils:
        obj = MAKERS[name](Path(tempfile.mkdtemp()), evil)
        kept.append(obj)
        display(obj)
"""
# one object for each payload; of views and pictures, in which every text gets one of them, one with each order of them
RICH = ("Html", "View", "PlanView", "ThresholdPicker", "SelectionMap", "TrainingDashboard", "AttentionViewer",
        "CompareView")
CELL = {
    n: f"show({n!r}, *({'map(each_its_own, (PAYLOADS, PAYLOADS[::-1]))' if n in RICH else 'map(the_same, PAYLOADS)'}))"
    for n in MAKERS
}
LOOK = """() => {
  const out = Array.from(document.querySelectorAll('.jp-OutputArea-output'));
  const all = out.flatMap(o => Array.from(o.querySelectorAll('*')));
  const never = 'script,iframe,object,embed,link,meta,base,form,svg[onload],details[ontoggle],mjx-container,.MathJax';
  const elsewhere = 'a[href]:not([href^="#"]),img:not([src^="data:image/png;base64,"])';
  const does = a => a.name.startsWith('on') || ['srcdoc', 'formaction', 'action'].includes(a.name)
                    || /^\\s*javascript:/i.test(a.value);
  const bad = all.filter(e => e.matches(never) || e.matches(elsewhere) || Array.from(e.attributes).some(does));
  const failed = '.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.error"]';
  return {
    ran: window.ran === undefined ? 0 : window.ran,
    bad: bad.map(e => e.outerHTML.slice(0, 200)),
    outputs: out.length,
    text: out.map(o => o.textContent).join(' '),
    errors: document.querySelectorAll(failed).length,
  };
}"""


@pytest.mark.slow
def test_nothing_that_data_brings_runs_or_leads_elsewhere(notebook):
    nb = notebook(SET_UP, *CELL.values())
    dialogs = []
    nb.page.on("dialog", lambda d: (dialogs.append(d.message), d.dismiss()))
    nb.run(0)
    for i in range(1, len(CELL) + 1): nb.run(i, timeout=90)
    nb.page.wait_for_timeout(1500)      # what loads late
    for b in nb.page.locator(".jp-OutputArea-output details summary").all()[:20]:
        b.evaluate("e => { e.parentElement.open = true }")
    for e in nb.page.locator(".jp-OutputArea-output :is(code, th, b)").all()[:40]: e.dispatch_event("mouseover")
    nb.page.wait_for_timeout(500)
    seen = nb.page.evaluate(LOOK)
    assert not seen["ran"] and not dialogs and not seen["bad"], (seen["ran"], dialogs, seen["bad"][:5])
    assert seen["outputs"] >= len(PAYLOADS)*(len(MAKERS) - len(RICH)) and not seen["errors"]
    # they were there, as text
    assert seen["text"].count("<script>") > 20 and "javascript:" in seen["text"] and re.search(r"\\u202e", seen["text"])
    assert "tracker.invalid" not in "".join(nb.requests)
    assert nb.page.title() and nb.page.frames == [nb.page.main_frame]
