"""A comparison by what a task is about: metrics on test rows, rates chosen on others, what is kept."""
import json

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from alf_nb.demo import demo_dataset, demo_model
from alf_nb.report.results import compare_results, read_results
from alf_nb.study.compare import compare_policies
from alf_nb.study.methods import METHODS
from alf_nb.study.runs import seen, train_method
from alf_nb.study.task import Task


def classifier():
    torch.manual_seed(0)
    shape = dict(hidden_size=16, num_hidden_layers=2, intermediate_size=32, num_attention_heads=2)
    return BertForSequenceClassification(BertConfig(vocab_size=64, max_position_embeddings=16, num_labels=2, **shape))


def labelled(n, first=0):
    "Is the first token above 32?"
    return [dict(input_ids=[t, 5, 7], attention_mask=[1]*3, labels=int(t > 32))
            for t in ((first+7*i) % 50 + 10 for i in range(n))]


def collate(rows): return {k: torch.tensor([r[k] for r in rows]) for k in rows[0]}


def ones(labels, predicted): return sum(predicted)/len(predicted)


def sorter(**kw):
    return Task(classifier(), labelled(40), labelled(12, 3), None, 'tiny', 'above 32', collate, 8, False, **kw)


def questions(n):
    answers = dict(answers=[[7, 8], [9], [10, 11, 12]], n_bytes=[6, 2, 9])
    return [dict(input_ids=[5+i, 6], label=i % 3, **answers) for i in range(n)]


def text_task(**kw):
    return Task(demo_model(), demo_dataset(48), demo_dataset(8, seed=7), None, 'demo', 'made-up', batch_size=4,
                bf16=False, **kw)


def test_a_metric_sees_labels_and_predictions_and_a_goal_has_to_be_measured():
    task = sorter(metrics=dict(ones=ones), goal='ones')
    found = task.evaluate(task.model, task.held)
    assert set(found) == {'loss', 'accuracy', 'ones'}
    with torch.no_grad(): said = task.model.eval()(**collate(labelled(12, 3))).logits.argmax(-1).tolist()
    assert found['ones'] == sum(said)/12
    assert found['accuracy'] == sum(a == r['labels'] for a, r in zip(said, labelled(12, 3)))/12
    with pytest.raises(ValueError, match="goal='f1'; this task measures loss, accuracy, ones"):
        sorter(metrics=dict(ones=ones), goal='f1')
    with pytest.raises(ValueError, match='metrics need rows with one label'): text_task(metrics=dict(ones=ones))
    with pytest.raises(ValueError, match='1.5 is not in 0-1'): text_task(scales=(1.5,))
    assert sorter().key == sorter(metrics=dict(ones=ones)).key != sorter(goal='accuracy').key
    assert sorter(test=labelled(9)).key != sorter().key


def test_rates_are_chosen_on_dev_rows_and_methods_ranked_on_test_rows(tmp_path):
    # the test rows say the opposite of what is learnt, so what is best there is worst on dev rows
    upside_down = [r | dict(labels=1-r['labels']) for r in labelled(12, 3)]
    task, out = sorter(test=upside_down, goal='accuracy'), tmp_path/'rows.jsonl'
    found = compare_policies(task, methods=('full', 'random'), rule='epochs', amount=3, seeds=(0, 1), lrs=(1e-5, 1e-2),
                             extend=0, points=0, out=out, progress=False)
    rows = read_results(out)
    assert {r['steps'] for r in rows} == {15}, "three passes over 40 rows, 8 a step"
    for r in rows: assert r['task_score'] == pytest.approx(1+r['choice']), "what is right there is wrong here"
    full = [r for r in rows if r['method'] == 'full' and r['seed'] == 0]
    best = min(full, key=lambda r: r['choice'])
    assert best['task_score'] < max(r['task_score'] for r in full), "the trial is too weak to tell"
    assert next(m for m in found if m.name == 'full').lr == best['lr']
    assert {r['seed'] for r in rows if r['method'] == 'full' and r['lr'] == best['lr']} == {0, 1}
    ranks = [m.mean('task_score') for m in found]
    assert ranks == sorted(ranks, reverse=True)
    assert f'{found.methods[0].name} has the highest accuracy' in found.verdict[0]
    assert '| accuracy |' in found._repr_markdown_()
    assert compare_results(out).goal == 'accuracy'


def test_a_higher_score_beats_chance(tmp_path):
    task, out = sorter(goal='accuracy'), tmp_path/'rows.jsonl'
    compare_policies(task, methods=('alf', 'random'), amount=4, seeds=(0, 1, 2), lrs=1e-3, points=0, out=out,
                     progress=False)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    for r in rows: r['task_score'] = (.9 if r['method'] == 'alf' else .5) + .01*r['seed']*(r['method'] == 'alf')
    assert 'Selection by measurement beats' in ' '.join(compare_results(rows).verdict)
    for r in rows: r['task_score'] = 1 - r['task_score']
    assert 'is significantly worse than' in ' '.join(compare_results(rows).verdict)


def test_choices_are_ranked_by_accuracy_and_the_panel_tells_what_is_kept():
    task = text_task(test=questions(6), general=dict(text=demo_dataset(4, seed=3), asked=questions(5)))
    r = train_method(task, METHODS['random'], 1e-3, 0, 6)
    assert set(r['metrics']) == {'accuracy', 'accuracy_norm'}
    before = seen(task, task.model)
    assert before['general']['text'] == task.evaluate(task.model, task.general['text'])['loss']
    assert before['general']['asked'] == task.evaluate(task.model, task.general['asked'])['accuracy']
    assert r['general']['text'] != before['general']['text'], "it trained"


@pytest.mark.parametrize('method', ['full', 'lora', 'random'])
def test_along_a_run_s_change_everything_is_measured_too(method):
    task = text_task(general=dict(text=demo_dataset(4, seed=3)), scales=(0., .5, 1.))
    r = train_method(task, METHODS[method], 4e-3, 0, 12)
    (zero, at_0), (_, half), (one, at_1) = r['scales']
    assert (zero, one) == (0, 1)
    assert at_0 == seen(task, task.model)
    assert at_1['task_loss'] == pytest.approx(r['task_loss'], rel=1e-5)
    assert min(at_0['task_loss'], at_1['task_loss']) < half['task_loss'] < max(at_0['task_loss'], at_1['task_loss'])
