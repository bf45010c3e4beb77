"The view of a plan: what fits is said anew whenever the slider moves, and stands in the still picture too."
from types import SimpleNamespace

import ipywidgets as W
import pytest

from alf_nb.widgets.parts import all_widgets
from alf_nb.widgets.plan import PlanView, memory_sizes, plan_table

GB = 10**9


class Plan(SimpleNamespace):
    margin = .1
    def fits(self, way): return way.total <= .9*self.memory
    def within(self, memory): return Plan(**vars(self) | dict(memory=memory))


def made_up(memory=16*GB, totals=(100, 24, 5), names=('full', 'alf 10 %', 'QLoRA')):
    ways = [SimpleNamespace(name=n, total=int(t*GB), n_trainable=t, n_params=100) for n, t in zip(names, totals)]
    return Plan(model='a <b>7 B</b> model', n_params=7*10**9, batch=1, length=1024, memory=memory, ways=ways)


@pytest.fixture
def view():
    made = []
    yield lambda *a, **kw: made.append(PlanView(made_up(*a, **kw))) or made[-1]
    for v in made: v.close()


def test_the_slider_marks_what_fits(view):
    v = view()
    assert (v.slider.value, v.now.memory) == (16*GB, 16*GB)
    seen = []
    for s in [s for _, s in v.slider.options]:
        v.slider.value = s
        n = sum(t*GB <= .9*s for t in (100, 24, 5))
        assert v.table.value.count('<b>fits</b>') == n and v.table.value.count('too large') == 3 - n
        assert f'{n} of 3 ways fit' in v.words.value and f'{n} of 3 ways fit' in v.static_html()
        seen.append(n)
    assert seen[0] == 0 and seen[-1] == 3 and seen == sorted(seen)


def test_words_say_what_the_bars_show(view):
    v = view(24*GB)
    assert 'role="status"' in v.words.value and 'most trains with QLoRA' in v.words.value
    assert v.table.value.count('aria-hidden="true"') == 3 and 'scope="row"' in v.table.value
    assert '<b>7 B</b>' not in v.table.value and '&lt;b&gt;7 B' in v.table.value
    v.slider.value = 4*GB
    assert 'the cheapest, QLoRA, needs 5 GB' in v.words.value
    assert '4 GB' in repr(v) and '<input' not in v.picture()._repr_html_()


def test_without_a_memory_it_begins_in_the_middle(view):
    v = view(None)
    assert v.slider.value in [s for _, s in v.slider.options] and 'ways fit in' in v.words.value


@pytest.mark.parametrize('least,most', [(1, 1), (10**6, 2*10**6), (5*GB, 2000*GB)])
def test_sizes_reach_from_nothing_to_all(least, most):
    sizes = memory_sizes(least, most, 12345)
    assert sizes == sorted(set(sizes)) and 12345 in sizes and sizes[-1] >= min(most, 12345)
    if least > 10**5: assert sizes[0] < least and .9*sizes[-1] >= most


def test_one_way_and_a_closed_view(view):
    v = view(8*GB, (5,), ('QLoRA',))
    widgets = all_widgets(v.box)
    v.close()
    assert all(w.comm is None for w in widgets) and '1 of 1 ways fit' in v.static_html()
    assert isinstance(v.slider, W.SelectionSlider)


def test_a_real_plan_is_shown():
    pytest.importorskip('torch')
    from alf_nb.demo import demo_model
    from alf_nb.study.plan import plan
    found = plan(demo_model(), max_length=32, budgets=(.1,))
    v = PlanView(found)
    for _, s in v.slider.options:
        v.slider.value = s
        assert v.table.value.count('<b>fits</b>') == sum(map(found.within(s).fits, found.ways))
    assert plan_table(v.now) in v.static_html()
    v.close()
