"The signal audit: usefulness agrees with a plain loop, nothing is left changed, planted cases are found."
import copy, random

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, DataCollatorWithPadding, default_data_collator

import alf_nb.study.audit as A
import alf_nb.study.verdict as V
from alf_nb.study.audit import audit_signals
from alf_nb.study.verdict import SignalAudit
from alf_nb.study.bench import sample_units
from alf_nb.study.ranks import rank_correlation
from alf_nb.demo import demo_dataset, demo_model, demo_tokenizer
from alf_nb.model.layers import partition_layers
from alf_nb.core.records import UnitInfo

FAST = dict(
    n_units=6,
    repeats=2,
    steps=2,
    lr=1e-2,
    batch_size=2,
    eval_batches=2,
    probe_batches=2,
    probe_steps=2,
    draws=200,
    progress=False,
    bf16=False,
)
ROWS = demo_dataset(60, length=16)


class Normed(nn.Module):
    "A model with buffers that training changes, and dropout"
    def __init__(self):
        super().__init__()
        self.inner, self.norm, self.drop = demo_model(), nn.BatchNorm1d(32), nn.Dropout(.3)
        self.blocks = self.inner.model
    def forward(self, input_ids, labels, attention_mask=None):
        random.random()
        np.random.rand()
        h = self.inner.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        h = self.drop(self.norm(h.transpose(1, 2)).transpose(1, 2))
        return dict(
            loss=nn.functional.cross_entropy(self.inner.lm_head(h)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        )


def everything(model):
    "All that an audit must leave as it is, as comparable values"
    modes = [m.training for m in model.modules()]
    wanted, grads = zip(*((p.requires_grad, p.grad) for p in model.parameters()))
    return dict(
        state={k: v.clone() for k, v in model.state_dict().items()},
        grad=list(wanted),
        modes=modes,
        grads=list(grads),
        torch=torch.get_rng_state(),
        python=random.getstate(),
        numpy=np.random.get_state(),
    )


def same(a, b):
    assert all(torch.equal(v, b['state'][k]) for k, v in a['state'].items()), "weights or buffers differ"
    assert (
        a['grad'] == b['grad']
        and a['modes'] == b['modes']
        and torch.equal(a['torch'], b['torch'])
        and a['python'] == b['python']
    )
    assert all(x is y for x, y in zip(a['grads'], b['grads'])), "gradients differ"
    assert all(np.array_equal(x, y) for x, y in zip(a['numpy'], b['numpy']))


def untidy(model):
    "A model in the midst of something: gradients present, a unit frozen, a module in another mode"
    model(**default_data_collator(ROWS[:2]))['loss'].backward()
    for k, p in model.named_parameters():
        if 'layers.2.mlp' in k: p.requires_grad_(False)
    model.get_submodule('blocks.layers.1' if isinstance(model, Normed) else 'model.layers.1').eval()
    return model


@pytest.mark.parametrize('make', [demo_model, Normed])
@pytest.mark.parametrize('groups', [1, 3])
def test_everything_is_left_as_it_was(make, groups):
    model = untidy(make())
    was = everything(model)
    audit = audit_signals(model, ROWS, groups=groups, **FAST)
    same(was, everything(model))
    assert not any('block.2.mlp' in u.name for u in audit.units), "what the user froze is not trained"


@pytest.mark.parametrize('at', [1, 3, 5, 9, 20])
@pytest.mark.parametrize('error', [ZeroDivisionError, KeyboardInterrupt])
def test_everything_is_left_as_it_was_after_an_error(at, error, monkeypatch):
    model = untidy(Normed())
    was, calls, real = everything(model), [0], torch.optim.AdamW.step
    def step(self, *a, **k):
        real(self, *a, **k)
        calls[0] += 1
        if calls[0] == at: raise error
    monkeypatch.setattr(torch.optim.AdamW, 'step', step)
    with pytest.raises(error): audit_signals(model, ROWS, **FAST)
    same(was, everything(model))


def test_a_diverging_unit_is_named_and_undone():
    model = demo_model()
    was = everything(model)
    def loss(m, b):
        return m(**b).loss + (
            float('nan')
            if not m.training
            and not torch.equal(
                m.model.layers[3].self_attn.q_proj.weight, was['state']['model.layers.3.self_attn.q_proj.weight']
            )
            else 0.0
        )
    with pytest.raises(RuntimeError, match='block.3.self_attn.q_proj'):
        audit_signals(
            model,
            ROWS,
            names=['block.0.mlp.up_proj', 'block.1.mlp.up_proj', 'block.2.mlp.up_proj', 'block.3.self_attn.q_proj'],
            loss=loss,
            **FAST
        )
    same(was, everything(model))


def by_hand(model, names, r):
    "Held-out loss after training `names` with the batches of repetition `r`, in a plain loop"
    _, train, held = A._prepare(model, ROWS, None, None, 16, 0, 4)
    held = A._batches(held, 2, 2, default_data_collator, 'cpu', '0/held')
    other = copy.deepcopy(model)
    params = [p for n in names for p in partition_layers(other).params(n)]
    if params:
        opt = torch.optim.AdamW(params, lr=1e-2, weight_decay=0.)
        for b in A._batches(train, 2, 2, default_data_collator, 'cpu', f'0/train/{r}'):
            other.zero_grad()
            other(**b).loss.backward()
            opt.step()
    return np.mean([other(**b).loss.item() for b in held])


@pytest.mark.parametrize('pin', [False, True])
def test_usefulness_agrees_with_a_plain_loop(pin):
    model = demo_model()
    pin = [n for n in partition_layers(model).by_layer['head']] if pin else []
    audit = audit_signals(model, ROWS, pin=pin, **FAST)
    for u in audit.units[1:3]:
        found = audit.usefulness[u.name]
        for r in range(2):
            assert abs(by_hand(model, pin, r) - by_hand(model, [u.name, *pin], r) - found['repeats'][r]) < 2e-6
        assert (
            abs(np.mean(found['repeats']) - found['total']) < 1e-9 and found['low'] <= found['total'] <= found['high']
        )
        assert abs(found['per_param']*u.n_params - found['total']) < 1e-12


def test_nothing_held_out_is_trained_on():
    _, train, held = A._prepare(demo_model(), [dict(i=i) for i in range(50)], None, None, 16, 0, 12)
    assert len(held) == 12 and {r['i'] for r in train} | {r['i'] for r in held} == set(range(50)) and len(train) == 38
    b = A._batches(
        [dict(x=i) for i in range(10)], 5, 2, lambda rs: dict(x=torch.tensor([r['x'] for r in rs])), 'cpu', 'k'
    )
    assert sorted(torch.cat([v['x'] for v in b]).tolist()) == list(range(10)), "no row twice before all are used"


def test_a_unit_that_cannot_help_is_last():
    model = demo_model()
    with torch.no_grad(): model.model.layers[1].self_attn.o_proj.weight.zero_()
    names = [f'block.{b}.self_attn.{m}' for b in range(4) for m in ('q_proj', 'k_proj', 'v_proj')]
    audit = audit_signals(model, ROWS, names=names, **FAST)
    dead = [f'block.1.self_attn.{m}' for m in ('q_proj', 'k_proj', 'v_proj')]
    for n in dead:
        assert audit.usefulness[n] == dict(total=0., low=0., high=0., per_param=0., repeats=(0., 0.))
        assert (
            audit.signals['gain'][n] == audit.signals['grad_norm'][n] == 0
        ), "its rate is not 0: together with o_proj it moves"
        assert audit.signals['prior'][n] > 0, "the prior cannot know"
    assert audit.agreement['gain']['per_param'] > audit.agreement['prior']['per_param']


def test_a_unit_outside_the_graph_is_useless_but_no_error():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.spare = demo_model(blocks=2), nn.Linear(8, 8, bias=False)
        def forward(self, **b): return self.net(**b)
    model = Spare()
    layers = partition_layers(model, kinds=('matrix', 'head', 'embedding'))
    spare = layers.unit_of('spare.weight')
    audit = audit_signals(
        model,
        ROWS,
        kinds=('matrix', 'head', 'embedding'),
        names=[spare, *[u.name for u in layers.units if u.kind == 'matrix' and u.name != spare][:5]],
        **FAST
    )
    assert audit.usefulness[spare]['total'] == 0 and audit.signals['gain'][spare] == 0


def test_deterministic_and_seeded():
    a, b = (audit_signals(Normed(), ROWS, **FAST) for _ in range(2))
    assert (a.usefulness, a.signals, a.agreement, a.advice) == (b.usefulness, b.signals, b.agreement, b.advice)
    random.seed(5)
    torch.manual_seed(5)
    np.random.seed(5)
    assert (
        audit_signals(Normed(), ROWS, **FAST).usefulness == a.usefulness
    ), "the state of global random generators does not matter"
    assert audit_signals(Normed(), ROWS, seed=1, **FAST).usefulness != a.usefulness
    assert SignalAudit.from_json(a.to_json()) == a


def test_a_unit_does_not_depend_on_the_others_in_the_sample():
    names = [f'inner.model.layers.{i}.mlp.up_proj.weight' for i in range(4)] + [
        'inner.model.layers.0.self_attn.q_proj.weight'
    ]
    layers = partition_layers(Normed())
    names = [layers.unit_of(n) for n in names]
    a, b = (audit_signals(Normed(), ROWS, names=ns, **FAST) for ns in (names, names[:0:-1]))
    assert all(b.usefulness[n] == a.usefulness[n] for n in names[1:])
    start = Normed().eval()
    held = A._batches(A._prepare(start, ROWS, None, None, 16, 0, 4)[2], 2, 2, default_data_collator, 'cpu', '0/held')
    assert (
        abs(a.config['loss'] - np.mean([start(**h)['loss'].item() for h in held])) < 1e-6
    ), "the probe left no trace in the norm's running statistics"


def test_blocks_texts_and_classifiers(capsys):
    text = 'The quick brown fox jumps over the lazy dog. ' * 40
    a = audit_signals(
        (demo_model(blocks=5), demo_tokenizer()),
        [text + str(i) for i in range(4)],
        unit='block',
        max_length=16,
        **{**FAST, 'progress': True}
    )
    assert [u.kind for u in a.units] == ['block'] * 5 and a.agreement['n_params'][
        'per_param'
    ] == 0, "blocks of one size: size tells nothing"
    assert 'Auditing 5 units × 2 × 2 steps: about' in ''.join(capsys.readouterr())
    torch.manual_seed(0)
    net = BertForSequenceClassification(
        BertConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            vocab_size=258,
            num_labels=3,
        )
    )
    rng = random.Random(0)
    rows = [dict(input_ids=[2 + i % 3]*rng.randint(4, 9), labels=i % 3) for i in range(60)]
    rows = [dict(r, attention_mask=[1]*len(r['input_ids'])) for r in rows]
    a = audit_signals(net, rows, pin='head', collate=DataCollatorWithPadding(demo_tokenizer()), **FAST)
    assert (
        len(a) == 6 and a.config['pin'] and not set(a.config['pin']) & {u.name for u in a.units} and a._repr_markdown_()
    )


def test_errors_say_what_would_work():
    m = demo_model()
    for kw, words in (
        (dict(steps=0), 'steps=0'),
        (dict(probe_batches=1), 'at least 2'),
        (dict(budget=1.0), 'fraction'),
        (dict(lr=0), 'learning rate'),
        (dict(names=['block.9']), "unknown unit 'block.9'"),
        (dict(names=['block.0.mlp.up_proj']), 'at least 4 units'),
        (dict(eval_batches=40), 'too little data'),
        (dict(unit='head'), "unknown unit 'head'"),
    ):
        with pytest.raises(ValueError, match=words): audit_signals(m, ROWS, **{**FAST, **kw})
    with pytest.raises(ValueError, match='tokenizer='): audit_signals(m, ['some text'], **FAST)
    with pytest.raises(ValueError, match='returned no loss'):
        audit_signals(m, [{k: v for k, v in r.items() if k != 'labels'} for r in ROWS], **FAST)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=2, max_size=12))
def test_rank_correlation_is_spearmans(pairs):
    a, b = map(list, zip(*pairs))
    def rank(w, x): return sum(v < w for v in x) + (sum(v == w for v in x)-1)/2
    def ranks(x): return [rank(w, x) for w in x]
    ra, rb = np.array(ranks(a)), np.array(ranks(b))
    want = 0. if not ra.std() or not rb.std() else float(np.corrcoef(ra, rb)[0, 1])
    got = rank_correlation(a, b)
    assert abs(got - want) < 1e-9 and abs(got) <= 1 + 1e-9 and abs(got - rank_correlation(b, a)) < 1e-12
    assert abs(rank_correlation([np.exp(v) for v in a], b) - got) < 1e-9, "only the order counts"


def made(n=24, seed=0, noise=.01):
    rng = np.random.default_rng(seed)
    units = [UnitInfo(f'block.{i}.m', f'block.{i}', 'matrix', 'm', int(rng.integers(50, 500)), i+1) for i in range(n)]
    per = rng.random(n)*1e-3
    useful = (per*[u.n_params for u in units])[:, None]*(1 + noise*rng.normal(size=(n, 3)))
    name = lambda v: dict(zip((u.name for u in units), map(float, v)))
    return units, useful, dict(knows=name(per), random=name(rng.random(n))), name


def test_the_signal_that_knows_is_recommended_and_keeps_nearly_all():
    units, useful, signals, _ = made()
    agreement, chance, repeats, advice = V.agree(units, useful, signals, .95, 500, .25, 0)
    assert (
        advice.startswith('Use knows')
        and 0.85 < agreement['knows']['kept'] <= 1
        and agreement['knows']['per_param_low'] > 0.9
    )
    assert agreement['random']['kept'] < agreement['knows']['kept'] and 0 < chance['kept'] < .9


def test_chance_is_seldom_recommended():
    "60 audits in which no signal knows anything: a recommendation is a mistake, and 5 % of audits may make one"
    wrong = 0
    for i in range(60):
        units, useful, _, name = made(seed=i)
        rng = np.random.default_rng(1000+i)
        wrong += V.agree(units, useful, {k: name(rng.random(24)) for k in 'abcde'}, 0.95, 400, 0.25, i)[3].startswith(
            'Use'
        )
    assert wrong <= 8, wrong  # 9 or more of 60 at 5 %: 1 in 300; without Holm's correction about 13


def test_no_choice_keeps_more_than_all():
    for i in range(40):
        rng = np.random.default_rng(i)
        useful, sizes = rng.normal(size=7), rng.integers(1, 9, 7).astype(float)
        sets = [[j for j in range(7) if m >> j & 1] for m in range(128)]
        best = max(useful[s].sum() for s in sets if sizes[s].sum() <= 0.4 * sizes.sum())
        assert (
            best <= V._most(useful, sizes, 0.4) + 1e-9
            and V._most(useful, sizes, 0.4) <= useful[useful > 0].sum() + 1e-9
        )


def test_harm_is_not_taken_for_use():
    units, useful, signals, _ = made()
    assert 'smaller learning rate' in V.agree(units, -useful, signals, .95, 200, .25, 0)[3]


def test_the_sample_is_spread():
    layers = partition_layers(demo_model(blocks=12))
    got = [layers[n] for n in sample_units(layers, 21)]
    for role in {u.role for u in got}: assert sum(u.role == role for u in got) == 3
    for third in range(3): assert 4 <= sum(third*4 < u.depth <= third*4+4 for u in got) <= 10
