"""ALF beside weights that are packed and frozen for good: QLoRA from the first step to the delta, and what packed
weights count."""
import pytest
import torch
from small_run import losses, same, small_trainer, weights
from torch import nn

from alf_nb.model.delta import apply_delta, save_delta

from alf_nb.model.fingerprint import fingerprint
from alf_nb.demo import demo_model
from alf_nb.model.layers import partition_layers
from alf_nb.model.bits import FrozenGuard
from alf_nb.core.runlog import RunLog
from alf_nb.signals.tracker import prior_scores
from alf_nb.train.trainer import ALFCallback

BITS = {
    4: dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
    8: dict(load_in_8bit=True),
}


@pytest.fixture(scope="module")
def qlora(tmp_path_factory):
    "Makes LoRA over a quantised base, the same each time"
    pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    demo_model(blocks=2, hidden_size=64, intermediate_size=128).save_pretrained(folder)

    def make(bits=4):
        torch.manual_seed(0)
        m = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=BitsAndBytesConfig(**BITS[bits]), device_map="cpu"
        )
        m = peft.prepare_model_for_kbit_training(m, gradient_checkpointing_kwargs=dict(use_reentrant=False))
        return peft.get_peft_model(
            m, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
        )
    return make


def run(folder, model, resume=None, steps=10, **alf):
    trainer = small_trainer(
        folder,
        ALFCallback(**{**dict(budget=0.4, interval=3, measure_every=2, select_until=1.0), **alf}),
        model=model,
        max_steps=steps,
        save_strategy="steps",
        save_steps=4,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def trainable(trainer): return {k: p.detach().clone() for k, p in trainer.model.named_parameters() if "lora" in k}


@pytest.mark.parametrize(
    "kw",
    [{}, dict(unit="block", budget=0.5), dict(preset="short"), dict(references="8bit")],
    ids=["default", "blocks", "short", "8bit"],
)
def test_lora_on_a_4_bit_base_trains_and_resumes_exactly(tmp_path, qlora, kw):
    whole = run(tmp_path, qlora(), **kw)
    log = RunLog(tmp_path)
    assert 0 < log.events("select")[-1]["share"] <= kw.get("budget", .4) and not log.events("error")
    again = run(tmp_path, qlora(), resume=str(tmp_path / "checkpoint-4"), **kw)
    assert losses(whole) == losses(again) and same(trainable(whole), trainable(again))


def test_a_delta_holds_what_lora_on_a_4_bit_base_changed(tmp_path, qlora):
    model = qlora()
    base = fingerprint(model)
    trainer = run(tmp_path / "run", model)
    delta = save_delta(trainer.model, base, tmp_path / "delta")
    assert delta.changed and all("lora" in k for k in delta.changed)
    other = qlora()
    apply_delta(other, tmp_path / "delta")
    assert same(weights(other), weights(trainer.model))


@pytest.mark.parametrize("bits", BITS)
def test_a_quantised_base_counts_as_the_base_it_was_made_from(qlora, bits):
    plain = {
        u.name: (u.n_params, u.shapes)
        for u in partition_layers(demo_model(blocks=2, hidden_size=64, intermediate_size=128)).units
    }
    layers = partition_layers(qlora(bits))
    frozen = {u.name.removesuffix(".base_layer"): (u.n_params, u.shapes) for u in layers.units if u.kind != "adapter"}
    assert frozen == plain
    assert (
        layers.total == sum(u.n_params for u in layers.units if u.kind == "adapter")
        and layers.share([u.name for u in layers.units if u.eligible]) == 1
    )
    packed = [n for n, v in prior_scores(layers).values.items() if v is None]
    assert all(n.partition("block")[1] for n in packed) and (bits == 8 or packed)


class Packed(nn.Module):
    def __init__(self, name, shape, dtype, n_in=64, n_out=32):
        super().__init__()
        self.in_features, self.out_features = n_in, n_out
        setattr(self, name, nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False))
        self.zeros = nn.Parameter(torch.zeros(1, 4, dtype=torch.int32), requires_grad=False)
        self.scales = nn.Parameter(torch.zeros(2, n_out))


class Experts(nn.Module):
    "As gpt-oss keeps them: two 4-bit numbers in a byte, 32 to a scale"
    def __init__(self):
        super().__init__()
        self.up_proj_blocks = nn.Parameter(torch.zeros(4, 128, 2, 16, dtype=torch.uint8), requires_grad=False)
        self.up_proj_scales = nn.Parameter(torch.zeros(4, 128, 2, dtype=torch.uint8), requires_grad=False)


@pytest.mark.parametrize(
    "name,shape,dtype",
    [
        ("qweight", (8, 32), torch.int32),
        ("qweight", (64, 4), torch.int32),
        ("W_q", (1024, 1), torch.uint8),
        ("weight_packed", (32, 8), torch.int32),
        ("weight", (32, 64), torch.int8),
    ],
    ids=["gptq", "awq", "hqq", "compressed", "int8"],
)
def test_packed_weights_of_other_quantisers_count_what_they_stand_for(name, shape, dtype):
    units = partition_layers(nn.Sequential(Packed(name, shape, dtype), nn.Linear(32, 4))).units
    assert {u.n_params for u in units if name in u.name or u.name == "0"} & {32*64}
    assert sum(u.n_params for u in units) == 32*64 + 4 + 2*32 + 32*4 + 4


def test_packed_experts_count_what_they_stand_for():
    units = partition_layers(nn.Sequential(Experts(), nn.Linear(8, 8))).units
    assert sum(u.n_params for u in units) == 4*128*64 + 4*128*2 + 8*8 + 8


def test_a_frozen_weight_made_of_several_tensors_is_watched():
    from test_optimizers import Rounded
    m = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    m[0].weight = nn.Parameter(Rounded.of(torch.randn(8, 8)), requires_grad=False)
    guard = FrozenGuard(partition_layers(m))
    guard.watch()
    guard.check()
    m[0].weight.codes[0, 0] += 1
    with pytest.raises(RuntimeError, match="frozen weights changed: 0.weight"): guard.check()
    with pytest.raises(ValueError, match="'0.weight' is a Rounded, made of several tensors, which a delta cannot hold"):
        fingerprint(m)
