"""Two real processes (gloo, CPU) under torchrun: all ranks choose the same, and what they learn is what one process
learns from the same batches.

Starting a process takes seconds, so each of the few launches runs several jobs, one after the other, scripts first;
every test then looks at its own."""
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import forks
import pytest
import torch

from alf_nb.core.runlog import RunLog

CONFIGS = Path(__file__).parents[1]/'configs'
CUDA = torch.cuda.is_available()
SCRIPT = '''
import gc, hashlib, json, os, runpy, sys, torch, warnings
from pathlib import Path
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerCallback
from alf_nb.core.checkpoints import find_checkpoint
from alf_nb.model.fingerprint import fingerprint
from alf_nb.demo import demo_dataset, demo_model
from alf_nb.app.finetune import finetune
from alf_nb.signals.probe import model_loss
from alf_nb.model.shards import local_tensor, full_tensor
from alf_nb.train import probing
from alf_nb.train.loop import ALFLoop
from alf_nb.train.trainer import ALFCallback
torch.set_num_threads(1)
gc.freeze()                                                # see tests/conftest.py
world, rank = int(os.environ.get('WORLD_SIZE', 1)), int(os.environ.get('RANK', 0))

def beside(out):
    "What is said where each process would train by itself: a Trainer, and a loop"
    model, rows = demo_model(), [{k: torch.tensor([v]) for k, v in r.items()} for r in demo_dataset(4)]
    args = TrainingArguments(out, max_steps=3, report_to=[], disable_tqdm=True, save_strategy='no')
    ways = dict(
        trainer=lambda: Trainer(model, args, train_dataset=demo_dataset(), callbacks=[ALFCallback(budget=.3)]).train(),
        loop=lambda: ALFLoop(model, torch.optim.SGD(model.parameters(), lr=.1), rows, 2, out=out))
    for name, way in ways.items():
        try: way()
        except Exception as e: yield name, f'{type(e).__name__}: {e}'

def as_started(script, *argv):
    "A script by itself: nothing of what follows is changed yet"
    sys.argv[1:] = argv
    runpy.run_path(script, run_name='__main__')

spec = json.loads(Path(sys.argv[1]).read_text())
if spec['beside']: Path(f"{spec['beside']}{rank}.json").write_text(json.dumps(dict(beside(spec['beside']))))
for script in spec['scripts']: as_started(*script)
os.environ['ACCELERATE_MIXED_PRECISION'] = 'no'            # what the launch configs name is for a GPU

def allow_fsdp_on_cpu():
    "accelerate shards on accelerators only; one condition in its state says so, and the rest runs on a CPU as well"
    init = AcceleratorState.__init__
    def patched(self, *a, fsdp_plugin=None, **kw):
        init(self, *a, fsdp_plugin=fsdp_plugin, **kw)
        if fsdp_plugin is None or self.distributed_type != DistributedType.MULTI_CPU: return
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        PartialState._shared_state['distributed_type'] = DistributedType.FSDP
    AcceleratorState.__init__ = patched
allow_fsdp_on_cpu()

class Watch(TrainerCallback):
    "What this process holds while the gradients are there"
    def __init__(self, alf, die): self.alf, self.die, self.rows = alf, die, []
    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kw):
        held = lambda p: local_tensor(p).numel()
        ps = [p for n in self.alf.run.layers for p in self.alf.run.layers.params(n)]
        chosen = [p for n in self.alf.selection.names for p in self.alf.run.layers.params(n)]
        state = [v for s in optimizer.state.values() for v in s.values() if v.dim()]
        self.rows.append(dict(
            trains=sum(map(held, chosen)), all=sum(map(held, ps)),
            grad=sum(held(p.grad) for p in ps if p.grad is not None), ddp=self.buckets(), adam=sum(map(held, state))))
    def buckets(self):
        if not hasattr(self.wrapped(), 'reducer'): return 0
        return sum(map(int, self.wrapped()._get_ddp_logging_data()['bucket_sizes'].split(',')))
    def on_step_end(self, args, state, control, **kw):
        if self.die == [rank, state.global_step]: os._exit(9)

NAN, PLAIN = float('nan'), probing.trainer_loss
SIGNALS = 'prior', 'rate', 'agreement', 'gain', 'grad_norm', 'descent'

class Spoil(TrainerCallback):
    """NaN on the second process only: in the loss of a batch of the probe; in the gradient of one unit before the
    processes add theirs up, and after they did"""
    def __init__(self, alf, probe=None, before=None, after=None):
        self.alf, self.probe, self.before, self.after, self.n, self.units = alf, probe, before, after, 0, {}
        if probe is not None and rank: probing.trainer_loss = lambda trainer: self.loss
    def loss(self, model, batch):
        self.n += 1
        return model_loss(model, batch)*(NAN if self.n in self.probe else 1)
    def first(self, step):
        unit = self.units.setdefault(step, self.alf.selection.names[0])
        return self.alf.run.layers.params(unit)[0] if rank else None
    def on_step_begin(self, args, state, control, **kw):
        if state.global_step + 1 != self.before or (p := self.first(self.before)) is None: return
        p.register_hook(lambda g: g*(NAN if state.global_step + 1 == self.before else 1))
    def on_pre_optimizer_step(self, args, state, control, **kw):
        if state.global_step + 1 != self.after or (p := self.first(self.after)) is None: return
        p.grad.view(-1)[1] = NAN

def refused(out):
    "What `finetune` says here"
    try: finetune((demo_model(), None), out, out, steps=2, progress=False)
    except Exception as e: return f'{type(e).__name__}: {e}'
    return ''

def job(out, settings, die=None, resume=False, spoil=None, alone=False, half=False, **more):
    if 'fsdp' in more and not more['fsdp']:                # beside jobs that a launch config shards
        os.environ.pop('ACCELERATE_USE_FSDP', None)
        more.pop('fsdp')
    if alone:                  # one process that shards, as `accelerate launch --num_processes 1` starts it
        os.environ.update(RANK='0', WORLD_SIZE='1', LOCAL_RANK='0', MASTER_ADDR='127.0.0.1', MASTER_PORT='0')
    out = Path(out)
    torch.manual_seed(0)
    AcceleratorState._reset_state(reset_partial_state=True)
    probing.trainer_loss = PLAIN
    alf = ALFCallback(**settings)
    watch, bad = Watch(alf, die), Spoil(alf, **spoil) if spoil else None
    usual = dict(output_dir=str(out), max_steps=10, per_device_train_batch_size=4//world, learning_rate=1e-2,
                 logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy='no', seed=3)
    args, callbacks = TrainingArguments(**{**usual, **more}), [alf, watch, *([bad] if bad else [])]
    model = demo_model().to(torch.bfloat16 if half else torch.float32)
    trainer = Trainer(model, args, train_dataset=demo_dataset(), callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    watch.wrapped = lambda: trainer.model_wrapped
    trainer.train(resume_from_checkpoint=find_checkpoint(out) if resume else settings.get('resume_from'))
    state = trainer.accelerator.unwrap_model(trainer.model).state_dict()
    weights = {k: full_tensor(p.detach()) for k, p in state.items()}
    trainer.save_model(out/'model')
    said = refused(str(out/'finetune')) if world > 1 else ''
    (out/f'rank{rank}.json').write_text(json.dumps(dict(
        losses=[h['loss'] for h in trainer.state.log_history if 'loss' in h],
        weights=hashlib.sha256(b''.join(p.float().numpy().tobytes() for p in weights.values())).hexdigest(),
        names=list(alf.selection.names),
        share=alf.summary()['trainable_share_peak'],
        norm=[float(p.float().norm()) for p in weights.values()],
        held=watch.rows,
        n_total=alf.run.n_total,
        engine=type(trainer.model_wrapped).__name__,
        spoilt=list(bad.units.values()) if spoil else [],
        finetune=said,
        tuned=(out/'finetune').exists(),
        signals={s: alf.run.tracker.scores(s, 10).values for s in SIGNALS})))

for j in spec['jobs']: job(**j)
'''
PROBE = '''
import json, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_probe as T
from torch.utils.data import DataLoader
rank, out, found = int(os.environ['RANK']), Path(sys.argv[2]), {}
pairs = lambda: DataLoader(T.ROWS, batch_sampler=[[i, i+32] for i in range(32)], collate_fn=T.collate)
jobs = {
    'sampler': (T.Loading, pairs, {}),
    'dispatched sampler': (T.Loading, pairs, dict(dispatch_batches=True)),
    'stream': (T.Counting, None, {}),
    'stream in shares': (T.Counting, None, dict(dispatch_batches=False)),
}
for name, (kind, make, how) in jobs.items():
    args = dict(per_device_train_batch_size=2, max_steps=8, ddp_find_unused_parameters=True)
    if how: args['accelerator_config'] = how
    for alf in (None, T.probing()):
        data = T.ROWS if make else T.stream('an iterator')
        t = T.train(out/name, make, alf, kind, data=data, **args)
        names = list(alf.selection) if alf else []
        found[f"{name}, {'probed' if alf else 'plain'}"] = dict(seen=t.seen, probed=t.probed, names=names)
(out/f'rank{rank}.json').write_text(json.dumps(found))
'''
SAVE = dict(save_strategy='steps', save_steps=3)
HALF = dict(half=True, bf16=True)
PACKED = dict(budget=.25, quantize_frozen=4)
PRIOR = dict(signal='prior', budget=.3, interval=4)
GAIN = dict(preset='probe', budget=.25, interval=4, measure_every=3)
METER = dict(signal='agreement', budget=.25, interval=4, warm_up=3)
COLUMNS = dict(unit='columns', budget=.2)
BADAM = dict(preset='badam', interval=3)
NOREF = dict(preset='probe', budget=.25, interval=4, references='none', measure_every=3)
FSDP = dict(fsdp=True, fsdp_config=dict(version=2))
DDP = dict(fsdp=False)                      # beside jobs that a launch config shards
SHARDED = dict(fsdp=True, fsdp_config=dict(version=2, state_dict_type='SHARDED_STATE_DICT'))


def tutorial():
    "The script that the tutorial shows"
    cells = json.loads((Path(__file__).parents[1]/'nbs'/'tutorials'/'8_package.ipynb').read_text())['cells']
    source = next(''.join(c['source']) for c in cells if 'script.write_text' in ''.join(c['source']))
    return source.split("script.write_text('''\n")[1].split("'''")[0]


def alone(script, *argv):
    "One process of its own"
    sys.argv[:] = [script, *argv]
    runpy.run_path(script, run_name='__main__')


def launch(folder, processes, *jobs, timeout=300, config=None):
    (folder/'job.py').write_text(SCRIPT)
    (folder/'train.py').write_text(tutorial())
    (folder/'probe.py').write_text(PROBE)
    (folder/'probe').mkdir(exist_ok=True)
    together = CUDA or processes == 1 or config == 'accelerate_fsdp2.yaml'      # as they should
    scripts = []
    if processes > 1 and not (CUDA and jobs):
        scripts += [[str(folder/'train.py'), '--out', str(folder/f'tutorial-{config}'), '--steps', '4']]
    if processes > 1 and jobs and not config:
        scripts += [[str(folder/'probe.py'), str(Path(__file__).parent), str(folder/'probe')]]
    spec = dict(
        scripts=scripts,
        beside='' if together else str(folder/f'beside-{config}'),
        jobs=[{**j, 'out': str(folder/j['out'])} for j in jobs],
    )
    (folder/'jobs.json').write_text(json.dumps(spec))
    for j in jobs: (folder/j['out']).mkdir(exist_ok=True)
    if processes == 1: return forks.run(alone, str(folder/'job.py'), str(folder/'jobs.json'))
    head = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(processes)]
    if config:
        head = [
            sys.executable,
            '-m',
            'accelerate.commands.launch',
            '--config_file',
            str(CONFIGS / config),
            '--num_processes',
            str(processes),
            '--main_process_port',
            '0',
        ]
    env = {
        k: v
        for k, v in os.environ.items()
        if k not in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')
    } | dict(OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore')
    return subprocess.run(
        [*head, str(folder / 'job.py'), str(folder / 'jobs.json')],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=env,
    )


def ranks(folder, processes=2): return [json.loads((folder/f'rank{i}.json').read_text()) for i in range(processes)]


def events(folder): return [json.loads(s) for s in (folder/'events.jsonl').read_text().splitlines()]


def choices(folder): return [(e['step'], e['names']) for e in events(folder) if e['event'] == 'select']


def close(a, b, rel=1e-4):
    return len(a) == len(b) and all(abs(x-y) <= rel*max(abs(x), abs(y), 1e-6) for x, y in zip(a, b))


def same_signals(a, b, rel):
    for s, values in a['signals'].items():
        known = [n for n, v in values.items() if v is not None]
        assert known == [n for n, v in b['signals'][s].items() if v is not None], s
        assert close([values[n] for n in known], [b['signals'][s][n] for n in known], rel), s


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """All jobs: two processes, the last job of which is killed; one process; two again, started with a launch config
    for users"""
    d = tmp_path_factory.mktemp('processes')
    dead = launch(
        d,
        2,
        dict(out='prior2', settings=PRIOR, **SAVE),
        dict(out='badam2', settings=BADAM),
        dict(out='gain2', settings=GAIN, ddp_find_unused_parameters=False),
        dict(out='meter2', settings=METER),
        dict(out='columns2', settings=COLUMNS, **SAVE),
        dict(out='half2', settings=BADAM, **HALF, **SAVE),
        dict(out='packed2', settings=PACKED, **HALF, **SAVE),
        dict(out='nan2', settings=GAIN, spoil=dict(probe=[3])),
        dict(out='freeze2', settings=dict(check='freeze', **PRIOR), spoil=dict(before=3, after=6)),
        dict(out='fsdp-gain2', settings=GAIN, **FSDP, **SAVE),
        dict(out='fsdp-noref2', settings=NOREF, **FSDP),
        dict(out='fsdp-meter2', settings=METER, **FSDP, **SAVE),
        dict(out='fsdp-nan2', settings=GAIN, spoil=dict(probe=[3]), **FSDP),
        dict(out='fsdp-drop2', settings=BADAM, **SAVE, **FSDP),
        dict(out='fsdp-half2', settings=BADAM, **HALF, **SAVE, **FSDP),
        dict(out='fsdp-sharded2', settings=BADAM, **SAVE, **SHARDED),
        dict(
            out='fsdp-sharded2to2',
            settings=dict(resume_from=str(d / 'fsdp-sharded2' / 'checkpoint-3'), **BADAM),
            **SHARDED
        ),
        dict(out='fsdp-gain-cut', settings=GAIN, die=[1, 7], **FSDP, **SAVE),
    )
    assert (d/'fsdp-sharded2to2'/'rank1.json').exists(), dead.stderr[-3000:]
    (d/'dead.txt').write_text(f'{dead.returncode}\n{dead.stderr}')
    assert 0 == launch(
        d,
        1,
        dict(out='prior1', settings=PRIOR, **SAVE),
        dict(out='badam1', settings=BADAM),
        dict(out='gain1', settings=GAIN),
        dict(out='noref1', settings=NOREF),
        dict(out='meter1', settings=METER),
        dict(out='columns1', settings=COLUMNS),
        dict(out='columns2to1', settings=dict(resume_from=str(d / 'columns2' / 'checkpoint-6'), **COLUMNS)),
        dict(out='prior2to1', settings=dict(resume_from=str(d / 'prior2' / 'checkpoint-6'), **PRIOR)),
        dict(
            out='fsdp-gain2to1',
            settings=dict(resume_from=str(d / 'fsdp-gain2' / 'checkpoint-6'), **GAIN),
            alone=True,
            **FSDP
        ),
        dict(out='fsdp-gain1', settings=GAIN, alone=True, **SAVE, **FSDP),
    )
    again = launch(
        d,
        2,
        dict(out='fsdp-gain-cut', settings=GAIN, resume=True, **SAVE),
        dict(out='fsdp-half2to2', settings=dict(resume_from=str(d / 'fsdp-half2' / 'checkpoint-6'), **BADAM), **HALF),
        dict(out='fsdp-meter2to2', settings=dict(resume_from=str(d / 'fsdp-meter2' / 'checkpoint-6'), **METER)),
        dict(out='fsdp-gain1to2', settings=dict(resume_from=str(d / 'fsdp-gain1' / 'checkpoint-6'), **GAIN)),
        dict(out='fsdp-drop2to2', settings=dict(resume_from=str(d / 'fsdp-drop2' / 'checkpoint-3'), **BADAM)),
        dict(out='prior2to2', settings=dict(resume_from=str(d / 'prior2' / 'checkpoint-6'), **PRIOR), **DDP),
        dict(out='half2to2', settings=dict(resume_from=str(d / 'half2' / 'checkpoint-6'), **BADAM), **HALF, **DDP),
        dict(out='packed2to2', settings=dict(resume_from=str(d / 'packed2' / 'checkpoint-6'), **PACKED), **HALF, **DDP),
        dict(out='prior1to2', settings=dict(resume_from=str(d / 'prior1' / 'checkpoint-6'), **PRIOR), **DDP),
        config='accelerate_fsdp2.yaml',
    )
    assert again.returncode == 0, again.stderr[-3000:]
    return d


@pytest.mark.parametrize('name', ['prior', 'badam', 'columns'])
def test_two_processes_learn_what_one_does(runs, name):
    (one,), two = ranks(runs/f'{name}1', 1), ranks(runs/f'{name}2')
    assert two[0]['engine'] == 'DistributedDataParallel'
    assert two[0]['weights'] == two[1]['weights'] and two[0]['names'] == two[1]['names'] == one['names']
    assert close(two[0]['losses'], one['losses']) and close(two[0]['norm'], one['norm'])
    same_signals(one, two[0], 1e-3)


def test_a_choice_by_gradient_is_the_same_on_every_rank(runs):
    a, b = ranks(runs/'gain2')
    assert (
        a['names'] == b['names']
        and a['weights'] == b['weights']
        and a['signals'] == b['signals']
        and 0 < a['share'] <= 0.25
    )


@pytest.mark.parametrize('name', ['meter2', 'fsdp-meter2'])
def test_what_two_processes_meter_is_what_one_does(runs, name):
    "The same random signs everywhere, and the gradient of all batches"
    (one,), (a, b) = ranks(runs/'meter1', 1), ranks(runs/name)
    assert a['signals'] == b['signals'] and a['names'] == b['names'] == one['names'] and a['weights'] == b['weights']
    assert sum(v is not None for v in a['signals']['agreement'].values()) > 20
    same_signals(one, a, 1e-3)
    assert not [e for e in events(runs/name) if e['event'] == 'probe']


def test_a_meter_goes_on_after_a_resume_of_pieces(runs):
    "Between two selections, with sketches of steps before and after the checkpoint"
    whole, again = ranks(runs/'fsdp-meter2'), ranks(runs/'fsdp-meter2to2')
    assert again[0]['weights'] == whole[0]['weights'] and again[0]['signals'] == whole[0]['signals']


def test_pieces_of_a_16_bit_model_are_in_fp32_and_learn_what_masters_do(runs):
    "accelerate shards a 16-bit model in fp32, and torch computes in bf16"
    whole, pieces, again = (ranks(runs/n) for n in ('half2', 'fsdp-half2', 'fsdp-half2to2'))
    assert pieces[0]['engine'].startswith('FSDP') and close(whole[0]['losses'], pieces[0]['losses'], 1e-3)
    memory = [e for e in events(runs/'fsdp-half2') if e['event'] == 'memory'][-1]
    assert memory['grad_bytes'] == 4*pieces[0]['held'][-1]['grad']
    assert again[0]['losses'] == pieces[0]['losses'] and again[0]['weights'] == pieces[0]['weights']


def test_what_is_packed_is_the_same_on_every_rank_and_after_a_resume(runs):
    whole, again = ranks(runs/'packed2'), ranks(runs/'packed2to2')
    assert whole[0]['weights'] == whole[1]['weights'] == again[0]['weights'] == again[1]['weights']
    assert whole[0]['losses'] == again[0]['losses'] and 0 < whole[0]['share'] <= .25
    pack, = [e for e in events(runs/'packed2') if e['event'] == 'pack']
    assert pack['bytes_after'] < .8*pack['bytes_before']


def test_fp32_masters_are_the_same_on_every_rank_and_after_a_resume(runs):
    a, b = ranks(runs/'half2')
    assert a['engine'] == 'DistributedDataParallel' and a['weights'] == b['weights'] and a['names'] == b['names']
    assert len(choices(runs/'half2')) > 2
    memory = [e for e in events(runs/'half2') if e['event'] == 'memory']
    assert memory and all(e['master_bytes'] > 0 for e in memory)
    again, _ = ranks(runs/'half2to2')
    assert again['weights'] == a['weights'] and again['losses'] == a['losses']


@pytest.mark.parametrize('name', ['gain', 'noref'])
def test_weights_in_pieces_learn_what_one_process_does(runs, name):
    (one,), two = ranks(runs/f'{name}1', 1), ranks(runs/f'fsdp-{name}2')
    assert two[0]['engine'].startswith('FSDP') and two[0]['n_total'] == one['n_total']
    assert two[0]['signals'] == two[1]['signals'] and two[0]['weights'] == two[1]['weights']       # to the last bit
    assert choices(runs/f'fsdp-{name}2') == choices(runs/f'{name}1')
    assert close(two[0]['losses'], one['losses']) and close(two[0]['norm'], one['norm'])
    same_signals(one, two[0], 2e-3)


def test_a_frozen_piece_costs_neither_gradient_nor_optimizer_state(runs):
    for r in ranks(runs/'fsdp-gain2'):
        for h in r['held']:
            assert h['grad'] == h['trains'] and h['adam'] == 2*h['trains'] and h['trains'] <= .3*h['all']
    assert len(choices(runs/'fsdp-gain2')) > 1
    memory = [e for e in events(runs/'fsdp-gain2') if e['event'] == 'memory']
    assert memory and all(e['grad_bytes'] <= 4*.3*r['held'][0]['all'] for e in memory)  # the log speaks of one process


def test_what_is_saved_from_pieces_loads_in_one_process(runs, tmp_path):
    from transformers import AutoModelForCausalLM
    from alf_nb.model.delta import apply_delta, save_delta
    from alf_nb.demo import demo_model
    model, base = AutoModelForCausalLM.from_pretrained(runs/'fsdp-gain2'/'model'), demo_model()
    assert [float(p.norm()) for p in model.state_dict().values()] == pytest.approx(
        ranks(runs / 'fsdp-gain2')[0]['norm'], rel=1e-6
    )
    delta = save_delta(model, base, tmp_path)
    assert 0 < len(delta) < delta.n_tensors and apply_delta(base, tmp_path).changed == delta.changed
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), base.state_dict().values()))


def test_a_rank_that_dies_ends_the_job_and_the_run_goes_on(runs):
    code, *said = (runs/'dead.txt').read_text().splitlines()
    assert (
        code != '0'
        and any('exitcode' in x and ': 9' in x for x in said)
        and not (runs / 'fsdp-gain-cut' / 'checkpoint-7').exists()
    )
    for new, old in (('fsdp-gain-cut', 'fsdp-gain2'), ('prior2to2', 'prior2')):
        a, b = ranks(runs/new), ranks(runs/old)
        assert a[0]['engine'] == b[0]['engine']
        for k in ('weights', 'losses', 'signals', 'names'): assert a[0][k] == a[1][k] == b[0][k], k


@pytest.mark.parametrize(
    'new, old, n',
    [
        ('prior1to2', 'prior1', 2),
        ('prior2to1', 'prior2', 1),
        ('fsdp-gain1to2', 'fsdp-gain1', 2),
        ('fsdp-gain2to1', 'fsdp-gain2', 1),
        ('columns2to1', 'columns2', 1),
    ],
)
def test_a_run_goes_on_with_another_number_of_processes(runs, new, old, n):
    a, b = ranks(runs/new, n)[0], ranks(runs/old, 3-n)[0]
    assert a['engine'].startswith('FSDP') == b['engine'].startswith('FSDP') == new.startswith('fsdp')
    assert a['names'] == b['names'] and close(a['losses'], b['losses']) and close(a['norm'], b['norm'])
    same_signals(b, a, 1e-3)
    assert choices(runs/new) == [c for c in choices(runs/old) if c[0] > 6]


@pytest.mark.parametrize('name', ['fsdp-drop2', 'fsdp-sharded2'])
def test_a_run_goes_on_right_after_a_switch_that_dropped_state(runs, name):
    (one,) = ranks(runs/'badam1', 1)
    (switch,) = [e for e in events(runs/name) if e['event'] == 'select' and e['step'] == 3]
    # nothing that trains has state in Adam when checkpoint-3 is written
    assert switch['left'] and switch['entered'] == switch['names']
    a, b = ranks(runs/f'{name}to2'), ranks(runs/name)
    assert (runs/name/'checkpoint-3'/'pytorch_model_fsdp_0').is_dir() == (name == 'fsdp-sharded2')
    for k in ('weights', 'losses', 'signals', 'names'): assert a[0][k] == a[1][k] == b[0][k], k
    assert close(b[0]['losses'], one['losses']) and close(b[0]['norm'], one['norm'])  # and saving has changed nothing


@pytest.mark.parametrize('name', ['nan2', 'fsdp-nan2'])
def test_a_batch_that_is_nan_on_one_process_is_left_out_by_all(runs, name):
    a, b = ranks(runs/name)
    for k in ('weights', 'losses', 'signals', 'names'): assert a[k] == b[k], k
    assert [e['batches'] for e in events(runs/name) if e['event'] == 'probe'][:2] == [7, 2]
    assert choices(runs/name)[0][1]


def test_nan_in_a_gradient_of_one_process_freezes_the_same_unit_on_all(runs):
    a, b = ranks(runs/'freeze2')
    for k in ('weights', 'losses', 'names', 'spoilt'): assert a[k] == b[k], k
    assert [(e['step'], e['units']) for e in events(runs / 'freeze2') if e['event'] == 'freeze'] == [
        (3, a['spoilt'][:1]),
        (6, a['spoilt'][1:]),
    ]
    assert len(a['losses']) == 10 and all(0 < x < 10 for x in a['losses']) and not set(a['spoilt']) & set(a['names'])


@pytest.fixture
def launched(runs, config):
    "The other launch config starts the scripts alone: the jobs of DDP run under torchrun"
    if config == 'accelerate_ddp.yaml' and not CUDA:
        done = launch(runs, 2, config=config)
        assert done.returncode == 0, done.stderr[-3000:]
    return runs


BY_HAND = [None, pytest.param('accelerate_ddp.yaml', marks=pytest.mark.slow)]


@pytest.mark.skipif(CUDA, reason='here they find each other')
@pytest.mark.parametrize('config', BY_HAND)
def test_processes_that_would_train_beside_each_other_are_refused_before_anything_is_written(launched, runs, config):
    for rank in range(2):
        said = json.loads((runs/f'beside-{config}{rank}.json').read_text())
        assert re.search('2 processes were started, and this Trainer trains alone.*use_cpu=True', said['trainer'])
        assert 'ALFLoop runs in one process, and here are several (2)' in said['loop']
    assert not [f for f in (runs/f'beside-{config}').rglob('*') if f.is_file()]


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason='two processes need two GPUs, or none')
@pytest.mark.parametrize('config', [*BY_HAND, 'accelerate_fsdp2.yaml'])
def test_the_script_of_the_tutorial_runs_under_every_launcher_that_is_documented_also_without_a_gpu(
    launched, runs, config
):
    if CUDA: assert launch(runs, 2, config=config).returncode == 0         # the other jobs are on the CPU
    folder = runs/f'tutorial-{config}'
    log = RunLog(folder)
    assert log.status == 'complete' and len(log.events('run_begin')) == 1 and not log.damaged
    assert (folder/'delta'/'delta.safetensors').exists() and not (folder/'alf.lock').exists()


def test_a_probe_takes_other_rows_on_each_process(runs):
    a, b = ranks(runs/'probe')
    for name in ('sampler', 'dispatched sampler', 'stream', 'stream in shares'):
        plain, probed = f'{name}, plain', f'{name}, probed'
        assert a[probed]['names'] == b[probed]['names'] != []
        for x in (a, b): assert x[probed]['seen'] == x[plain]['seen'] and len(x[probed]['probed']) == 8 + 2
        for mine, other in zip(a[probed]['probed'], b[probed]['probed']):
            assert len(mine) == len(other) == 2 and not set(mine) & set(other)
            if 'sampler' in name: assert [mine[1] - mine[0], other[1] - other[0]] == [32, 32]


def test_finetune_is_refused_under_a_launcher(runs):
    for name in ('gain2', 'fsdp-gain2', 'prior2to2'):
        for r in ranks(runs/name):
            assert 'finetune() works in one process, and 2 were started' in r['finetune'] and not r['tuned']


@pytest.mark.skipif((os.cpu_count() or 1) < 4, reason='four processes on fewer cores take too long')
def test_replicas_of_pieces_learn_what_one_process_does(runs, tmp_path, monkeypatch):
    for k, v in dict(USE_PARALLELISM_CONFIG='true', DP_REPLICATE_SIZE='2', DP_SHARD_SIZE='2').items():
        monkeypatch.setenv(f"{'ACCELERATE_' if k[0] == 'U' else 'PARALLELISM_CONFIG_'}{k}", v)
    hsdp = launch(tmp_path, 4, dict(out='hsdp4', settings=GAIN, **FSDP))
    assert hsdp.returncode == 0, hsdp.stderr[-3000:]
    (one,), four = ranks(runs/'gain1', 1), ranks(tmp_path/'hsdp4', 4)
    assert all(r['signals'] == four[0]['signals'] and r['weights'] == four[0]['weights'] for r in four) and choices(
        tmp_path / 'hsdp4'
    ) == choices(runs / 'gain1')
    assert close(four[0]['losses'], one['losses']) and close(four[0]['norm'], one['norm'])
    # a half each, in two copies
    for r in four: assert all(2*h['grad'] == 2*h['trains'] == o['trains'] for h, o in zip(r['held'], one['held']))


def test_ddp_buffers_only_what_trains(runs):
    for name in ('prior2', 'badam2', 'gain2', 'prior2to2'):
        held = ranks(runs/name)[0]['held']
        for h in held: assert h['ddp'] == 4*h['trains'] < 4*.5*h['all']


def test_accelerate_reads_the_launch_configs():
    from accelerate.commands.config.config_args import load_config_from_file
    kinds = {f.name: load_config_from_file(str(f)).distributed_type.value for f in CONFIGS.iterdir()}
    assert kinds == {'accelerate_ddp.yaml': 'MULTI_GPU', 'accelerate_fsdp2.yaml': 'FSDP'}


def test_what_cannot_work_is_refused_before_the_first_step(monkeypatch):
    from types import SimpleNamespace
    from torch import nn
    from alf_nb.train.engine import check_engine
    args, model = SimpleNamespace(deepspeed=None, fsdp=None, world_size=1), nn.Linear(2, 2)
    check_engine(args, model)
    with pytest.raises(ValueError, match='FSDP1 flattens.*version'):
        check_engine(args, nn.Sequential(type('FullyShardedDataParallel', (nn.Linear,), {})(2, 2)))
    with pytest.warns(UserWarning, match='every process holds the whole weights'):
        check_engine(SimpleNamespace(**{**vars(args), 'fsdp': True}), model)
    with pytest.raises(ValueError, match='DeepSpeed.*accelerate_fsdp2.yaml.*apply_selection'):
        check_engine(SimpleNamespace(**{**vars(args), 'deepspeed': 'ds.json'}), model)
    split = nn.Linear(2, 2)
    split._tp_size = 2
    with pytest.raises(ValueError, match='tensor parallelism is not supported'): check_engine(args, split)
    monkeypatch.setenv('ACCELERATE_USE_DEEPSPEED', 'true')
    with pytest.raises(ValueError, match='DeepSpeed'): check_engine(args, model)
