"""Methods under one rule, on tiny models: every method runs and keeps its promise; a killed comparison goes on; a
classifier; equal time."""
import json, time

import forks
import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, DataCollatorWithPadding

from alf_nb.app.cli import main
from alf_nb.study.compare import compare_policies
from alf_nb.study.runs import _layer_map, train_method, trained_model
from alf_nb.study.task import Task, text_task
from alf_nb.study.methods import METHODS, Method, alf_method
from alf_nb.demo import demo_dataset, demo_model, demo_tokenizer
from alf_nb.report.results import read_results

FIELDS = (
    'method signal unit budget lr seed model data rule steps tokens wall_s task_loss other_loss trainable_share_peak'
    ' state_bytes_peak'.split()
)


def small_task():
    return Task(
        demo_model(),
        demo_dataset(96),
        demo_dataset(8, seed=7),
        demo_dataset(8, seed=9),
        'demo',
        'ring',
        batch_size=4,
        bf16=False,
    )


@pytest.fixture
def task(): return small_task()


@pytest.mark.slow
def test_every_method_trains_on_the_same_batches(task, tmp_path):
    rates = {m: (1e-3,) for m in METHODS}
    task = Task(demo_model(blocks=8), task.train, task.held, task.other, 'demo', 'ring', batch_size=4, bf16=False)
    found = compare_policies(
        task,
        methods=list(METHODS),
        amount=24,
        seeds=1,
        lrs=rates,
        out=tmp_path / 'policies.jsonl',
        points=2,
        progress=False,
    )
    rows = {r['method']: r for r in read_results(tmp_path/'policies.jsonl')}
    assert not [r['error'] for r in rows.values() if r.get('error')]
    assert set(rows) == set(METHODS) and len(found) == len(METHODS)
    for r in rows.values(): assert set(FIELDS) <= set(r), r['method']
    assert (
        len({r['data_order'] for r in rows.values()}) == 1
        and {r['steps'] for r in rows.values()} == {24}
        and len({r['tokens'] for r in rows.values()}) == 1
    )
    assert all(r['task_loss'] < r['task_loss_before'] for r in rows.values())                      # all learn
    same = {}
    for n,r in rows.items(): same.setdefault(r['task_loss'], []).append(n)
    # no two are the same run, but the second probe may agree with the first
    assert [v for v in same.values() if len(v) > 1] in ([], [['alf-unstratified', 'alf-static']])
    budgeted = [
        n
        for n in rows
        if n.startswith('alf') or n in ('random', 'random-stratified', 'rotate', 'inverted', 'first', 'last', 'spread')
    ]
    assert all(0 < rows[n]['trainable_share_peak'] <= 0.3 for n in budgeted), {
        n: rows[n]['trainable_share_peak'] for n in budgeted
    }
    # adapters on a model this small are no smaller than it
    assert all(rows[n]['state_bytes_peak'] < .5*rows['full']['state_bytes_peak'] for n in budgeted if n != 'alf-lora')
    assert (
        rows['full']['trainable_share_peak'] == 1
        and rows['freeze-50']['map']['block.3'] == '0' * 24
        and rows['freeze-25']['map']['block.2'] == '9' * 24
    )
    assert [rows[n]['selects'] for n in ('alf', 'random', 'inverted', 'full')] == [True, False, True, False]
    assert all(
        len(r['curve']) == 3 and r['curve'][-1][0] == 24 and r['curve'][-1][3] == r['task_loss'] for r in rows.values()
    )
    assert any('against random' in v for v in found.verdict)


def test_the_state_of_full_training_is_three_weights(task):
    r = train_method(task, METHODS['full'], 1e-3, 0, 4)
    weights = sum(p.numel()*4 for p in task.model.parameters())
    assert 3*weights <= r['state_bytes_peak'] < 3.02*weights  # gradient and two moments, and a step counter each


def test_evaluation_while_training_changes_nothing(task):
    torch.manual_seed(0)
    with_dropout = Task(
        demo_model('gpt2', resid_pdrop=0.2),
        demo_dataset(96),
        demo_dataset(8, seed=7),
        None,
        'gpt2',
        'ring',
        batch_size=4,
        bf16=False,
    )
    a, b = (train_method(with_dropout, METHODS['alf'], 1e-3, 0, 10, p) for p in ((), {2, 5, 7}))
    assert a['task_loss'] == b['task_loss'] and len(b['curve']) == 4


AGAIN = dict(methods=('full', 'alf', 'random'), amount=10, seeds=(0, 1), lrs=(1e-3, 2e-3), extend=0, progress=False)


def compare(out):
    "In a process of its own"
    torch.set_num_threads(1)
    compare_policies(small_task(), out=out, **AGAIN)


def test_the_further_a_method_goes_the_larger_its_distance_from_the_base(task, tmp_path):
    out, rates = tmp_path/'p.jsonl', (1e-4, 1e-2)
    found = compare_policies(task, methods=['full'], amount=6, seeds=0, lrs=rates, extend=0, out=out, progress=False)
    near, far = sorted((r['lr'], r['kl']) for r in read_results(out))
    assert 0 < near[1] < far[1]
    net = trained_model(task, METHODS['full'], near[0], 0, 6)
    rows = torch.tensor([r['input_ids'] for r in task.held])
    with torch.no_grad(): a, b = (m.eval()(rows).logits[:, :-1].log_softmax(-1) for m in (task.model, net))
    first = slice(0, 256)
    a, b = (x.flatten(0, 1)[first] for x in (a, b))
    assert near[1] == pytest.approx(float((a.exp()*(a-b)).sum(-1).mean()), rel=1e-3)
    assert f"| {min(r['kl'] for r in found.rows if r['lr'] == found.methods[0].lr):.3f} |" in found._repr_markdown_()
    assert 'KL from base' in found._repr_markdown_()


def test_killed_and_called_again_it_holds_the_same_runs(task, tmp_path):
    out = tmp_path/'a'/'policies.jsonl'
    child = forks.begin(compare, out)
    until = time.monotonic() + 120
    while (not out.exists() or out.read_bytes().count(b'\n') < 3) and child.is_alive() and time.monotonic() < until:
        time.sleep(.02)
    child.kill()
    child.join()
    done = out.read_bytes().count(b'\n')
    assert 3 <= done < 9, f"{done} rows: killed too late to mean anything"
    # half a row, as a full disk leaves it
    with out.open('ab') as f: f.write(b'{"key": "torn", "task": "de')
    compare_policies(task, out=out, **AGAIN)
    compare_policies(task, out=tmp_path/'b.jsonl', **AGAIN)
    lines = [json.loads(l) for l in out.read_text().splitlines() if l.endswith('}')]
    assert len(lines) == len({r['key'] for r in lines}) == 9                                       # nothing twice
    figures = lambda rows: {
        (r['method'], r['lr'], r['seed']): (r['task_loss'], r['other_loss'], r['map'], r['data_order'], r['key'])
        for r in rows
    }
    assert figures(lines) == figures(read_results(tmp_path/'b.jsonl'))


def test_the_best_rate_is_looked_for_beyond_the_grid(task, tmp_path):
    found = compare_policies(
        task,
        methods='full',
        amount=8,
        seeds=(0, 1),
        lrs=(1e-6, 2e-6),
        extend=2,
        out=tmp_path / 'p.jsonl',
        progress=False,
    )
    assert [(r['lr'], r['seed']) for r in read_results(tmp_path / 'p.jsonl')] == [
        (1e-6, 0),
        (2e-6, 0),
        (4e-6, 0),
        (8e-6, 0),
        (8e-6, 1),
    ]
    assert any('may lie beyond' in w for w in found.warnings)  # and still at the edge: said


def test_equal_time_means_equal_time(task, tmp_path):
    slow = Method(
        'slow',
        'every step takes 50 ms longer',
        (1e-3,),
        prepare=lambda model, task: model.register_forward_pre_hook(lambda *a: time.sleep(0.05)) and model,
    )
    compare_policies(
        task,
        methods=('full', slow, 'alf-once'),
        rule='wall',
        amount=3,
        seeds=0,
        lrs={'full': (1e-3,), 'alf-once': (1e-3,)},
        out=tmp_path / 'p.jsonl',
        progress=False,
    )
    rows = {r['method']: r for r in read_results(tmp_path/'p.jsonl')}
    assert not [r['error'] for r in rows.values() if r.get('error')]
    assert all(r['wall_s'] < 3.5 for r in rows.values()), {k: r['wall_s'] for k,r in rows.items()}
    assert rows['slow']['steps'] < .6*rows['full']['steps']
    # the learning rate follows the clock, so every schedule is through
    assert not any(r['stopped_early'] for r in rows.values())
    short = compare_policies(
        task, methods=slow, rule='wall', amount=0.1, seeds=0, out=tmp_path / 'q.jsonl', progress=False
    )
    assert any('fewer than 4 steps in 0.1 s' in w for w in short.warnings)


def test_equal_tokens(task, tmp_path):
    compare_policies(
        task,
        methods='full',
        rule='tokens',
        amount=4 * 32 * 6,
        seeds=0,
        lrs=1e-3,
        out=tmp_path / 'p.jsonl',
        progress=False,
    )
    assert [(r['steps'], r['tokens']) for r in read_results(tmp_path/'p.jsonl')] == [(6, 4*32*6)]


def test_a_classifier_keeps_its_new_head_in_every_method(tmp_path):
    torch.manual_seed(0)
    tok = demo_tokenizer()
    cfg = BertConfig(
        vocab_size=258,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        num_labels=2,
        pad_token_id=0,
    )
    rows = [dict(tok('good ' * (i % 5 + 2) if i % 2 else 'bad ' * (i % 5 + 2)), labels=i % 2) for i in range(80)]
    for r in rows: r.pop('token_type_ids', None)
    task = Task(
        AutoModelForSequenceClassification.from_config(cfg),
        rows[:64],
        rows[64:],
        None,
        'bert',
        'mood',
        DataCollatorWithPadding(tok),
        8,
        False,
        pin='head',
    )
    names = ('full', 'alf', 'random', 'lora', 'freeze-50', 'badam', 'lisa')
    compare_policies(task, methods=names, amount=40, seeds=0, lrs=5e-3, out=tmp_path/'p.jsonl', progress=False)
    got = {r['method']: r for r in read_results(tmp_path/'p.jsonl')}
    assert not [r['error'] for r in got.values() if r.get('error')]
    assert all(set(r['map']['head']) == {'9'} for r in got.values() if r['map']), {
        k: r['map'] and r['map'].get('head') for k, r in got.items()
    }
    assert 'kl' not in got['full']
    assert got['full']['metrics']['accuracy'] == 1. and got['alf']['metrics']['accuracy'] > .9
    with pytest.raises(ValueError, match="'heads' matches no unit"):
        compare_policies(Task(task.model, rows, rows, pin='heads', bf16=False), out=tmp_path/'q.jsonl', progress=False)


def test_what_blows_up_is_a_row_and_not_the_end(task, tmp_path):
    def poison(model, task):
        next(model.parameters()).data.fill_(float('nan'))
        return model
    found = compare_policies(
        task,
        methods=(Method('poisoned', 'NaN', (1e-3, 2e-3), prepare=poison), 'full'),
        amount=6,
        seeds=(0, 1),
        lrs=dict(full=(1e-3,)),
        out=tmp_path / 'p.jsonl',
        progress=False,
    )
    rows = read_results(tmp_path/'p.jsonl')
    assert [
        (r['method'], r['lr'], r['seed'], r['diverged'], r['task_loss'] is None)
        for r in rows
        if r['method'] == 'poisoned'
    ] == [('poisoned', 1e-3, 0, True, True), ('poisoned', 2e-3, 0, True, True)]
    assert {m.name: len(m.runs) for m in found} == dict(full=2, poisoned=0)


def test_the_command(tmp_path, capsys, monkeypatch):
    model, tok = demo_model(tie_word_embeddings=True), demo_tokenizer()
    model.save_pretrained(tmp_path/'net')
    tok.save_pretrained(tmp_path/'net')
    (tmp_path/'texts').mkdir()
    for i in range(8): (tmp_path/'texts'/f'{i}.txt').write_text(f'number {i} is a number, and so is {i+1}. ' * 12)
    argv = [
        'compare',
        '--model',
        str(tmp_path / 'net'),
        '--data',
        str(tmp_path / 'texts'),
        '--methods',
        'full',
        'random',
        '--amount',
        '6',
        '--seeds',
        '0',
        '1',
        '--lrs',
        '1e-3',
        '--max-length',
        '64',
        '--eval-blocks',
        '4',
        '--fp32',
        '--quiet',
        '--out',
        str(tmp_path / 'out'),
    ]
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert (
        'equal steps' in said
        and 'comparison.html' in said
        and len(read_results(tmp_path / 'out' / 'policies.jsonl')) == 4
    )
    assert main([*argv[:5], '--methods', 'fulll', '--out', str(tmp_path/'bad')]) == 2
    assert "unknown method 'fulll'" in capsys.readouterr().err and not (tmp_path/'bad').exists()
