"""A memory instead of a budget: the largest one that fits is found before the first step, and kept by a resume."""

import warnings

import pytest
import torch
from small_run import losses, same, small_trainer, weights
from torch.utils.data import Dataset, IterableDataset

from alf_nb.app.cli import main
from alf_nb.core.config import ALFConfig
from alf_nb.core.policies import BudgetPolicy
from alf_nb.core.runlog import RunLog
from alf_nb.demo import demo_dataset, demo_model
from alf_nb.model.fit import MARGIN
from alf_nb.model.needs import Held, Sizer
from alf_nb.train import selecting
from alf_nb.train.lightning import lightning_callback
from alf_nb.train.loop import ALFLoop
from alf_nb.train.trainer import ALFCallback

MEMORY = 2_000_000      # of a demo model, about half of what may train fits


class Stream(IterableDataset):
    def __iter__(self): return iter(demo_dataset())


class Drawn(Dataset):
    "Rows that take a number from torch's generator"
    def __init__(self): self.rows = demo_dataset()
    def __len__(self): return len(self.rows)
    def __getitem__(self, i): return self.rows[(i + int(torch.randint(8, ()))) % len(self)]


def trained(folder, memory=MEMORY, resume=None, model=None, data=None, how={}, **settings):
    alf = ALFCallback(**dict(preset='probe', memory=memory) | settings)
    t = small_trainer(folder, alf, model=model, data=data, **how)
    t.train(resume_from_checkpoint=resume)
    return t, alf


def fit_of(folder):
    found, = RunLog(folder).events('fit')
    return found


def test_the_largest_budget_that_fits_is_taken(tmp_path):
    _, alf = trained(tmp_path)
    fit = fit_of(tmp_path)
    assert (fit['memory'], fit['batch'], fit['length']) == (MEMORY, 4, 32) and 0 < fit['budget'] < 1
    sizer = Sizer(demo_model(), 4, 32, bf16=False, device='cpu')
    needed = lambda b: sizer.alf(b, Held()).total
    assert needed(fit['budget']) == fit['total'] <= (1-MARGIN)*MEMORY < needed(fit['budget'] + .01)
    assert alf.selection.share <= fit['budget'] == alf.run.policy.budget
    assert RunLog(tmp_path).begin['config']['policy']['budget'] == fit['budget']


@pytest.mark.parametrize('make', [Drawn, Stream], ids=['drawn', 'stream'])
def test_looking_for_it_changes_nothing_else(tmp_path, make):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        t, alf = trained(tmp_path/'memory', data=make())
        budget = fit_of(tmp_path/'memory')['budget']
        again = small_trainer(tmp_path/'budget', ALFCallback(preset='probe', budget=budget), data=make())
        again.train()
    assert losses(t) == losses(again) and same(weights(t), weights(again))


@pytest.mark.parametrize('memory,common,more,smaller', [
    (1_950_000, dict(signal='rate'), dict(how=dict(gradient_accumulation_steps=2)), True),
    (2_300_000, {}, dict(how=dict(per_device_train_batch_size=5)), True),
    (1_900_000, dict(references='device'), dict(references='none'), False),
    (1_900_000, {}, dict(how=dict(gradient_checkpointing=True)), False),
    (1_900_000, dict(references='device'), dict(signal='rate'), False),
], ids=['micro-batches', 'batch', 'references', 'checkpoints', 'rate'])
def test_what_a_step_is_decides(tmp_path, memory, common, more, smaller):
    trained(tmp_path/'plain', memory, **common)
    trained(tmp_path/'other', memory, **common | more)
    a, b = fit_of(tmp_path/'plain')['budget'], fit_of(tmp_path/'other')['budget']
    assert b < a if smaller else b > a


def test_a_meter_needs_less_than_a_probe(tmp_path):
    trained(tmp_path/'probe')
    trained(tmp_path/'meter', preset='default')
    assert fit_of(tmp_path/'meter')['budget'] > fit_of(tmp_path/'probe')['budget']


def test_16_bit_weights_leave_more_room(tmp_path):
    how = dict(bf16=True)
    trained(tmp_path/'32', memory=1_700_000, model=demo_model(), how=how)
    trained(tmp_path/'16', memory=1_700_000, model=demo_model().to(torch.bfloat16), how=how)
    assert fit_of(tmp_path/'16')['budget'] > fit_of(tmp_path/'32')['budget']


def test_a_resume_keeps_what_was_found(tmp_path, monkeypatch):
    how = dict(save_strategy='steps', save_steps=4)
    whole, _ = trained(tmp_path/'whole', how=how)
    found = fit_of(tmp_path/'whole')['budget']
    given = str(tmp_path/'whole'/'checkpoint-4')
    with monkeypatch.context() as m:
        m.setattr(selecting, 'largest_budget', lambda *a: pytest.fail('looked for again'))
        again, alf = trained(tmp_path/'again', resume=given, how=how, resume_from=given)
    assert losses(again)[4:] == losses(whole)[4:] and same(weights(again), weights(whole))
    assert alf.run.policy.budget == found
    with pytest.warns(UserWarning, match='policy, memory'):
        _, alf = trained(tmp_path/'more', memory=64 << 20, resume=given, how=how, resume_from=given)
    assert alf.run.policy.budget == 1


@pytest.mark.parametrize('given,said', [
    (dict(budget=.1), 'budget is given'), (dict(threshold=.5), 'threshold is given'),
    (dict(policy=BudgetPolicy(.1)), 'a ready policy is given'),
    (dict(policy=dict(policy='static', budget=.1)), 'budget is given'),
    (dict(preset='lisa'), "policy 'lisa' has none"), (dict(policy='topk'), "policy 'topk' has none"),
])
def test_one_of_memory_and_budget(given, said):
    with pytest.raises(ValueError, match=said): ALFCallback(memory='12GB', **given)


def test_a_policy_without_its_budget_takes_one():
    assert ALFCallback(memory='1GB', policy='static').config.policy.budget == 1
    config = ALFConfig.from_args('short', memory='1GB')
    assert ALFConfig.from_dict(config.to_dict()) == config and config.memory == 10**9
    with pytest.raises(ValueError, match="'12 GiB'"): ALFCallback(memory='much')


def test_too_little_says_what_the_smallest_budget_needs(tmp_path):
    with pytest.raises(ValueError, match=r'a budget of 1 % needs 1\.\d+ MB \(weights 215 KB, .*probe'):
        trained(tmp_path, memory='1MB')


def test_pins_are_in_it(tmp_path):
    _, alf = trained(tmp_path, pin=('head',), ban=('block.0',))
    assert {'head.norm', 'head.lm_head'} <= set(alf.selection.names)
    assert not any(n.startswith('block.0') for n in alf.selection.names)


def loop(model, batches, out=None, **kw):
    return ALFLoop(model, torch.optim.AdamW(model.parameters(), lr=1e-3), batches, 3, out=out, start='prior',
                   reprobe_batches=0, **kw)


def test_in_a_loop(tmp_path):
    ids = torch.arange(64).reshape(2, 32)
    batches = [dict(input_ids=ids[:, :n], labels=ids[:, :n]) for n in (8, 32, 16)]
    model = demo_model()
    with loop(model, batches, tmp_path, memory=1_300_000) as alf:
        fit = fit_of(tmp_path)
        assert (fit['batch'], fit['length']) == (2, 32) and 0 < fit['budget'] <= 1
        saved = alf.state_dict()
    with loop(model, batches, resume=saved, memory=1_300_000) as alf: assert alf.run.policy.budget == fit['budget']
    with pytest.raises(ValueError, match="size of a step from 'input_ids' of a batch, and this one is a Tensor"):
        loop(demo_model(), [ids, ids], memory='1GB')
    with pytest.raises(ValueError, match='a Sequential is not known to take'):
        loop(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)), [ids, ids], memory='1GB')


def test_the_command_line_has_it(capsys):
    with pytest.raises(SystemExit): main(['finetune', '--help'])
    assert '--memory' in capsys.readouterr().out
    assert main(['finetune', '--memory', '1GB', '--budget', '0.1', '--steps', '1']) == 2
    assert 'budget is given' in capsys.readouterr().err


def test_under_lightning(tmp_path):
    L = pytest.importorskip('lightning')

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = demo_model()
        def training_step(self, batch, i): return self.net(**batch).loss
        def configure_optimizers(self): return torch.optim.AdamW(self.parameters(), lr=1e-3)

    rows = [{k: torch.as_tensor(v) for k,v in r.items()} for r in demo_dataset()]
    alf = lightning_callback(out=tmp_path, preset='probe', memory=MEMORY)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        L.Trainer(max_steps=2, accelerator='cpu', devices=1, callbacks=[alf], logger=False, enable_checkpointing=False,
                  enable_progress_bar=False, default_root_dir=tmp_path).fit(
            Module(), torch.utils.data.DataLoader(rows, batch_size=4))
    trained(tmp_path/'trainer')
    assert alf.loop.run.policy.budget == fit_of(tmp_path)['budget'] == fit_of(tmp_path/'trainer')['budget']


@pytest.mark.parametrize('settings', [dict(), dict(signal='rate'), dict(pin='block.0')], ids=str)
def test_a_preview_shows_the_budget_that_is_found(tmp_path, settings):
    settings = dict(preset='probe') | settings
    alf = ALFCallback(memory=MEMORY, **settings)
    chosen = alf.preview(demo_model(), batch=4, length=32)
    trained(tmp_path, **settings)
    assert 0 < chosen.share <= fit_of(tmp_path)['budget'] < 1
    assert chosen == ALFCallback(budget=fit_of(tmp_path)['budget'], **settings).preview(demo_model())


def test_a_preview_asks_for_the_size_of_a_step():
    with pytest.raises(ValueError, match='batch=.*length='): ALFCallback(memory=MEMORY).preview(demo_model())
