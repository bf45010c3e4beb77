"""What a step costs: arithmetic and measurement agree to the byte, with what ALFCallback counts, with PEFT, and with
torch's FLOP counter."""
import json, subprocess, sys
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments, default_data_collator

from alf_nb.core.config import ALFConfig
from alf_nb.core.schedule import schedule_of
from alf_nb.demo import demo_dataset, demo_model
from alf_nb.study.step_costs import EnergyMeter, StepCosts, StepMeter
from alf_nb.study.estimate import ASSUMPTIONS, SHAPES, Estimate, ModelShape, Speed
from alf_nb.study.step_costs import count_selections, measure_step, probe_batches
from alf_nb.study.estimate import extrapolate
from alf_nb.model.layers import partition_layers
from alf_nb.core.policies import BudgetPolicy, StaticPolicy, step_cost
from alf_nb.core.runlog import RunLog
from alf_nb.train.trainer import ALFCallback

root = Path(__file__).resolve().parents[1]
BYTES = (
    'n_params',
    'n_trainable',
    'weight_bytes',
    'gradient_bytes',
    'optimizer_bytes',
    'reference_bytes',
    'probe_bytes',
    'state_bytes',
)
# nothing is a multiple of 8
ODD = dict(hidden_size=36, intermediate_size=50, num_attention_heads=3, num_key_value_heads=1)


def batch(rows=2, length=24, vocab=258):
    ids = torch.arange(rows*length).reshape(rows, length) % vocab
    return dict(input_ids=ids, labels=ids)


@pytest.mark.parametrize(
    'config',
    [{}, ODD, dict(tie_word_embeddings=True), dict(vocab_size=301, **ODD)],
    ids=['plain', 'odd', 'tied', 'odd vocab'],
)
@pytest.mark.parametrize('weights', ['fp32', 'mixed', 'bf16'])
def test_bytes_agree_when_everything_trains(config, weights):
    model = demo_model(blocks=2, **config).to(torch.bfloat16 if weights == 'bf16' else torch.float32)
    computed = extrapolate(ModelShape.of(model.config, 'demo'), 'full', weights=weights, length=24, batch_size=2)
    measured = measure_step(model, batch(), steps=1, bf16=weights == 'mixed')
    assert {k: getattr(computed, k) for k in BYTES} == {k: getattr(measured, k) for k in BYTES}
    if not config:
        assert (computed.activation_bytes, computed.cast_bytes) == (measured.activation_bytes, measured.cast_bytes)
    assert measured.tokens == computed.tokens == 48


@pytest.mark.parametrize('config', [{}, ODD, dict(tie_word_embeddings=True)], ids=['plain', 'odd', 'tied'])
@pytest.mark.parametrize('references', ['device', '8bit', 'host', 'none'])
@pytest.mark.parametrize('budget', [.1, .25, .6])
def test_bytes_agree_for_a_selection(config, references, budget):
    model = demo_model(blocks=4, **config)
    shape = ModelShape.of(model.config, 'demo')
    names = StaticPolicy('random', budget).select(None, shape.units).names
    computed = extrapolate(shape, names=names, weights='fp32', references=references, length=24, batch_size=2)
    measured = measure_step(model, batch(), names, steps=1, references=references)
    assert {k: getattr(computed, k) for k in BYTES} == {k: getattr(measured, k) for k in BYTES}
    assert (
        computed.share <= budget and measured.activation_bytes <= computed.activation_bytes
    ), "what is computed is a bound"


@pytest.mark.parametrize('weights', ['fp32', 'mixed', 'bf16'])
def test_bytes_agree_for_lora(weights):
    peft = pytest.importorskip('peft')
    base = demo_model(blocks=3).to(torch.bfloat16 if weights == 'bf16' else torch.float32)
    computed = extrapolate(ModelShape.of(base.config, 'demo'), 'lora', rank=4, weights=weights, length=24, batch_size=2)
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=4, target_modules='all-linear', lora_dropout=0.0, task_type='CAUSAL_LM')
    )
    measured = measure_step(model, batch(), steps=1, bf16=weights == 'mixed')
    assert {k: getattr(computed, k) for k in BYTES} == {k: getattr(measured, k) for k in BYTES}


def test_flops_of_lora_agree_with_torchs_counter():
    peft = pytest.importorskip('peft')
    from torch.utils.flop_counter import FlopCounterMode
    model = demo_model(blocks=3)
    model.set_attn_implementation('eager')
    computed = extrapolate(ModelShape.of(model.config, 'demo'), 'lora', rank=4, weights='fp32', length=24, batch_size=2)
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules='all-linear', lora_dropout=0.0, task_type='CAUSAL_LM')
    )
    with FlopCounterMode(display=False) as f:
        loss = model(**batch()).loss
        forward = f.get_total_flops()
        loss.backward()
    assert computed.forward_flops == forward
    assert .9*computed.backward_flops < f.get_total_flops()-forward <= computed.backward_flops


def test_the_callback_counts_the_same(tmp_path):
    "A real Trainer with ALFCallback: the same peak of the training state, the same probes and selections"
    model = demo_model(blocks=4)
    shape, alf = ModelShape.of(model.config, 'demo'), ALFCallback(preset='probe', budget=.25)
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=70,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy='no',
        logging_steps=100,
    )
    Trainer(model, args, train_dataset=demo_dataset(), data_collator=default_data_collator, callbacks=[alf]).train()
    log = RunLog(tmp_path)
    events = list(log.events())
    probes, selections = ([e for e in events if e['event'] == k] for k in ('probe', 'select'))
    assert sum(e['batches'] for e in probes) == probe_batches(70) == 10 and len(selections) == count_selections(70) == 2
    computed = [extrapolate(shape, names=e['names'], weights='fp32', length=32, batch_size=2) for e in selections]
    assert alf.run.totals.state_bytes_peak == max(e.state_bytes for e in computed)
    for e, s in zip(computed, selections):
        m = next(m for m in events if m['event'] == 'memory' and m['step'] > s['step'])
        assert (m['grad_bytes'], m['optimizer_bytes'], m['reference_bytes']) == (
            e.gradient_bytes,
            e.optimizer_bytes,
            e.reference_bytes,
        )


def test_selections_are_counted_as_the_callback_makes_them():
    for steps in (1, 5, 31, 32, 33, 70, 96, 120, 300, 767, 768, 1000, 5000):
        schedule = schedule_of(ALFConfig(), steps)
        assert count_selections(steps) == 1 + sum(map(schedule.due, range(1, steps))), steps


def test_large_models_follow_known_rules():
    for shape in SHAPES.values():
        full, alf, lora = (extrapolate(shape, m, weights='mixed') for m in ('full', 'alf', 'lora'))
        assert full.weight_bytes + full.state_bytes == 16 * shape.n_params + 4 * len(
            shape.units
        ), "the 16 bytes per parameter of mixed-precision AdamW"
        assert (
            alf.share <= 0.25 and alf.state_bytes < 0.35 * full.state_bytes
        ), "the goal of CONTRIBUTING's issue: at most 0.35 of full's state"
        assert lora.state_bytes < alf.state_bytes and lora.importance_flops == full.importance_flops == 0
        bf16 = extrapolate(shape, weights='bf16')
        assert 2*bf16.gradient_bytes == alf.gradient_bytes and 2*bf16.reference_bytes == alf.reference_bytes
        longer = extrapolate(shape, steps=10_000)
        assert (
            longer.importance_flops < extrapolate(shape, steps=100).importance_flops
            and longer.state_bytes == alf.state_bytes
        )
    assert (
        abs(
            extrapolate(SHAPES['Llama-2-7B'], 'full', length=1).flops
            / (6 * (SHAPES['Llama-2-7B'].n_params - 32000 * 4096))
            - 1
        )
        < 0.001
    ), "the rule of 6 FLOPs per parameter and token"


def test_flops_agree_with_the_policies_cost():
    "`step_cost` is the same arithmetic without attention"
    shape = SHAPES['Llama-3-8B']
    names = StaticPolicy('last', .25).select(None, shape.units).names
    e, full = (
        extrapolate(shape, m, names=names if m == 'alf' else None, length=1, steps=10**9) for m in ('alf', 'full')
    )
    assert abs((e.forward_flops + e.backward_flops)/full.flops - step_cost(shape.units, names)) < .001


def test_it_grows_with_what_it_should():
    shape, costs = SHAPES['SmolLM2-135M'], []
    for b in (.05, .1, .25, .5): costs.append(extrapolate(shape, budget=b))
    assert all(
        a.state_bytes < b.state_bytes and a.flops < b.flops and a.weight_bytes == b.weight_bytes
        for a, b in zip(costs, costs[1:])
    )
    short, long = (extrapolate(shape, length=l) for l in (512, 1024))
    assert (
        short.state_bytes == long.state_bytes
        and 1.9 < long.activation_bytes / short.activation_bytes < 2.1
        and long.flops > 2 * short.flops
    )


def test_a_meter_really_trains_what_it_should():
    model = demo_model()
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    names = ('block.1.mlp.up_proj', 'block.2.self_attn.k_proj')
    m = StepMeter(model, batch(), names, lr=1e-3)
    for i in range(3): m.step(measure=i == 2)
    layers = partition_layers(model)
    moved = {layers.unit_of(k) for k, p in model.named_parameters() if not torch.equal(p, before[k])}
    assert moved == set(names)
    c = m.costs()
    assert c.steps == 3 and c.probe_s == 0 and c.measure_s > 0 and all(p.grad is None for p in model.parameters())


def test_counting_what_is_kept_does_not_disturb_training():
    a, b = demo_model(), demo_model()
    x, y = StepMeter(a, batch()), StepMeter(b, batch())
    for m in (x, y): m.step()
    x.costs()
    for m in (x, y): m.step()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


def test_energy_is_unknown_where_it_cannot_be_read(tmp_path):
    zone = tmp_path/'intel-rapl:0'
    zone.mkdir()
    (zone/'name').write_text('package-0\n')                  # no counter: nobody may read it
    if torch.cuda.is_available(): pytest.skip('a GPU may have a counter of its own')
    assert EnergyMeter(tmp_path).read() is None
    m = StepMeter(demo_model(), batch())
    m.energy = EnergyMeter(tmp_path)
    m.step()
    assert m.costs().energy_j is None


def test_energy_of_a_step(tmp_path, monkeypatch):
    zone = tmp_path/'intel-rapl:0'
    zone.mkdir()
    for k, v in dict(name='package-0', energy_uj=0, max_energy_range_uj=10_000_000).items():
        (zone/k).write_text(f'{v}\n')
    m = StepMeter(demo_model(), batch())
    m.energy = EnergyMeter(tmp_path)
    m.energy.gpus = ()
    # µJ before and after each of two steps; the last wraps
    m.energy.last, used = m.energy._read(), iter((1_000_000, 4_000_000, 9_000_000, 2_000_000))
    monkeypatch.setattr(m.energy, '_read', lambda: [next(used)/1e6])
    m.step()
    m.step()
    assert m.costs().energy_j == pytest.approx((3 + 3)/2)


def test_records_survive_json_and_say_what_is_assumed():
    e = extrapolate(SHAPES['Llama-3-70B'])
    assert (
        Estimate.from_json(e.to_json()) == e
        and ModelShape.from_json(SHAPES['Llama-3-70B'].to_json()) == SHAPES['Llama-3-70B']
    )
    assert all(len(v) > 40 and v.endswith('.') for v in ASSUMPTIONS.values())
    c = measure_step(demo_model(), batch(), steps=1)
    assert StepCosts.from_json(c.to_json()) == c
    assert (
        Speed.fit([(c, extrapolate(ModelShape.of(demo_model().config), 'full', length=24, batch_size=2))]).flops_per_s
        > 0
    )


def test_shapes_outside_the_family_are_refused():
    config = demo_model().config
    config.attention_bias = True
    with pytest.raises(ValueError, match='another shape'): ModelShape.of(config)
    with pytest.raises(ValueError, match='references='): extrapolate(SHAPES['Llama-2-7B'], references='disk')


@pytest.mark.slow
def test_the_benchmark_runs_and_quick_appends_nothing():
    path = root/'benchmarks'/'results'/'efficiency.jsonl'
    before = path.read_bytes() if path.exists() else None
    out = subprocess.run(
        [sys.executable, 'benchmarks/bench_efficiency.py', '--quick', '--repeats', '1', '--threads', '1'],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert out.returncode == 0, out.stderr[-2000:]
    assert 'nothing appended' in out.stdout and 'left out' not in out.stdout
    for sweep, rows in dict(size=6, length=6, budget=4, peak=1).items():
        assert sum(l.startswith(sweep) for l in out.stdout.splitlines()) == rows, out.stdout
    assert (path.read_bytes() if path.exists() else None) == before


def test_committed_rows_can_be_read():
    path = root/'benchmarks'/'results'/'efficiency.jsonl'
    if not path.exists(): pytest.skip('nothing was measured yet')
    for r in map(json.loads, path.read_text(encoding='utf-8').splitlines()):
        assert {'sweep', 'shape', 'length', 'method', 'budget', 'device', 'versions', 'date', 'seed'} <= set(r)
        shape = ModelShape.from_dict(r['shape'])
        if r['sweep'] == 'peak': continue
        c = StepCosts.from_dict(r['costs'])
        names = None if r['units'] is None else [shape.units[i].name for i in r['units']]
        e = extrapolate(
            shape,
            r['method'],
            names=names,
            rank=r['rank'],
            length=r['length'],
            batch_size=r['batch_size'],
            weights=r['weights'],
            references='device' if c.reference_bytes else 'none',
        )
        assert {k: getattr(e, k) for k in BYTES} == {
            k: getattr(c, k) for k in BYTES
        }, "what was measured is what arithmetic says"
