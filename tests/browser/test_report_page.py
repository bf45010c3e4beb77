"A report as a browser lays it out."
import pytest

from alf_nb.core.runlog import RunLog
from alf_nb.report.page import write_report


@pytest.mark.parametrize("width", [700, 1100])
def test_no_line_is_wider_than_the_window(context, tmp_path, width):
    log = RunLog(tmp_path)
    about = dict(call="finetune(" + "lr=1e-4, "*60 + ")", command="alf finetune --out " + "o"*300)
    log.write("run_begin", step=0, run_id="a", model="m", max_steps=4, units=[], about=about)
    log.write("run_end", step=4, wall_s=1.)
    log.close()
    page = context.new_page()
    page.set_viewport_size(dict(width=width, height=900))
    page.goto(write_report(tmp_path).resolve().as_uri())
    assert "lr=1e-4" in page.content()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.close()
