"""From a finished run to how much of it to keep: what the points say is what the run's own log says of its ends."""
import json

import pytest
import torch

from alf_nb.app.cli import main
from alf_nb.app.finetune import finetune
from alf_nb.app.tradeoff import tradeoff
from alf_nb.app.tuned import load_tuned
from alf_nb.core.runlog import RunLog
from alf_nb.demo import demo_model, demo_tokenizer
from alf_nb.sources.models import load_model


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tradeoff')
    for o in (demo_model(), demo_tokenizer()): o.save_pretrained(folder/'base')
    notes = folder/'notes.txt'
    notes.write_text('\n\n'.join(f'note {i}: the quick brown fox jumps over the lazy dog. '*6 for i in range(20)))
    finetune(str(folder/'base'), str(notes), folder/'run', steps=6, max_length=32, eval_blocks=4, seed=5, lr=1e-2,
             bf16=False, progress=False)
    return folder


@pytest.fixture(scope='module')
def points(run): return tradeoff(run/'run', base=str(run/'base'))


def test_its_ends_are_those_that_the_run_measured(run, points):
    losses = {(e['name'], e['when']): e['loss'] for e in RunLog(run/'run').events('eval')}
    for p, when in ((points.points[0], 'before'), (points.points[-1], 'after')):
        assert p['task'] == pytest.approx(losses['domain', when], rel=1e-5)
        assert p['other'] == pytest.approx(losses['other', when], rel=1e-5)


def test_the_further_from_the_base_the_larger_the_divergence(points):
    kl = [p['kl'] for p in points.points]
    assert kl[0] == 0 < kl[1] and kl == sorted(kl)


def test_the_run_says_the_same_distance(run, points):
    found, = RunLog(run/'run').events('divergence')
    assert found['kl'] == pytest.approx(points.points[-1]['kl'], rel=1e-4) and found['tokens'] == 124
    assert json.loads((run/'run'/'summary.json').read_text())['kl_from_base'] == found['kl']
    assert f"{found['kl']:.3f} nats from the base" in (run/'run'/'report.html').read_text(encoding='utf-8')


def test_from_a_terminal(run, points, capsys):
    there = [str(run/'run'), '--base', str(run/'base'), '--scales', '0.5', '1', '--save', str(run/'half')]
    assert main(['tradeoff', *there, '--scale', '0.5']) == 0
    told = capsys.readouterr().out
    half = points.points[2]
    assert f"| 50 % | {half['task']:.3f} | {half['other']:.3f} | {half['kl']:.4f} |" in told and '25 %' not in told
    assert (run/'half'/'delta.safetensors').is_file()
    assert main(['tradeoff', *there]) == 2 and 'go together' in capsys.readouterr().err


def test_what_is_saved_lies_on_the_line(run, points):
    points.save(run/'quarter', .25)
    nets = [load_model(str(run/'base'))[0], *(load_tuned(p, str(run/'base'))[0] for p in (run/'quarter', run/'run'))]
    base, quarter, tuned = (dict(n.named_parameters()) for n in nets)
    moved = [k for k in base if not torch.equal(base[k], tuned[k])]
    assert moved
    for k in base: torch.testing.assert_close(quarter[k], base[k].lerp(tuned[k], .25))
    with pytest.raises(ValueError, match='nothing is overwritten'): points.save(run/'quarter', .5)


def test_a_run_that_does_not_say_its_data_asks_for_it(run, tmp_path):
    (run/'run'/'delta').rename(tmp_path/'delta')
    try:
        with pytest.raises(ValueError, match='give data'): tradeoff(tmp_path/'delta', base=str(run/'base'))
    finally: (tmp_path/'delta').rename(run/'run'/'delta')
