"Of a 16-bit model, what trains is held in fp32: it learns as an fp32 model does, and nothing else of it changes."
import copy
import io
import json
import sys
import warnings

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from alf_nb.core.config import ALFConfig
from alf_nb.core.runlog import RunLog
from alf_nb.demo import demo_dataset, demo_model, demo_tokenizer
from alf_nb.model.delta import apply_delta, save_delta
from alf_nb.model.fingerprint import fingerprint
from alf_nb.model.layers import partition_layers
from alf_nb.model.masters import Masters
from alf_nb.train.lightning import lightning_callback
from alf_nb.train.loop import ALFLoop
from alf_nb.train.trainer import ALFCallback
from small_run import losses, same, small_trainer, weights

HALF = dict(bf16=True, learning_rate=2e-4, max_steps=16)
MOVES = dict(policy="rotate", budget=.3, interval=4, measure_every=2, select_until=1.)


def half(*args, dtype=torch.bfloat16, **kw):
    torch.manual_seed(0)
    return demo_model(*args, **kw).to(dtype)


def trained(folder, alf, *more, model=None, resume=None, **kw):
    t = small_trainer(folder, alf, *more, model=half() if model is None else model, **HALF | kw)
    t.train(resume_from_checkpoint=resume)
    return t


class Dtypes:
    "What is in fp32 in each step"
    def __init__(self, alf): self.alf, self.seen, self.frozen = alf, [], {}

    def look(self, model):
        trains = set(self.alf.selection.names)
        for n in self.alf.run.layers:
            for k, p in self.alf.run.layers.named_params(n).items():
                assert p.dtype == (torch.float32 if n in trains else torch.bfloat16), k
                assert p.grad is None or p.grad.dtype == p.dtype
        self.seen.append(trains)


def watched(alf):
    from transformers import TrainerCallback
    d = Dtypes(alf)
    return d, type("Look", (TrainerCallback,), dict(on_step_end=lambda self, *a, model=None, **k: d.look(model)))()


def test_a_16_bit_model_learns_as_one_of_32_bits(tmp_path):
    rows = torch.stack([torch.as_tensor(r["input_ids"]) for r in demo_dataset()])

    @torch.no_grad()
    def loss(model): return float(copy.deepcopy(model).float().eval()(rows, labels=rows).loss)

    learned, before = {}, loss(half())
    for name, dtype, masters in (("all", torch.float32, True), ("masters", torch.bfloat16, True),
                                 ("none", torch.bfloat16, False)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            t = trained(tmp_path/name, ALFCallback(**MOVES, masters=masters), model=half(dtype=dtype))
        learned[name] = before - loss(t.model)
    assert learned["masters"] > .95*learned["all"] > 0 and learned["none"] < .7*learned["all"]


@pytest.mark.parametrize("references", ["device", "8bit", "none"])
def test_what_trains_is_in_fp32_and_nothing_else(tmp_path, references):
    alf = ALFCallback(**MOVES, references=references)
    d, look = watched(alf)
    before = weights(half())
    t = trained(tmp_path, alf, look)
    assert len({frozenset(s) for s in d.seen}) > 2
    assert {p.dtype for p in t.model.parameters()} == {torch.bfloat16}
    ever = {k for s in d.seen for n in s for k in alf.run.layers.named_params(n)}
    after = weights(t)
    assert {k for k in before if not torch.equal(before[k], after[k])} <= ever | {"lm_head.weight"} and ever
    sizes = [e["master_bytes"] for e in RunLog(tmp_path).events("memory")]
    assert max(sizes) == 2*max(sum(alf.run.layers[n].n_params for n in s) for s in d.seen)


RESUMES = dict(
    rotate=MOVES,
    full=dict(budget=.3, interval=4, offload="full"),
    eight=dict(budget=.3, interval=4, references="8bit", offload="none"),
)


@pytest.mark.parametrize("optim,settings", [*[("adamw_torch", k) for k in RESUMES], ("adagrad", "rotate"),
                                            ("adagrad", "full"), ("sgd", "rotate")])
def test_killed_and_resumed_is_never_killed(tmp_path, optim, settings):
    settings = RESUMES[settings]
    how = dict(optim=optim, save_strategy="steps", save_steps=6)
    whole = trained(tmp_path/"whole", ALFCallback(**settings), **how)
    for given in (str(tmp_path/"whole"/"checkpoint-6"), str(tmp_path/"whole"/"checkpoint-12")):
        alf = ALFCallback(**settings, resume_from=given)
        again = trained(tmp_path/"again", alf, resume=given, **how)
        at = int(given.rpartition("-")[2])
        assert losses(again)[at:] == losses(whole)[at:] and same(weights(again), weights(whole))


def test_a_callback_added_later_resumes_exactly_too(tmp_path):
    how = dict(save_strategy="steps", save_steps=6)
    whole = trained(tmp_path, ALFCallback(**MOVES), **how)
    t = small_trainer(tmp_path, model=half(), **HALF | how)
    t.add_callback(ALFCallback(**MOVES))
    t.train(resume_from_checkpoint=str(tmp_path/"checkpoint-12"))
    assert losses(t)[12:] == losses(whole)[12:] and same(weights(t), weights(whole))


def test_a_checkpoint_is_in_the_dtype_of_the_model(tmp_path):
    alf = ALFCallback(policy="static", budget=1., interval=0, pin="embeddings")
    trained(tmp_path, alf, model=half("gpt2"), save_strategy="steps", save_steps=8)
    folder = tmp_path/"checkpoint-8"
    assert {t.dtype for t in load_file(folder/"model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((folder/"config.json").read_text())["dtype"] == "bfloat16"
    masters = {k: t for k, t in load_file(folder/"alf"/"tensors.safetensors").items() if k.startswith("master/")}
    assert {t.dtype for t in masters.values()} == {torch.float32}
    assert "master/transformer.wte.weight" in masters


@pytest.mark.parametrize("change", [
    lambda t: t.pop(next(k for k in t if k.startswith("master/"))),
    lambda t: t.update({k: v + .5 for k, v in t.items() if k.startswith("master/")}),
    lambda t: t.update({k: v.bfloat16() for k, v in t.items() if k.startswith("master/")}),
    lambda t: t.update({"master/nobody": torch.zeros(2)}),
], ids=["missing", "another", "rounded", "unknown"])
def test_masters_that_are_not_those_of_the_model_are_refused(tmp_path, change):
    from safetensors.torch import save_file
    from alf_nb.core.checkpoints import write_manifest
    how = dict(save_strategy="steps", save_steps=8)
    trained(tmp_path, ALFCallback(**MOVES), **how)
    folder = tmp_path/"checkpoint-8"
    tensors = load_file(folder/"alf"/"tensors.safetensors")
    change(tensors)
    save_file(tensors, folder/"alf"/"tensors.safetensors")
    write_manifest(folder)
    model = half()
    with pytest.raises(RuntimeError, match="cannot resume from checkpoint-8: .*master/"):
        trained(tmp_path, ALFCallback(**MOVES, resume_from=str(folder)), model=model, resume=str(folder), **how)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_resume_keeps_the_masters_that_a_run_has(tmp_path):
    how = dict(save_strategy="steps", save_steps=8)
    trained(tmp_path, ALFCallback(**MOVES), **how)
    folder = str(tmp_path/"checkpoint-8")
    with pytest.raises(ValueError, match="saved with masters=True, and this run has masters=False"):
        trained(tmp_path, ALFCallback(**MOVES, masters=False, resume_from=folder), resume=folder, **how)


def test_without_autocast_it_is_refused_with_both_ways_out(tmp_path):
    model = half()
    words = "is not under autocast: train with bf16=True .* dtype=torch.float32; or give masters=False"
    with pytest.raises(RuntimeError, match=words): trained(tmp_path, ALFCallback(budget=.3), model=model, bf16=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(torch.arange(8)[None]).logits.isfinite().all()     # no hook is left


def test_without_masters_it_is_said_what_is_lost(tmp_path):
    with pytest.warns(UserWarning, match="masters=False: [0-9]+ % of the weights, in torch.bfloat16, are too large"):
        t = trained(tmp_path, ALFCallback(budget=.3, masters=False), learning_rate=1e-5)
    assert "master_bytes" not in RunLog(tmp_path).events("memory")[0]
    assert {p.dtype for p in t.model.parameters()} == {torch.bfloat16}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(tmp_path/"large", ALFCallback(budget=.3, masters=False, check="off"), learning_rate=.1, max_steps=1)


def test_an_fp32_model_is_as_before(tmp_path):
    a, b = (trained(tmp_path/str(m), ALFCallback(**MOVES, masters=m), model=half(dtype=torch.float32), bf16=False)
            for m in (True, False))
    assert losses(a) == losses(b) and same(weights(a), weights(b))
    assert "master_bytes" not in RunLog(tmp_path/"True").events("memory")[0]


def test_a_delta_of_16_bits_is_exact(tmp_path):
    model = half()
    base = fingerprint(model)
    t = trained(tmp_path/"run", ALFCallback(**MOVES), model=model)
    save_delta(model, base, tmp_path/"delta")
    again = half()
    apply_delta(again, tmp_path/"delta")
    assert same(weights(again), weights(t)) and not same(weights(half()), weights(t))


def on_disk(x):
    "As it comes back from a file"
    torch.save(x, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)


def loop(model, folder=None, resume=None, steps=12, stop=None, optimizer=None, **settings):
    rows = [dict(input_ids=b, labels=b) for b in torch.arange(6*2*24).reshape(6, 2, 24) % model.config.vocab_size]
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-3)

    def loss(model, batch):
        with torch.autocast("cpu", torch.bfloat16): return model(**batch).loss

    found = []
    with ALFLoop(model, optimizer, rows, steps, folder, loss, resume, **MOVES | settings) as alf:
        while not alf.done:
            value = loss(model, rows[alf.steps % len(rows)])
            value.backward()
            alf.step()
            found.append(value.item())
            if alf.steps == stop:
                return found, on_disk(dict(model=model.state_dict(), optimizer=optimizer.state_dict(),
                                           alf=alf.state_dict()))
    return found, weights(model)


def test_a_loop_resumes_to_the_last_bit_in_any_order():
    """`Optimizer.load_state_dict` rounds moments to the dtype of the weights, which are not in fp32 yet"""
    whole, end = loop(half())
    _, saved = loop(half(), stop=5)
    assert {t.dtype for t in saved["model"].values()} == {torch.bfloat16}
    model = half()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    rest, again = loop(model, resume=saved["alf"], optimizer=optimizer)
    assert rest == whole[5:] and same(again, end)


TEXT = ["llama", "gemma3", "mixtral", "phi", "gpt2", "opt", "bloom", "falcon", "bert", "roberta", "t5", "bart",
        "gpt_oss", "mamba", "albert", "rwkv"]


@pytest.mark.parametrize("family", [*TEXT, "vit", "convnext"])
def test_a_model_of_two_dtypes_trains_under_autocast(family):
    "Half of the units by lot in fp32, the rest in bf16"
    from test_layers_families import FAMILIES
    torch.manual_seed(0)
    model = FAMILIES[family]()["model"].bfloat16()
    ids, pixels = torch.arange(8)[None], torch.rand(1, 3, *[getattr(model.config, "image_size", 32)]*2)
    given = dict(input_ids=ids) if family in TEXT else dict(pixel_values=pixels)
    if model.config.is_encoder_decoder: given["decoder_input_ids"] = ids
    layers = partition_layers(model)
    masters = Masters(layers, layers)
    masters.watch()
    for _ in range(4):
        chosen = [n for n in layers if torch.rand(()) < .5]
        masters.switch(chosen)
        with torch.autocast("cpu", torch.bfloat16): out = model(**given)
        out[0].float().sum().backward()
        has = {p.dtype for n in chosen for p in layers.params(n) if p.grad is not None}
        assert has == {torch.float32}
        model.zero_grad()
    masters.remove()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_masters_is_a_truth_value():
    with pytest.raises(ValueError, match="masters='yes', but it is True or False"): ALFConfig(masters="yes")


def test_weights_loaded_before_training_ask_no_checkpoint(tmp_path):
    "A damaged state in the folder is the business of a resume"
    (tmp_path/"checkpoint-6"/"alf").mkdir(parents=True)
    (tmp_path/"checkpoint-6"/"alf"/"state.json").write_text("{")
    t = small_trainer(tmp_path, ALFCallback(**MOVES, resume_from=str(tmp_path/"checkpoint-6")), model=half(), **HALF)
    t.model.load_state_dict(half().state_dict())
    assert {p.dtype for p in t.model.parameters()} == {torch.bfloat16}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="TRL needs Python 3.11")
def test_sft_of_16_bits_resumes_to_the_last_bit(tmp_path):
    trl = pytest.importorskip("trl")
    texts = Dataset.from_list([dict(text=f"number {i} is a number, and so is {i+1}.") for i in range(60)])
    how = dict(data=texts, kind=trl.SFTTrainer, config=trl.SFTConfig, max_length=64, save_strategy="steps",
               save_steps=8, more=dict(processing_class=demo_tokenizer()))
    whole = trained(tmp_path, ALFCallback(**MOVES), **how)
    again = trained(tmp_path, ALFCallback(**MOVES), resume=str(tmp_path/"checkpoint-8"), **how)
    assert losses(again)[8:] == losses(whole)[8:] and same(weights(again), weights(whole))


def test_lightning_of_16_bits_resumes_to_the_last_bit(tmp_path):
    L = pytest.importorskip("lightning")
    rows = [{k: torch.as_tensor(v) for k, v in r.items()} for r in demo_dataset()[:4]]*8   # its loader begins anew

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.losses, self.dtypes = half(), [], set()

        def training_step(self, batch, i):
            loss = self.model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
            self.losses.append(loss.item())
            self.dtypes |= {p.dtype for p in self.parameters()}
            return loss

        def configure_optimizers(self): return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def fit(folder, resume=None):
        module = Module()
        save = L.pytorch.callbacks.ModelCheckpoint(dirpath=folder, filename="at4", every_n_train_steps=4, save_top_k=-1)
        L.Trainer(max_steps=7, accelerator="cpu", devices=1, precision="bf16-mixed", logger=False,
                  callbacks=[lightning_callback(out=folder, **MOVES), save], enable_progress_bar=False,
                  enable_model_summary=False).fit(module, DataLoader(rows, batch_size=4), ckpt_path=resume,
                                                  weights_only=False)
        return module

    whole = fit(tmp_path/"whole")
    again = fit(tmp_path/"again", str(tmp_path/"whole"/"at4.ckpt"))
    assert whole.dtypes == {torch.float32, torch.bfloat16}
    assert {p.dtype for p in whole.parameters()} == {torch.bfloat16}
    assert again.losses == whole.losses[4:] and same(weights(again), weights(whole))
