"""DeepSpeed (ZeRO-1, 2 and 3, two processes, gloo, CPU): a choice made once, before the Trainer is made, trains
there as it does in one process; ALFCallback is refused by name. Runs where deepspeed is installed."""
import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec('deepspeed') is None, reason='deepspeed is not installed')]

SCRIPT = '''
import json, os, sys, torch
from pathlib import Path
from accelerate.state import AcceleratorState
from transformers import Trainer, TrainingArguments, TrainerCallback
from alf_nb.demo import demo_dataset, demo_model
from alf_nb.model.layers import partition_layers
from alf_nb.model.optim import apply_selection
from alf_nb.train.trainer import ALFCallback
torch.set_num_threads(1)
out, world, rank = Path(sys.argv[1]), int(os.environ.get('WORLD_SIZE', 1)), int(os.environ.get('RANK', 0))

def job(stage, how):
    "how: 'static', chosen and frozen before the Trainer is made; 'late', frozen after 5 steps; 'callback'"
    torch.manual_seed(0)
    AcceleratorState._reset_state(reset_partial_state=True)
    model = demo_model()
    layers = partition_layers(model)
    copies = lambda model: {k: p.detach().clone() for k, p in model.named_parameters()}
    before = copies(model)
    chosen = ALFCallback(budget=.3).preview(model)
    mine = [k for n in chosen.names for k in layers.named_params(n)]
    if how == 'static': apply_selection(layers, chosen.names)
    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **kw):
            if state.global_step == 5 and how == 'late':
                apply_selection(layers, chosen.names)
                before.update(copies(model))
            while hasattr(optimizer, 'optimizer'): optimizer = optimizer.optimizer
            state = [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
            self.bytes = sum(v.nbytes for v in state if v.dim())
    watch, said = Watch(), ''
    auto = dict.fromkeys(('train_micro_batch_size_per_gpu', 'train_batch_size', 'gradient_accumulation_steps'), 'auto')
    args = TrainingArguments(
        str(out/f'{stage}{how}'), max_steps=10, per_device_train_batch_size=4//world, learning_rate=1e-2,
        weight_decay=.1, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy='no', seed=3,
        deepspeed=dict(zero_optimization=dict(stage=stage), **auto) if stage else None)
    alf = [ALFCallback(budget=.3)] if how == 'callback' else []
    trainer = Trainer(model, args, train_dataset=demo_dataset(), callbacks=[watch, *alf])
    try: trainer.train()
    except ValueError as e: said = str(e)
    after, whole = {}, dict(trainer.accelerator.unwrap_model(trainer.model).named_parameters())
    for k, p in whole.items():
        if stage == 3:
            import deepspeed
            with deepspeed.zero.GatheredParameters([p]): after[k] = p.detach().clone()
        else: after[k] = p.detach().clone()
    losses = [h['loss'] for h in trainer.state.log_history if 'loss' in h]
    moved = [k for k in before if not torch.equal(before[k], after[k])]
    row = dict(losses=losses, moved=moved, mine=mine, bytes=getattr(watch, 'bytes', 0), said=said)
    (out/f'{stage}{how}{rank}.json').write_text(json.dumps(row))

for stage, how in json.loads(sys.argv[2]): job(stage, how)
'''


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    d = tmp_path_factory.mktemp('deepspeed')
    (d/'job.py').write_text(SCRIPT)
    env = {
        k: v
        for k, v in os.environ.items()
        if k not in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')
    } | dict(OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore', DS_ACCELERATOR='cpu')
    for head, jobs in (
        ([], [(0, 'static')]),
        (
            ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2'],
            [(1, 'static'), (2, 'static'), (1, 'late'), (2, 'late'), (1, 'callback'), (3, 'static')],
        ),
    ):
        r = subprocess.run(
            [sys.executable, *head, str(d / 'job.py'), str(d), json.dumps(jobs)],
            capture_output=True,
            text=True,
            timeout=300,
            env=env,
        )
        assert r.returncode == 0, r.stderr[-3000:]
    return lambda name: json.loads((d/f'{name}.json').read_text())


@pytest.mark.parametrize('stage', [1, 2, 3])
def test_what_is_chosen_before_the_trainer_trains_under_zero(runs, stage):
    one, a, b = runs('0static0'), runs(f'{stage}static0'), runs(f'{stage}static1')
    # what is frozen keeps every bit
    assert a['moved'] == b['moved'] == a['mine'] == one['moved'] and 0 < len(a['mine']) < 20
    assert a['losses'] == b['losses'] == pytest.approx(one['losses'], rel=1e-5)
    assert a['bytes'] == pytest.approx(one['bytes']/2, rel=.01)  # state of what trains, in two halves


@pytest.mark.parametrize('stage', [1, 2])
def test_what_is_frozen_later_would_go_on_moving(runs, stage):
    a = runs(f'{stage}late0')
    # why the callback is refused
    assert len(a['moved']) > len(a['mine']) and a['bytes'] > 1.5*runs(f'{stage}static0')['bytes']


def test_the_callback_is_refused_and_says_what_works(runs):
    for rank in (0, 1):
        assert (
            'accelerate_fsdp2.yaml' in runs(f'1callback{rank}')['said']
            and 'apply_selection' in runs(f'1callback{rank}')['said']
            and not runs(f'1callback{rank}')['moved']
        )
