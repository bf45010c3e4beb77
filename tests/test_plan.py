"""Will it fit? Bytes by arithmetic against real models, tensor by tensor and step by step."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, GPT2Config, LlamaConfig

from alf_nb.app.cli import main
from alf_nb.demo import demo_model
from alf_nb.model.dry_run import LiveBytes, example_inputs
from alf_nb.model.layers import partition_layers
from alf_nb.model.needs import Held, Sizer, draw, fixed_bytes, packed_bytes
from alf_nb.model.optim import apply_selection
from alf_nb.study.plan import MARGIN, Plan, _adapted, plan


def bert(blocks=3):
    config = BertConfig(vocab_size=300, hidden_size=32, num_hidden_layers=blocks, num_attention_heads=2,
                        intermediate_size=64, max_position_embeddings=64)
    return AutoModelForSequenceClassification.from_config(config)


def peak(model, batch=2, length=32, bf16=False):
    "Most bytes of a real forward and backward pass beside weights"
    inputs = example_inputs(model, batch, length)
    model.config.use_cache = False      # as Trainer sets it
    with LiveBytes() as live:
        live.skip([*model.parameters(), *model.buffers(), *inputs.values()])
        with torch.autocast('cpu', torch.bfloat16, enabled=bf16): loss = model.train()(**inputs).loss
        loss.backward()
    return live.peak + sum(x.nbytes for x in {id(x): x for x in inputs.values()}.values())


@pytest.mark.parametrize('make', [demo_model, bert, lambda: demo_model(tie_word_embeddings=True)])
def test_weights_gradients_and_state_are_those_of_a_real_model(make):
    model = make()
    names = draw_names(model, .3)
    layers = partition_layers(model)
    apply_selection(layers, names)
    trains = [p for p in model.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(trains, fused=True)
    model.train()(**example_inputs(model, 2, 16)).loss.backward()
    opt.step()
    found = fixed_bytes(model, trains, Held(references='device'))
    assert found.n_params == sum(p.numel() for p in model.parameters())      # parameters() has a tied one once
    assert found.weights == sum(p.nbytes for p in model.parameters())
    assert found.gradients == found.references == sum(p.grad.nbytes for p in trains)
    assert found.state == sum(x.nbytes for s in opt.state.values() for x in s.values())


def draw_names(model, budget):
    layers = partition_layers(model)
    return {layers.unit_of(k) for k,p in model.named_parameters() if any(p is q for q in draw(layers, budget))}


@pytest.mark.parametrize('bf16', [False, True])
@pytest.mark.parametrize('make', [demo_model, bert])
@pytest.mark.parametrize('budget', [None, .25])
def test_a_step_without_data_is_counted_as_one_with_data(make, budget, bf16):
    sizer, real = Sizer(make(), 2, 32, bf16, device='cpu'), make()
    if budget is not None:
        names = draw_names(real, budget)
        for k,p in real.named_parameters(): p.requires_grad_(sizer.layers.unit_of(k) in names)
    needs = sizer.full() if budget is None else sizer.alf(budget, probe=False)
    assert peak(real, bf16=bf16) == pytest.approx(needs.both, rel=.002)


def test_a_deep_stack_is_told_from_its_first_blocks():
    whole, short = Sizer(demo_model(blocks=20), 2, 32, deep=20), Sizer(demo_model(blocks=20), 2, 32)
    assert (whole.each, short.each) == (1, 2.5)
    assert short.full() == whole.full()
    a, b = short.alf(.25), whole.alf(.25)
    assert (a.weights, a.state) == (b.weights, b.state) and a.total == pytest.approx(b.total, rel=.02)


def test_checkpoints_keep_less_and_the_length_counts():
    needs = lambda **kw: Sizer(demo_model(blocks=6), 2, **kw).full()
    assert needs(length=64, checkpointing=True).activations < .6*needs(length=64).activations
    assert needs(length=128).activations > 1.8*needs(length=64).activations


def test_packed_weights_are_those_of_bitsandbytes():
    bnb = pytest.importorskip('bitsandbytes')
    w = torch.nn.Linear(96, 64, bias=False)
    q = bnb.nn.Linear4bit(96, 64, bias=False, quant_type='nf4', compress_statistics=False)
    q.load_state_dict(w.state_dict())
    q = q.to('cpu')
    assert packed_bytes(96*64) == q.weight.nbytes + q.weight.quant_state.absmax.nbytes


def test_a_model_loaded_in_4_bits_needs_no_16_bit_weights_first():
    ways = {w.name: w for w in plan(demo_model(blocks=4), batch=2, max_length=32, budgets=(.1,), probe=True).ways}
    first, loaded = ways['alf 10 %, 4-bit rest'], ways['alf 10 %, loaded in 4 bits']
    assert loaded.probe == 0 < first.probe and loaded.total < first.total and loaded.weights == first.weights


def test_a_larger_budget_needs_more():
    ways = [w for w in plan(demo_model(), batch=2, max_length=32, budgets=(.1, .2, .4, .6)).ways if w.method == 'alf']
    for rest, loaded in (('fp32', False), ('bf16', False), ('nf4', False), ('nf4', True)):
        some = [w for w in ways if (w.held.rest, w.held.loaded, w.held.bits) == (rest, loaded, 32)]
        assert len(some) == 4
        for a,b in zip(some, some[1:]): assert a.n_trainable < b.n_trainable and a.total <= b.total


def test_adapters_are_those_of_peft():
    peft = pytest.importorskip('peft')
    config = peft.LoraConfig(r=4, target_modules='all-linear', lora_dropout=0.)
    real = peft.get_peft_model(demo_model(), config)
    ours = _adapted(demo_model(), 4)
    count = lambda m: sum(p.numel() for k,p in m.named_parameters() if 'lora_' in k)
    assert count(real) == count(ours)
    way = plan(demo_model(), batch=2, max_length=32, bf16=False, rank=4, device='cpu').ways[-1]
    for p in real.parameters(): p.data = p.data.float()
    inner = real.base_model.model
    assert way.n_trainable == count(real) and peak(inner) == pytest.approx(way.both, rel=.02)


def test_a_plan_survives_json_and_says_what_fits():
    found = plan(demo_model(), '4MB', batch=2, max_length=32)
    assert Plan.from_json(found.to_json()) == found
    for w in found.ways: assert found.fits(w) == (w.total <= (1-MARGIN)*4*10**6)
    largest = max(w.total for w in found.ways)
    assert all(map(found.within(2*largest).fits, found.ways)) and not any(map(found.within(1).fits, found.ways))
    assert '| yes |' in found.within('1GB')._repr_markdown_()
    assert 'fits' not in plan(demo_model(), max_length=32)._repr_markdown_()


@pytest.mark.parametrize('given,said', [
    (dict(memory='much'), "'16GB'"), (dict(memory=0), 'memory=0'), (dict(batch=0), 'batch=0'),
    (dict(max_length=0), 'max_length=0'), (dict(budgets=(25,)), 'did you mean 0.25'),
    (dict(references='far'), "'device'"),
    (dict(rank=0), 'rank=0'), (dict(device='gpu'), "'cuda'"),
])
def test_what_makes_no_sense_is_refused(given, said):
    with pytest.raises(ValueError, match=said.replace('(', r'\(')): plan(demo_model(), **given)


def test_more_tokens_than_positions_are_refused():
    with pytest.raises(ValueError, match='knows 64 positions'): plan(bert(), max_length=65)
    assert plan(bert()).length == 64


def test_what_has_no_linear_layers_gets_no_adapter():
    config = GPT2Config(vocab_size=258, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    assert {w.method for w in plan(config).ways} == {'full', 'alf'}


def test_from_the_command_line(tmp_path, capsys):
    LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=2, vocab_size=300).save_pretrained(tmp_path)
    assert main(['plan', str(tmp_path), '--memory', '1 GiB', '--max-length', '64', '--json']) == 0
    found = Plan.from_json(capsys.readouterr().out)
    assert (found.memory, found.length, found.batch) == (2**30, 64, 1)
    assert main(['plan', str(tmp_path), *'--memory 1GB --max-length 64 --budgets 0.5 --checkpointing'.split()]) == 0
    said = capsys.readouterr().out
    assert 'alf 50 %' in said and 'checkpoints' in said and 'nf4' in said
    assert main(['plan', str(tmp_path), '--batch', '0']) == 2
    assert 'batch=0' in capsys.readouterr().err
    assert main(['plan', str(tmp_path/'none')]) == 2
    assert 'no model folder' in capsys.readouterr().err


@pytest.mark.parametrize('checkpointing', [False, True])
def test_attention_of_a_cuda_device_keeps_no_matrix(checkpointing):
    "Attention with dropout on a CPU does, and checkpoints run the same kernels again"
    made = lambda device, length: Sizer(bert(), 4, length, checkpointing=checkpointing, device=device).full()
    growth = lambda device: made(device, 64).activations / made(device, 32).activations
    assert growth('cpu') > 1.1*growth('cuda')
    assert made('cuda', 64).total - made('cuda', 64).both > made('cpu', 64).total - made('cpu', 64).both + 2**25


@pytest.mark.parametrize('experts,each', [(4, 2), (8, 1)])
def test_tokens_of_experts_are_counted_though_nobody_knows_whose_they_are(experts, each):
    transformers = pytest.importorskip('transformers', '5.5')
    config = transformers.MixtralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=300, num_local_experts=experts, num_experts_per_tok=each, architectures=['MixtralForCausalLM'])
    torch.manual_seed(0)
    real = transformers.MixtralForCausalLM(config)
    needs = Sizer(real, 2, 64, bf16=False, device='cpu').full()
    assert peak(real, 2, 64) == pytest.approx(needs.both, rel=.03)
    assert {w.method for w in plan(config, batch=2, max_length=64).ways} == {'full', 'alf', 'lora'}
