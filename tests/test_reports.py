"A report must be a sound, safe, self-contained page for any run: whole, crashed, empty, odd, huge."
import base64, json, math, re, struct, zlib
from html.parser import HTMLParser
import pytest
from fake_run import fake_run, fake_units
from small_run import small_trainer
from alf_nb.core.config import ALFConfig
from alf_nb.core.policies import POLICIES
from alf_nb.core.records import UnitInfo
from alf_nb.core.runlog import RunLog
from alf_nb.core import format
from alf_nb.report import html, png
from alf_nb.report.charts import layer_map, loss_chart, memory_chart, rate_chart, role_maps
from alf_nb.report.comparison import compare_runs
from alf_nb.report.page import report_html, write_report
from alf_nb.report.run_state import RunState, state_of
from alf_nb.report.summary import latest_scores, summarize, summary_table
from alf_nb.train.trainer import ALFCallback

VOID = {'meta', 'br', 'img', 'link', 'input', 'hr', 'col'}
class Page(HTMLParser):
    "Balanced tags, what is loaded, and the text"
    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.stack, self.loads, self.tags, self.text, self.unlabelled, self.ids = [], [], [], [], [], []
        self.feed(html)
        self.close()
        assert not self.stack, f'not closed: {self.stack}'
        self.text = ' '.join(''.join(self.text).split())
    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.ids += [attrs['id']] if 'id' in attrs else []
        self.loads += [attrs[k] for k in ('src', 'href', 'data', 'srcset', 'poster', 'xlink:href') if attrs.get(k)]
        if any(k.startswith('on') for k in attrs): raise AssertionError(f'handler in {tag}: {attrs}')
        if attrs.get('role') in ('img', 'region') and not attrs.get('aria-label'): self.unlabelled.append(tag)
        if tag not in VOID: self.stack.append(tag)
    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.stack[-1:] = [] if tag not in VOID else self.stack[-1:]
    def handle_endtag(self, tag):
        if tag in VOID: return
        assert self.stack and self.stack[-1] == tag, f'</{tag}> closes {self.stack[-3:]}'
        self.stack.pop()
    def handle_data(self, d):
        if self.stack and self.stack[-1] != 'style': self.text.append(d)

def page(path): return Page(write_report(path).read_text(encoding='utf-8'))

KINDS = dict(
    whole={},
    crashed=dict(stop=47, samples=False),
    before_step_one=dict(stop=0),
    two=dict(blocks=2),
    hundred=dict(blocks=100, steps=60),
    sparse=dict(every=25),
    encdec=dict(blocks=12, layer=lambda i: f"{'encoder' if i < 6 else 'decoder'}.block.{i%6}"),
    often=dict(blocks=3, steps=400, interval=4),
)

@pytest.mark.parametrize('kind', KINDS)
def test_every_kind_of_run_gives_a_sound_page(tmp_path, kind):
    log = fake_run(tmp_path/kind, **KINDS[kind])
    p = page(log.dir)
    assert all(u.startswith('data:image/png;base64,') for u in p.loads) and not {
        'script',
        'link',
        'iframe',
        'object',
    } & set(p.tags)
    html = (tmp_path/kind/'report.html').read_text(encoding='utf-8')
    assert (
        not re.search(r'url\(|@import|https?://', html)
        and not re.search(r'\bNone\b|\bnan\b|\binf\b', p.text)
        and not p.unlabelled
        and not p.ids
    )
    assert p.tags.count('table') == p.tags.count('caption') and len(html) < 400_000
    assert ('unfinished' in p.text) == ('stop' in KINDS[kind]) and 'Settings' in p.text
    if kind == 'encdec': assert 'encoder.block.0' in p.text and 'decoder.block.5' in p.text
    if kind == 'often': assert 'first and last 20 of' in p.text

def test_the_figures_of_the_summary_are_on_the_page(tmp_path):
    s = summarize(fake_run(tmp_path/'r'))
    text, table = page(tmp_path/'r').text, summary_table(s)
    for k in ('domain_loss_before', 'domain_loss_after', 'other_loss_before', 'other_loss_after'):
        assert format.num(s[k]) in text and format.num(s[k]) in table
    for k in ('trainable_share_mean', 'trainable_share_peak', 'importance_overhead_share'):
        assert format.percent(s[k]) in text and format.percent(s[k]) in table
    for k in ('state_bytes_peak', 'rss_bytes_peak'):
        assert format.human_bytes(s[k]) in text and format.human_bytes(s[k]) in table
    assert (
        'encapsulated for convenient reuse' in text
        and '2 min 48 s' in text
        and all(len(l) < 130 for l in table.splitlines())
    )

@pytest.mark.parametrize('name', sorted(POLICIES))
def test_settings_are_told_in_words(tmp_path, name):
    more = dict(unit='columns') if name == 'columns' else dict(freeze_bottom=.2)
    config = ALFConfig.from_args(policy=dict(policy=name), **more).to_dict()
    with RunLog(tmp_path) as log:
        about = dict(lr=4e-4, warmup_steps=1, batch_size=2, grad_accum=1, length=64, data_sha256='4f')
        log.write('run_begin', step=0, units=fake_units(2), config=config, max_steps=9, about=about)
    html = report_html(tmp_path)
    tables = [t for t in re.findall('<table.*?</table>', html, re.S) if 'Settings of the run' in t or 'Data and' in t]
    cells = re.findall('<t[dh][^>]*>(.*?)</t[dh]>', ''.join(tables), re.S)
    said = [re.sub('<[^>]+>', '', c) for c in cells]
    assert len(tables) == 2 and len(said) > 40 and 'yes' in said and any(c.endswith('0 %') for c in said)
    assert not [c for c in said if re.search(r'[_{}\[\]"]|&quot;|^(true|false|null)$', c)]

def test_summary_holds_the_promised_numbers(tmp_path):
    s = summarize(fake_run(tmp_path/'r'))
    json.dumps(s, allow_nan=False)
    for k in (
        'steps seed wall_s domain_loss_before domain_loss_after other_loss_before other_loss_after trainable_share_mean'
        ' trainable_share_peak seconds_per_step tokens_per_second state_bytes_peak rss_bytes_peak'
        ' importance_overhead_share'
    ).split():
        assert isinstance(s[k], (int, float)), k
    assert (
        s['steps'] == 120
        and s['status'] == 'complete'
        and s['domain_perplexity_after'] == pytest.approx(math.exp(1.405))
    )
    assert s['state_bytes_full'] == s['n_total']*12            # AdamW in fp32: gradient and two moments

def test_a_killed_run_is_worked_out_from_its_events(tmp_path):
    whole, dead = summarize(fake_run(tmp_path/'a')), summarize(fake_run(tmp_path/'b', stop=119))
    assert dead['status'] == 'unfinished' and dead['steps'] == 119 and dead['domain_loss_after'] is None
    for k, tol in (
        ('trainable_share_peak', 0.02),
        ('trainable_share_mean', 0.05),
        ('state_bytes_peak', 0.01),
        ('importance_overhead_share', 0.2),
        ('wall_s', 0.1),
        ('seconds_per_step', 0.02),
    ):
        assert dead[k] == pytest.approx(whole[k], rel=tol), k

def test_share_is_weighted_by_steps(tmp_path):
    with RunLog(tmp_path) as l:
        l.write('run_begin', step=0, t=0, units=fake_units(2), n_total=100)
        for s, share in ((0, .1), (30, .4)): l.write('select', step=s, names=['block.0.mlp.up_proj'], share=share)
        l.write('log', step=40, loss=1., t=10)
    s = summarize(tmp_path)
    assert s['trainable_share_mean'] == pytest.approx((30*.1+10*.4)/40) and s['trainable_share_peak'] == .4

@pytest.mark.parametrize(
    'events',
    [
        [],
        [('run_begin', {})],
        [('log', dict(loss=float('nan')))],
        [('eval', dict(name='domain', when='before', loss=None))],
        [('error', dict(type='E', message='<b>no'))],
        [('run_begin', dict(units=[], config={}, n_total=0)), ('select', dict(names=[], share=0.0)), ('memory', {})],
        [('sample', dict(when='after', prompt=None, text=None))],
        [('select', dict(names=['gone'], share=0.5)), ('log', dict(step=3, loss=1))],
    ],
)
def test_almost_nothing_is_enough(tmp_path, events):
    with RunLog(tmp_path) as l:
        l.write('save', step=0, path='x')
        for e, kw in events: l.write(e, **kw)
    p = page(tmp_path)
    assert 'unfinished' in p.text or 'failed' in p.text
    assert '\n' in summary_table(summarize(tmp_path))
    compare_runs([tmp_path]).plot()

def test_whatever_comes_from_the_run_is_escaped(tmp_path):
    evil = '"><script>alert(1)</script><img src=http://evil/x onerror=alert(1)>\''
    with RunLog(tmp_path) as l:
        us = [UnitInfo(f'{evil}{i}{r}', f'{evil}{i}', 'matrix', f'{evil}{r}', 9, i+1) for i in range(3) for r in 'ab']
        for when in ('before', 'after'):
            l.write('eval', step=0, name=evil, when=when, loss=2.)
            l.write('sample', step=0, when=when, prompt=evil, text=evil+'</p>'+evil)
        l.write(
            'run_begin',
            step=0,
            model=evil,
            device=evil,
            seed=evil,
            run_id=evil,
            versions={evil: evil},
            config={evil: evil, 'signal': evil, 'policy': {'policy': evil}},
            units=us,
            n_total=54,
            max_steps=2,
        )
        l.write('probe', step=0, signals={evil: {u.name: .5 for u in us}}, wall_s=1.)
        l.write('select', step=0, names=[us[0].name], entered=[evil], left=[evil], reason=evil, policy=evil, share=.2)
        l.write('log', step=2, loss=2., learning_rate=1.)
        l.write('error', step=2, type=evil, message=evil)
    p = page(tmp_path)
    assert 'script' not in p.tags and not any('evil' in u for u in p.loads) and 'alert(1)' in p.text
    md = compare_runs([tmp_path])._repr_markdown_()
    assert '<script' not in md.replace('\\<', '')

def test_nonfinite_losses_are_said(tmp_path):
    with RunLog(tmp_path) as l:
        l.write('run_begin', step=0, n_total=1)
        for i in range(1, 9): l.write('log', step=i, loss=float('nan') if i == 5 else 1.)
    assert summarize(tmp_path)['nonfinite'] == 1 and 'not finite' in page(tmp_path).text

def test_damaged_lines_are_counted_and_said(tmp_path):
    fake_run(tmp_path)
    clean = summarize(tmp_path)
    assert clean['damaged_lines'] == 0 and 'passed over.' not in page(tmp_path).text + summary_table(clean)
    lines = (tmp_path/'events.jsonl').read_bytes().splitlines(True)
    odd = [b'{"event":"log","st\n', b'\xff\xfe\n', b'{"event":"log","step":"three"}\n', b'[]\n']
    # an empty line separates, and the end without a newline is still being written
    (tmp_path / 'events.jsonl').write_bytes(
        b''.join([*lines[:9], *odd[:3], b'\n', *lines[9:], odd[3], b'{"event":"log"'])
    )
    s = summarize(tmp_path)
    said = '4 lines of the run log are damaged and were passed over.'
    assert {k: v for k, v in s.items() if k != 'damaged_lines'} == {
        k: v for k, v in clean.items() if k != 'damaged_lines'
    } and s['damaged_lines'] == 4
    assert said in page(tmp_path).text and said in summary_table(s)

def test_a_resumed_run_counts_each_step_once(tmp_path):
    fake_run(tmp_path, stop=70)
    with RunLog(tmp_path) as l:
        l.write('resume', step=60, path='checkpoint-60')
        l.write('log', step=61, loss=9.)
    s = summarize(tmp_path)
    assert s['steps'] == 61 and s['resumed'] == 1 and 'Resumed 1 time;' in page(tmp_path).text

def test_the_report_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    fake_run(tmp_path/'r', blocks=2)
    out = write_report(tmp_path/'r')
    old = out.read_bytes()
    monkeypatch.setattr(
        'alf_nb.core.files.os.replace', lambda *a: (_ for _ in ()).throw(OSError(28, 'No space left on device'))
    )
    with pytest.raises(OSError, match='cannot write the report .No space'): write_report(tmp_path/'r')
    assert out.read_bytes() == old and sorted(p.name for p in (tmp_path / 'r').iterdir()) == [
        'events.jsonl',
        'report.html',
    ]

def test_png_is_a_png_and_its_colours_are_those_of_the_style_sheet():
    rows = [[0, .5, None], [1, 2., -1.]]
    data = base64.b64decode(png.palette_pngs(rows)['l'].partition(',')[2])
    assert data[:8] == b'\x89PNG\r\n\x1a\n'
    i, chunks = 8, {}
    while i < len(data):
        n, = struct.unpack('>I', data[i:i+4])
        kind, body = data[i+4:i+8], data[i+8:i+8+n]
        assert struct.unpack('>I', data[i+8+n:i+12+n])[0] == zlib.crc32(kind+body)
        chunks[kind] = body
        i += 12+n
    assert struct.unpack('>II', chunks[b'IHDR'][:8]) == (3, 2)
    assert zlib.decompress(chunks[b'IDAT']) == bytes([0, 0, 16, 0, 0, 31, 31, 0])
    for theme, css in zip(
        'ld', re.findall(r'--ramp0:(#\w+); --ramp1:(#\w+); --ramp2:(#\w+); --ramp3:(#\w+)', html.theme_css())
    ):
        assert png._ramps[theme] == css
    light, dark = chunks[b'PLTE'], png._palette('d')
    assert tuple(light[-3:]) == tuple(bytes.fromhex(png._ramps['l'][3][1:])) and len(light) == len(dark) == 96

def test_both_dark_themes_are_the_same():
    css = html.theme_css()
    sets = re.findall(r'--bg:#11161d;.*?--dark:block;', css, re.S)
    assert len(sets) == 2 and sets[0].split() == sets[1].split()

def test_compare_sorts_and_marks_the_best(tmp_path):
    a, b, c = (
        fake_run(tmp_path / n, blocks=2, **kw) for n, kw in (('a', {}), ('b', dict(after=1.3)), ('c', dict(stop=20)))
    )
    cmp = compare_runs([a, c.dir, str(b.dir)]).sort()
    assert (
        [r['run'] for r in cmp] == ['b', 'a', 'c']
        and '**1.300**' in cmp._repr_markdown_()
        and cmp._repr_markdown_().count('\n') == 4
    )
    Page(cmp.plot())
    assert 'b (' in cmp.plot()
    with pytest.raises(ValueError, match='unknown figure'): cmp.sort('speed')

def test_light_side_stays_light():
    import subprocess, sys
    out = subprocess.run(
        [
            sys.executable,
            '-c',
            (
                "import sys, alf_nb.report.page; print([m for m in ('torch', 'numpy', 'matplotlib', 'IPython') if m in"
                " sys.modules])"
            ),
        ],
        capture_output=True,
        text=True,
    )
    assert out.stdout.strip() == '[]', out.stderr

def axis(html, which):
    inside = ''.join(re.findall(rf'<div class="alf-{which}">(.*?)</div>', html))
    return re.findall(r'<span[^>]*>([^<]*)</span>', inside)

@pytest.mark.parametrize('steps', [1, 2, 3, 7])
def test_steps_on_an_axis_are_whole_and_none_stands_there_twice(tmp_path, steps):
    fake_run(tmp_path, blocks=2, steps=steps)
    for draw in (loss_chart, layer_map, role_maps, memory_chart):
        axes = re.findall(r'<div class="alf-x">.*?</div>', draw(tmp_path))
        shown = [axis(a, 'x') for a in axes]
        assert any(shown) and all(v.isdecimal() for a in shown for v in a), (draw.__name__, shown)
        assert all(len(set(a)) == len(a) for a in shown)

def test_a_rate_that_is_only_zero_has_no_other_label_on_its_axis():
    assert axis(rate_chart([0, 1], [0., 0.], '0', ''), 'y') == ['0']
    assert axis(rate_chart([0], [0.], '0', ''), 'y') == ['0']

@pytest.mark.parametrize('top', [1e-5, 4.5e-5, 4e-4, 3e-3, .02, .5, 1])
def test_rates_on_an_axis_are_what_they_say(top):
    labels = axis(rate_chart([0, 1], [0, top], '', ''), 'y')
    shown = list(map(float, labels))
    steps = [b-a for a, b in zip(shown, shown[1:])]
    assert len(labels) > 1 and shown[0] == 0 and steps == pytest.approx([steps[0]]*len(steps))


def test_importance_is_by_the_signal_that_the_run_chose_by(tmp_path):
    "Also where a meter measured it, and the change rate is newer"
    t = small_trainer(tmp_path, ALFCallback(budget=.3), max_steps=16)
    t.train()
    log = RunLog(tmp_path)
    assert log.events('meter') and log.events('measure')[-1]['step'] > log.events('meter')[-1]['step']
    assert latest_scores(log).signal == state_of(log).signal == 'agreement'
    assert latest_scores(log).values == {n: v for n, v in state_of(log).scores().values.items() if v is not None}
    # what a meter found is known before a choice tells of it
    untold = RunState(e for e in log.events() if e['event'] != 'select').scores('agreement').known
    assert untold and untold == pytest.approx({n: state_of(log).scores().values[n] for n in untold}, rel=1e-3)
    assert 'values of the signal agreement' in role_maps(log)
