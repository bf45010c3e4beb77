"Checkpoints that were edited and sealed again are refused in words before training: none crashes, none trains on."
from dataclasses import fields

import pytest
import tampered as T
import torch
from safetensors.torch import load_file, save_file
from small_run import small_trainer

from alf_nb.core.checkpoints import write_manifest
from alf_nb.demo import demo_model
from alf_nb.train.state import State
from alf_nb.train.trainer import ALFCallback


@pytest.mark.parametrize("name", T.SETTINGS)
def test_a_tampered_checkpoint_is_refused_in_words(tmp_path, name, record_property):
    about = ("state", "tensors", "optimizer", "files") if name == "device" else ("tensors",)
    tried, refused, odd = T.try_checkpoint(T.made(tmp_path, **T.SETTINGS[name]), T.SETTINGS[name], about)
    assert not odd
    assert tried == refused > dict(device=1000, default=30).get(name, 76)
    record_property("tried", tried)


def test_a_tampered_state_of_a_loop_is_refused_in_words(record_property):
    tried, refused, odd = T.try_loop()
    assert not odd
    assert tried == refused > 30
    record_property("tried", tried)


def test_every_field_of_the_state_is_tampered_with(tmp_path):
    folder = T.made(tmp_path)
    tried = {words.partition(":")[0].partition(".")[0] for words, _ in T.cases(folder, ("state",))}
    assert {f.name for f in fields(State)} <= tried


OPTIMIZERS = {
    "adamw_torch": "",
    "adamw_torch_fused": "",
    "adafactor": "",
    "adagrad": "",
    "rmsprop": "momentum=0.9",
    "adamw_8bit": "",
    "ademamix_8bit": "",
}


@pytest.mark.parametrize("offload", ["second_moment", "full"])
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_what_an_optimizer_has_kept_is_taken_and_a_piece_of_it_is_not(tmp_path, optim, offload):
    if optim.endswith("_8bit"): pytest.importorskip("bitsandbytes")
    training = dict(optim=optim, optim_args=OPTIMIZERS[optim] or None)
    folder = T.made(tmp_path, training, offload=offload)
    resume = T.Resume(folder, dict(offload=offload), **training)
    assert resume.whole() == "training began"
    file = folder/"alf"/"tensors.safetensors"
    whole = load_file(file)
    parked = [k for k, t in whole.items() if k.startswith("parked/") and t.dim()]
    assert parked
    for k in parked:
        save_file({**whole, k: whole[k].reshape(-1)[:-1].clone()}, file)
        assert resume.look() == "", k
    save_file(whole, file)
    assert resume.whole() == "training began"


def test_a_tampered_checkpoint_ends_no_process(tmp_path):
    "The fused AdamW trusts the shapes of its state: what it would be given is seen before"
    folder = T.made(tmp_path, dict(optim="adamw_torch_fused"))
    saved = torch.load(folder/"optimizer.pt", weights_only=True)
    for s in saved["state"].values(): s["exp_avg_sq"] = s["exp_avg_sq"].reshape(-1)[:1].clone()
    torch.save(saved, folder/"optimizer.pt")
    write_manifest(folder)
    trainer = small_trainer(
        tmp_path, ALFCallback(**T.RUN), model=demo_model(blocks=2), max_steps=6, optim="adamw_torch_fused"
    )
    with pytest.raises(
        RuntimeError, match=r"cannot resume from checkpoint-3: .*optimizer.pt\): .*exp_avg_sq has shape \(1,\)"
    ):
        trainer.train(resume_from_checkpoint=str(folder))
    assert all(p.requires_grad for p in trainer.model.parameters())
