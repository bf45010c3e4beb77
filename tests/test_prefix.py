"""What the frozen lowest blocks make of a row is computed once (`cache_prefix`): the same losses, or a refusal."""
import copy
import itertools
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from small_run import losses, small_trainer, weights
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import BertConfig, BertForSequenceClassification, DistilBertConfig
from transformers import DistilBertForSequenceClassification, GPT2Config, GPT2LMHeadModel, LlamaConfig
from transformers import LlamaForCausalLM, RobertaConfig, RobertaForMaskedLM, T5Config
from transformers import T5ForConditionalGeneration, TrainerCallback

from alf_nb.app import cli
from alf_nb.app.finetune import finetune
from alf_nb.core.config import ALFConfig
from alf_nb.core.runlog import RunLog
from alf_nb.demo import demo_model, demo_tokenizer
from alf_nb.train.controller import ALFController
from alf_nb.train.engine import Engine
from alf_nb.train.loop import ALFLoop
from alf_nb.train.probing import ProbeSource
from alf_nb.train.trainer import ALFCallback

WIDE = dict(vocab_size=96, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64,
            max_position_embeddings=48)
STILL = dict(hidden_dropout_prob=0., attention_probs_dropout_prob=0.)
DISTIL = dict(vocab_size=96, dim=32, n_layers=4, n_heads=2, hidden_dim=64, max_position_embeddings=48)
GPT2 = dict(vocab_size=96, n_embd=32, n_layer=4, n_head=2, n_positions=48)
MAKE = dict(
    llama=lambda: LlamaForCausalLM(LlamaConfig(**WIDE, num_key_value_heads=1)),
    tied=lambda: LlamaForCausalLM(LlamaConfig(**WIDE, tie_word_embeddings=True)),
    gpt2=lambda: GPT2LMHeadModel(GPT2Config(**GPT2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)),
    bert=lambda: BertForSequenceClassification(BertConfig(**WIDE, **STILL, num_labels=3)),
    distilbert=lambda: DistilBertForSequenceClassification(
        DistilBertConfig(**DISTIL, dropout=0, attention_dropout=0, seq_classif_dropout=0)),
    roberta=lambda: RobertaForMaskedLM(RobertaConfig(**WIDE, **STILL, pad_token_id=1)),
)


FULL = dict(policy='full', interval=0, budget=None, probe_batches=None)


def rows(n=24, kind='lm', seed=1):
    "Rows of 4 to 20 tokens, unpadded"
    g = torch.Generator().manual_seed(seed)
    made = [torch.randint(3, 96, (int(torch.randint(4, 21, (1,), generator=g)),), generator=g) for _ in range(n)]
    return [dict(input_ids=r, labels=r if kind == 'lm' else int(r[1]) % 2) for r in made]


def collate(rows, left=False, width=None, ignore=-100):
    n = width or max(len(r['input_ids']) for r in rows)
    def pad(v, fill):
        rest = v.new_full((n-len(v),), fill)
        return torch.cat([rest, v] if left else [v, rest])
    ids = [r['input_ids'] for r in rows]
    lm = isinstance(rows[0]['labels'], torch.Tensor)
    labels = torch.stack([pad(r['labels'], ignore) for r in rows]) if lm else torch.tensor([r['labels'] for r in rows])
    mask = torch.stack([pad(torch.ones_like(i), 0) for i in ids])
    return dict(input_ids=torch.stack([pad(i, 1) for i in ids]), attention_mask=mask, labels=labels)


def kind_of(name): return 'class' if 'bert' in name and name != 'roberta' else 'lm'


def run(folder, name='llama', data=None, how=collate, more={}, callbacks=(), model=None, resume=None, **kw):
    "A Trainer of four epochs that has trained, and its callback"
    args = {k: kw.pop(k) for k in list(kw) if k in ('bf16', 'max_steps', 'save_strategy', 'save_steps', 'seed',
            'gradient_accumulation_steps', 'gradient_checkpointing', 'eval_strategy', 'eval_steps', 'torch_compile',
            'gradient_checkpointing_kwargs', 'per_device_train_batch_size')}
    torch.manual_seed(0)
    model = MAKE[name]() if model is None else model
    alf = ALFCallback(**(dict(freeze_bottom=.5, probe_batches=2, budget=.3) | kw))
    data = rows(kind=kind_of(name)) if data is None else data
    t = small_trainer(folder, alf, *callbacks, model=model, data=data, more=dict(data_collator=how, **more),
                      **dict(max_steps=24, dataloader_drop_last=False) | args)
    t.train(resume_from_checkpoint=resume)
    return t, alf


def prefix(alf): return alf.run.prefix


def close(a, b, eps=1e-5): return len(a) == len(b) and all(abs(x-y) <= eps for x, y in zip(a, b))


@pytest.mark.parametrize('name', MAKE)
@pytest.mark.parametrize('left', [False, True])
def test_losses_are_those_without(tmp_path, name, left):
    how = lambda rows: collate(rows, left)
    plain, _ = run(tmp_path/'plain', name, how=how)
    kept, alf = run(tmp_path/'kept', name, how=how, cache_prefix=True)
    assert close(losses(plain), losses(kept))
    assert all(torch.allclose(v, weights(plain)[k], atol=1e-4) for k, v in weights(kept).items())
    event, = RunLog(tmp_path/'kept').events('prefix')
    assert event['hits'] + event['computed'] == 24*4 and event['blocks'] == 2
    if not left: assert event['hits'] == 3*24 and event['rows'] == 24
    assert event['hits'] > 0 and event['bytes'] <= event['limit']


def test_equal_rows_give_equal_losses_to_the_last_bit(tmp_path):
    "Rows of one length, in every epoch in the same batches"
    ids = torch.randint(3, 96, (8, 16), generator=torch.Generator().manual_seed(0))
    data = [dict(input_ids=r, labels=r) for r in ids]
    plain, _ = run(tmp_path/'plain', data=data, per_device_train_batch_size=8, max_steps=6)
    kept, alf = run(tmp_path/'kept', data=data, per_device_train_batch_size=8, max_steps=6, cache_prefix=True)
    assert losses(plain) == losses(kept)
    twice = [*data, *data]
    _, alf = run(tmp_path/'twice', data=twice, max_steps=8, cache_prefix=True)
    assert len({r['input_ids'].numpy().tobytes() for r in twice}) == 8
    event, = RunLog(tmp_path/'twice').events('prefix')
    assert event['rows'] == 8


def test_blocks_below_are_not_run_again(tmp_path):
    ran = []
    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kw):
            for i, b in enumerate(model.model.layers):
                b.mlp.register_forward_hook(lambda m, x, y, i=i: ran.append((i, state.global_step)))
    run(tmp_path, callbacks=[Watch()], cache_prefix=True, **FULL)
    epoch = 24//4
    assert {s for i, s in ran if i < 2} == set(range(epoch)) and {s for i, s in ran if i >= 2} == set(range(24))


def test_in_16_bits_within_rounding(tmp_path):
    plain, _ = run(tmp_path/'plain', bf16=True)
    kept, alf = run(tmp_path/'kept', bf16=True, cache_prefix=True)
    assert prefix(alf).dtype == torch.float32 and close(losses(plain), losses(kept), .05)
    assert losses(plain) != losses(kept)
    half, _ = run(tmp_path/'half', bf16=True, cache_prefix=True)
    assert losses(half) == losses(kept)


def test_a_model_in_16_bits_keeps_its_own(tmp_path):
    make = lambda: MAKE['llama']().bfloat16()
    torch.manual_seed(0)
    plain, _ = run(tmp_path/'plain', model=make(), bf16=True)
    torch.manual_seed(0)
    kept, alf = run(tmp_path/'kept', model=make(), bf16=True, cache_prefix=True)
    assert prefix(alf).dtype == torch.bfloat16 and close(losses(plain), losses(kept), 2e-2)


def test_selections_probes_and_evaluations_go_on_as_without(tmp_path):
    evaluates = dict(eval_strategy='steps', eval_steps=5, more=dict(eval_dataset=rows(8, seed=5)))
    more = dict(interval=6, select_until=1., **evaluates)
    plain, one = run(tmp_path/'plain', **more)
    kept, two = run(tmp_path/'kept', cache_prefix=True, **more)
    evals = lambda t: [h['eval_loss'] for h in t.state.log_history if 'eval_loss' in h]
    chosen = lambda d: [e['names'] for e in RunLog(d).events('select')]
    assert chosen(tmp_path/'plain') == chosen(tmp_path/'kept') and len(chosen(tmp_path/'kept')) > 2
    assert close(losses(plain), losses(kept)) and close(evals(plain), evals(kept)) and len(evals(kept)) > 3
    assert RunLog(tmp_path/'kept').events('prefix')[0]['hits'] == 3*24


@pytest.mark.parametrize('how', [
    dict(gradient_accumulation_steps=2, max_steps=12),
    dict(gradient_checkpointing=True, gradient_checkpointing_kwargs=dict(use_reentrant=False)),
])
def test_with_accumulation_and_checkpointing(tmp_path, how):
    plain, _ = run(tmp_path/'plain', **how)
    kept, _ = run(tmp_path/'kept', cache_prefix=True, **how)
    assert close(losses(plain), losses(kept)) and RunLog(tmp_path/'kept').events('prefix')[0]['hits'] > 24


def test_padding_that_the_loss_sees_is_kept_too(tmp_path):
    how = lambda rows: collate(rows, width=20, ignore=1)
    plain, _ = run(tmp_path/'plain', how=how)
    kept, _ = run(tmp_path/'kept', how=how, cache_prefix=True)
    assert close(losses(plain), losses(kept)) and RunLog(tmp_path/'kept').events('prefix')[0]['hits'] == 3*24


def test_a_bound_holds_and_is_said(tmp_path):
    plain, _ = run(tmp_path/'plain')
    with pytest.warns(UserWarning, match='of 24 rows fill the'):
        kept, alf = run(tmp_path/'kept', cache_prefix=10_000)
    event = RunLog(tmp_path/'kept').events('prefix')[-1]
    assert 0 < event['bytes'] <= 10_000 == event['limit'] and 0 < event['rows'] < 24
    assert event['hits'] == 3*event['rows'] and close(losses(plain), losses(kept))


def test_nothing_stays_behind(tmp_path):
    kept, alf = run(tmp_path/'kept', cache_prefix=True)
    fresh = MAKE['llama']()
    held = lambda m: [(k, len(s._forward_hooks), len(s._forward_pre_hooks)) for k, s in m.named_modules()]
    assert not prefix(alf).kept and not [s for s in kept.model.model.layers if 'forward' in vars(s)]
    assert held(kept.model) == held(fresh)
    run(tmp_path/'plain')
    files = lambda d: sorted(p.relative_to(d).as_posix() for p in d.rglob('*'))
    assert files(tmp_path/'plain') == files(tmp_path/'kept')


def test_an_error_leaves_the_model_as_it_was(tmp_path):
    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **kw):
            if state.global_step == 15: raise KeyError('stop')
    torch.manual_seed(0)
    model = MAKE['llama']()
    with pytest.raises(KeyError): run(tmp_path, model=model, callbacks=[Fails()], cache_prefix=True)
    assert not [m for m in model.modules() if 'forward' in vars(m) and m is not model]
    assert not [m for m in model.modules() if m._forward_pre_hooks]
    assert all(p.requires_grad for p in model.parameters())


def test_a_resume_is_exact(tmp_path):
    how = lambda rows: collate(rows, width=20)
    same_batches = dict(cache_prefix=True, how=how, save_strategy='steps', save_steps=9)
    whole, _ = run(tmp_path, **same_batches)
    again, alf = run(tmp_path, resume=str(tmp_path/'checkpoint-9'), **same_batches)
    assert close(losses(again), losses(whole), 1e-6)
    assert all(torch.allclose(v, weights(whole)[k], atol=1e-5) for k, v in weights(again).items())
    assert RunLog(tmp_path).events('prefix')[-1]['computed'] == 24      # once more
    files = {p.name for p in (tmp_path/'checkpoint-9'/'alf').iterdir()}
    assert not [f for f in files if 'prefix' in f or 'cache' in f]


def test_a_copy_of_the_model_is_one_of_its_own(tmp_path):
    copies = []
    class Copies(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kw):
            if state.global_step == 10: copies.append(copy.deepcopy(model))
    kept, _ = run(tmp_path, callbacks=[Copies()], cache_prefix=True)
    other, batch = copies[0].train(), collate(rows(4))
    with torch.no_grad():
        before = other(**batch).loss
        for p in other.model.layers[0].parameters(): p.mul_(2)
        assert before != other(**batch).loss and before != kept.model(**batch).loss


def test_weights_that_change_below_are_seen(tmp_path):
    "Somebody loads others in the middle of a run"
    class Changes(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kw):
            if state.global_step == 13:
                with torch.no_grad(): model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    plain, _ = run(tmp_path/'plain', callbacks=[Changes()], check='off')
    kept, _ = run(tmp_path/'kept', callbacks=[Changes()], check='off', cache_prefix=True)
    assert close(losses(plain), losses(kept))


def test_a_loop_of_ones_own():
    found = []
    for kept in (False, True):
        torch.manual_seed(0)
        model = MAKE['gpt2']()
        loader = DataLoader(rows(12), 4, shuffle=True, collate_fn=collate, generator=torch.Generator().manual_seed(3))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        found.append([])
        with ALFLoop(model, optimizer, loader, 9, freeze_bottom=.5, budget=.3, cache_prefix=kept) as alf:
            for batch in itertools.chain.from_iterable(loader for _ in range(3)):
                loss = model(**batch).loss
                loss.backward()
                alf.step()
                found[-1].append(float(loss.detach()))
            if kept: assert (alf.run.prefix.hits, alf.run.prefix.computed) == (24, 12)
        assert 'forward' not in vars(model.transformer.h[0])
    assert close(*found)


def test_packed_weights_below_are_as_good(tmp_path):
    pytest.importorskip('bitsandbytes')
    make = lambda: LlamaForCausalLM(LlamaConfig(**WIDE | dict(hidden_size=64), num_key_value_heads=1)).bfloat16()
    how = dict(bf16=True, quantize_frozen=4, policy='full', budget=None, probe_batches=None)
    torch.manual_seed(0)
    plain, _ = run(tmp_path/'plain', model=make(), **how)
    torch.manual_seed(0)
    kept, _ = run(tmp_path/'kept', model=make(), cache_prefix=True, **how)
    assert close(losses(plain), losses(kept), 2e-2) and RunLog(tmp_path/'kept').events('prefix')[0]['hits'] == 3*24


# what is refused

def refused(tmp_path, match, error=ValueError, **kw):
    with pytest.raises(error, match=match): run(tmp_path, **dict(cache_prefix=True) | kw)
    assert not list(tmp_path.glob('**/checkpoint-*'))


@pytest.mark.parametrize('name,drops', [
    ('bert', dict(hidden_dropout_prob=.1)), ('gpt2', dict(embd_pdrop=.1)), ('llama', dict(attention_dropout=.1)),
])
def test_dropout_below_is_refused_and_can_be_left_out(tmp_path, name, drops):
    config = MAKE[name]().config
    config.update(drops)
    make = lambda: type(MAKE[name]())(config)
    refused(tmp_path, 'eval_prefix=True', name=name, model=make())
    found = []
    for kept in (False, True):
        torch.manual_seed(0)
        t, _ = run(tmp_path/str(kept), name, model=make(), cache_prefix=kept, eval_prefix=True)
        found.append(losses(t))
        assert not [m for m in t.model.modules() if not m.training]
    assert close(*found)


def test_pins_below_are_refused(tmp_path):
    refused(tmp_path, "pin='embeddings' would", pin='embeddings')
    refused(tmp_path, "pin='block.1.mlp.down_proj' would", pin=['block.3.*', 'block.1.mlp.down_proj'])


def test_a_later_request_for_what_is_below_is_refused(tmp_path):
    asked = []
    class Asks(TrainerCallback):
        def on_step_end(self, args, state, control, **kw):
            if state.global_step != 8: return
            alf = next(c for c in asked)
            with pytest.raises(ValueError, match='cache_prefix keeps'):
                alf.choose(policy=dict(policy='budget', budget=.3, pin=('block.0.*',)), now=True)
            alf.choose(policy=dict(policy='budget', budget=.4, pin=('block.3.*',)), now=True)
    alf = ALFCallback(freeze_bottom=.5, budget=.3, cache_prefix=True)
    asked.append(alf)
    torch.manual_seed(0)
    t = small_trainer(tmp_path, alf, Asks(), model=MAKE['llama'](), data=rows(), more=dict(data_collator=collate))
    t.train()
    names = {n for e in RunLog(tmp_path).events('select') for n in e['names']}
    assert not [n for n in names if n.startswith(('block.0', 'block.1', 'embed'))]
    assert any(n.startswith('block.3') for n in names)


class Masked(Dataset):
    "Rows that are changed as they are read"
    def __init__(self, rows): self.rows = rows
    def __len__(self): return len(self.rows)
    def __getitem__(self, i):
        ids = self.rows[i]['input_ids'].clone()
        ids[int(torch.randint(len(ids), (1,)))] = int(torch.randint(3, 96, (1,)))
        return dict(input_ids=ids, labels=ids)


def test_changed_rows_are_refused_by_name(tmp_path):
    refused(tmp_path, r'row \d+ of the dataset is not the same when it is read again', data=Masked(rows()))
    def masks(rows):
        batch = collate(rows)
        return batch | dict(input_ids=batch['input_ids'].masked_fill(torch.rand(batch['input_ids'].shape) < .3, 2))
    refused(tmp_path, r'row \d+ of the dataset is not the same', how=masks)


def test_rows_that_begin_to_change_later_are_computed_and_said(tmp_path):
    class Later(Masked):
        on = False
        def __getitem__(self, i): return super().__getitem__(i) if self.on else self.rows[i]
    class Starts(TrainerCallback):
        def on_step_begin(self, args, state, control, **kw): data.on = True
    found = []
    for kept in (False, True):
        data = Later(rows())
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            t, alf = run(tmp_path/str(kept), data=data, callbacks=[Starts()], cache_prefix=kept, **FULL)
        found.append(losses(t))
    assert close(*found) and [w for w in said if 'none came twice' in str(w.message)]
    assert not prefix(alf).limit


class Stream(IterableDataset):
    def __iter__(self): return iter(rows())


def test_a_stream_is_refused(tmp_path):
    refused(tmp_path, 'give a dataset that has one, not a stream', data=Stream())


def test_other_places_are_refused(tmp_path):
    refused(tmp_path, 'torch.compile', torch_compile=True)
    model, config = MAKE['llama'](), ALFConfig.from_args(freeze_bottom=.5, cache_prefix=True)
    source = lambda layers: ProbeSource(layers, DataLoader(rows(), 4, collate_fn=collate))
    with pytest.raises(ValueError, match='one process'):
        ALFController(model, torch.optim.AdamW(model.parameters()), config, 9, source, Engine(n_processes=2))


def test_models_that_hand_on_more_are_refused(tmp_path):
    small = dict(vocab_size=96, d_model=32, d_ff=64, d_kv=16, num_layers=4, num_heads=2, dropout_rate=0)
    refused(tmp_path, 'this model has 2', model=T5ForConditionalGeneration(T5Config(**small)))
    asks = MAKE['llama']()
    asks.config.output_hidden_states = True
    refused(tmp_path, 'output_hidden_states=True', model=asks)
    refused(tmp_path, 'freezes none', freeze_bottom=.2)
    turns = LlamaConfig(**WIDE, num_key_value_heads=1,
                        rope_parameters=dict(rope_type='dynamic', factor=2., rope_theta=10000.))
    refused(tmp_path, "rope_type 'dynamic'", model=LlamaForCausalLM(turns))


def test_a_block_that_sees_more_than_states_is_found_before_training(tmp_path):
    model = MAKE['llama']()
    seen = {}
    model.model.layers[0].mlp.register_forward_hook(lambda m, x, y: seen.__setitem__('y', y.detach().mean()))
    model.model.layers[3].mlp.register_forward_hook(lambda m, x, y: y*(1 + (seen.pop('y', 1)*1e4)))
    refused(tmp_path, 'hand them more than states', model=model)


def test_settings_are_checked():
    for kw, match in ((dict(cache_prefix=True, freeze_bottom=0.), 'freeze_bottom=0 freezes none'),
                      (dict(eval_prefix=True, freeze_bottom=0.), 'eval_prefix is'),
                      (dict(cache_prefix='much', freeze_bottom=.5), 'a memory such as'),
                      (dict(eval_prefix=2, freeze_bottom=.5), 'True or False')):
        with pytest.raises(ValueError, match=match): ALFConfig.from_args(**kw)
    assert ALFConfig.from_args(cache_prefix='2GB', freeze_bottom=.5).cache_prefix == 2*10**9
    assert ALFConfig.from_dict(ALFConfig.from_args(cache_prefix=True, freeze_bottom=.5).to_dict()).cache_prefix is True


def test_finetune_and_its_command(tmp_path, capsys):
    text = tmp_path/'text.txt'
    text.write_text('\n\n'.join(f'{i} times {i+1} is {i*(i+1)}, as everybody knows who can count.' for i in range(60)))
    found = {}
    for kept in (False, True):
        torch.manual_seed(0)
        model = demo_model(blocks=4), demo_tokenizer()
        out = tmp_path/str(kept)
        how = dict(steps=24, max_length=32, eval_blocks=2, bf16=False, probe_batches=2, progress=False)
        found[kept] = finetune(model, str(text), out, other=str(text), freeze_bottom=.5, cache_prefix=kept, **how)
    event, = RunLog(tmp_path/'True').events('prefix')
    assert event['hits'] > 0
    evals = [[e['loss'] for e in RunLog(tmp_path/str(k)).events('eval')] for k in (False, True)]
    assert close(*evals)
    with pytest.raises(SystemExit): cli.main(['finetune', '--help'])
    assert '--cache-prefix' in capsys.readouterr().out


SCRIPT = '''
import sys
import time
sys.path.insert(0, {tests!r})
from test_prefix import *
class Says(TrainerCallback):
    def on_step_end(self, args, state, control, **kw):
        if state.global_step == 9: print('now', flush=True)
        if state.global_step > 9: time.sleep(.5)
run(Path({out!r}), callbacks=[Says()], cache_prefix=True)
'''


@pytest.mark.skipif(sys.platform == 'win32', reason="signals")
def test_a_killed_run_leaves_no_file(tmp_path):
    out, temp = tmp_path/'run', tmp_path/'temp'
    temp.mkdir()
    code = SCRIPT.format(tests=str(Path(__file__).parent), out=str(out))
    env = {**os.environ, 'TMPDIR': str(temp)}
    p = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, env=env, text=True)
    assert 'now' in p.stdout.readline()
    p.send_signal(signal.SIGKILL)
    p.wait()
    left = [f.name for f in temp.rglob('*') if f.is_file() and 'torchinductor' not in str(f)]
    assert not left and not [f for f in out.rglob('*') if 'prefix' in f.name or f.stat().st_size > 100_000]
