"Some input columns of every matrix train: what the gradient is, what stays as it was, and what is kept of it."
import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from alf_nb.app.finetune import finetune
from alf_nb.core.config import ALFConfig
from alf_nb.core.runlog import RunLog
from alf_nb.demo import demo_model, demo_tokenizer
from alf_nb.model.bits import FrozenGuard
from alf_nb.model.columns import column_layers, join_columns, split_columns
from alf_nb.model.delta import apply_delta, read_delta, save_delta
from alf_nb.model.fingerprint import fingerprint
from alf_nb.model.layers import partition_layers
from alf_nb.train.loop import ALFLoop
from alf_nb.train.trainer import ALFCallback
from small_run import losses, same, small_trainer, weights

COLUMNS = dict(unit="columns", budget=.2)
ROWS = torch.arange(4*32).reshape(4, 32) % 97


def fresh(*args, dtype=torch.float32, **kw):
    torch.manual_seed(0)
    return demo_model(*args, **kw).to(dtype)


def trained(folder, alf, *more, model=None, resume=None, **kw):
    t = small_trainer(folder, alf, *more, model=fresh() if model is None else model, **kw)
    t.train(resume_from_checkpoint=resume)
    return t


def changed(before, after):
    "Name → columns that are not what they were"
    return {k: (after[k] != v).any(0).nonzero().flatten().tolist() for k, v in before.items()
            if not torch.equal(v, after[k])}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradients_are_those_of_the_whole_weight(name):
    model, plain = fresh(name).eval(), fresh(name).eval()
    found = split_columns(model, .2)
    assert len(found) > 6
    out, ref = model(ROWS, labels=ROWS), plain(ROWS, labels=ROWS)
    assert torch.equal(out.logits, ref.logits)
    out.loss.backward()
    ref.loss.backward()
    for k, m in found.items():
        g = plain.get_parameter(f"{k}.weight").grad
        g = g if m.inputs else g.T
        torch.testing.assert_close(m.columns.grad, g[:, m.index], rtol=1e-4, atol=1e-6)
        assert m.weight.grad is None


def test_a_step_moves_these_columns_and_nothing_else(tmp_path):
    before = weights(fresh())
    alf = ALFCallback(**COLUMNS)
    t = trained(tmp_path, alf)
    after, layers = weights(t), column_layers(t.model)
    assert list(after) == list(before)
    assert changed(before, after) == {f"{k}.weight": m.index.tolist() for k, m in layers.items()}
    assert abs(alf.selection.share - .2) < .02 and losses(t)[-1] < losses(t)[0]
    held = sum(p.numel() for p in t.optimizer.state)
    assert held == sum(m.columns.numel() for m in layers.values())


def test_a_budget_is_a_share_of_the_model_and_larger_ones_are_refused():
    model = fresh()
    n = partition_layers(model).total
    assert .08 < sum(m.columns.numel() for m in split_columns(model, .1).values())/n <= .1
    with pytest.raises(ValueError, match=r"budget=0.99, but the columns that could train hold 0\.\d+"):
        split_columns(fresh(), .99)
    with pytest.raises(ValueError, match="adapters"): split_columns(model, .1)


def test_pins_are_paid_from_the_budget(tmp_path):
    alf = ALFCallback(unit="columns", budget=.3, pin="head")
    t = trained(tmp_path, alf, model=fresh(tie_word_embeddings=False), max_steps=2)
    head = t.model.lm_head.weight
    assert head.requires_grad and .27 < alf.selection.share <= .3
    of = alf.run.layers
    assert sum(of[n].kind == "adapter" for n in alf.selection.names) == len(column_layers(t.model)) == 28


def test_what_trains_depends_on_the_seed_alone():
    draw = lambda **kw: {k: m.index.tolist() for k, m in split_columns(fresh(), .1, **kw).items()}
    assert draw() == draw() != draw(seed=1)
    low = draw(freeze_bottom=.5)
    assert low and not any(k.startswith("model.layers.0.") for k in low)


@pytest.mark.parametrize("settings,words", [
    (dict(unit="columns", strata=3), "strata"),
    (dict(unit="columns", threshold=.5), "columns"),
    (dict(unit="columns", memory="1GB"), "memory"),
    (dict(unit="columns", quantize_frozen=4), "quantize_frozen"),
    (dict(unit="columns", interval=4), "interval"),
    (dict(unit="columns", policy="full"), "policy 'full'"),
    (dict(policy="columns"), "policy 'columns'"),
])
def test_settings_that_need_whole_matrices_are_refused(settings, words):
    with pytest.raises(ValueError, match=words): ALFConfig.from_args(**settings)


def test_a_callback_that_comes_too_late_says_so(tmp_path):
    t = small_trainer(tmp_path, model=fresh())
    t.add_callback(ALFCallback(**COLUMNS))
    with pytest.raises(ValueError, match=r"Trainer\(callbacks="): t.train()


def test_columns_are_drawn_once(tmp_path):
    class Ask(TrainerCallback):
        def on_step_end(self, *args, **kw):
            with pytest.raises(RuntimeError, match="before the first step"): alf.choose(budget=.1)
    alf = ALFCallback(**COLUMNS)
    trained(tmp_path, alf, Ask(), max_steps=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_killed_and_resumed_is_never_killed(tmp_path, dtype, optim):
    how = dict(save_strategy="steps", save_steps=4, optim=optim, bf16=dtype == torch.bfloat16)
    whole = trained(tmp_path/"whole", ALFCallback(**COLUMNS), model=fresh(dtype=dtype), **how)
    given = str(tmp_path/"whole"/"checkpoint-8")
    again = trained(tmp_path/"again", ALFCallback(**COLUMNS, resume_from=given), model=fresh(dtype=dtype), resume=given,
                    **how)
    assert losses(again)[8:] == losses(whole)[8:] and same(weights(again), weights(whole))


def test_a_16_bit_model_learns_what_one_of_32_bits_does(tmp_path):
    how = dict(bf16=True, learning_rate=1e-3)
    half, full = (trained(tmp_path/str(d), ALFCallback(**COLUMNS), model=fresh(dtype=d), **how)
                  for d in (torch.bfloat16, torch.float32))
    assert {v.dtype for v in weights(half).values()} == {torch.bfloat16}
    assert abs(losses(half)[-1] - losses(full)[-1]) < .02
    without = trained(tmp_path/"without", ALFCallback(**COLUMNS, masters=False), model=fresh(dtype=torch.bfloat16),
                      bf16=True, learning_rate=1e-5)
    assert without.state.global_step == 12


@pytest.mark.parametrize("more", [
    dict(gradient_checkpointing=True, gradient_checkpointing_kwargs=dict(use_reentrant=False)),
    dict(gradient_accumulation_steps=2, per_device_train_batch_size=2),
])
def test_checkpointing_and_accumulation_change_nothing(tmp_path, more):
    plain = trained(tmp_path/"plain", ALFCallback(**COLUMNS))
    other = trained(tmp_path/"other", ALFCallback(**COLUMNS), **more)
    for a, b in zip(weights(plain).values(), weights(other).values()):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=0)


def test_the_guard_sees_the_columns_that_stay(tmp_path):
    model = fresh()
    m = next(iter(split_columns(model, .1).values()))
    guard = FrozenGuard(partition_layers(model, kinds=("adapter",)))
    guard.watch()
    with torch.no_grad(): m.columns.add_(1.)
    m.settle()
    guard.check()
    still = next(i for i in range(m.matrix.shape[1]) if i not in m.index.tolist())
    with torch.no_grad(): m.weight[:, still] += 1.
    with pytest.raises(RuntimeError, match="frozen weights changed"): guard.check()


def test_a_copy_trains_on_by_itself():
    model = fresh()
    split_columns(model, .1)
    model(ROWS, labels=ROWS).loss.backward()
    with torch.no_grad():
        for m in column_layers(model).values(): m.columns.add_(.1)
    other = copy.deepcopy(model)
    assert same(weights(other), weights(model))
    assert all(hasattr(m.weight, "trained_columns") for m in column_layers(other).values())


def test_joined_it_is_what_it_was(tmp_path):
    t = trained(tmp_path, ALFCallback(**COLUMNS))
    learned = weights(t)
    join_columns(t.model)
    assert same(weights(t), learned) and not column_layers(t.model)
    assert {type(m) for m in t.model.modules()} == {type(m) for m in fresh().modules()}
    assert all(p.requires_grad for p in t.model.parameters())
    names = {n for n, _ in t.model.named_buffers()}
    assert names == {n for n, _ in fresh().named_buffers()}


def test_another_callback_finds_the_model_whole(tmp_path):
    model = fresh()
    trained(tmp_path/"a", ALFCallback(**COLUMNS), model=model)
    alf = ALFCallback(budget=.25)
    trained(tmp_path/"b", alf, model=model)
    assert not column_layers(model) and {u.kind for u in alf.run.units} >= {"matrix"}


def test_a_delta_holds_the_columns_alone(tmp_path):
    model = fresh()
    base = fingerprint(model)
    trained(tmp_path/"run", ALFCallback(**COLUMNS), model=model)
    d = save_delta(model, base, tmp_path/"delta")
    assert d.share < .3 and read_delta(tmp_path/"delta").changed == d.changed
    other = fresh()
    apply_delta(other, tmp_path/"delta")
    assert same(weights(other), weights(model))
    apply_delta(other, tmp_path/"delta")
    assert same(weights(other), weights(model))
    with pytest.raises(ValueError, match="wrong base"): apply_delta(demo_model(seed=1), tmp_path/"delta")


def test_a_delta_whose_columns_are_damaged_is_refused(tmp_path):
    model = fresh()
    base = fingerprint(model)
    trained(tmp_path/"run", ALFCallback(**COLUMNS), model=model)
    save_delta(model, base, tmp_path/"delta")
    file = tmp_path/"delta"/"delta.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    other = fresh()
    with pytest.raises(ValueError, match="do not match their hash"): apply_delta(other, tmp_path/"delta")
    assert same(weights(other), weights(fresh()))


def test_a_loop_of_your_own(tmp_path):
    model = fresh()
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with pytest.raises(ValueError, match="split_columns"):
        ALFLoop(model, opt, [dict(input_ids=ROWS, labels=ROWS)], 4, out=tmp_path/"a", **COLUMNS)
    before = weights(model)
    layers = split_columns(model, .2)
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with ALFLoop(model, opt, [dict(input_ids=ROWS, labels=ROWS)], 4, out=tmp_path/"b", **COLUMNS) as alf:
        while not alf.done:
            loss = model(ROWS, labels=ROWS).loss
            loss.backward()
            alf.step()
    assert changed(before, weights(model)) == {f"{k}.weight": m.index.tolist() for k, m in layers.items()}
    assert abs(RunLog(tmp_path/"b").selections()[0].share - .2) < .02


def test_preview_leaves_a_model_as_it_is():
    model = fresh()
    chosen = ALFCallback(**COLUMNS).preview(model)
    assert abs(chosen.share - .2) < .02 and not column_layers(model)
    assert all(p.requires_grad for p in model.parameters())


def test_torch_compile_is_refused(tmp_path):
    with pytest.raises(ValueError, match="torch.compile"):
        trained(tmp_path, ALFCallback(**COLUMNS), torch_compile=True, torch_compile_backend="eager")


def test_finetune_trains_columns_and_its_delta_is_small(tmp_path):
    model, tokenizer = fresh(), demo_tokenizer()
    (tmp_path/"text.txt").write_text("\n\n".join(f"The {i}th line of a text that is learned." * 8 for i in range(60)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        s = finetune((model, tokenizer), str(tmp_path/"text.txt"), out=tmp_path/"run", steps=6, max_length=32,
                     batch_size=2, other=str(tmp_path/"text.txt"), progress=False, **COLUMNS)
    assert abs(s["trainable_share_peak"] - .2) < .02 and not column_layers(model)
    other = fresh()
    assert apply_delta(other, tmp_path/"run"/"delta").share < .4
    assert same(weights(other), weights(model))
    begin = RunLog(tmp_path/"run").events("run_begin")[0]
    assert begin["config"]["unit"] == "columns" and begin["config"]["policy"]["policy"] == "columns"
