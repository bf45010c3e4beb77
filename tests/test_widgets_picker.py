"The threshold picker, driven as a front end drives it: before a run, beside one that lives, and on a recorded one."
import json, random, re, sys, threading, time

import ipywidgets as W
import pytest
import traitlets

from alf_nb.core.format import human_bytes, human_time
from alf_nb.core.config import ALFConfig
from alf_nb.core.policies import BudgetPolicy, FullPolicy, LISAPolicy, ThresholdPolicy, budget_for_threshold
from alf_nb.core.policies import step_cost, threshold_for_budget
from alf_nb.core.policy import make_candidates
from alf_nb.core.records import Scores, Selection, UnitInfo
from alf_nb.core.runlog import RunLog
from alf_nb.widgets.base import ticker
from alf_nb.widgets.parts import all_widgets
from alf_nb.widgets.choice import ADAMW_BYTES
from alf_nb.widgets.picker import ThresholdPicker

sys.path.insert(0, __file__.rpartition('/')[0])
from fake_run import fake_run, fake_units  # noqa: E402
from live_run import wait_for  # noqa: E402


@pytest.fixture
def picker():
    made = []
    yield lambda *args, **kw: made.append(ThresholdPicker(*args, **kw)) or made[-1]
    for p in made: p.close()
    wait_for(lambda: ticker._thread is None)


def made_up_scores(units, seed=0, signal='gain'):
    rng = random.Random(seed)
    return Scores(signal, {u.name: rng.random()**2 if u.eligible and rng.random() > .1 else None for u in units})


class Live:
    "What `train_in_background` returns: trains in a thread when told to, and writes a real run log"
    def __init__(self, path, policy=BudgetPolicy(.25), blocks=4, interval=10, steps=1000):
        self.log = RunLog(path)
        self.units = fake_units(blocks)
        self.policy = policy
        self.interval = interval
        self.max_steps = steps
        self.status = 'starting'
        self.alive = True
        self.error = None
        self.current = None
        self.step = 0
        self.pending = None
        self.asked = []
        self.log.write(
            'run_begin',
            step=0,
            run_id='live',
            config=dict(policy=policy.to_dict(), signal='gain', interval=interval),
            units=self.units,
            n_total=sum(u.n_params for u in self.units),
            max_steps=steps,
            interval=interval,
        )
        self.select(0)
        self.status = 'running'

    def draw(self, step): return made_up_scores(self.units, step)

    def choose(self, policy, now=False):
        self.asked.append((policy, now))
        if not self.alive: raise RuntimeError('there is nothing to change after training has ended')
        self.pending = policy, now

    def select(self, step):
        scores = self.draw(step)
        sel = self.policy.select(scores, self.units, step, self.current)
        self.log.write(
            'select',
            step=step,
            names=list(sel),
            entered=[],
            left=[],
            reason=sel.reason,
            policy=sel.policy,
            share=sel.share,
            signal='gain',
            scores=scores.values,
            ages=scores.ages,
        )
        self.current = sel

    def _train(self, n):
        for _ in range(n):
            self.step += 1
            now = False
            if self.pending:
                (self.policy, now), self.pending = self.pending, None
                self.log.write('choose', step=self.step, policy=self.policy.to_dict(), now=now)
            if now or self.step % self.interval == 0: self.select(self.step)
            self.log.write(
                'log',
                step=self.step,
                loss=1.0,
                seconds_per_step=0.8 * step_cost(self.units, self.current.names),
                tokens_per_second=9.0,
            )

    def train(self, n=1):
        t = threading.Thread(target=self._train, args=(n,))
        t.start()
        t.join()

    def end(self, stopped=True):
        self.log.write('run_end', step=self.step, stopped=stopped)
        self.status, self.alive = 'stopped', False


units = fake_units(30)
scores = made_up_scores(units)


# ---- before a run

usual = ALFConfig().policy      # what `ALFCallback` chooses by
gain = lambda t, **kw: ThresholdPolicy(t, **kw)


def click(p, row, column, rule='next'):
    "What the page sends of a click: -1 is the head of a row or column; names of them, or their numbers"
    at = lambda x, names: x if isinstance(x, int) else names.index(x)
    place = dict(row=at(row, p.grid.grid.rows), column=at(column, p.grid.grid.columns))
    p.grid._handle_custom_msg(dict(place, rule=rule), [])


def cell(p, name):
    "Shade, text and classes of a unit's cell"
    i = next(i for i, us in enumerate(p.grid.grid.cells) if name in {u.name for u in us})
    return p.grid.cells[i]


def test_sliders_numbers_and_traits_are_one(picker):
    p = picker(scores=scores, units=units)
    assert p.by is None and p.policy == usual == BudgetPolicy(.25, strata=3)
    assert p.selection == usual.select(scores, units) and p.budget == .25 and p.budget_number.value == 25
    assert p.threshold == threshold_for_budget(scores, units, .25, usual)
    p.threshold_slider.set_state({'value': .4})             # what a front end's message does
    assert (p.by, p.threshold, p.threshold_number.value) == ('threshold', .4, .4)
    assert p.policy == gain(.4) and p.selection == gain(.4).select(scores, units)
    assert p.budget == budget_for_threshold(scores, units, .4) == p.selection.share
    assert p.budget_slider.value == round(100*p.budget)
    p.budget_number.value = 10
    assert (p.by, p.policy, p.budget_slider.value) == ('budget', BudgetPolicy(.1, strata=3), 10)
    p.threshold = .7
    assert (p.by, p.threshold_slider.value, p.threshold_number.value) == ('threshold', .7, .7)
    assert p.selection.share == p.budget


def test_what_was_given_is_shown(picker):
    p = picker(scores=scores, units=units, budget=.2)
    assert (p.budget_number.value, p.budget_slider.value, p.by) == (20, 20, 'budget')
    q = picker(scores=scores, units=units, threshold=.9)
    assert (q.threshold_number.value, q.threshold_slider.value, q.by) == (.9, .9, 'threshold')


def test_a_rounded_echo_is_no_choice(picker):
    p = picker(scores=scores, units=units)
    p.threshold_slider.set_state({'value': round(p.threshold, 2)})
    p.budget_slider.set_state({'value': 25.00000000001})
    assert p.by is None


def test_no_tick_of_the_threshold_is_a_leap(picker):
    p = picker(scores=scores, units=units)
    shares = []
    for t in range(100):
        p.threshold_slider.value = t/100
        shares.append(p.selection.share)
    of_all = sum(u.n_params for u in units if u.eligible)/sum(u.n_params for u in units)
    known = [(a - b)/of_all for a, b in zip(shares, shares[1:])]
    assert max(known) < .025 and abs(p.budget - shares[-1]) < 1e-9
    assert abs(shares[75] - .25*of_all) < .01


def test_a_nudge_keeps_strata_and_units(picker):
    p = picker(scores=scores, units=units)
    before = set(p.selection)
    p.threshold_number.value = round(p.threshold, 3) + .001
    assert p.policy.strata == 3 and len(before ^ set(p.selection)) <= 3


@pytest.mark.parametrize('by, value', [('budget', 250), ('budget', 0), ('budget', -5), ('threshold', 50),
                                       ('threshold', -.1), ('budget', float('nan'))])
def test_what_is_out_of_range_is_refused_in_words(picker, by, value):
    "Never clamped: 250 is not full fine-tuning"
    p = picker(scores=scores, units=units, budget=.2)
    before = p.selection, p.policy, p.budget, p.threshold
    number = p.budget_number if by == 'budget' else p.threshold_number
    shown = number.value
    number.value = value
    assert (p.selection, p.policy, p.budget, p.threshold) == before and number.value == shown
    assert 'is refused' in p.refusal.value and 'role="status"' in p.refusal.value and not p.error.value
    p.budget_number.value = 50
    assert p.policy.budget == .5 and not p.refusal.value


def test_traits_can_be_linked_and_observed(picker):
    a, b = picker(scores=scores, units=units), picker(scores=scores, units=units)
    traitlets.link((a, 'threshold'), (b, 'threshold'))
    seen = []
    b.observe(lambda c: seen.append(len(c['new'])), 'selection')
    a.threshold_slider.value = .9
    assert b.threshold_slider.value == .9 and a.selection == b.selection and seen == [len(b.selection)]


def test_the_policy_keeps_its_other_settings(picker):
    base = BudgetPolicy(.3, pin='norm', ban='block.2*', explore=.2, hysteresis=.5)
    p = picker(scores=scores, units=units, policy=base, budget=.2)
    assert p.policy == BudgetPolicy(.2, pin='norm', ban='block.2*', explore=.2, hysteresis=.5)
    assert p.selection == p.policy.select(scores, units)
    p.threshold_slider.value = .5
    assert p.policy == gain(.5, pin='norm', ban='block.2*', hysteresis=.5, strata=0) and 'norm' in p.selection
    p.budget_slider.value = 20
    assert p.policy == BudgetPolicy(.2, pin='norm', ban='block.2*', explore=.2, hysteresis=.5)
    q = picker(scores=scores, units=units, policy=dict(policy='lisa', k=3))
    assert len(q.selection) == 3*7 and q.budget == q.selection.share


# ---- the grid

def test_a_click_pins_another_bans_a_third_frees(picker):
    p = picker(scores=scores, units=units)
    name = 'block.7.mlp.down_proj'
    free = cell(p, name)
    click(p, 'block.7', 'down_proj')
    assert p.policy == BudgetPolicy(.25, strata=3, pin=name) and name in p.selection and p.by == 'units'
    assert cell(p, name)[1:] == ['pin', 'on pin']
    click(p, 'block.7', 'down_proj')
    assert p.policy == BudgetPolicy(.25, strata=3, ban=name) and name not in p.selection
    assert cell(p, name)[1:] == ['ban', 'ban'] and p.selection == p.policy.select(scores, units)
    click(p, 'block.7', 'down_proj')
    assert p.policy == usual and cell(p, name) == free


def test_rows_and_columns_at_once(picker):
    p = picker(scores=scores, units=units)
    for block in 10, 16, 17: click(p, f'block.{block}', -1, 'ban')
    assert p.policy.ban == ('block.10', 'block.16', 'block.17')
    assert not {u.name for u in units if u.layer in p.policy.ban} & set(p.selection)
    click(p, -1, 'v_proj', 'pin')           # all of a column, those that were banned, too
    assert p.policy.pin == ('*.v_proj',) and {u.name for u in units if u.role == 'v_proj'} <= set(p.selection)
    assert p.selection.share <= .25
    click(p, -1, -1, 'free')
    assert p.policy == usual


def test_all_of_it_is_true_of_what_is_shown(picker):
    "Numbers, frames and words are those of the policy that selects"
    p = picker(scores=scores, units=units)
    click(p, 'block.3', -1, 'ban')
    click(p, 'block.9', 'q_proj', 'pin')
    p.threshold_slider.value = .66
    b = make_candidates(scores, units, p.policy.pin, p.policy.ban)
    imp = b.importance(3, .15)
    for u in units:
        if not u.eligible: continue
        shade, text, classes = cell(p, u.name)
        assert ('on' in classes.split()) == (u.name in p.selection)
        if u.name in p.policy.pin: assert text == 'pin'
        elif u.layer == 'block.3': assert text == 'ban' and u.name not in p.selection
        elif u.name in imp:
            assert shade == round(100*imp[u.name]) and (imp[u.name] >= .66) == (u.name in p.selection)
        else: assert (shade, text) == (None, '–') and u.name not in p.selection
    assert p.selection == p.policy.select(scores, units)
    assert 'block.3 banned' in p.said.value and 'block.9.self_attn.q_proj pinned' in p.said.value


def test_raw_scores_are_one_click_away(picker):
    p = picker(scores=scores, units=units)
    name = next(n for n, v in scores.values.items() if v == max(scores.known.values()))
    p.numbers.value = True
    assert cell(p, name)[0] == 100 and p.grid.what == 'gain' and 'highest gain' in p.legend.value
    assert cell(p, name)[1] == f'{scores[name]:.2f}'.removeprefix('0')


def test_other_kinds_are_shown_when_asked_for(picker):
    p = picker(scores=scores, units=units)
    assert len(p.grid.grid.units) == 210
    p.all_kinds.value = True
    assert len(p.grid.grid.units) == len(units)
    p.budget_number.value = 10
    click(p, 'embeddings', 'embed_tokens', 'pin')
    assert p.policy.pin == ('embeddings',) and p.selection is None and 'the pinned units hold' in p.said.value
    p.budget_number.value = 60
    assert 'embeddings' in p.selection
    p.all_kinds.value = False
    assert len(p.grid.grid.units) == 211            # what was pinned stays in sight


def test_units_of_one_layer_and_role_share_a_cell(picker):
    experts = [UnitInfo(f'block.{i}.experts.{e}.up', f'block.{i}', 'matrix', 'up', 10, i+1)
               for i in range(4) for e in range(3)]
    p = picker(scores=Scores('gain', {u.name: i for i, u in enumerate(experts)}), units=experts)
    assert p.grid.shape['rows'] == [f'block.{i}' for i in range(4)] and p.grid.shape['columns'] == ['up']
    click(p, 'block.2', 'up', 'ban')
    assert p.policy.ban == ('block.2',)
    blocks = [UnitInfo(f'block.{i}', f'block.{i}', 'block', 'block', 10, i+1) for i in range(12)]
    q = picker(scores=Scores('gain', {u.name: i for i, u in enumerate(blocks)}), units=blocks, threshold=.75)
    assert q.policy == gain(.75, strata=0) == ALFConfig.from_args(threshold=.75, unit='block').policy
    assert q.selection.names == ('block.9', 'block.10', 'block.11') and "unit='block'" in q.text.value


def test_undo_and_redo(picker):
    p = picker(scores=scores, units=units)
    assert p.undo.disabled and p.redo.disabled
    click(p, 'block.1', -1, 'ban')
    p.budget_slider.value = 40
    p.budget_slider.value = 41              # one drag, one wish
    click(p, 'block.2', -1, 'pin')
    seen = []
    for _ in range(3):
        p.undo.click()
        seen.append(p.policy)
    assert seen == [BudgetPolicy(.41, strata=3, ban='block.1'), BudgetPolicy(.25, strata=3, ban='block.1'), usual]
    assert p.undo.disabled and p.by is None and p.budget_number.value == 25
    for _ in range(2): p.redo.click()
    assert p.policy == seen[0] and p.budget_number.value == 41
    p.threshold_slider.value = .5           # what was undone is forgotten
    assert p.redo.disabled and p.policy == gain(.5, ban='block.1')


def test_what_is_copied_is_what_is_shown(picker):
    p = picker(scores=scores, units=units)
    click(p, 'block.10', -1, 'ban')
    for by, value in (('budget', .1), ('threshold', .8)):
        setattr(p, by, value)
        p.form.value = 'Python'
        args = eval(p.text.value.replace('ALFCallback', 'dict'))
        assert ALFConfig.from_args(**args).policy == p.policy and args == {by: value, 'ban': ['block.10']}
        p.form.value = 'JSON'
        assert p.policy == type(p.policy).from_json(p.text.value)
        p.form.value = 'command line'
        assert p.text.value == f'alf finetune --{by} {value} --ban block.10'


# ---- what is said

def test_readouts_say_what_the_records_say(picker):
    p = picker(scores=scores, units=units, threshold=.5)
    assert 'training state' in p.tiles.value and 'beside weights and activations' in p.tiles.value
    sel, n = p.selection, sum(u.n_params for u in units if u.name in p.selection)
    assert f'>{len(sel)} <small>of 210<' in p.tiles.value and f'{sel.share*100:.1f} %' in p.tiles.value
    assert f'{n*ADAMW_BYTES/1e6:.3g} MB' in p.tiles.value and 'AdamW' in p.tiles.value
    assert f'× {step_cost(units, sel.names):.2f}' in p.tiles.value


def test_memory_is_all_of_it_where_the_run_measured_it(tmp_path, picker):
    fake_run(tmp_path/'r', blocks=4, steps=20)
    path = tmp_path/'r'/'events.jsonl'
    def measured(**more):
        events = [json.loads(l) for l in path.read_text().splitlines()]
        events = [e | more if e['event'] == 'memory' else e for e in events]
        path.write_text(''.join(json.dumps(e) + '\n' for e in events))
        return picker(tmp_path/'r', budget=.1)
    p = measured(used_bytes=3*10**9, device_bytes=16*10**9)
    state = [sum(e[f'{k}_bytes'] for k in ('grad', 'optimizer', 'reference')) for e in p.state.events('memory')]
    needed = round(sum(u.n_params for u in p.state.units if u.name in p.selection)*p.state.bytes_per_param)
    assert f'{human_bytes(3*10**9 - max(state) + needed)} <small>of 16 GB<' in p.tiles.value
    assert f'training state {human_bytes(needed)};' in p.tiles.value and 'more than there is' not in p.tiles.value
    assert 'more than there is' in measured(device_bytes=2*10**9).tiles.value


def test_the_button_copies_what_the_field_shows(picker):
    p = picker(scores=scores, units=units)
    for form in ('Python', 'JSON', 'command line'):
        p.form.value = form
        assert p.clip.text == p.text.value != ''


def test_what_selects_nothing_is_said(picker):
    p = picker(scores=scores, units=units)
    p.threshold_slider.value = 1
    assert p.selection is None and 'is reached by no unit' in p.said.value and not p.error.value
    assert p.policy == gain(1.)
    click(p, -1, -1, 'ban')
    assert p.selection is None and 'nothing to choose from' in p.said.value
    p.undo.click()
    p.budget_number.value = 50
    assert p.selection and p.policy == BudgetPolicy(.5, strata=3)
    empty = picker(scores=Scores('rate', {}), units=units, policy=FullPolicy())
    assert len(empty.selection) == 210
    empty.threshold_slider.value = .31
    assert empty.selection is None and 'no candidate has a known rate' in empty.said.value


def test_bad_input_is_refused():
    for kw, match in (
        (dict(), 'of a run, or of scores= and units='),
        (dict(scores=scores), 'of a run'),
        (dict(source=3), 'got int'),
        (dict(scores={}, units=units), 'a Scores'),
        (dict(scores=scores, units=fake_units(2)), 'another model'),
        (dict(scores=scores, units=units, policy=3), 'policy is a Policy'),
        (dict(scores=scores, units=units, policy=dict(policy='none')), 'unknown policy'),
        (dict(scores=scores, units=units, threshold=0.1, budget=0.1), 'give one'),
        (dict(scores=scores, units=units, budget=25), 'did you mean 0.25'),
        (dict(scores=scores, units=[]), 'no parameters'),
    ):
        with pytest.raises(ValueError, match=re.escape(match)): ThresholdPicker(**kw)
    p = ThresholdPicker(scores=scores, units=units)
    with pytest.raises(traitlets.TraitError): p.threshold = 2
    p.close()


def test_a_unit_tells_about_itself(picker):
    p = picker(scores=scores, units=units)
    click(p, 'block.7', 'down_proj', 'look')
    name, v = 'block.7.mlp.down_proj', p._choice.importance.get('block.7.mlp.down_proj')
    assert '576×1536' in p.about.value and name in p.about.value
    assert f'{v:.2f}' in p.about.value if v is not None else 'unknown' in p.about.value
    assert p.policy == usual and p.by is None           # a look changes nothing
    click(p, 'block.7', -1, 'ban')
    assert 'banned: block.7' in p.about.value
    click(p, 'block.7', -1, 'look')
    assert '>7<' in p.about.value and '0 would train' in p.about.value


def test_hostile_names_are_text(picker):
    odd = [UnitInfo('<b>"x', '<script>', 'matrix', '<i>', 10, 1), UnitInfo('y', '<script>', 'matrix', 'y', 10, 1)]
    p = picker(scores=Scores('rate', {'<b>"x': 1., 'y': .2}), units=odd, budget=.9)
    click(p, 0, 0, 'pin')
    click(p, 0, 0, 'look')
    html = p.static_html() + p.about.value + p.said.value
    assert '<script' not in html and '<b>"x' not in html and '<i>&' not in html
    assert 'innerHTML' not in p.grid._esm and 'insertAdjacentHTML' not in p.grid._esm


# ---- how much and how fast

def test_updates_are_small_and_quick(picker):
    p = picker(scores=scores, units=units)
    sent = []
    for w in all_widgets(p.box): w.observe(lambda c: sent.append(len(str(c['new']).encode())))
    took = []
    for i in range(1, 40):
        for slider, v in ((p.threshold_slider, i/42), (p.budget_slider, 100*i/41)):
            del sent[:]
            t = time.thread_time()
            slider.value = v
            took.append(time.thread_time() - t)
            assert sum(sent) < 20_000
    assert sorted(took)[len(took)//2] < .02


def test_a_look_at_another_step_is_small_too(picker, tmp_path):
    p = picker(fake_run(tmp_path))
    sent = []
    for w in all_widgets(p.box): w.observe(lambda c: sent.append(len(str(c['new']).encode())))
    for i in range(3):
        del sent[:]
        p.step.value = i
        assert 3_000 < sum(sent) < 25_000


def test_a_large_model_is_quick(picker):
    "A click is answered in a tenth of a second, also of 80 blocks"
    big = fake_units(80)
    p = picker(scores=made_up_scores(big), units=big)
    took = []
    for i in range(12):
        t = time.thread_time()
        click(p, f'block.{5*i}', -1)
        took.append(time.thread_time() - t)
    assert sorted(took)[6] < .1 and len(str(p.grid.cells)) < 25_000


# ---- beside a run

def test_it_follows_a_run_and_its_policy(picker, tmp_path):
    run = Live(tmp_path, BudgetPolicy(.25, hysteresis=.3))
    p = picker(run)
    assert p.by is None and p.selection == run.policy.select(run_scores(run), run.units, 0, run.current)
    assert (
        p.actions.layout.display is None
        and p.step.layout.display == 'none'
        and p.apply.disabled
        and 'trains now' in p.legend.value
    )
    run.train(25)
    wait_for(lambda: p.state.step == 25 and 'Since step 20' in p.said.value)
    assert p.selection.names == run.policy.select(p.state.scores(), run.units, 25, run.current).names
    p.threshold_slider.value = .33
    assert not p.apply.disabled and p.policy == gain(.33, hysteresis=.3, strata=0)
    assert (
        human_time(float(f'{.8*step_cost(run.units, p.selection.names):.2g}')) in p.tiles.value
        and 'timed' in p.tiles.value
    )


def run_scores(run):
    e = RunLog(run.log.path).events('select')[-1]
    return Scores(e['signal'], e['scores'], e['ages'])


def test_the_policy_in_force_is_the_last_one_chosen(picker, tmp_path):
    run = Live(tmp_path, BudgetPolicy(.25))
    run.log.write('choose', step=0, policy=BudgetPolicy(.4, explore=.5, pin='norm').to_dict(), now=False)
    p = picker(run)
    assert p.policy == BudgetPolicy(.4, explore=.5, pin='norm')
    p.budget_slider.value = 30
    assert p.policy == BudgetPolicy(.3, explore=.5, pin='norm') and 'norm' in p.selection
    p.threshold_slider.value = .3
    assert p.policy == gain(.3, pin='norm', strata=0)


def test_undo_goes_back_to_what_the_run_was_asked_for(picker, tmp_path):
    "After a reload, too, and what another view asked for comes before what was not asked for yet"
    run = Live(tmp_path, usual)
    first, second = BudgetPolicy(.4, strata=3), LISAPolicy(3)
    run.log.write('choose', step=0, policy=first.to_dict(), now=False)
    p = picker(run)
    assert p.policy == first and p.by is None and not p.undo.disabled and p.apply.disabled
    p.undo.click()
    assert p.policy == usual and p.by == 'units' and not p.apply.disabled
    p.redo.click()
    assert p.policy == first and p.apply.disabled
    click(p, 'block.1', -1, 'ban')
    run.log.write('choose', step=1, policy=second.to_dict(), now=False)
    wait_for(lambda: len(p.state.events('choose')) == 2 and p._history.n_logged == 3)
    assert p.policy == BudgetPolicy(.4, strata=3, ban='block.1')
    p.undo.click()
    assert p.policy == second and p.by is None


def test_importance_is_that_of_units_that_may_be_chosen(picker):
    p = picker(scores=Scores('gain', {**scores.values, 'embeddings': 1e9}), units=units)
    q = picker(scores=scores, units=units)
    assert p._choice.importance == q._choice.importance and 'embeddings' not in p._choice.importance


def test_apply_at_the_next_reselection(picker, tmp_path):
    run = Live(tmp_path)
    p = picker(run)
    run.train(3)
    p.budget_slider.value = 10
    p.apply.click()
    assert run.asked == [(BudgetPolicy(.1), False)] and 'pending' in p.request.value
    run.train()
    wait_for(lambda: 'in force since step 4' in p.request.value and '(step 10)' in p.request.value)
    run.train(6)
    wait_for(lambda: 'trains since step 10' in p.request.value)
    assert run.current.share <= .1 and f'{len(run.current)} units' in p.request.value and 'good' in p.request.value
    assert p.by is None and p.apply.disabled        # what was asked for is in force
    p.budget_slider.value = 20                      # the old answer does not stay beside a new choice
    assert 'trains since' not in p.request.value and 'good' not in p.request.value


def test_what_was_banned_by_clicks_trains_no_more(picker, tmp_path):
    run = Live(tmp_path, usual)
    p = picker(run)
    for block in 1, 3: click(p, f'block.{block}', -1, 'ban')
    p.apply_now.click()
    run.train()
    wait_for(lambda: 'trains since' in p.request.value)
    assert run.asked == [(BudgetPolicy(.25, strata=3, ban=('block.1', 'block.3')), True)]
    assert {n.split('.')[1] for n in run.current} == {'0', '2'} and 'block.1, block.3 banned' in p.request.value


def test_apply_now_and_the_run_trains_what_was_shown(picker, tmp_path):
    run = Live(tmp_path)
    p = picker(run)
    p.threshold_slider.value = .45
    shown = p.selection.names
    p.apply_now.click()
    run.draw = lambda step: made_up_scores(run.units, 0)        # the same scores as those shown
    run.train()
    wait_for(lambda: 'taken at step 1' in p.request.value or 'trains since' in p.request.value)
    assert run.asked[-1] == (gain(.45, strata=0), True) and run.current.names == shown


def test_a_refusal_is_said(picker, tmp_path):
    run = Live(tmp_path)
    p = picker(run)
    p.budget_slider.value = 50
    run.choose = lambda **kw: (_ for _ in ()).throw(RuntimeError('no re-selection is left <b>'))
    p.apply.click()
    assert 'refused: no re-selection is left &lt;b&gt;' in p.request.value and not p.error.value


def test_a_run_that_ends_can_be_looked_back_at(picker, tmp_path):
    run = Live(tmp_path)
    p = picker(run)
    p.budget_slider.value = 12
    p.apply.click()
    run.end()
    wait_for(lambda: 'ended before it was taken' in p.request.value)
    assert p.apply.layout.display == p.apply_now.layout.display == 'none'
    run2 = Live(tmp_path/'2')
    q = picker(run2)
    run2.train(30)
    run2.end()
    wait_for(lambda: q.step.layout.display is None)
    assert [o[0] for o in q.step.options] == ['0', '10', '20', '30'] and 'At step 30' in q.said.value


# ---- in hindsight

def test_a_recorded_run_is_reproduced_at_every_step(picker, tmp_path):
    run = Live(tmp_path, BudgetPolicy(.2, explore=.3, hysteresis=.4), blocks=6)
    run.train(25)
    run.choose(gain(.5), now=True)
    run.train(25)
    run.end()
    p = picker(tmp_path)
    events = RunLog(tmp_path).events('select')
    assert len(p.step.options) == len(events) == 7
    for i, e in enumerate(events):
        p.step.value = i
        assert (
            list(p.selection.names) == e['names']
            and f"At step {e['step']}" in p.said.value
            and 'the same' in p.said.value
        ), e['step']
        assert p.policy.name == e['policy']
    p.step.value = 2
    p.budget_slider.value = 12
    before = BudgetPolicy(0.2, explore=0.3, hysteresis=0.4).select(
        Scores('gain', events[1]['scores']), run.units, 10, Selection(events[0]['names'])
    )
    assert (
        p.selection.names == BudgetPolicy(0.12, explore=0.3, hysteresis=0.4).select(
            Scores('gain', events[2]['scores']), run.units, 20, before
        ).names
    )
    p.step.value = 1
    p.threshold_slider.value = .6
    was = Selection(events[0]['names'])
    again = gain(.6, hysteresis=.4, strata=0).select(Scores('gain', events[1]['scores']), run.units, 10, was)
    assert p.selection.names == again.names
    here, there = set(p.selection.names), set(events[1]['names'])
    assert (
        f'<b>{len(here-there)}</b> only here' in p.said.value and f'<b>{len(there-here)}</b> only there' in p.said.value
    )


def test_recorded_runs_without_scores_in_their_selections(picker, tmp_path):
    p = picker(fake_run(tmp_path/'old', steps=60))      # probes only
    assert p.selection and p.state.selections[0].share > 0
    p.step.value = 0
    assert 'At step 0' in p.said.value and not p.error.value
    assert '16 B per weight, measured' in p.tiles.value


def test_a_run_that_has_not_measured_yet(picker, tmp_path):
    log = RunLog(tmp_path)
    log.write('eval', step=0, when='before', name='domain', loss=1.)
    p = picker(log)
    assert p.selection is None and 'Waiting for the run' in p.empty.value
    assert p.grid.layout.display == 'none' and not p.error.value
    log.write(
        'run_begin',
        step=0,
        run_id='x',
        config=dict(policy=dict(policy='budget', budget=0.3), signal='rate'),
        units=fake_units(2),
    )
    wait_for(lambda: 'Nothing was measured' in p.empty.value)
    log.write('select', step=0, names=['block.0.mlp.up_proj'], share=.2, reason='warm-up', policy='warm-up')
    log.write(
        'measure',
        step=10,
        signals=dict(
            rate={'block.0.mlp.up_proj': 0.1, 'block.1.mlp.up_proj': 0.05}, coherence={'block.0.mlp.up_proj': 0.5}
        ),
    )
    wait_for(lambda: p.selection and 'block.0.mlp.up_proj' in p.selection)
    assert [o[0] for o in p.step.options] == ['0', 'now'] and 'trains now' in p.legend.value
    p.step.value = 0
    assert 'did train' in p.legend.value and p.selection is None
    p.step.value = -1
    click(p, 'block.0', 'up_proj', 'look')
    assert '0.5' in p.about.value and 'coherence' in p.about.value


# ---- where no kernel runs

def test_the_still_picture_holds_the_same(picker):
    p = picker(scores=scores, units=units, threshold=.5)
    html = p.picture()._repr_html_()
    assert p.tiles.value in html and html.count('<tr>') == 31 and 'alf-grid' in html and '<svg' not in html
    # what a careful viewer leaves
    bare = re.sub(r'<style>.*?</style>|<svg.*?</svg>| style="[^"]*"| class="[^"]*"', '', html, flags=re.S)
    assert f'{len(p.selection)} <small>of 210' in bare and 'block.29' in bare and f'{len(p.selection)} units' in bare
    assert len(re.findall(r'<b>1?\.', bare)) == len(p.selection) > 30      # what would train is bold
    assert repr(p).startswith('ThresholdPicker: importance ≥ 0.5, ')


def test_closing_lets_go(tmp_path):
    run = Live(tmp_path)
    p = ThresholdPicker(run)
    slider = p.threshold_slider
    heard = lambda: len(slider._trait_notifiers['value']['change'])
    n = heard()
    p.close()
    assert heard() == n-1
    slider.value = .9
    run.train(2)
    assert p.by is None and slider.comm is None and all(w.comm is None for w in all_widgets(p.box))


# ---- with a real model

@pytest.mark.timeout(120)
def test_beside_a_real_run(picker, tmp_path):
    "What the picker showed is what the run went on to train, and every selection of the run is shown again afterwards"
    pytest.importorskip('torch')
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from alf_nb.train.background import train_in_background
    from alf_nb.demo import demo_dataset, demo_model
    from alf_nb.train.trainer import ALFCallback

    class Slow(TrainerCallback):
        def on_step_begin(self, args, state, control, **kw): time.sleep(.03)

    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=60,
        per_device_train_batch_size=4,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy='no',
    )
    run = train_in_background(
        Trainer(
            demo_model(),
            args,
            train_dataset=demo_dataset(),
            callbacks=[ALFCallback(budget=0.3, interval=10, select_until=1.0), Slow()],
        )
    )
    wait_for(lambda: run.log.path.exists() and run.log.events('meter'), 60)
    p = picker(run)
    p.budget_slider.value = 50
    p.apply_now.click()
    wait_for(lambda: 'trains since step' in p.request.value, 30)
    at = next(e['step'] for e in run.log.events('choose'))
    run.wait(60)
    wait_for(lambda: p.step.layout.display is None)
    chosen = run.log.events('select')
    assert (
        [s for e in chosen if (s := e['step']) >= at][0] == at
        and all(e['share'] <= 0.5 for e in chosen)
        and any(e['share'] > 0.3 for e in chosen)
    )
    fresh = picker(tmp_path)
    for e in chosen:                        # the follower blends what was measured as the tracker does
        if e.get('scores'):
            assert {n: v for n, v in fresh.state.scores(step=e['step']).values.items() if v is not None} == {
                n: v for n, v in e['scores'].items() if v is not None
            }
    tracked = run.callback.run.tracker.scores(run.callback.config.signal, 60)
    assert fresh.state.scores().known == pytest.approx(tracked.known)
    for i, e in enumerate(chosen):
        fresh.step.value = i
        # the first selection is by lot, before there is anything to pick by
        if 'scores' in e: assert list(fresh.selection.names) == e['names']
        else: assert e['step'] == 0 and fresh.selection is None
    assert not p.error.value and not fresh.error.value
