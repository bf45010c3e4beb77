"""The demo's job on the real SmolLM2-135M, shortened: the command gives the result that a script and a notebook give
together, the script killed and the notebook going on from its checkpoint."""
import json, os, subprocess, sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

SHORT = dict(steps=4, max_length=32, batch_size=2, eval_blocks=4, interval=2)
FIGURES = (
    'domain_loss_before',
    'domain_loss_after',
    'other_loss_before',
    'other_loss_after',
    'trainable_share_mean',
    'trainable_share_peak',
    'steps',
    'seed',
)
SUMMARY = (
    'steps seed wall_s domain_loss_before domain_loss_after other_loss_before other_loss_after trainable_share_mean'
    ' trainable_share_peak seconds_per_step tokens_per_second state_bytes_peak rss_bytes_peak importance_overhead_share'
).split()


def summary(run): return json.loads((run/'summary.json').read_text(encoding='utf-8'))
def figures(run): return {k: summary(run)[k] for k in FIGURES}
def weights(run): return (run/'delta'/'delta.safetensors').read_bytes()


def call(out, **more):
    how = {**SHORT, **more}
    return f"from alf_nb.app.finetune import finetune\nfinetune(out={str(out)!r}, progress=False, **{how!r})"


def command(out):
    alf = Path(sys.executable).with_name('alf')
    options = [x for k, v in SHORT.items() for x in (f"--{k.replace('_', '-')}", str(v))]
    return subprocess.run([alf, 'finetune', '--out', out, *options], capture_output=True, text=True)


@pytest.fixture(scope='module')
def by_command(tmp_path_factory):
    out = tmp_path_factory.mktemp('command')/'run'
    res = command(out)
    assert not res.returncode, res.stderr
    return out, res


def test_the_command_fine_tunes_a_real_model(by_command):
    out, res = by_command
    s = summary(out)
    assert all(isinstance(s[k], (int, float)) for k in SUMMARY)
    assert s['domain_loss_after'] < s['domain_loss_before'] - .01
    assert 0 < s['trainable_share_peak'] <= .25
    assert s['state_bytes_peak'] <= .35*12*s['n_total']
    assert {p.name for p in out.iterdir()} == {'delta', 'events.jsonl', 'report.html', 'run.yaml', 'summary.json'}
    for word in ('before', 'after', 'loss', 'perplexity', 'trainable', 'step'): assert word in res.stdout.lower(), word
    assert 'loss' in res.stderr and '4/4' in res.stderr        # the progress bar


@pytest.mark.slow
def test_a_script_that_is_killed_and_a_notebook_that_goes_on_give_the_same(by_command, tmp_path):
    "Killed behind the checkpoint of step 2, in which a selection is new"
    kill = (
        "from transformers import TrainerCallback\nimport alf_nb.app.finetune as f, os\nclass Kill(f.Bar):\n    def"
        " on_step_end(self, args, state, control, **kw):\n        if state.global_step == 3: os._exit(9)\nf.Bar ="
        " Kill\n"
    )
    script = kill + call(tmp_path/'run', save_steps=2)
    res = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert res.returncode == 9, res.stderr
    assert (tmp_path/'run'/'checkpoint-2').exists() and not (tmp_path/'run'/'summary.json').exists()
    resume = call(tmp_path/'run', save_steps=2, resume=True)
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(resume)])
    NotebookClient(nb, timeout=600, kernel_name='python3').execute()
    assert figures(tmp_path/'run') == figures(by_command[0])


@pytest.mark.slow
def test_the_delta_makes_the_tuned_model(by_command):
    from alf_nb.model.delta import apply_delta
    from alf_nb.sources.models import load_model
    from alf_nb.sources.losses import evaluate_loss
    from alf_nb.sources.blocks import holdout_split, token_blocks
    from alf_nb.sources.texts import load_texts
    model, tokenizer = load_model(progress=False)
    apply_delta(model, by_command[0]/'delta')
    held = token_blocks(holdout_split(load_texts(), seed=0)[1], tokenizer, SHORT['max_length'])
    loss, _ = evaluate_loss(model, held.select(range(SHORT['eval_blocks'])), batch_size=SHORT['batch_size'])
    assert loss == pytest.approx(summary(by_command[0])['domain_loss_after'], abs=1e-6)
