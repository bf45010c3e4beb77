"""Units that train and stay where they are: good runs go on, what is unknown is not called 0, and only a step that
was undone is an error."""
import copy
import warnings

import pytest
import torch
from small_run import losses, same, small_trainer, weights
from transformers import BertConfig, BertModel, Trainer, TrainerCallback

from alf_nb.core.checkpoints import find_checkpoint
from alf_nb.demo import demo_dataset, demo_model
from alf_nb.train.loop import ALFLoop
from alf_nb.core.policy import Policy
from alf_nb.core.records import KINDS, Scores
from alf_nb.core.runlog import RunLog
from alf_nb.train.selecting import switch
from alf_nb.train.trainer import ALFCallback


def train(folder, alf, *more, model=None, steps=12, **kw):
    "The Trainer after its run, and what was warned of"
    t = small_trainer(folder, alf, *more, model=model, max_steps=steps, **kw)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        t.train()
    return t, [str(w.message) for w in said]


def whys(folder): return {e["why"] for e in RunLog(folder).events("not_measured")}


def rates(alf, name): return alf.run.tracker.scores("rate", 0)[name]


class Skips(torch.nn.Module):
    "A model of two matrices, of which one takes part in the steps `on` says"
    def __init__(self, on=lambda step: False, factor=lambda step: 1.):
        super().__init__()
        self.always, self.sometimes = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.on, self.factor, self.calls = on, factor, 0

    def forward(self, x, labels=None):
        used = self.on(self.calls)
        factor = self.factor(self.calls)
        self.calls += self.training
        y = self.always(x)
        if used: y = y + self.sometimes(x)
        return dict(loss=((y - labels)**2).mean()*factor)


def numbers(n=64):
    g = torch.Generator().manual_seed(0)
    return [dict(x=torch.randn(8, generator=g), labels=torch.randn(8, generator=g)) for _ in range(n)]


def alf(**kw): return ALFCallback(**{**dict(preset="full", measure_every=3), **kw})


# ---------------------------------------------------------------- good runs

@pytest.mark.parametrize("references", ["device", "host", "8bit", "none"])
@pytest.mark.parametrize(
    "name, on",
    [
        ("never", lambda step: False),
        ("not at the end", lambda step: step < 7),
        ("not in the step that is looked at", lambda step: step % 3 != 2),
    ],
)
def test_a_part_that_is_skipped_ends_no_run_and_has_no_rate_of_0(tmp_path, references, name, on):
    one = alf(references=references)
    t, said = train(tmp_path, one, model=Skips(on), data=numbers())
    assert t.state.global_step == 12
    for e in RunLog(tmp_path).events("measure"):
        assert 0 not in e["signals"]["rate"].values() and 0 not in e["signals"]["descent"].values()
    assert any(rates(one, n) for n in one.run.names), "what moves is measured"
    if name == "never":
        assert all(rates(one, n) is None for n in one.run.names if "sometimes" in n)
        assert whys(tmp_path) == {"no gradient"} and sum("no gradient reached" in w for w in said) == 1, "said once"


@pytest.mark.parametrize("references", ["device", "none"])
def test_a_reward_that_does_not_come_yet_ends_no_run(tmp_path, references):
    "Advantages of 0: every gradient is there, and exactly 0; once rewards come, rates are known"
    one = alf(references=references)
    t, said = train(tmp_path, one, model=Skips(lambda step: True, factor=lambda step: float(step >= 7)), data=numbers())
    assert whys(tmp_path) == {"gradient 0"} and sum("exactly 0" in w for w in said) == 1
    assert all(rates(one, n) > 0 for n in one.run.names)


class Waits(torch.optim.AdamW):
    "Adds gradients up over seven steps"
    def __init__(self, *a, **kw):
        super().__init__(*a, **kw)
        self.calls = 0

    def step(self, closure=None):
        self.calls += 1
        if self.calls % 7 == 0: super().step()


class Around:
    "A wrapper that steps the optimizer inside it every seventh time"
    def __init__(self, inner): self.optimizer, self.calls = inner, 0

    def step(self):
        self.calls += 1
        if self.calls % 7 == 0: self.optimizer.step()


def test_an_optimizer_that_waits_ends_no_run(tmp_path):
    model = demo_model()
    t, said = train(
        tmp_path,
        ALFCallback(budget=0.5, interval=6, measure_every=3),
        model=model,
        steps=14,
        more=dict(optimizers=(Waits(model.parameters(), lr=1e-2), None)),
    )
    assert t.state.global_step == 14 and whys(tmp_path) == {"unknown"} and any("Waits may wait" in w for w in said)


@pytest.mark.parametrize("references", ["device", "none"])
def test_a_wrapper_that_waits_ends_no_loop(tmp_path, references):
    torch.manual_seed(0)
    model = Skips(lambda step: True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = [{k: torch.stack([v[k]]) for k in v} for v in numbers(8)]
    loop = ALFLoop(model, optimizer, data, 14, out=tmp_path, preset="full", measure_every=3, references=references)
    around = Around(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while not loop.done:
            model(**data[loop.steps % 8])["loss"].backward()
            loop.before_step()
            around.step()
            loop.after_step()
    loop.close()
    assert loop.steps == 14


def test_a_scaler_that_skips_steps_ends_no_loop(tmp_path):
    "Three steps overflow: the scaler leaves them out, and the loop says so"
    torch.manual_seed(0)
    model, seen = Skips(lambda step: True), []
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.)
    data = [{k: torch.stack([v[k]]) for k in v} for v in numbers(8)]
    loop = ALFLoop(model, optimizer, data, 9, out=tmp_path, preset="full", measure_every=3)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        while not loop.done:
            loss = model(**data[loop.steps % 8])["loss"]*(float("inf") if loop.steps in (2, 3, 4, 5) else 1)
            scaler.scale(loss).backward()
            loop.before_step()
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            seen.append(scaler.get_scale() < before)
            loop.after_step(skipped=seen[-1])
    loop.close()
    assert sum(seen) == 4 and loop.steps == 9
    assert not [w for w in said if "did not move" in str(w.message)], "a step that was left out says nothing"


@pytest.mark.parametrize("preset", ["lisa", "full"])
def test_the_last_step_of_a_cosine_ends_no_run(tmp_path, preset):
    t, said = train(
        tmp_path,
        ALFCallback(preset=preset),
        model=demo_model(blocks=2),
        steps=51,
        learning_rate=2e-6,
        lr_scheduler_type="cosine",
        warmup_steps=2,
    )
    assert (
        t.state.global_step == 51
        and whys(tmp_path) == {"rounded away"}
        and any("smaller than torch.float32 shows" in w for w in said)
    )


@pytest.mark.parametrize("references", ["device", "none"])
def test_weights_of_16_bits_that_learn_nothing_are_said(tmp_path, references):
    t, said = train(
        tmp_path,
        ALFCallback(budget=0.25, measure_every=2, references=references, masters=False),
        model=demo_model().bfloat16(),
        learning_rate=1e-9,
    )
    assert (
        t.state.global_step == 12
        and sum("rounded away, so that nothing is learnt; load the model in float32" in w for w in said) >= 1
    )


# ---------------------------------------------------------------- what is wrong

class Vandal(TrainerCallback):
    "Undoes every step of the optimizer for one unit"
    def __init__(self, one, name): self.one, self.name = one, name

    def on_train_begin(self, args, state, control, optimizer=None, **kw):
        ps = [(p, p.detach().clone()) for p in self.one.run.layers.params(self.name)]
        def undo(*a):
            for p, was in ps: p.data.copy_(was)
        getattr(optimizer, "optimizer", optimizer).register_step_post_hook(undo)


@pytest.mark.parametrize("references", ["device", "host", "none"])
@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_a_step_that_is_undone_is_an_error(tmp_path, references, optim):
    name = "block.1.mlp.up_proj"
    one = ALFCallback(preset="probe", budget=.5, pin=name, measure_every=3, references=references)
    with pytest.raises(RuntimeError, match=f"selected unit {name} did not move at step 3: .* above rounding"):
        train(tmp_path, one, Vandal(one, name), optim=optim)


@pytest.mark.parametrize("references", ["device", "none"])
@pytest.mark.parametrize("optim", ["adafactor", "rmsprop", "lion_32bit"])
def test_the_same_under_an_optimizer_of_others_is_a_guess_and_said(tmp_path, optim, references):
    if optim.startswith("lion"): pytest.importorskip("bitsandbytes")
    name = "block.1.mlp.up_proj"
    one = ALFCallback(budget=.5, pin=name, measure_every=3, references=references)
    t, said = train(tmp_path, one, Vandal(one, name), optim=optim)
    assert t.state.global_step == 12 and rates(one, name) is None
    assert whys(tmp_path) - {"not kept"} == {"unknown"} and any(f"{name} did not move" in w for w in said)


def test_an_undone_step_goes_on_with_warn_and_off(tmp_path):
    name = "block.1.mlp.up_proj"
    for check, words in (("warn", True), ("off", False)):
        one = ALFCallback(budget=.5, pin=name, measure_every=3, check=check)
        t, said = train(tmp_path/check, one, Vandal(one, name))
        assert (
            t.state.global_step == 12 and any("above rounding" in w for w in said) == words and rates(one, name) is None
        )


# ---------------------------------------------------------------- other units instead

class Pooled(torch.nn.Module):
    "BERT with mean pooling: its pooler is in no loss"
    def __init__(self):
        super().__init__()
        self.bert = BertModel(
            BertConfig(
                vocab_size=258,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=48,
                max_position_embeddings=64,
            )
        )

    def forward(self, input_ids, labels=None, **kw):
        return dict(loss=(self.bert(input_ids).last_hidden_state.mean(1)**2).mean() + 0*labels.sum())


TRIED = {
    "default": {},
    "full": dict(preset="full"),
    "lisa": dict(preset="lisa", interval=4, pin=()),
    "short": dict(preset="short"),
    "badam": dict(preset="badam", interval=3),
    "paper": dict(preset="paper", budget=0.35),
    "rotate": dict(policy="rotate", interval=3, budget=0.3),
    "static": dict(policy=dict(policy="static", where="last"), budget=0.1, interval=0),
}


@pytest.mark.parametrize("kw", TRIED.values(), ids=TRIED)
def test_a_pooler_in_no_loss_ends_no_run(tmp_path, kw):
    torch.manual_seed(0)
    model = Pooled()
    pooler = [p.detach().clone() for p in model.bert.pooler.parameters()]
    before = weights(model)
    t, said = train(tmp_path, ALFCallback(measure_every=3, **kw), model=model, steps=16)
    assert t.state.global_step == 16 and all(torch.equal(a, b) for a, b in zip(pooler, model.bert.pooler.parameters()))
    assert not same(before, weights(model)), "others learn"


def test_a_selection_that_reaches_nothing_makes_way_for_others(tmp_path):
    "Said before the first backward pass; after the first step others train"
    torch.manual_seed(0)
    model = Pooled()
    one = ALFCallback(policy="badam", unit="block", interval=8, kinds=KINDS, measure_every=4, offload="none")
    class First(TrainerCallback):
        def on_train_begin(self, *a, **kw):
            name = next(n for n in one.run.names if "pooler" in n)
            switch(one.run, one.selection.__class__((name,), "by hand", "test", 0, .01), 0)
    t, said = train(tmp_path, one, First(), model=model, steps=16)
    log = RunLog(tmp_path)
    assert any("nothing that trains reaches the loss of a batch at step 1" in w for w in said)
    assert [e["step"] for e in log.events("select")][:3] == [
        0,
        0,
        1,
    ] and "left out that no gradient reaches" in log.events("select")[2]["reason"]
    assert not same(weights(model), weights(Pooled())) and t.state.global_step == 16


@pytest.mark.parametrize(
    "kw",
    [dict(kinds=KINDS, budget=1.0), dict(preset="full"), dict(policy="rotate", interval=4, budget=1.0, kinds=KINDS)],
    ids=["probe", "full", "rotate"],
)
@pytest.mark.parametrize("steps", [2, 6])
def test_if_nothing_that_may_train_is_reached_it_is_an_error_with_names(tmp_path, kw, steps):
    torch.manual_seed(0)
    model = Pooled()
    for n, p in model.named_parameters(): p.requires_grad_("pooler" in n)
    with pytest.raises(RuntimeError, match="no gradient (has )?reached any of the 2 units .*pooler"):
        train(tmp_path, ALFCallback(measure_every=4, **kw), model=model, steps=steps)


def test_a_loss_made_without_the_models_own_forward_is_looked_at(tmp_path):
    "The Trainer's loss is of a part of the model that this selection does not reach"
    class Part(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kw):
            return (model.always(inputs["x"]) - inputs["labels"]).square().mean()
    torch.manual_seed(0)
    model = Skips()
    before = model.always.weight.detach().clone()
    one = ALFCallback(policy=dict(policy="badam", order="descending"), kinds=KINDS, interval=5, measure_every=2)
    t, said = train(tmp_path, one, model=model, data=numbers(), kind=Part, remove_unused_columns=False)
    assert t.state.global_step == 12 and not torch.equal(before, model.always.weight)
    assert "backward" not in vars(t.accelerator), "what was put before the backward pass is taken away"


def test_a_batch_that_nothing_trained_takes_part_in_changes_nothing(tmp_path):
    "A model that is trained only where a batch uses it: in the other steps nothing moves, and nothing fails"
    on = lambda step: step % 4 != 3
    torch.manual_seed(0)
    model, kept = Skips(on), {}
    for p in model.always.parameters(): p.requires_grad_(False)
    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kw):
            kept[state.global_step] = model.sometimes.weight.detach().clone()
    t, said = train(tmp_path, alf(), Watch(), model=model, data=numbers(), weight_decay=.1)
    for step in range(2, 13): assert torch.equal(kept[step-1], kept[step]) == (not on(step-1)), step
    assert sum("It changes nothing" in w for w in said) == 1


def test_a_model_can_be_copied_while_it_trains(tmp_path):
    "As callbacks with moving averages do"
    class Copies(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kw): made.append(copy.deepcopy(model))
    made = []
    t, said = train(tmp_path, ALFCallback(budget=.3), Copies(), steps=2)
    assert (
        same(weights(made[-1]), weights(t))
        and made[-1](**{k: torch.tensor([v]) for k, v in demo_dataset(1)[0].items()}).loss.isfinite()
    )


def test_a_loop_survives_a_selection_that_reaches_nothing(tmp_path):
    torch.manual_seed(0)
    model = Skips()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = [{k: torch.stack([v[k]]) for k in v} for v in numbers(8)]
    before = model.always.weight.detach().clone()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with ALFLoop(
            model,
            optimizer,
            data,
            12,
            policy=dict(policy="badam", order="descending"),
            kinds=KINDS,
            interval=6,
            loss=lambda m, b: m(**b)["loss"],
        ) as loop:
            while not loop.done:
                model(**data[loop.steps % 8])["loss"].backward()
                loop.step()
    assert loop.steps == 12 and not torch.equal(before, model.always.weight)
    assert any("nothing that trains reaches the loss" in str(w.message) for w in said)


def test_lightning_survives_a_selection_that_reaches_nothing(tmp_path):
    L = pytest.importorskip("lightning.pytorch")
    from alf_nb.train.lightning import lightning_callback
    torch.manual_seed(0)
    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Skips()
        def training_step(self, batch, i): return self.net(**batch)["loss"]
        def configure_optimizers(self): return torch.optim.AdamW(self.parameters(), lr=1e-2)
    module = Module()
    before = module.net.always.weight.detach().clone()
    one = lightning_callback(out=tmp_path, policy=dict(policy="badam", order="descending"), kinds=KINDS, interval=6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        L.Trainer(
            max_steps=10,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[one],
            default_root_dir=tmp_path,
        ).fit(module, torch.utils.data.DataLoader(numbers(), batch_size=4))
    assert one.loop.steps == 10 and not torch.equal(before, module.net.always.weight)


# ---------------------------------------------------------------- left out, and taken back

def test_what_stays_without_a_gradient_is_left_out_and_looked_at_again(tmp_path):
    "Ten steps without one: left out for sixteen times as long; then it trains again, and stays when it is reached"
    one = ALFCallback(policy="rotate", budget=1., kinds=KINDS, interval=10, measure_every=5, select_until=1.)
    t, said = train(tmp_path, one, model=Skips(lambda step: step >= 100), data=numbers(), steps=230)
    name = next(n for n in one.run.names if "sometimes" in n)
    chosen = {e["step"]: name in e["names"] for e in RunLog(tmp_path).events("select")}
    assert (
        chosen[0]
        and not any(on for step, on in chosen.items() if 10 <= step < 170)
        and all(on for step, on in chosen.items() if step >= 170)
    )
    assert RunLog(tmp_path).events("left_out")[0]["units"] == [name, f"{name}.bias"] and rates(one, name) > 0
    assert sum("left out" in w for w in said) == 1


def test_what_is_looked_at_again_in_vain_makes_way_again_at_once(tmp_path):
    "One of two matrices is never reached: of 200 steps the few in which it has its turn alone are lost"
    one = ALFCallback(
        policy=dict(policy="badam", order="descending"), kinds=KINDS, interval=10, measure_every=5, select_until=1.0
    )
    model = Skips()
    t, said = train(tmp_path, one, model=model, data=numbers(), steps=200)
    alone = [e["step"] for e in RunLog(tmp_path).events("select") if all("sometimes" in n for n in e["names"])]
    after = {e["step"] for e in RunLog(tmp_path).events("select")}
    assert len(alone) > 1 and all(step + 1 in after for step in alone), "chosen anew after one step"
    assert 0 < len(alone) <= 6


def test_a_pinned_unit_stays_and_is_said(tmp_path):
    one = ALFCallback(policy="rotate", budget=1., kinds=KINDS, interval=10, measure_every=5, select_until=1.,
                      pin="*sometimes*")
    t, said = train(tmp_path, one, model=Skips(), data=numbers(), steps=40)
    name = next(n for n in one.run.names if "sometimes" in n)
    assert all(name in e["names"] for e in RunLog(tmp_path).events("select")) and any(
        name in w and "no gradient" in w for w in said
    )


def test_a_probe_that_reaches_a_unit_takes_it_back(tmp_path):
    "Ten probe batches reach it not, a later probe does"
    one = ALFCallback(preset="probe", budget=1., kinds=KINDS, strata=0, interval=10, measure_every=5, select_until=1.)
    model = Skips(lambda step: step >= 40)
    t, said = train(tmp_path, one, model=model, data=numbers(), steps=60)
    name = next(n for n in one.run.names if "sometimes" in n)
    chosen = {e["step"]: name in e["names"] for e in RunLog(tmp_path).events("select")}
    assert not chosen[0] and chosen[50]


def test_the_log_tells_the_policy_with_what_is_left_out(tmp_path):
    "Whoever asks the policy of the log comes to the same selections"
    one = ALFCallback(policy="rotate", budget=1., kinds=KINDS, interval=10, measure_every=5, select_until=1.)
    train(tmp_path, one, model=Skips(), data=numbers(), steps=45)
    log = RunLog(tmp_path)
    policy, current, n = log.begin["config"]["policy"], None, 0
    for e in log.events(("select", "choose")):
        if e["event"] == "choose":
            policy = e["policy"]
            continue
        current = Policy.from_dict(policy).select(
            Scores(e["signal"], e["scores"], e["ages"]) if "scores" in e else None, log.units, e["step"], current
        )
        assert current.names == tuple(e["names"])
        n += 1
    assert n > 3 and any(e["event"] == "choose" for e in log.events())


def test_what_is_left_out_is_so_after_a_resume(tmp_path):
    make = lambda: ALFCallback(policy="rotate", budget=.8, kinds=KINDS, interval=4, measure_every=3, select_until=1.)
    def go(folder, **kw):
        torch.manual_seed(0)
        t = small_trainer(folder, make(), model=Pooled(), max_steps=32, **kw)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            t.train(
                resume_from_checkpoint=(
                    find_checkpoint(folder) if folder.exists() and list(folder.glob("checkpoint-*")) else None
                )
            )
        return t
    whole = go(tmp_path/"whole")
    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kw):
            if state.global_step == 19: raise KeyboardInterrupt
    torch.manual_seed(0)
    t = small_trainer(
        tmp_path / "cut", make(), Kill(), model=Pooled(), max_steps=32, save_strategy="steps", save_steps=17
    )
    with pytest.raises(KeyboardInterrupt), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        t.train()
    again = go(tmp_path/"cut", save_strategy="steps", save_steps=17)
    assert same(weights(again), weights(whole)) and losses(again) == losses(whole)
    chosen = lambda d: [(e["step"], e["names"], e["reason"]) for e in RunLog(tmp_path/d).events("select")]
    assert chosen("cut") == chosen("whole") and any("left out" in r for _, _, r in chosen("whole"))


# ---------------------------------------------------------------- NaN, and labels that are masked

class Poison(TrainerCallback):
    def __init__(self, one, step): self.one, self.step = one, step

    def on_step_end(self, args, state, control, model=None, **kw):
        if state.global_step == self.step:
            with torch.no_grad(): model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")


@pytest.mark.parametrize("check", ["warn", "off"])
def test_nan_weights_end_no_run_that_is_to_go_on(tmp_path, check):
    one = ALFCallback(preset="probe", budget=.3, interval=4, measure_every=2, check=check)
    t, said = train(tmp_path, one, Poison(one, 5), steps=14)
    skipped = [w for w in said if "is skipped" in w]
    assert (
        t.state.global_step == 14
        and skipped
        and "hold NaN or infinity" in skipped[0]
        and not any("mask" in w for w in skipped)
    )
    assert [e["step"] for e in RunLog(tmp_path).events("skip")] == [8]


@pytest.mark.parametrize("check", ["warn", "off"])
def test_nan_weights_from_the_start_are_named(tmp_path, check):
    model = demo_model()
    with torch.no_grad(): model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    t, said = train(tmp_path, ALFCallback(preset="probe", budget=.3, check=check), model=model, steps=3)
    assert t.state.global_step == 3 and any("weights of block.0.mlp.up_proj hold NaN" in w for w in said)
    with pytest.raises(ValueError, match="weights of block.0.mlp.up_proj hold NaN"):
        train(tmp_path/"raise", ALFCallback(preset="probe", budget=.3), model=demo_model_with_nan(), steps=3)


def demo_model_with_nan():
    model = demo_model()
    with torch.no_grad(): model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    return model


def test_a_loss_that_is_nan_is_not_blamed_on_labels(tmp_path):
    class Odd(Trainer):
        def compute_loss(self, *a, **kw): return super().compute_loss(*a, **kw)*float("nan")
    with pytest.raises(ValueError, match="look at the data, the loss and its dtype") as e:
        train(tmp_path, ALFCallback(preset="probe", budget=.3), kind=Odd)
    assert "mask" not in str(e.value)


def test_masked_labels_are_named_where_they_are_to_blame(tmp_path):
    data = [dict(r, labels=[-100]*len(r["input_ids"])) for r in demo_dataset(32)]
    with pytest.raises(ValueError, match="all labels masked"):
        train(tmp_path, ALFCallback(preset="probe", budget=.3), data=data)
    t, said = train(tmp_path/"warn", ALFCallback(preset="probe", budget=.3, check="warn"), data=data, steps=3)
    assert t.state.global_step == 3 and any("all labels masked" in w for w in said)


def test_a_meter_names_weights_that_hold_nan(tmp_path):
    said = "weights of block.0.mlp.up_proj hold NaN or infinity after step 0: load the model anew"
    with pytest.raises(RuntimeError, match=said): train(tmp_path, ALFCallback(budget=.3), model=demo_model_with_nan())
    t, warned = train(tmp_path/"warn", ALFCallback(budget=.3, check="warn"), model=demo_model_with_nan(), steps=3)
    assert t.state.global_step == 3 and any("hold NaN or infinity after step 0" in w for w in warned)


def test_a_meter_names_gradients_that_are_not_finite(tmp_path):
    class Odd(Trainer):
        def compute_loss(self, *a, **kw): return super().compute_loss(*a, **kw)*float("nan")
    said = r"after step 1 \(and \d+ more units\): the gradients of step 1 were so already: look at the data"
    with pytest.raises(RuntimeError, match=said): train(tmp_path, ALFCallback(budget=.3), kind=Odd)


def test_where_there_is_nothing_to_learn_from_it_is_said(tmp_path):
    data = [dict(r, labels=[-100]*len(r["input_ids"])) for r in demo_dataset(32)]
    t, said = train(tmp_path, ALFCallback(budget=.3), data=data)
    assert t.state.global_step == 12 and any("the gradient is exactly 0" in w and "masked" in w for w in said)


def test_gradients_that_somebody_has_left_out_are_no_reason_later(tmp_path):
    class Odd(Trainer):
        def compute_loss(self, *a, **kw):
            return super().compute_loss(*a, **kw)*(float("nan") if self.state.global_step == 0 else 1)

    class LeaveOut(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kw):
            if state.global_step > 0: return
            for p in model.parameters(): p.grad = None

    one = ALFCallback(budget=.3, pin="block.1.mlp.up_proj", measure_every=2, interval=0)
    with pytest.raises(RuntimeError, match=r"after step 10 \(and \d+ more units\): lower the learning rate"):
        train(tmp_path, one, LeaveOut(), Poison(one, 9), kind=Odd)
