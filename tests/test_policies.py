"Properties of every policy, on models that hypothesis makes up."
import json, math, subprocess, sys

import pytest
from hypothesis import assume, given, settings, strategies as st

from alf_nb.core.policies import POLICIES, BudgetPolicy, FullPolicy, ThresholdPolicy, budget_for_threshold
from alf_nb.core.policies import policy_importance, step_cost, threshold_for_budget, with_target
from alf_nb.core.policy import Policy, make_candidates
from alf_nb.core.records import Scores, Selection, UnitInfo

finite = st.floats(-1e6, 1e6, allow_nan=False)
budgets = st.floats(.01, 1.)


@st.composite
def models(draw):
    """Units in model order: embeddings, blocks of one to four matrices and a norm, a head; any of them may be frozen
    by the user"""
    n = st.integers(1, 10_000)
    units = [UnitInfo('embeddings.tokens', 'embeddings', 'embedding', 'tokens', draw(n), 0, eligible=False)]
    roles = 'abcd'[:draw(st.integers(1, 4))]
    n_blocks = draw(st.integers(1, 12))
    for i in range(n_blocks):
        units += [
            UnitInfo(f'block.{i}.{r}', f'block.{i}', 'matrix', r, draw(n), i + 1, eligible=draw(st.integers(0, 9)) > 0)
            for r in roles
        ]
        units += [UnitInfo(f'block.{i}.norm', f'block.{i}', 'norm', 'norm', 8, i+1, eligible=False)]
    units += [UnitInfo('head', 'head', 'head', 'head', draw(n), n_blocks+1, eligible=False)]
    assume(any(u.eligible for u in units))
    return tuple(units)


@st.composite
def questions(draw):
    "A model, its scores (some unknown, some old), what trains now, pins, bans and a step"
    units = draw(models())
    names = [u.name for u in units]
    values = {u.name: draw(st.none() | finite) for u in units if u.eligible}
    assume(any(v is not None for v in values.values()))
    ages = {n: draw(st.integers(0, 500)) for n in values}
    current = Selection(tuple(n for n in values if draw(st.integers(0, 2)) == 0))
    pin = draw(st.lists(st.sampled_from(names), max_size=2, unique=True))
    ban = draw(st.lists(st.sampled_from(names), max_size=4, unique=True))
    ban = [n for n in ban if n not in pin]
    return units, values, ages, current, pin, ban, draw(st.integers(0, 10_000)), draw(st.integers(0, 5))


def settings_of(name, data):
    "Random settings of a policy"
    b = dict(budget=data.draw(budgets))
    hard = dict(hysteresis=data.draw(st.floats(0, 2)))
    return dict(
        threshold=lambda: {**hard, 'threshold': data.draw(st.floats(0, 1)), 'strata': data.draw(st.integers(0, 4))},
        topk=lambda: dict(k=data.draw(st.integers(1, 6))),
        full=dict,
        columns=lambda: b,
        budget=lambda: {
            **b,
            **hard,
            'explore': data.draw(st.floats(0, 1)),
            **data.draw(st.sampled_from([{}, dict(cost_aware=True), dict(strata=1), dict(strata=4)])),
        },
        inverted=lambda: {**b, **hard},
        static=lambda: {
            **b,
            **data.draw(
                st.sampled_from(
                    [*(dict(where=w) for w in ('first', 'last', 'spread', 'random')), dict(where='random', strata=2)]
                )
            ),
        },
        rotate=lambda: b,
        lisa=lambda: dict(k=data.draw(st.integers(1, 3))),
        badam=lambda: dict(
            order=data.draw(st.sampled_from(['random', 'ascending', 'descending'])),
            interval=data.draw(st.integers(1, 60)),
        ),
        grass=lambda: {
            **(b if data.draw(st.booleans()) else dict(k=data.draw(st.integers(1, 4)))),
            'temperature': data.draw(st.floats(1e-3, 10)),
        },
    )[name]()


@pytest.mark.parametrize('name', [n for n, p in POLICIES.items() if hasattr(p, 'budget')])
@pytest.mark.parametrize('budget, said', [(.25, '25 % of'), (.125, '12.5 % of'), (1., '100 % of')])
def test_a_reason_says_a_budget_in_percent(name, budget, said):
    units = [UnitInfo(f'block.{i}.a', f'block.{i}', 'matrix', 'a', 10, i) for i in range(20)]
    policy = POLICIES[name](budget=budget)
    scores = Scores(policy.signal or 'rate', {u.name: 1. for u in units})
    reason = policy.select(scores if policy.needs_scores else None, units).reason
    assert said in reason and f'{budget:g} of' not in reason.replace(said, '')


@pytest.mark.parametrize('name', POLICIES)
@given(questions(), st.data())
@settings(max_examples=120, deadline=None, derandomize=True)
def test_every_policy(name, question, data):
    units, values, ages, current, pin, ban, step, seed = question
    policy = POLICIES[name](pin=pin, ban=ban, seed=seed, **settings_of(name, data))
    assert Policy.from_json(policy.to_json()) == policy
    scores = Scores(policy.signal or 'rate', values, ages) if policy.needs_scores else None
    try: sel = policy.select(scores, units, step, current)
    except ValueError as e:                 # a question without an answer is refused, and the message says why
        assert str(e)
        return
    size, total = {u.name: u.n_params for u in units}, sum(u.n_params for u in units)
    assert sel.names and list(sel.names) == [u.name for u in units if u.name in sel]  # model order, no doubles
    assert set(pin) <= set(sel.names) and not set(ban) & set(sel.names)
    assert all(u.eligible or u.name in pin for u in units if u.name in sel)
    assert math.isclose(sel.share, sum(size[n] for n in sel.names)/total)
    # never exceeded, not by a rounding
    if getattr(policy, 'budget', None): assert sum(size[n] for n in sel.names)/total <= policy.budget
    assert (sel.policy, sel.step) == (name, step) and sel.reason
    assert Policy.from_dict(json.loads(policy.to_json())).select(scores, list(units), step, current) == sel
    assert Selection.from_json(sel.to_json()) == sel


strata = st.integers(0, 4)


@given(questions(), st.floats(0, 1), st.floats(0, 1), strata)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_threshold_is_monotone(question, t1, t2, bands):
    units, values, ages, current, pin, ban, *_ = question
    lo, hi = sorted((t1, t2))
    scores = Scores('rate', values, ages)
    low, high = (ThresholdPolicy(t, pin=pin, ban=ban, strata=bands) for t in (lo, hi))
    share = lambda t: budget_for_threshold(scores, units, t, low, current)
    assert share(hi) <= share(lo)
    try: few = high.select(scores, units, current=current)
    except ValueError: return
    more = low.select(scores, units, current=current)
    assert set(few) <= set(more)
    assert more.share == budget_for_threshold(scores, units, lo, low, current)


@given(questions(), budgets, strata, st.sampled_from((BudgetPolicy, ThresholdPolicy)))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_threshold_for_budget_is_the_lowest_that_fits(question, budget, bands, cls):
    "Under either rule, with its strata, its hysteresis, what trains now, its pins and its bans"
    units, values, ages, current, pin, ban, *_ = question
    scores = Scores('rate', values, ages)
    policy = cls(pin=pin, ban=ban, strata=bands)
    try: tau = threshold_for_budget(scores, units, budget, policy, current)
    except ValueError: return
    share = budget_for_threshold(scores, units, tau, policy, current)
    assert share <= budget or tau == 1
    imp = policy_importance(policy, make_candidates(scores, units, pin, ban, current=current))
    below = [v for v in imp.values() if v < tau]
    if below and share <= budget: assert budget_for_threshold(scores, units, max(below), policy, current) > budget


@given(questions(), budgets, strata)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_a_budget_trains_what_stands_above_its_threshold(question, budget, bands):
    "And what is smaller and still fits"
    units, values, ages, current, pin, ban, step, _ = question
    scores = Scores('rate', values, ages)
    policy = BudgetPolicy(budget, pin=pin, ban=ban, strata=bands)
    try: chosen = policy.select(scores, units, step, current)
    except ValueError: return
    tau = threshold_for_budget(scores, units, budget, policy, current)
    imp = policy_importance(policy, make_candidates(scores, units, pin, ban, current=current))
    assert {n for n,v in imp.items() if v >= tau} <= set(chosen)


@given(questions(), st.floats(0, 1), strata)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_importance_is_even(question, threshold, bands):
    "What stands above a threshold holds as much as the threshold says, within half of a unit: no leaps"
    units, values, ages, current, pin, ban, *_ = question
    candidates = make_candidates(Scores('rate', values, ages), units, pin, ban, current=current)
    assume(candidates.values)
    imp = candidates.importance(bands, .15)
    size = {u.name: u.n_params for u in candidates.units}
    room, known = sum(size.values()), sum(size[n] for n in imp)
    assert set(imp) == set(candidates.values) and all(0 <= v <= 1 for v in imp.values())
    above = sum(size[n] for n,v in imp.items() if v >= threshold)
    assert abs(above - min((1 - threshold)*room, known)) <= max(size.values())/2 + 1e-6*room
    squeezed = Scores('rate', {n: None if v is None else math.copysign(abs(v)**.5, v) for n,v in values.items()}, ages)
    again = make_candidates(squeezed, units, pin, ban).importance(bands)
    assert again == make_candidates(Scores('rate', values, ages), units, pin, ban).importance(bands)


def a_model(blocks=30):
    "Units of SmolLM2's shape, and scores of which nearly all are tiny"
    sizes = dict(q_proj=331, k_proj=110, v_proj=110, o_proj=331, gate_proj=884, up_proj=884, down_proj=884)
    units = [UnitInfo(f'block.{i}.{r}', f'block.{i}', 'matrix', r, n, i + 1)
             for i in range(blocks) for r, n in sizes.items()]
    return units, Scores('gain', {u.name: 1e-9*(1 + i*37 % 211)**4 for i, u in enumerate(units)})


def test_three_quarters_train_the_upper_quarter_of_every_kind():
    units, scores = a_model()
    sel = ThresholdPolicy(.75).select(scores, units)
    assert abs(sel.share - .25) < .005
    for role in {u.role for u in units}:
        for band in range(3):
            kind = [u for u in units if u.role == role and (u.depth - 1)*3//30 == band]
            on = [u.name in sel for u in sorted(kind, key=lambda u: -scores[u.name])]
            assert sum(on) in (2, 3) and on == sorted(on, reverse=True)


def test_no_step_of_the_slider_is_a_leap():
    units, scores = a_model()
    shares = [budget_for_threshold(scores, units, t/100) for t in range(101)]
    steps = [a - b for a, b in zip(shares, shares[1:])]
    assert max(steps) < .019 and sum(s > 0 for s in steps) == 100


def test_a_nudge_keeps_the_rule():
    "From a budget to its threshold and a hair further: nearly the same units train, in the same strata"
    units, scores = a_model()
    budget = BudgetPolicy(.25, strata=3, hysteresis=.3, ban='block.7')
    now = budget.select(scores, units)
    tau = threshold_for_budget(scores, units, .25, budget, now)
    nudged = with_target(budget, budget, threshold=tau - .001)
    assert nudged == ThresholdPolicy(tau - .001, strata=3, hysteresis=.3, ban='block.7')
    assert len({*nudged.select(scores, units, current=now)} ^ {*now}) <= 2


def test_pins_and_bans_of_now_outlive_a_move_of_the_slider():
    now, asked = ThresholdPolicy(.5, pin='a', ban='b'), BudgetPolicy(.3, explore=.2, ban='c')
    assert with_target(now, asked, budget=.1) == BudgetPolicy(.1, explore=.2, pin='a', ban='b')
    assert with_target(FullPolicy(seed=4), FullPolicy(), threshold=.7) == ThresholdPolicy(.7, seed=4)


@given(questions(), budgets, st.floats(0, .5))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_asking_again_with_the_same_scores_changes_nothing(question, budget, hysteresis):
    "Without exploration a selection is its own answer: no flicker"
    units, values, ages, current, pin, ban, step, seed = question
    values = {k: 0. if v is None else v for k,v in values.items()}
    kw = dict(hysteresis=hysteresis, pin=pin, ban=ban, seed=seed)
    for p in BudgetPolicy(budget, **kw), ThresholdPolicy(1-budget, **kw):
        try: first = p.select(Scores('rate', values, ages), units, step)
        except ValueError: continue
        assert p.select(Scores('rate', values, ages), units, step+50, first).names == first.names


@given(models(), st.lists(st.integers(0, 60), max_size=20))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_step_cost(units, picks):
    names = [u.name for u in units if u.kind in ('matrix', 'head')]
    some = {names[i % len(names)] for i in picks}
    cost = step_cost(units, some)
    assert 1/3 - 1e-9 <= cost <= 1 + 1e-9
    assert cost <= step_cost(units, some | {names[0]}) + 1e-9       # more never costs less
    assert math.isclose(step_cost(units, names), 1)


EXPECTED = ['rotate 0 9 10', 'lisa 1 7 10', 'static 0 4 6', 'grass 8 10 11', 'badam 1']


def test_draws_are_the_same_in_another_process():
    """Hash randomisation, other draws and other versions of Python change nothing: the expected names are written
    down here"""
    code = """
from alf_nb.core.peers import *
from alf_nb.core.policies import *
from alf_nb.core.records import UnitInfo, Scores
us = [UnitInfo(f'block.{i}', f'block.{i}', 'block', 'block', 10, i+1) for i in range(12)]
s = Scores('grad_norm', {u.name: i/12 for i,u in enumerate(us)})
ours = RotatePolicy(.25, seed=7), StaticPolicy('random', .25, seed=7)
peers = LISAPolicy(3, seed=7), GRASSPolicy(.25, seed=7), BAdamPolicy(interval=10, seed=7)
for p in (ours[0], peers[0], ours[1], *peers[1:]):
    print(p.name, *[n.split('.')[1] for n in p.select(s, us, step=40)])
"""
    out = [
        subprocess.run(
            [sys.executable, '-c', code],
            env={'PYTHONHASHSEED': h, 'PATH': ''},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for h in '12'
    ]
    assert out[0] == out[1]
    assert out[0].splitlines() == EXPECTED
