"""The command line: refused before torch is loaded, repeated from its own file, rehearsed, watched, merged."""
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from alf_nb.app.cli import main
from alf_nb.app.merge import merge
from alf_nb.core.runlog import RunLog
from alf_nb.demo import demo_model, demo_tokenizer
from alf_nb.sources.blocks import holdout_split, token_blocks
from alf_nb.sources.losses import evaluate_loss
from alf_nb.sources.texts import load_texts

ROOT = Path(__file__).resolve().parents[1]
# torch and transformers cannot be imported
WITHOUT = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; from alf_nb.app.cli import main; "


def without_torch(where, *argv):
    env = dict(os.environ, PYTHONPATH=str(ROOT), HF_HUB_OFFLINE='1')
    return subprocess.run([sys.executable, '-c', WITHOUT + 'sys.exit(main())', *map(str, argv)], capture_output=True,
                          text=True, env=env, cwd=where)


@pytest.fixture(scope='module')
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp('command')
    for o in (demo_model(), demo_tokenizer()): o.save_pretrained(folder/'model')
    (folder/'notes.txt').write_text('\n\n'.join(f'The sum of {i} and {i+1} is {2*i+1}.' for i in range(200)))
    return folder


def options(work, out):
    given = dict(model=work/'model', data=work/'notes.txt', other=work/'notes.txt', steps=4, max_length=32, lr=1e-2,
                 eval_blocks=3, interval=2, out=out)
    return [x for k,v in given.items() for x in (f"--{k.replace('_', '-')}", str(v))] + ['--quiet', '--fp32']


@pytest.fixture(scope='module')
def run(work):
    assert main(['finetune', *options(work, work/'run')]) == 0
    return work/'run'


WRONG = dict(
    file=('--data', 'none.jsonl', "no file or folder 'none.jsonl'"),
    column=('--column', 'body', "no column 'body'"),
    budget=('--budget', '3', 'above 0 and at most 1'),
    steps=('--steps', '0', 'steps=0'),
    both=('--epochs', '2', 'give one'),
    model=('--model', './none', 'no model folder'),
    config=('--config', 'none.yaml', 'none.yaml'),
    place=('--out', 'rows.jsonl', 'is a file'),
)


@pytest.mark.parametrize('name', WRONG)
def test_a_mistake_is_told_without_torch_and_leaves_nothing(tmp_path, name):
    option, value, words = WRONG[name]
    (tmp_path/'rows.jsonl').write_text('{"prompt": "Hi", "completion": "Hello"}\n')
    more = ('--steps', '7') if name == 'both' else ()
    res = without_torch(tmp_path, 'finetune', '--data', 'rows.jsonl', option, value, *more)
    assert res.returncode == 2 and words in res.stderr, res.stderr
    assert [p.name for p in tmp_path.iterdir()] == ['rows.jsonl']


def test_it_is_told_in_under_a_second(tmp_path):
    "The processor's time: other work on the machine does not count"
    code = WITHOUT + "import time; main(['finetune', '--budget', '3']); print(time.process_time())"
    took = min(float(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT).stdout)
               for _ in range(3))
    assert took < 1, took


def test_a_run_is_repeated_from_its_file(run, work, tmp_path):
    assert main(['finetune', '--config', str(run/'run.yaml'), '--out', str(tmp_path/'again'), '--quiet']) == 0
    a, b = (load_file(p/'delta'/'delta.safetensors') for p in (run, tmp_path/'again'))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    same = lambda p: [l for l in (p/'run.yaml').read_text().splitlines() if not l.startswith('#')]
    assert same(run) == same(tmp_path/'again')


def test_what_stands_beside_a_file_wins(run, work, tmp_path):
    argv = ['finetune', '--config', str(run/'run.yaml'), '--out', str(tmp_path/'run'), '--quiet', '--steps', '2']
    assert main([*argv, '--grad-accum', '2']) == 0
    begin = RunLog(tmp_path/'run').begin
    assert (begin['max_steps'], begin['about']['grad_accum'], begin['about']['lr']) == (2, 2, 1e-2)


def test_a_rehearsal_writes_nothing(work, tmp_path, capsys):
    assert main(['finetune', *options(work, tmp_path/'run'), '--dry-run']) == 0
    told = capsys.readouterr().out
    for words in ('texts', 'steps', 'about', 'memory, weights', 'would write'): assert words in told, told
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_watched_without_torch(run, work):
    res = without_torch(work, 'watch', run)
    assert res.returncode == 0, res.stderr
    for words in ('complete', 'step 4 of 4', 'training loss', 'loss, this domain', 'trains'): assert words in res.stdout


def test_a_run_that_goes_on_is_watched_until_its_end(tmp_path, monkeypatch, capsys):
    from alf_nb.app import watch as watching
    log = RunLog(tmp_path)
    log.write('run_begin', run_id='a', model='m', max_steps=4, units=[])
    log.write('log', step=2, loss=3., seconds_per_step=1.)

    def later(s):
        log.write('run_end', step=4, wall_s=4.)
    monkeypatch.setattr(time, 'sleep', later)
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True)
    watching.watch(tmp_path)
    log.close()
    told = capsys.readouterr().out
    assert 'unfinished' in told and '2 of 4, about 2 s left' in told
    assert told.rstrip().split('\x1b[2J')[-1].startswith('m · complete')


def test_a_merged_model_is_the_tuned_one(run, work, tmp_path):
    assert main(['merge', str(run), str(tmp_path/'whole')]) == 0
    model, tokenizer = (c.from_pretrained(tmp_path/'whole') for c in (AutoModelForCausalLM, AutoTokenizer))
    held = token_blocks(holdout_split(load_texts(work/'notes.txt'), seed=0)[1], tokenizer, 32)
    loss, _ = evaluate_loss(model, held.select(range(3)), autocast=False)
    after, = RunLog(run).events('eval', name='domain', when='after')
    assert loss == pytest.approx(after['loss'], abs=1e-6)
    assert not [n for n in os.listdir(tmp_path) if n.startswith('.')]


def test_a_merged_model_may_keep_more_of_its_base(run, tmp_path):
    assert main(['merge', str(run), str(tmp_path/'half'), '--scale', '.5']) == 0
    merge(run, tmp_path/'none', scale=0)
    merge(run, tmp_path/'whole')
    load = lambda name: AutoModelForCausalLM.from_pretrained(tmp_path/name).state_dict()
    none, half, whole = map(load, ("none", "half", "whole"))
    moved = [k for k in none if not torch.equal(none[k], whole[k])]
    assert moved
    for k in none: torch.testing.assert_close(half[k], (none[k] + whole[k])/2)


def test_nothing_is_merged_over(run, tmp_path):
    (tmp_path/'there').mkdir()
    (tmp_path/'there'/'mine.txt').write_text('mine')
    with pytest.raises(ValueError, match='nothing is overwritten'): merge(run, tmp_path/'there')
    assert os.listdir(tmp_path/'there') == ['mine.txt']


def test_a_push_without_a_network_says_so(run, monkeypatch, capsys):
    import huggingface_hub.constants
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    assert main(['push', str(run), 'me/my-delta']) == 2
    assert 'cannot push' in capsys.readouterr().err


def test_a_second_run_keeps_the_first(run, work, tmp_path):
    "Delta, card, report and file of the first are together in a folder of their own"
    for seed in (1, 2):
        argv = ['finetune', *options(work, tmp_path/'run'), '--seed', str(seed)]
        if seed == 1: main(argv)
        else:
            with pytest.warns(UserWarning, match='was used before'): assert main(argv) == 0
    kept, = (tmp_path/'run'/'earlier').iterdir()
    assert {p.name for p in kept.iterdir()} == {'delta', 'report.html', 'run.yaml', 'summary.json'}
    assert 'seed: 1' in (kept/'run.yaml').read_text() and 'seed: 2' in (tmp_path/'run'/'run.yaml').read_text()
    assert '| seed | 1 |' in (kept/'delta'/'README.md').read_text()
