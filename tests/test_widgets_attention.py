"The attention viewer: what it takes, what it says of a token, and how little it sends."
import re, sys

import numpy as np
import pytest

from alf_nb.core.format import percent
from alf_nb.widgets.attention import AttentionViewer
from alf_nb.widgets.heads import as_maps, head_change, head_grid, head_sharpness, pool, square_map
from alf_nb.widgets.heads import token_text
from alf_nb.widgets.base import ticker
from alf_nb.widgets.parts import all_widgets

sys.path.insert(0, __file__.rpartition('/')[0])
from fake_run import fake_run  # noqa: E402
from live_run import Sent  # noqa: E402


def made_up(layers=3, heads=4, n=6, seed=0, causal=True):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(layers, heads, n, n))*2
    if causal: logits = np.where(np.tril(np.ones((n, n))) > 0, logits, -np.inf)
    w = np.exp(logits - logits.max(-1, keepdims=True))
    return w/w.sum(-1, keepdims=True)


class Tensor:
    "As a torch tensor on some device, in bf16"
    def __init__(self, a, steps=()): self.a, self.steps, self.shape = a, steps, a.shape
    def detach(self): return Tensor(self.a, (*self.steps, 'detach'))
    def cpu(self): return Tensor(self.a, (*self.steps, 'cpu'))
    def float(self): return Tensor(self.a, (*self.steps, 'float'))
    def numpy(self):
        assert self.steps == ('detach', 'cpu', 'float')
        return self.a


@pytest.fixture
def view():
    made = []
    yield lambda *args, **kw: made.append(AttentionViewer(*args, **kw)) or made[-1]
    for v in made: v.close()
    assert not any(v in ticker._views for v in made)


a, b = made_up(), made_up(seed=1)


@pytest.mark.parametrize(
    'given',
    [
        a,
        a.tolist(),
        [l for l in a],
        tuple(l[None] for l in a),
        Tensor(a),
        [Tensor(l[None]) for l in a],
        a.astype('float16'),
    ],
)
def test_maps_of_any_kind(given): np.testing.assert_allclose(as_maps(given), a, atol=1e-3)


@pytest.mark.parametrize(
    'bad, says',
    [
        (a[0, 0], r'got shape \[6, 6\]'),
        (a[:, :, :3], r'got shape'),
        ([], 'attention weights'),
        ('text', 'attention weights'),
        (3, 'attention weights'),
        (None, 'attention weights'),
        (a * 3 - 1, 'apply softmax first'),
        (np.full((1, 1, 2, 2), np.inf), 'apply softmax first'),
        ([a[0], a[1, :2]], 'all layers have one shape'),
        ([l[None].repeat(2, 0) for l in a], 'a batch of 2 texts'),
    ],
)
def test_what_is_no_attention_is_refused(bad, says):
    with pytest.raises(ValueError, match=says): as_maps(bad, 'before')


def test_what_is_no_number_is_nothing():
    x = a.copy()
    x[1, 2, 3] = np.nan
    assert as_maps(x)[1, 2, 3].max() == 0


def test_head_change_is_the_part_that_moved():
    assert head_change(a, a).max() == 0
    one, other = np.zeros((1, 1, 3, 3)), np.zeros((1, 1, 3, 3))
    one[..., 0] = 1
    other[..., 0] = .25
    other[..., 1] = .75
    np.testing.assert_allclose(head_change(one, other), .75)
    assert (head_change(a, b) >= 0).all() and (head_change(a, b) <= 1).all()
    assert head_sharpness(one) == 1 and head_change(one[..., :1, :1], one[..., :1, :1]) == 0


def test_pool_keeps_what_stands_out():
    m = np.zeros((7, 7))
    m[3, 4] = -.9
    m[6, 6] = .5
    p = pool(m, 4)
    assert p.shape == (4, 4) and p[1, 2] == -.9 and p[3, 3] == .5 and pool(m, 7) is m
    for n in (1, 5, 64, 65, 127, 300): assert len(pool(np.ones((n, n)), 64)) <= 64


def test_it_opens_where_most_changed(view):
    after = a.copy()
    after[1, 3, 4] = np.eye(6)[0]
    after[1, 3, 2] = np.eye(6)[2]*.5 + a[1, 3, 2]*.5
    v = view(a, after, [f'w{i}' for i in range(6)])
    assert v.at[:2] == (1, 3) and v.at[2] in (2, 4)
    assert 'place 1 of 12' in v.said.value
    assert 'Most: layer 1 head 3' in v.overview.value


def test_every_scale_says_which_value_a_colour_is(view):
    after = a.copy()
    after[1, 3, 4] = np.eye(6)[0]
    v = view(a, after)
    said = lambda w: [re.findall(r'<span[^>]*>([^<]*)</span>', s) for s in re.findall(r'alf-x">(.*?)</div>', w.value)]
    top = v.score.max()
    assert said(v.legend) == [['0', percent(top/4), percent(top)], ['0', '0.25', '1'],
                              ['-1', '-0.25', '0', '+0.25', '+1']]
    assert v.static_html().count('alf-scale') == 3


def test_reading_a_token(view):
    after = a.copy()
    after[0, 0, 5] = [0, .75, 0, .25, 0, 0]
    v = view(a, after, ['The', 'Ġcat', '▁sat', '\n', '<b>', 's'])
    v.layer.value, v.head.value, v.token.value = 0, 0, 5
    rows = re.findall(
        r'<tr><th scope="row"'
        r' class="txt">([^<]*)</th><td>(\d)</td><td>([\d.]+)</td><td><strong>([\d.]+)</strong></td><td>([^<]*)</td>',
        v.table.value,
    )
    assert [r[:2] for r in rows[:2]] == [('␣cat', '1'), ('⏎', '3')] and rows[0][3] == '0.750'
    for t,j,before,now,change in rows:
        assert abs(float(before) - a[0, 0, 5, int(j)]) < 6e-4 and abs(float(now) - after[0, 0, 5, int(j)]) < 6e-4
        assert change.startswith('more') == (float(now) - float(before) > 5e-4)
    assert '&lt;b&gt;' in v.strip.value and '<caption>What s (token 5) attends to in layer 0, head 0' in v.table.value
    assert 'aria-label' in v.strip.value and v.strip.value.count('class="alf-toks"') == 2
    assert len(rows) <= 8


def test_sliders_numbers_and_drawings_go_together(view):
    v = view(a, b)
    v.layer.value, v.head.value = 0, 0
    v.layer_slider.value = 2
    assert v.layer.value == 2 and 'Layer 2, head 0' in v.said.value and 'layer 2:' in v.heads.value
    v.head.value = 3
    assert v.head_slider.value == 3
    v.head.value = 99
    assert v.head.value == 3            # the last head
    for s in ('before', 'after', 'difference'):
        v.show.value = s
        assert f'aria-label="{s} of 4 heads of layer 2' in v.heads.value
    assert v.maps.value.count('<figure') == 3
    assert not v.error.value


def test_before_alone(view):
    v = view(a)
    assert (
        v.show.options == ('before',)
        and v.maps.value.count('<figure') == 1
        and 'after' not in v.said.value + v.table.value + v.strip.value
        and 'less' not in v.legend.value
    )
    assert v.tokens == [str(i) for i in range(6)]


def test_one_of_everything(view):
    v = view(np.ones((1, 1, 1, 1)), np.ones((1, 1, 1, 1)), ['x'])
    assert v.at == (0, 0, 0) and not v.error.value and v.picture()


def test_encoders_look_both_ways(view):
    v = view(made_up(causal=False), made_up(causal=False, seed=2))
    assert not v.error.value


def test_what_does_not_fit_together():
    with pytest.raises(ValueError, match='their shapes differ'): AttentionViewer(a, b[:2])
    with pytest.raises(ValueError, match='6 tokens, but 2 tokens'): AttentionViewer(a, tokens=['a', 'b'])
    with pytest.raises(ValueError, match='after are attention weights'): AttentionViewer(a, 'no')


@pytest.mark.parametrize('n, most', [(32, 22_000), (64, 27_000)])
def test_updates_are_small(view, n, most):
    "All of it at once, and no map compresses: they are noise"
    x, y = made_up(30, 9, n), made_up(30, 9, n, seed=1)
    v = view(x, y, [f'tok{i}' for i in range(n)])
    v.layer.value = v.head.value = v.token.value = 1
    sent = Sent(v.box)
    for change in (
        lambda: setattr(v.token, 'value', 3),
        lambda: setattr(v.head, 'value', 8),
        lambda: setattr(v.show, 'value', 'after'),
        lambda: setattr(v.layer, 'value', 29),
    ):
        change()
        assert 0 < sent.take() <= most
    v.refresh()
    assert sent.take() == 0


def test_cells_tell_pair_and_weight_and_columns_have_names(view):
    v = view(a, b, [f'tok{i}' for i in range(6)])
    v.show.value = 'difference'
    l, h, _ = v.at
    assert f'title="tok3 → tok1: {v.after[l, h, 3, 1]:.3f}" tabindex="-1"' in v.maps.value
    assert f'title="tok3 → tok1: {v.after[l, h, 3, 1] - v.before[l, h, 3, 1]:+.3f}"' in v.maps.value
    assert v.maps.value.count('tabindex') == 3*36 and 'click a cell' in v.legend.value
    x = re.findall('<div class="alf-x">(.*?)</div>', v.maps.value)
    assert [re.findall('>(tok.)<', s) for s in x] == [[f'tok{i}' for i in range(6)]]*3
    assert 'tabindex' not in view(made_up(1, 1, 40)).maps.value


def test_a_long_text(view):
    v = view(made_up(2, 2, 150), made_up(2, 2, 150, seed=3))
    v.token.value = 149
    assert (
        'each cell shows the largest of 3 × 3' in v.maps.value
        and v.strip.value.count('<span') == 128
        and '>149<' in v.strip.value
    )
    assert 'class="now"' in v.strip.value
    v.token.value = 0
    assert v.strip.value.count('<span') == 128 and 'class="now"' in v.strip.value


def test_it_can_bear_the_name_of_a_run(tmp_path, view):
    fake_run(tmp_path/'my-run', blocks=1, steps=5)
    assert 'my-run' in view(a, b, source=tmp_path/'my-run').said.value


def test_picture_and_close():
    v = AttentionViewer(a, b, ['<i>']*6)
    p = v.picture()
    for part in (v.said.value, v.table.value, v.strip.value): assert part in p
    assert (
        '<i>' not in re.sub('<i( class| title|>)', '', v.table.value + v.strip.value + v.maps.value)
        and 'http' not in v.static_html()
        and '<script' not in p
    )
    ws = all_widgets(v.box)
    v.close()
    assert all(w.comm is None for w in ws)
    assert repr(v) == 'AttentionViewer: 3 layers, 4 heads, 6 tokens, before and after'


def test_drawings_stand_alone():
    for h in (1, 2, 5, 9, 12, 16, 32):
        assert head_grid(np.ones((h, 3, 3))*.5, [str(i) for i in range(h)], 'x').count('<span') == h
    assert 'aria-label="&quot;"' in square_map(a[0, 0], '"') and token_text('') == '∅'
