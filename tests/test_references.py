"""References are kept where a signal asks for them, and nowhere else; what is not measured then is said."""
import pytest
import torch
from small_run import arguments, losses, same, small_trainer, weights
from transformers import Trainer, TrainerCallback

from alf_nb.core.config import PRESETS, ALFConfig
from alf_nb.core.runlog import RunLog
from alf_nb.demo import demo_dataset, demo_model
from alf_nb.report.page import report_html
from alf_nb.report.run_state import state_of
from alf_nb.train.loop import ALFLoop
from alf_nb.train.trainer import ALFCallback
from alf_nb.widgets.picker import ThresholdPicker

MOVES = dict(budget=.3, interval=4, measure_every=2)


def run(folder, *more, optim="adamw_torch", resume=None, model=None, given={}, **alf):
    one = ALFCallback(**{**MOVES, **alf})
    t = small_trainer(folder, one, *more, model=model, optim=optim, more=given, save_strategy="steps", save_steps=5)
    t.train(resume_from_checkpoint=resume)
    return t, one


def kept(folder): return [e["reference_bytes"] for e in RunLog(folder).events("memory")]


def rates(folder): return [e["signals"]["rate"] for e in RunLog(folder).events("measure")]


def test_the_default_keeps_none_and_measures_the_last_update(tmp_path):
    t, one = run(tmp_path)
    assert one.config.references == "none" == RunLog(tmp_path).begin["config"]["references"]
    assert kept(tmp_path) and set(kept(tmp_path)) == {0}
    assert all(0 < v for r in rates(tmp_path) for v in r.values()) and all(rates(tmp_path))
    assert not state_of(tmp_path).unread and not RunLog(tmp_path).events("not_measured")
    again, _ = run(tmp_path, resume=str(tmp_path/"checkpoint-5"))
    assert losses(again) == losses(t) and same(weights(again), weights(t))


@pytest.mark.parametrize("asks", [dict(signal="rate"), dict(signal="coherence"), dict(check="freeze")], ids=str)
def test_what_asks_for_references_has_them(tmp_path, asks):
    _, one = run(tmp_path, **asks)
    trains = [sum(p.nbytes for n in e["names"] for p in one.run.layers.params(n))
              for e in RunLog(tmp_path).events("select")]
    assert one.config.references == "device" and set(kept(tmp_path)) <= set(trains) and all(kept(tmp_path))


def test_a_loop_keeps_none_by_default_and_some_for_rate(tmp_path):
    rows = [{k: torch.tensor([v]) for k, v in r.items()} for r in demo_dataset(8)]
    for name, kw in (("default", {}), ("rate", dict(signal="rate", start="rotate", warm_up=4))):
        model = demo_model(blocks=2)
        opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
        with ALFLoop(model, opt, rows, 8, out=tmp_path/name, **MOVES, **kw) as alf:
            while not alf.done:
                model(**rows[alf.steps]).loss.backward()
                alf.step()
        assert all(map(bool, kept(tmp_path/name))) == bool(kw), name


def test_every_preset_keeps_what_its_signal_asks_for():
    for name in PRESETS: assert (ALFConfig.from_args(name).references == "device") == (name == "paper"), name
    assert ALFConfig(signal="rate", references="none").references == "none", "what is given is kept"
    with pytest.raises(ValueError, match="check='freeze' puts back"): ALFConfig(check="freeze", references="none")


def test_a_resume_of_a_run_that_kept_references_goes_on_without(tmp_path):
    run(tmp_path, references="device")
    _, one = run(tmp_path, resume=str(tmp_path/"checkpoint-5"))
    assert one.config.references == "none" and kept(tmp_path)[-1] == 0 and rates(tmp_path)[-1]


# ---------------------------------------------------------------- optimizers that cannot be read

class Poison(TrainerCallback):
    "Puts a NaN into a weight that trains"
    def __init__(self, one): self.one = one

    def on_step_end(self, args, state, control, model=None, **kw):
        if state.global_step == 5:
            with torch.no_grad(): self.one.run.layers.params(self.one.selection.names[0])[0].view(-1)[-1] = float("nan")


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor"])
def test_weights_that_are_nan_are_noticed_without_references(tmp_path, optim):
    one = ALFCallback(**MOVES)
    with pytest.raises(RuntimeError, match="hold NaN or infinity"):
        small_trainer(tmp_path, one, Poison(one), optim=optim).train()


def test_views_say_that_movement_is_not_measured(tmp_path):
    run(tmp_path/"odd", optim="adafactor")
    run(tmp_path/"plain")
    assert "the last update of Adafactor cannot be read" in state_of(tmp_path/"odd").unread
    assert "Rate, coherence and descent are not measured" in report_html(tmp_path/"odd")
    assert "descent are not measured" not in report_html(tmp_path/"plain")
    for name in ("odd", "plain"):
        p = ThresholdPicker(RunLog(tmp_path/name))
        unit = next(u for u in p.grid.grid.units if u.name in state_of(tmp_path/name).selections[-1])
        place = dict(row=p.grid.grid.rows.index(unit.layer), column=p.grid.grid.columns.index(unit.role))
        p.grid._handle_custom_msg(dict(place, rule='look'), [])
        assert "<dt>rate</dt>" in p.about.value and ("not measured" in p.about.value) == (name == "odd")


class Renamed(torch.optim.AdamW):
    "Steps as AdamW does, and calls its moments otherwise"
    @torch.no_grad()
    def step(self, closure=None):
        for s in self.state.values(): s["exp_avg"], s["exp_avg_sq"] = s.pop("m"), s.pop("v")
        super().step(closure)
        for s in self.state.values(): s["m"], s["v"] = s.pop("exp_avg"), s.pop("exp_avg_sq")


def test_a_subclass_with_a_state_of_its_own_is_not_read(tmp_path):
    model = demo_model()
    given = dict(optimizers=(Renamed(model.parameters(), lr=1e-2), None))
    t, one = run(tmp_path, model=model, given=given, offload="full")
    assert t.state.global_step == 12 and not any(rates(tmp_path))
    assert "not measured so far" in state_of(tmp_path).unread


def test_a_table_of_which_few_rows_move_is_not_called_still(tmp_path, recwarn):
    "4,096 numbers of a million are compared: none of them lies in a row that a batch uses"
    class Rows(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.out = torch.nn.Embedding(20_000, 64), torch.nn.Linear(64, 1)

        def forward(self, x, labels=None): return dict(loss=(self.out(self.table(x)) - labels).square().mean())

    data = [dict(x=torch.tensor([7]), labels=torch.ones(1, 1)) for _ in range(16)]
    torch.manual_seed(0)
    for optim in ("sgd", "adafactor"):
        one = ALFCallback(preset="full", measure_every=2)
        t = Trainer(Rows(), arguments(tmp_path/optim, optim=optim, remove_unused_columns=False), train_dataset=data,
                    callbacks=[one])
        t.train()
        assert not [w for w in recwarn if "did not move" in str(w.message)]
        found = [r for r in rates(tmp_path/optim) if "embeddings" in r or "table" in r]
        assert bool(found) == (optim == "sgd")
