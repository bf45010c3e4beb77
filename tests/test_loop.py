"ALF without transformers.Trainer: the same run bit for bit in a loop of one's own, and in Lightning, the real package."
import itertools
import logging

import pytest
import torch
from small_run import same, small_trainer, weights
from torch.utils.data import DataLoader
from transformers import Trainer, default_data_collator

from alf_nb.demo import demo_dataset, demo_model
from alf_nb.train.loop import ALFLoop
from alf_nb.train.lightning import lightning_callback
from alf_nb.core.runlog import RunLog
from alf_nb.train.trainer import ALFCallback

STEPS = 14


def loader(n=64): return DataLoader(demo_dataset(n), batch_size=4, collate_fn=default_data_collator)


def selections(folder): return [(e["step"], e["names"], e["reason"]) for e in RunLog(folder).events("select")]


def numbers(folder):
    return [
        {k: v for k, v in e.items() if k not in ("t", "wall_s", "run_id", "rss_bytes")}
        for e in RunLog(folder).events(("probe", "measure", "memory"))
    ]


class Recorder(Trainer):
    "Keeps the batches and the losses of every step"
    def training_step(self, model, inputs, *args, **kw):
        self.seen.append(
            ({k: v.clone() for k, v in inputs.items()}, kw.get("num_items_in_batch", args[0] if args else None))
        )
        return super().training_step(model, inputs, *args, **kw)


def trainer(folder, *callbacks):
    t = small_trainer(
        folder,
        *callbacks,
        kind=Recorder,
        max_steps=STEPS,
        weight_decay=0.1,
        more=dict(data_collator=default_data_collator)
    )
    t.seen = []
    return t


@pytest.mark.parametrize(
    "settings",
    [
        dict(budget=0.3, signal="gain"),
        dict(budget=0.3, signal="rate", explore=0.5, references="8bit"),
        dict(policy="lisa", unit="block"),
        dict(threshold=0.4, start="rotate", warm_up=4),
    ],
    ids=lambda s: next(iter(s.values())),
)
def test_a_loop_is_the_trainer_bit_for_bit(tmp_path, settings):
    settings = dict(settings, interval=4, measure_every=2, select_until=1., seed=5)
    t = trainer(tmp_path/"trainer", ALFCallback(**settings))
    t.train()

    other = trainer(tmp_path)  # for its optimizer, its scheduler and its loss; it never trains
    other.create_optimizer_and_scheduler(STEPS)
    model, optimizer, scheduler = other.model, other.optimizer, other.lr_scheduler
    with ALFLoop(model, optimizer, loader(), STEPS, out=tmp_path/"loop", **settings) as alf:
        for batch, n in t.seen:
            model.train()
            loss = other.compute_loss(model, batch, num_items_in_batch=n)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
            alf.before_step()
            optimizer.step()
            alf.after_step()
            scheduler.step()
            optimizer.zero_grad()
            alf.log_loss(loss.detach(), grad_norm=norm)
    assert same(weights(t), weights(model))
    assert selections(tmp_path/"loop") == selections(tmp_path/"trainer") and len(selections(tmp_path/"loop")) > 2
    assert numbers(tmp_path/"loop") == numbers(tmp_path/"trainer")
    assert RunLog(tmp_path/"loop").series("log", "loss")[1] == [h["loss"] for h in t.state.log_history if "loss" in h]


def test_a_choice_while_a_loop_runs(tmp_path):
    torch.manual_seed(0)
    model = demo_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with ALFLoop(model, optimizer, loader(), 8, out=tmp_path, preset="probe", budget=.3, interval=4) as alf:
        for i, batch in enumerate(itertools.islice(loader(), 8)):
            if i == 2: alf.choose(budget=.1, now=True)
            model(**batch).loss.backward()
            alf.step()
    assert (
        [round(s.share, 1) <= 0.3 for s in RunLog(tmp_path).selections()][0]
        and RunLog(tmp_path).selections()[1].step == 3
        and alf.selection.share <= 0.1
    )


def test_a_skipped_step_counts_no_learning_rate():
    model = demo_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    alf = ALFLoop(model, optimizer, loader(), 4, budget=.3, measure_every=2)
    for i, batch in enumerate(itertools.islice(loader(), 3)):
        model(**batch).loss.backward()
        alf.before_step()
        if i: optimizer.step()
        alf.after_step(skipped=i == 0)
    assert alf.run.rates.total == [.02]
    alf.close()


def test_lightning_is_the_loop_bit_for_bit_and_resumes(tmp_path):
    L = pytest.importorskip("lightning")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.model = demo_model()
            self.calls = 0
        def log(self, *a, **kw):
            self.calls += 1
            super().log(*a, **kw)
        def training_step(self, batch, i):
            loss = self.model(**batch).loss
            self.log("train_loss", loss)
            return loss
        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            return dict(
                optimizer=optimizer,
                lr_scheduler=dict(
                    scheduler=torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS), interval="step"
                ),
            )
    settings = dict(budget=.3, interval=4, measure_every=2, select_until=1., seed=5)

    def fit(folder, steps=STEPS, ckpt=None, **kw):
        alf, module = lightning_callback(out=folder, **settings), Module()
        save = L.pytorch.callbacks.ModelCheckpoint(
            dirpath=folder, every_n_train_steps=7, save_top_k=-1, filename="{step}"
        )
        t = L.Trainer(
            max_steps=steps,
            accelerator="cpu",
            devices=1,
            callbacks=[alf, save],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            gradient_clip_val=1.0,
            log_every_n_steps=1,
            **kw
        )
        t.fit(module, loader(28), ckpt_path=ckpt)  # 7 batches: Lightning goes on exactly from the end of an epoch
        return module, alf, t
    module, alf, t = fit(tmp_path/"lightning")
    assert module.calls == STEPS, "a probe logs nothing"
    assert (
        alf.loop.done
        and all(p.requires_grad for p in module.parameters())
        and RunLog(tmp_path / "lightning").status == "complete"
    )

    torch.manual_seed(0)
    model = demo_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1., 0., STEPS)
    with ALFLoop(model, optimizer, loader(28), STEPS, out=tmp_path/"loop", **settings) as by_hand:
        for batch in itertools.islice(itertools.cycle(loader(28)), STEPS):
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
            by_hand.step()
            scheduler.step()
            by_hand.log_loss(loss.detach())
    assert same(weights(module.model), weights(model))
    plain = [(s, [n.removeprefix("model.") for n in names]) for s, names, _ in selections(tmp_path/"lightning")]
    assert plain == [(s, names) for s, names, _ in selections(tmp_path/"loop")]
    assert RunLog(tmp_path/"lightning").series("log", "loss") == RunLog(tmp_path/"loop").series("log", "loss")

    again, alf, t = fit(tmp_path/"lightning", ckpt=str(tmp_path/"lightning"/"step=7.ckpt"))
    assert same(weights(again), weights(module)) and [
        e["step"] for e in RunLog(tmp_path / "lightning").events("resume")
    ] == [7]


def test_a_crash_in_lightning_is_written_down(tmp_path):
    L = pytest.importorskip("lightning")

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = demo_model()
        def training_step(self, batch, i):
            if i == 3: raise RuntimeError("the data ended in tears")
            return self.model(**batch).loss
        def configure_optimizers(self): return torch.optim.SGD(self.parameters(), lr=1e-2)
    module = Module()
    with pytest.raises(RuntimeError, match="in tears"):
        L.Trainer(
            max_steps=8,
            accelerator="cpu",
            devices=1,
            callbacks=[lightning_callback(out=tmp_path, budget=0.3)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(module, loader())
    assert RunLog(tmp_path).status == "failed" and all(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("mode", ["max_size_cycle", "min_size"])
def test_lightning_prepares_the_batches_of_the_probe_and_joins_its_loaders(tmp_path, mode):
    L = pytest.importorskip("lightning")

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.model, self.norm, self.seen = demo_model(), torch.nn.BatchNorm1d(1), []
        def on_before_batch_transfer(self, batch, i):
            return (
                [b["input_ids"] for b in batch.values()]
                if isinstance(batch, dict) and "a" in batch
                else [batch["input_ids"]]
            )

        def training_step(self, batch, i):
            if i or not self.probing: self.seen.append(batch[0].tolist())
            return (
                sum(self.model(input_ids=ids, labels=ids).loss for ids in batch) + 0 * self.norm(torch.ones(4, 1)).sum()
            )
        probing = True
        def on_train_batch_start(self, batch, i): self.probing = False
        def on_before_zero_grad(self, optimizer): self.probing = True
        def configure_optimizers(self): return torch.optim.SGD(self.parameters(), lr=1e-2)

    def fit(*callbacks):
        module, loaders = Module(), L.pytorch.utilities.CombinedLoader(dict(a=loader(16), b=loader(24)), mode)
        L.Trainer(
            max_steps=8,
            accelerator="cpu",
            devices=1,
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(module, loaders)
        return module
    plain, alf = fit(), lightning_callback(out=tmp_path, preset="probe", budget=.3, interval=3, select_until=1.)
    module = fit(alf)
    assert (
        module.seen == plain.seen
        and len(plain.seen) == 8
        and int(module.norm.num_batches_tracked) == int(plain.norm.num_batches_tracked) == 8
    )
    assert [(e["step"], e["batches"]) for e in RunLog(tmp_path).events("probe")] == [
        (0, 4 if mode == "min_size" else 6),
        (3, 2),
        (6, 2),
    ]
