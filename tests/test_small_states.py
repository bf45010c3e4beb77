"""Moments of 8 and 4 bits, paged ones, and ones in 16 bits, under a model of 16 bits: trained in fp32 masters, kept or
dropped as `offload` says, counted to the byte, and resumed to the last bit."""
import pytest
import torch
from small_run import losses, same, small_trainer, weights
from torch.optim.lr_scheduler import ConstantLR

from alf_nb.core.runlog import RunLog
from alf_nb.demo import demo_model
from alf_nb.model.masters import Masters
from alf_nb.model.layers import partition_layers
from alf_nb.model.needs import adamw_bytes
from alf_nb.model.offload import OffloadedStates
from alf_nb.model.optim import apply_selection
from alf_nb.model.states import optimizer_bytes
from alf_nb.train.trainer import ALFCallback

MOVES = dict(policy="rotate", budget=.3, interval=3, measure_every=2, select_until=1.)
NAMED = {                        # name of TrainingArguments(optim=…) → (package, bits of a moment)
    "adamw_8bit": ("bitsandbytes", 8), "adamw_bnb_8bit": ("bitsandbytes", 8), "paged_adamw_8bit": ("bitsandbytes", 8),
    "paged_adamw_32bit": ("bitsandbytes", 32), "adamw_torch_8bit": ("torchao", 8), "adamw_torch_4bit": ("torchao", 4),
    "adamw_torch_fused": ("torch", 32),
}
MADE = {"AdamWFp8": ("torchao", 8)}
ALL = NAMED | MADE


@pytest.fixture(autouse=True)
def eager():
    "torchao compiles its steps; what they do is the same"
    with torch.compiler.set_stance("force_eager"): yield


def half(dtype=torch.bfloat16):
    torch.manual_seed(0)
    return demo_model(blocks=2, hidden_size=64, intermediate_size=128).to(dtype)


def given(optim, model):
    "Arguments of a Trainer with this optimizer"
    pytest.importorskip(ALL[optim][0])
    if optim in NAMED: return dict(optim=optim)
    import torchao.optim
    opt = getattr(torchao.optim, optim)(model.parameters(), lr=1e-2)
    return dict(more=dict(optimizers=(opt, ConstantLR(opt, factor=1.))))


def trained(folder, optim, *more, resume=None, dtype=torch.bfloat16, steps=11, save=5, **alf):
    model, one = half(dtype), ALFCallback(**{**MOVES, **alf}, resume_from=resume)
    t = small_trainer(folder, one, *more, model=model, bf16=True, max_steps=steps, save_strategy="steps",
                      save_steps=save, **given(optim, model))
    t.train(resume_from_checkpoint=resume)
    return t, one


def states(optimizer):
    while hasattr(optimizer, "optimizer"): optimizer = optimizer.optimizer
    return optimizer.state


def held(optimizer):
    "Bytes of every storage that the state refers to, each once"
    found = {}
    def look(x):
        if hasattr(x, "__tensor_flatten__"):
            for k in x.__tensor_flatten__()[0]: look(getattr(x, k))
        elif isinstance(x, torch.Tensor): found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    for s in states(optimizer).values():
        for v in s.values(): look(v)
    return sum(found.values())


@pytest.mark.parametrize("offload", ["second_moment", "full", "none"])
@pytest.mark.parametrize("optim", [o for o in ALL if o != "adamw_bnb_8bit"])       # adamw_8bit by another name
def test_masters_train_and_resume_to_the_last_bit(tmp_path, optim, offload):
    whole, one = trained(tmp_path, optim, offload=offload)
    assert losses(whole)[-1] < losses(whole)[0] and {p.dtype for p in whole.model.parameters()} == {torch.bfloat16}
    assert not same(weights(whole), weights(half()))
    trains = {id(p) for n in one.selection.names for p in one.run.layers.params(n)}
    assert {id(p) for p in states(whole.optimizer)} == trains
    again, _ = trained(tmp_path, optim, resume=str(tmp_path/"checkpoint-5"), offload=offload)
    assert losses(again)[5:] == losses(whole)[5:] and same(weights(again), weights(whole))


@pytest.mark.parametrize("optim", ALL)
def test_bytes_are_counted_as_they_are_and_as_planned(tmp_path, optim):
    t, one = trained(tmp_path, optim, policy="static", interval=0)
    told = [e["optimizer_bytes"] for e in RunLog(tmp_path).events("memory")]
    assert told[-1] == held(t.optimizer) == optimizer_bytes(t.optimizer) > 0
    sizes = [p.numel() for n in one.selection.names for p in one.run.layers.params(n)]
    planned = sum(adamw_bytes(n, ALL[optim][1]) for n in sizes)
    # tables of codes: those of bitsandbytes once, those of torchao with each moment
    assert abs(told[-1] - planned) <= (2048 if ALL[optim][0] == "bitsandbytes" else 2048*len(sizes)) + 4*len(sizes)


@pytest.mark.parametrize("optim", ALL)
def test_memory_counts_the_bits_of_a_moment(tmp_path, optim):
    "Where moments are smaller, more fits"
    budget = {}
    for name in ("adamw_torch_fused", optim):
        trained(tmp_path/name, name, policy="static", interval=0, budget=None, memory=1_800_000, steps=2)
        budget[name] = RunLog(tmp_path/name).events("fit")[0]["budget"]
    assert (budget[optim] > budget["adamw_torch_fused"]) == (ALL[optim][1] < 32)


def test_codes_stay_codes_where_a_master_is_made_later():
    "An optimizer that stepped 16-bit weights before ALF came: its moments are not unpacked"
    torchao = pytest.importorskip("torchao.optim")
    model = half()
    opt = torchao.AdamW8bit(model.parameters(), lr=1e-3)
    ids = torch.arange(32).reshape(2, 16) % 200
    model(input_ids=ids, labels=ids).loss.backward()
    opt.step()
    layers = partition_layers(model)
    name = next(u.name for u in layers.units if u.eligible and u.n_params >= 4096)
    p, = layers.params(name)
    kind, before = type(opt.state[p]["exp_avg"]), opt.state[p]["exp_avg"].dequantize()
    apply_selection(layers, [name], opt)
    masters = Masters(layers, [name])
    masters.switch([name], opt)
    assert p.dtype == torch.float32 and type(opt.state[p]["exp_avg"]) is kind is not torch.Tensor
    assert torch.equal(opt.state[p]["exp_avg"].dequantize(), before)
    p.grad = torch.randn_like(p)
    opt.step()
    masters.switch([])


def test_moments_of_16_bits_stay_where_there_are_no_masters(tmp_path):
    "Without masters the moments of torch's fused AdamW are in 16 bits, half the bytes, and resume exactly"
    how = dict(masters=False, offload="full", check="off")
    whole, one = trained(tmp_path, "adamw_torch_fused", **how)
    assert {s["exp_avg"].dtype for s in states(whole.optimizer).values()} == {torch.bfloat16}
    sizes = [p.numel() for n in one.selection.names for p in one.run.layers.params(n)]
    last = RunLog(tmp_path).events("memory")[-1]["optimizer_bytes"]
    assert last == optimizer_bytes(whole.optimizer) == sum(adamw_bytes(n, 16) for n in sizes)
    again, _ = trained(tmp_path, "adamw_torch_fused", resume=str(tmp_path/"checkpoint-5"), **how)
    assert losses(again)[5:] == losses(whole)[5:] and same(weights(again), weights(whole))


def in_pages(monkeypatch):
    "bitsandbytes on a CPU has no pages: what it does on a GPU, with buffers that only say that they are some"
    from bitsandbytes.optim.optimizer import Optimizer8bit
    made = []
    def buffer(self, p, dtype=torch.float32):
        t = torch.zeros_like(p, dtype=dtype)
        if not self.is_paged or p.numel() < 4096: return t
        t.is_paged, t.page_deviceid = True, p.device.index
        made.append(t)
        return t
    monkeypatch.setattr(Optimizer8bit, "get_state_buffer", buffer)
    monkeypatch.setattr(Optimizer8bit, "prefetch_state", lambda self, p: None)
    return made


@pytest.mark.parametrize("offload", ["second_moment", "none"])
@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "paged_adamw_32bit"])
def test_pages_serve_again_and_state_that_returns_is_in_pages(tmp_path, monkeypatch, optim, offload):
    pytest.importorskip("bitsandbytes")
    how = dict(offload=offload, steps=22, interval=2)
    plain, _ = trained(tmp_path/"plain", optim, **how)
    made = in_pages(monkeypatch)
    whole, one = trained(tmp_path/"pages", optim, **how)
    assert losses(whole) == losses(plain) and same(weights(whole), weights(plain))
    moments = [s[k] for p, s in states(whole.optimizer).items() for k in ("state1", "state2") if p.numel() >= 4096]
    assert moments and all(m.is_paged for m in moments)
    total = sum(p.numel() for n in one.run.names for p in one.run.layers.params(n) if p.numel() >= 4096)
    assert sum(t.numel() for t in made) < 2*total, "no more than if everything trained"
    again, _ = trained(tmp_path/"pages", optim, resume=str(tmp_path/"pages"/"checkpoint-5"), **how)
    assert losses(again)[5:] == losses(whole)[5:] and same(weights(again), weights(whole))
    assert all(s["state1"].is_paged for p, s in states(again.optimizer).items() if p.numel() >= 4096)


@pytest.mark.parametrize("package", ["bitsandbytes", "torchao"])
def test_a_loop_resumes_to_the_last_bit(package):
    "`load_state_dict` is called while the weights are still in 16 bits"
    from test_masters import loop
    optim = pytest.importorskip(f"{package}.optim")
    make = lambda m: optim.AdamW8bit(m.parameters(), lr=1e-3)
    model = half()
    whole, end = loop(model, optimizer=make(model))
    model = half()
    _, saved = loop(model, optimizer=make(model), stop=5)
    model = half()
    optimizer = make(model)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    rest, again = loop(model, resume=saved["alf"], optimizer=optimizer)
    assert rest == whole[5:] and same(again, end)
