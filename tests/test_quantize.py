"""4 or 8 bits for what stays frozen (`quantize_frozen`): chosen once, exact in checkpoints, deltas and resumes."""
import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from small_run import losses, same, small_trainer, weights
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPTNeoXConfig, GPTNeoXForCausalLM, Trainer

from alf_nb.app import finetune as finetuning
from alf_nb.app.finetune import finetune
from alf_nb.core.config import ALFConfig
from alf_nb.core.runlog import RunLog
from alf_nb.demo import demo_model, demo_tokenizer
from alf_nb.model.delta import apply_delta, read_delta, save_delta
from alf_nb.model.fingerprint import fingerprint
from alf_nb.model.layers import partition_layers
from alf_nb.model.quantize import pack, packable, unpack, weight_bytes
from alf_nb.model.tree import is_packed
from alf_nb.train.loop import ALFLoop
from alf_nb.train.repacking import pack_again
from alf_nb.train.trainer import ALFCallback

pytest.importorskip("bitsandbytes")
IDS = torch.arange(64).reshape(2, 32) % 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A checkpoint in bf16"
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    demo_model(blocks=4, hidden_size=64, intermediate_size=128).bfloat16().save_pretrained(folder)
    return folder


def load(folder, **kw): return AutoModelForCausalLM.from_pretrained(folder, **kw)


def run(out, model, resume=None, bits=4, steps=8, alf=None, **args):
    alf = ALFCallback(**(dict(budget=.25, quantize_frozen=bits) | (alf or {})))
    args = dict(bf16=True, max_steps=steps, save_strategy="steps", save_steps=4) | args
    trainer = small_trainer(out, alf, model=model, **args)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logits(model):
    "As a Trainer's forward pass has them"
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16): return model.eval()(IDS).logits.float()


def packed_names(model): return {k for k, p in model.named_parameters() if is_packed(p)}


@pytest.fixture(scope="module", params=[4, 8])
def trained(request, folder, tmp_path_factory):
    "(bits, folder of the run, its Trainer, fingerprint of the base)"
    model, out = load(folder), tmp_path_factory.mktemp("run")
    base = fingerprint(model)
    return request.param, out, run(out, model, bits=request.param), base


def test_what_is_chosen_trains_and_the_rest_is_packed(trained, folder):
    bits, out, trainer, _ = trained
    log, base = RunLog(out), load(folder)
    names = set(log.events("select")[-1]["names"])
    layers = partition_layers(base)
    trains = {k for n in names for k in layers.named_params(n)}
    linear = {f"{k}.weight" for k in packable(base)}
    assert packed_names(trainer.model) == linear - trains and trains <= linear
    now, was = trainer.model.state_dict(), base.state_dict()
    assert all(not torch.equal(now[k], was[k]) for k in trains)
    assert all(torch.equal(now[k], was[k]) for k in set(was) - linear)
    assert log.events("select")[-1]["share"] <= .25 and len(log.events("select")) == 1


def test_packed_weights_are_those_of_the_base_from_first_to_last_step(trained, folder):
    bits, _, trainer, _ = trained
    kept = packed_names(trainer.model)
    fresh = load(folder)
    pack(fresh, [p for k, p in fresh.named_parameters() if k not in kept], bits)
    now, want = trainer.model.state_dict(), fresh.state_dict()
    of_packed = [k for k in want if any(k.startswith(n.removesuffix("weight")) for n in kept)]
    assert len(of_packed) > 2*len(kept) and all(torch.equal(now[k], want[k]) for k in of_packed)


def test_bytes_are_counted_as_they_are(trained, folder):
    bits, out, trainer, _ = trained
    event, = RunLog(out).events("pack")
    assert event["bits"] == bits and event["modules"] == len(packed_names(trainer.model))
    assert event["bytes_before"] == sum(p.nbytes for p in load(folder).parameters())
    shapes = [load(folder).get_parameter(k).shape for k in packed_names(trainer.model)]
    # nf4: half a byte, an fp32 scale for every 64, and its 16 values; int8: a byte, and an fp32 scale for every row
    sizes = [n*k//2 + n*k//16 + 64 if bits == 4 else n*k + 4*n for n, k in shapes]
    assert event["bytes_before"] - event["bytes_after"] == sum(2*n*k for n, k in shapes) - sum(sizes)


def test_a_resume_is_exact(trained, folder):
    bits, out, whole, _ = trained
    again = run(out, load(folder), str(out/"checkpoint-4"), bits)
    assert losses(again) == losses(whole) and same(weights(again.model), weights(whole.model))


def test_a_resume_by_true_is_exact_too(trained, folder, tmp_path):
    bits, out, whole, _ = trained
    shutil.copytree(out, tmp_path/"run", ignore=shutil.ignore_patterns("checkpoint-8"))
    again = run(tmp_path/"run", load(folder), True, bits)
    assert losses(again) == losses(whole) and same(weights(again.model), weights(whole.model))


def test_a_checkpoint_is_one_of_transformers(trained):
    _, out, trainer, _ = trained
    loaded = load(out/"checkpoint-8")
    now, want = loaded.state_dict(), trainer.model.state_dict()
    assert now.keys() == want.keys() and all(torch.equal(now[k], want[k]) for k in want)
    # to bf16: some CPUs multiply packed weights that were just loaded by another kernel
    torch.testing.assert_close(logits(loaded), logits(trainer.model), atol=.05, rtol=0)


def test_a_delta_is_that_of_the_base(trained, folder, tmp_path):
    bits, _, trainer, base = trained
    delta = save_delta(trainer.model, base, tmp_path)
    assert delta.dtype == "bfloat16" and not set(delta.changed) & packed_names(trainer.model)
    assert delta.packed == dict.fromkeys(packed_names(trainer.model), bits)
    other = load(folder)
    apply_delta(other, tmp_path)
    assert not packed_names(other)
    other = load(folder)
    apply_delta(other, tmp_path, packed=True)
    assert same(weights(other), weights(trainer.model))
    assert torch.equal(logits(other), logits(trainer.model))


def test_a_copy_knows_what_is_packed(trained):
    _, _, trainer, _ = trained
    other = copy.deepcopy(trainer.model)
    assert packed_names(other) == packed_names(trainer.model) != set()
    assert torch.equal(logits(other), logits(trainer.model))


def test_biases_and_hooks_stay():
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=128)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes)).bfloat16()
    name, layer = next(iter(packable(model).items()))
    seen = []
    layer.register_forward_hook(lambda *a: seen.append(1))
    with torch.no_grad(): layer.bias.normal_()
    bias = layer.bias.detach().clone()
    for bits in (4, 8):
        m = copy.deepcopy(model)
        pack(m, [], bits)
        with torch.autocast("cpu", torch.bfloat16): m(IDS, labels=IDS).loss.backward()
        packed = m.get_submodule(name)
        assert packed(torch.randn(2, 64)).dtype == torch.float32
        b = packed.bias
        assert torch.equal(b, bias) and b.dtype == torch.bfloat16
    assert len(seen) == 4


@pytest.mark.parametrize(
    "kw,says",
    [
        (dict(interval=4), "interval=4 would choose again"),
        (dict(preset="lisa"), "interval=20 would choose again"),
        (dict(signal="rate", start="rotate"), "start='rotate' would choose again"),
        (dict(check="freeze"), "check='freeze' chooses again"),
        (dict(quantize_frozen=3), "quantize_frozen=3"),
    ],
)
def test_what_would_choose_again_is_refused(kw, says):
    with pytest.raises(ValueError, match=says): ALFConfig.from_args(**(dict(quantize_frozen=4) | kw))


def test_another_choice_is_refused_with_the_reason(folder, tmp_path):
    said = []

    class Ask(ALFCallback):
        def on_step_end(self, args, state, control, **kw):
            if state.global_step == 2:
                for wish in (dict(budget=.1), dict(budget=.1, now=True), dict(policy="full")):
                    with pytest.raises(RuntimeError, match="held in 4 bits and cannot train again") as e:
                        self.choose(**wish)
                    said.append(e)
            super().on_step_end(args, state, control, **kw)

    small_trainer(
        tmp_path, Ask(budget=.25, quantize_frozen=4), model=load(folder), max_steps=3, bf16=True
    ).train()
    assert len(said) == 3


@pytest.mark.parametrize(
    "alf,says",
    [
        (dict(quantize_frozen=None), "saved with quantize_frozen=4"),
        (dict(quantize_frozen=8), "saved with quantize_frozen=4"),
        (dict(budget=.1), "the policy is not that of checkpoint-4"),
    ],
)
def test_a_resume_with_other_settings_is_refused(folder, tmp_path, alf, says):
    run(tmp_path, load(folder), steps=4)
    with pytest.raises((ValueError, RuntimeError), match=says):
        run(tmp_path, load(folder), str(tmp_path/"checkpoint-4"), alf=alf)


def test_adapters_and_compiled_models_are_refused(folder, tmp_path):
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match="load its base in 4 bits"):
        run(tmp_path/"a", peft.get_peft_model(load(folder), peft.LoraConfig(target_modules=["q_proj"])))
    with pytest.raises(ValueError, match="torch.compile"):
        run(tmp_path/"b", load(folder), torch_compile=True, torch_compile_backend="eager")


def loop_steps(loop, model, n):
    for i in range(n):
        with torch.autocast("cpu", torch.bfloat16): model(IDS + i % 3, labels=IDS + i % 3).loss.backward()
        loop.step()


def test_a_loop_of_ones_own_resumes_exactly(folder):
    batches = [dict(input_ids=IDS + i, labels=IDS + i) for i in range(3)]

    def made(resume=None, model_state=None, optimizer_state=None):
        model = load(folder)
        if resume: pack_again(model, resume)
        if model_state: model.load_state_dict(model_state)
        params = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(params, lr=1e-3)
        if optimizer_state: optimizer.load_state_dict(optimizer_state)
        loss = lambda m, b: m(**b).loss
        with torch.autocast("cpu", torch.bfloat16):
            return model, optimizer, ALFLoop(model, optimizer, batches, 6, loss=loss, budget=.25, quantize_frozen=4,
                                             signal="prior", resume=resume)

    model, optimizer, loop = made()
    loop_steps(loop, model, 3)
    saved = copy.deepcopy((loop.state_dict(), model.state_dict(), optimizer.state_dict()))
    loop_steps(loop, model, 3)
    other, _, again = made(*saved)
    loop_steps(again, other, 3)
    assert same(weights(other), weights(model))
    with pytest.raises(ValueError, match=r"call pack_again\(model, saved\) before"):
        fresh = load(folder)
        ALFLoop(fresh, torch.optim.AdamW(fresh.parameters()), batches, 6, budget=.25, quantize_frozen=4,
                signal="prior", resume=saved[0])


# a model that was loaded in 4 or 8 bits


def loaded_packed(folder, bits):
    how = dict(load_in_8bit=True) if bits == 8 else dict(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    return load(folder, quantization_config=BitsAndBytesConfig(**how), device_map="cpu")


CHOSEN = ["model.layers.1.mlp.up_proj", "model.layers.3.self_attn.q_proj"]


@pytest.mark.parametrize("bits", [4, 8])
def test_chosen_layers_of_a_packed_model_come_back_from_its_files(folder, tmp_path, bits):
    files = load_file(folder/"model.safetensors")

    def made():
        model = unpack(loaded_packed(folder, bits), CHOSEN)
        assert all(torch.equal(model.get_submodule(n).weight, files[f"{n}.weight"]) for n in CHOSEN)
        return model

    model = made()
    assert partition_layers(model).total == sum(p.numel() for p in load(folder).parameters())
    base = fingerprint(model)
    alf = dict(quantize_frozen=None, budget=None, policy="full", kinds="matrix", interval=0)
    whole = run(tmp_path/"run", model, alf=alf)
    select, = RunLog(tmp_path/"run").events("select")
    assert set(select["names"]) == {"block.1.mlp.up_proj", "block.3.self_attn.q_proj"}
    assert select["share"] == pytest.approx(
        sum(files[f"{n}.weight"].numel() for n in CHOSEN)/sum(p.numel() for p in load(folder).parameters()))
    again = run(tmp_path/"run", made(), str(tmp_path/"run"/"checkpoint-4"), alf=alf)
    assert losses(whole) == losses(again) and same(weights(whole.model), weights(again.model))
    delta = save_delta(whole.model, base, tmp_path/"delta")
    assert set(delta.changed) == {f"{n}.weight" for n in CHOSEN}
    other = made()
    apply_delta(other, tmp_path/"delta")
    assert same(weights(other), weights(whole.model))


def test_what_cannot_come_back_is_said(folder, tmp_path):
    model = loaded_packed(folder, 4)
    with pytest.raises(ValueError, match="lm_head is no packed layer"): unpack(model, ["lm_head"])
    with pytest.raises(ValueError, match="no safetensors of"): unpack(model, CHOSEN, tmp_path)
    (tmp_path/"config.json").write_text(json.dumps({}))
    torch.manual_seed(0)
    other = demo_model(blocks=1, hidden_size=64, intermediate_size=128)
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no model.layers.1.mlp.up_proj.weight"): unpack(model, CHOSEN, tmp_path)


def test_weights_and_scales_are_counted_once(folder):
    model = load(folder)
    assert weight_bytes(model) == sum(p.nbytes for p in model.parameters())


class Stop(Exception): pass


@pytest.mark.parametrize("place", ["training", "before the delta", "behind the delta"])
def test_finetune_goes_on_with_a_packed_rest(tmp_path, monkeypatch, place):
    notes = tmp_path/"notes.txt"
    notes.write_text("\n\n".join(f"note {i}: the quick brown fox jumps over the lazy dog. "*6 for i in range(20)))
    how = dict(steps=6, batch_size=2, max_length=32, eval_blocks=2, save_steps=3, quantize_frozen=4, lr=1e-3, budget=.4)

    def tuned(out, **kw):
        net = demo_model(blocks=2, hidden_size=64, intermediate_size=128).bfloat16()
        return finetune((net, demo_tokenizer()), str(notes), out, other=str(notes), progress=False, **how, **kw)

    whole = tuned(tmp_path/"whole")
    assert "packed=True)      # the rest in 4 bits" in (tmp_path/"whole/delta/README.md").read_text()
    with monkeypatch.context() as m:
        stop, calls = Trainer.training_step, []

        def at_the_fifth(*args, **kw):
            calls.append(1)
            if len(calls) == 5: raise Stop
            return stop(*args, **kw)

        def at_once(*args): raise Stop

        if place == "training": m.setattr(Trainer, "training_step", at_the_fifth)
        else: m.setattr(finetuning, "_save" if place == "before the delta" else "_write", at_once)
        with pytest.raises(Stop): tuned(tmp_path/"run")
    again = tuned(tmp_path/"run", resume=True)
    one, two = (safetensors_of(tmp_path/n/"delta") for n in ("whole", "run"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert again["domain_loss_after"] == whole["domain_loss_after"] < whole["domain_loss_before"]
    assert read_delta(tmp_path/"run/delta").packed == read_delta(tmp_path/"whole/delta").packed != {}


def safetensors_of(folder): return load_file(folder/"delta.safetensors")
