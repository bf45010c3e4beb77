"Two real processes (gloo, CPU) under torchrun: all ranks choose the same, and what they learn is what one process learns from the same batches."
import json
import os
import subprocess
import sys

import pytest

SCRIPT = '''
import hashlib, json, os, sys, torch
from pathlib import Path
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from alf_nb.checkpoints import find_checkpoint
from alf_nb.demo import demo_dataset, demo_model
from alf_nb.trainer import ALFCallback
torch.set_num_threads(1)
out, settings, more = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
world, rank = int(os.environ.get('WORLD_SIZE', 1)), int(os.environ.get('RANK', 0))
resume, die = more.pop('resume', False), more.pop('die', None)
torch.manual_seed(0)
alf = ALFCallback(**settings)
args = TrainingArguments(**{**dict(output_dir=str(out), max_steps=10, per_device_train_batch_size=4//world, learning_rate=1e-2, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy='no', seed=3), **more})
class Die(ALFCallback.__mro__[1]):
    def on_step_end(self, args, state, control, **kw):
        if die == [rank, state.global_step]: os._exit(9)
trainer = Trainer(demo_model(), args, train_dataset=demo_dataset(), callbacks=[alf, Die()])
trainer.remove_callback(PrinterCallback)
trainer.train(resume_from_checkpoint=find_checkpoint(out) if resume else None)
model = trainer.accelerator.unwrap_model(trainer.model)
digest = hashlib.sha256(b''.join(p.detach().numpy().tobytes() for p in model.state_dict().values())).hexdigest()
(out/f'rank{rank}.json').write_text(json.dumps(dict(losses=[h['loss'] for h in trainer.state.log_history if 'loss' in h], weights=digest, names=list(alf.selection.names), share=alf.summary()['trainable_share_peak'],
    rates=alf.tracker.scores('rate', 10).values, norm=[float(p.detach().norm()) for p in model.parameters()])))
'''


def launch(folder, processes, settings, timeout=180, **more):
    (folder/'job.py').write_text(SCRIPT)
    argv = [str(folder/'job.py'), str(folder), json.dumps(settings), json.dumps(more)]
    head = [sys.executable] if processes == 1 else [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(processes)]
    env = {k: v for k, v in os.environ.items() if k not in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')} | dict(OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore')
    return subprocess.run([*head, *argv], capture_output=True, text=True, timeout=timeout, env=env)


def ranks(folder, processes): return [json.loads((folder/f'rank{i}.json').read_text()) for i in range(processes)]


def close(a, b, rel=1e-4): return len(a) == len(b) and all(abs(x-y) <= rel*max(abs(x), abs(y), 1e-6) for x, y in zip(a, b))


@pytest.mark.parametrize('settings', [dict(signal='prior', budget=.3, interval=4), dict(preset='badam', interval=3)], ids=['prior', 'badam'])
def test_two_processes_learn_what_one_does(tmp_path, settings):
    for n in (1, 2):
        (tmp_path/str(n)).mkdir()
        done = launch(tmp_path/str(n), n, settings)
        assert done.returncode == 0, done.stderr[-2000:]
    (one,), two = ranks(tmp_path/'1', 1), ranks(tmp_path/'2', 2)
    assert two[0]['weights'] == two[1]['weights'] and two[0]['names'] == two[1]['names'] == one['names']
    assert close(two[0]['losses'], one['losses']) and close(two[0]['norm'], one['norm'])
    known = [n for n, v in one['rates'].items() if v is not None]
    assert known and close([two[0]['rates'][n] for n in known], [one['rates'][n] for n in known], 1e-3)


def test_a_choice_by_gradient_is_the_same_on_every_rank(tmp_path):
    done = launch(tmp_path, 2, dict(budget=.25, interval=4))
    assert done.returncode == 0, done.stderr[-2000:]
    a, b = ranks(tmp_path, 2)
    assert a['names'] == b['names'] and a['weights'] == b['weights'] and 0 < a['share'] <= .25


def test_a_rank_that_dies_ends_the_job_and_the_run_goes_on(tmp_path):
    settings, saving = dict(signal='prior', budget=.3, interval=4), dict(save_strategy='steps', save_steps=3)
    for d in ('whole', 'cut'): (tmp_path/d).mkdir()
    done = launch(tmp_path/'whole', 2, settings, **saving)
    assert done.returncode == 0, done.stderr[-2000:]
    dead = launch(tmp_path/'cut', 2, settings, die=[1, 7], **saving)
    assert dead.returncode != 0 and 'exitcode  : 9' in dead.stderr.replace('exitcode: 9', 'exitcode  : 9'), dead.stderr[-2000:]
    again = launch(tmp_path/'cut', 2, settings, resume=True, **saving)
    assert again.returncode == 0, again.stderr[-2000:]
    whole, cut = ranks(tmp_path/'whole', 2), ranks(tmp_path/'cut', 2)
    assert cut[0]['weights'] == whole[0]['weights'] and cut[0]['losses'] == whole[0]['losses']
