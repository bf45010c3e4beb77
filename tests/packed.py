"""Packed chats, as test_chats.py runs them: in a process of their own."""
import pytest
import torch

from alf_nb.app.finetune import finetune
from alf_nb.core.runlog import RunLog
from alf_nb.demo import demo_model, demo_tokenizer
from alf_nb.sources.chats import Chat
from alf_nb.sources.templates import answer_rows, keep_apart, pack_rows, pad_rows
from test_chats import SHORT, losses, said, tiny, written


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
