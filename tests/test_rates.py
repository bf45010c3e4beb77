"The learning rate follows the share: what is suggested, what a run says of its own, and when it warns."
import json
import warnings

import pytest
import torch
from small_run import small_trainer

from alf_nb.app.cli import main
from alf_nb.app.finetune import finetune
from alf_nb.core.rates import lr_of_all, rates_around, suggested_lr
from alf_nb.core.runlog import RunLog
from alf_nb.demo import demo_model, demo_tokenizer
from alf_nb.study.methods import METHODS, alf_method
from alf_nb.train.loop import ALFLoop
from alf_nb.train.trainer import ALFCallback

TEXT = ' '.join(f"The sun and the moon are {n} and {n*n}." for n in range(400))


def said(folder):
    found, = RunLog(folder).events('rate')
    return found


def trained(folder, lr, how={}, model=None, resume=None, **settings):
    "Warnings of a run that speak of its rate"
    trainer = small_trainer(folder, ALFCallback(**settings), model=model, learning_rate=lr, **how)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        trainer.train(resume_from_checkpoint=resume)
    return [str(w.message) for w in seen if 'full_lr' in str(w.message)]


@pytest.mark.parametrize('off, warns', [(1, 0), (1.9, 0), (1/1.9, 0), (2.2, 1), (1/2.2, 1), (20, 1)])
def test_a_rate_that_is_off_is_warned_of_once(tmp_path, off, warns):
    wanted = suggested_lr(.3, 1e-3)
    found = trained(tmp_path, off*wanted, budget=.3, full_lr=1e-3)
    assert len(found) == warns and all(f'full_lr=0.001 asks for {wanted:g}' in w for w in found)
    assert said(tmp_path)['suggested'] == wanted


def test_without_a_full_rate_the_log_tells_and_nobody_is_warned(tmp_path):
    assert not trained(tmp_path, 1e-1, budget=.3)
    e = said(tmp_path)
    assert (e['lr'], e['share'], e['suggested']) == (1e-1, .3, None) and e['of_all'] == lr_of_all(1e-1, .3)
    assert e['message'] == 'lr 0.1 for 30.0 % of the parameters is what 0.038 is for all of them'


def test_a_resume_says_it_once(tmp_path):
    how = dict(save_strategy='steps', save_steps=6)
    assert len(trained(tmp_path, 1e-1, how, budget=.3, full_lr=1e-3)) == 1
    again = trained(tmp_path, 1e-1, how, resume=str(tmp_path/'checkpoint-6'), budget=.3, full_lr=1e-3)
    assert not again and len(RunLog(tmp_path).events('rate')) == 1


def groups(model):
    params = list(model.parameters())
    return torch.optim.AdamW([dict(params=params[:4], lr=1e-2), dict(params=params[4:], lr=1e-3)])


@pytest.mark.parametrize('make', [lambda m: torch.optim.SGD(m.parameters(), lr=.5), groups], ids=['sgd', 'two rates'])
def test_what_is_no_step_of_adam_with_one_rate_is_passed_over(tmp_path, make):
    model = demo_model()
    with warnings.catch_warnings():
        warnings.filterwarnings('error', '.*full_lr.*')
        ALFLoop(model, make(model), [], 4, out=tmp_path, budget=.3, start='prior', full_lr=1e-3)
    assert not RunLog(tmp_path).events('rate')


def test_adapters_have_rates_of_their_own(tmp_path):
    peft = pytest.importorskip('peft')
    model = peft.get_peft_model(demo_model(), peft.LoraConfig(r=2, target_modules=['q_proj', 'up_proj']))
    assert not trained(tmp_path, 1e-1, model=model, budget=.5, full_lr=1e-3)
    assert not RunLog(tmp_path).events('rate')


def tuned(folder, **kw):
    text = folder/'text.txt'
    text.write_text('\n\n'.join(TEXT[i:i+90] for i in range(0, len(TEXT), 90)), encoding='utf-8')
    how = dict(steps=3, max_length=32, eval_blocks=2, other=text, bf16=False, progress=False, start='prior')
    return finetune((demo_model(), demo_tokenizer()), text, folder/'run', **{**how, **kw})


@pytest.mark.parametrize('kw, lr', [
    (dict(), suggested_lr(.25)),
    (dict(budget=.1), suggested_lr(.1)),
    (dict(budget=.1, full_lr=1e-3), suggested_lr(.1, 1e-3)),
    (dict(preset='full'), suggested_lr(1)),
    (dict(lr=2e-3, budget=.1), 2e-3),
], ids=str)
def test_finetune_takes_what_suits_its_share(tmp_path, kw, lr):
    assert tuned(tmp_path, **kw)['lr'] == lr == json.loads((tmp_path/'run'/'summary.json').read_text())['lr']
    assert said(tmp_path/'run')['lr'] == lr


def test_finetune_takes_what_suits_the_budget_that_fits(tmp_path):
    s = tuned(tmp_path, memory=1_600_000)
    budget = RunLog(tmp_path/'run').events('fit')[0]['budget']
    assert 0 < budget < 1 and s['lr'] == pytest.approx(suggested_lr(budget), rel=.05)


def test_the_command_line_says_where_the_rate_comes_from(capsys):
    with pytest.raises(SystemExit): main(['finetune', '--help'])
    told = ' '.join(capsys.readouterr().out.split())
    assert '--lr LR peak learning rate' in told and 'suggested_lr says of the share that trains' in told
    assert suggested_lr(.25) == 4e-4 and '4e-4 for a quarter' in told and '--full-lr' in told


def test_methods_are_tried_around_what_suits_their_share():
    for m in METHODS.values():
        if m.describe(120, 30)['budget'] == .25: assert m.lrs == rates_around(.25), m.name
    assert METHODS['full'].lrs == rates_around(1) and alf_method('mine', budget=.05).lrs == rates_around(.05)


@pytest.mark.parametrize('share', [1, .6, .25, .1, .05])
def test_grids_hold_the_suggestion(share):
    low, middle, high = rates_around(share)
    assert low < suggested_lr(share) < high and middle/1.5 < suggested_lr(share) < middle*1.5
