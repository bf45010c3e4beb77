"""From a finished run to how much of it to keep: what the points say is what the run's own log says of its ends."""
import pytest
import torch

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
