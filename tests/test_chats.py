"""Chats of every usual shape go through `finetune`: the loss is that of the answers, in training and in evaluation."""
import json
import warnings

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM

from alf_nb.app.finetune import finetune
from alf_nb.core.runlog import RunLog
from alf_nb.demo import demo_model, demo_tokenizer
from alf_nb.sources.chats import Chat
from alf_nb.sources.templates import answer_rows, keep_apart, pack_rows, pad_rows
from alf_nb.sources.texts import load_texts
from alf_nb.study.task import text_task

SHORT = dict(steps=4, max_length=64, eval_blocks=3, lr=1e-2, interval=2, bf16=False, progress=False, probe_batches=2)


def said(i): return f'{i} and {i}?', f'It is {2*i}.' + ' Yes.'*(i % 5)


def turns(i, keys, names):
    return [dict(zip(keys, pair)) for pair in zip(names, said(i))]


SHAPES = dict(
    messages=lambda i: dict(messages=turns(i, ('role', 'content'), ('user', 'assistant'))),
    sharegpt=lambda i: dict(conversations=turns(i, ('from', 'value'), ('human', 'gpt'))),
    alpaca=lambda i: dict(instruction=said(i)[0], input='', output=said(i)[1], text='not this'),
    pairs=lambda i: dict(prompt=said(i)[0], completion=said(i)[1]),
)


def written(folder, shape, n=40, suffix='jsonl'):
    file = folder/f'{shape}.{suffix}'
    rows = [SHAPES[shape](i) for i in range(n)]
    if suffix == 'tsv':
        lines = ['\t'.join(rows[0]), *('\t'.join(r.values()) for r in rows)]
        file.write_text('\n'.join(lines))
    elif suffix == 'json': file.write_text(json.dumps(rows))
    else: file.write_text('\n'.join(map(json.dumps, rows)))
    return file


def tiny(): return demo_model(), demo_tokenizer()


def losses(out): return {(e['name'], e['when']): e['loss'] for e in RunLog(out).events('eval')}


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A run on chats, and the file that it learnt"
    folder = tmp_path_factory.mktemp('chats')
    file = written(folder, 'messages')
    finetune(tiny(), file, folder/'run', other=file, **SHORT)
    return folder/'run', file


@pytest.mark.parametrize('shape,suffix', [('sharegpt', 'json'), ('alpaca', 'jsonl'), ('pairs', 'tsv')])
def test_every_shape_is_the_same_chat(tmp_path, run, shape, suffix):
    assert load_texts(written(tmp_path, shape, suffix=suffix)) == load_texts(run[1])


def test_only_answers_are_evaluated(run):
    "Tokens of the held-out loss are those of the answers and their ends"
    events = RunLog(run[0]).events('eval', name='domain', when='before')
    rows = answer_rows(load_texts(run[1]), demo_tokenizer(), 64)
    lengths = {tuple(i for i in r['labels'] if i != -100) for r in rows}
    assert all(demo_tokenizer().decode(l).startswith(' It is') for l in lengths)
    assert 0 < events[0]['tokens'] <= 3*max(map(len, lengths))


def test_the_log_knows_the_data_and_how_it_was_learnt(run):
    about = RunLog(run[0]).begin['about']
    assert about['texts'].startswith('40 chats, 40 answers') and about['data'] == str(run[1])
    assert (about['lr'], about['batch_size'], about['grad_accum'], about['max_length']) == (1e-2, 3, 1, 64)


def test_its_sample_is_an_answer_to_a_question(run):
    sample, = RunLog(run[0]).events('sample', when='before')
    assert sample['prompt'] in {said(i)[0] for i in range(40)}


def test_a_question_is_never_learnt(tmp_path):
    "Other questions of the same length change the loss through what is read, never through what is predicted"
    chat = lambda q: Chat([dict(role='user', content=q), dict(role='assistant', content='Yes.')])
    rows = answer_rows([chat('Is it?'), chat('Is ye?')], demo_tokenizer())
    assert rows[0]['labels'] == rows[1]['labels'] and rows[0]['input_ids'] != rows[1]['input_ids']
    model = demo_model().eval()
    out = model(input_ids=torch.tensor([rows[0]['input_ids']]), labels=torch.tensor([rows[0]['labels']]))
    logits = out.logits[0, :-1]
    learnt = [i for i,l in enumerate(rows[0]['labels'][1:]) if l != -100]
    by_hand = torch.nn.functional.cross_entropy(logits[learnt], torch.tensor(rows[0]['input_ids'])[1:][learnt])
    assert out.loss.item() == pytest.approx(by_hand.item(), abs=1e-5) and len(learnt) == len(' Yes.') + 1


def test_rows_cached_behind_the_frozen_blocks_give_the_same_losses(tmp_path, run):
    "Rows differ in length, so batches are padded"
    more = SHORT | dict(steps=30, freeze_bottom=.5, policy='static', interval=0, start='prior')
    for name, cache in (('cached', True), ('plain', False)):
        finetune(tiny(), run[1], tmp_path/name, other=run[1], **more, cache_prefix=cache)
    a, b = losses(tmp_path/'cached'), losses(tmp_path/'plain')
    assert a == pytest.approx(b, abs=1e-4) and a['domain', 'after'] < a['domain', 'before']


def test_other_texts_at_a_resume_are_said(tmp_path, run):
    finetune(tiny(), run[1], tmp_path/'run', other=run[1], save_steps=2, **SHORT)
    more = written(tmp_path, 'pairs', 50)
    with pytest.warns(UserWarning, match='goes on with other rows'):
        finetune(tiny(), more, tmp_path/'run', other=run[1], resume=True, **SHORT | dict(steps=6))


def test_epochs_are_steps_over_the_rows(tmp_path, run):
    kw = SHORT | dict(epochs=2, batch_size=2, grad_accum=3)
    kw.pop('steps')
    summary = finetune(tiny(), run[1], tmp_path/'run', other=run[1], **kw)
    rows = RunLog(tmp_path/'run').begin['about']['rows']
    assert summary['steps'] == 2*-(-(-(-rows//2))//3)


def test_methods_are_compared_on_answers(run):
    task = text_task(tiny(), run[1], run[1], batch_size=4, max_length=64, eval_blocks=4, bf16=False, progress=False)
    one = [task.evaluate(task.model, [r])['loss'] for r in task.held]
    n = [sum(l != -100 for l in r['labels'][1:]) for r in task.held]
    mean = sum(a*b for a,b in zip(one, n))/sum(n)
    assert task.evaluate(task.model, task.held)['loss'] == pytest.approx(mean, abs=1e-4)


def test_what_is_no_data_is_refused_or_said(tmp_path):
    (tmp_path/'report.pdf').write_bytes(b'%PDF-1.4\n\0\xff')
    with pytest.raises(ValueError, match='report.pdf is not'): load_texts(tmp_path/'report.pdf')
    (tmp_path/'code.py').write_text('print(1)')
    with pytest.warns(UserWarning, match='code.py is read as plain text'): load_texts(tmp_path/'code.py')
    (tmp_path/'a.txt').write_text('a')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        load_texts(tmp_path/'a.txt')


def packs(model):
    "(a batch of packed rows, the same chats a row each)"
    rows = answer_rows([Chat([dict(role='user', content=q), dict(role='assistant', content=a)])
                        for q,a in map(said, range(9))], demo_tokenizer(), 64)
    return pad_rows(list(pack_rows(rows, 200))), pad_rows(list(rows))


def summed(model, batch):
    with torch.no_grad(): out = model(**batch)
    return (out.loss*(batch['labels'][:, 1:] != -100).sum()).item()


@pytest.mark.parametrize('attention', ['eager', 'sdpa'])
def test_a_packed_chat_has_the_loss_that_it_has_alone(attention):
    model = demo_model().eval()
    model.set_attn_implementation(attention)
    keep_apart(model)
    packed, alone = packs(model)
    assert len(packed['input_ids']) < len(alone['input_ids'])/2
    assert 0 < (packed['labels'] != -100).sum() == (alone['labels'] != -100).sum()
    assert summed(model, packed) == pytest.approx(summed(model, alone), rel=1e-5)
    mixed = {k: v for k,v in packed.items() if k != 'position_ids'}
    assert summed(model, mixed) != pytest.approx(summed(model, alone), rel=1e-3)


@pytest.mark.parametrize('make', [
    lambda: BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=2)),
    lambda: MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4)),
])
def test_a_model_that_does_not_keep_packed_chats_apart_is_refused(make):
    model = make().train()
    cached = model.config.use_cache
    with pytest.raises(ValueError, match='lets a packed chat look into'): keep_apart(model)
    assert model.training and model.config.use_cache == cached


def test_a_run_on_packed_chats(tmp_path, capfd):
    file = written(tmp_path, 'messages')
    for n in ('loose', 'packed'):
        finetune(tiny(), file, tmp_path/n, other=file, **SHORT | dict(max_length=160), packing=n == 'packed')
    said = capfd.readouterr()
    assert not said.err and not said.out
    rows = {n: RunLog(tmp_path/n).events('run_begin')[0]['about']['rows'] for n in ('loose', 'packed')}
    assert rows['packed'] < rows['loose']/2
    assert losses(tmp_path/'packed')['domain', 'before'] == losses(tmp_path/'loose')['domain', 'before']
    assert losses(tmp_path/'packed')['domain', 'after'] < losses(tmp_path/'packed')['domain', 'before']


def test_packing_is_refused_where_it_does_nothing_or_would_be_wrong(tmp_path):
    file = written(tmp_path, 'messages')
    text = tmp_path/'text.txt'
    text.write_text('The cat sat on the mat. '*400)
    with pytest.raises(ValueError, match='these are texts'):
        finetune(tiny(), text, tmp_path/'a', other=file, **SHORT, packing=True)
    with pytest.raises(ValueError, match='give one of the two'):
        finetune(tiny(), file, tmp_path/'b', other=file, **SHORT, packing=True, cache_prefix=True, freeze_bottom=.5)
