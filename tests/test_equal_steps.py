"""The loop of benchmarks/bench_curves.py and bench_columns.py: what each way moves, and a captured step is the step."""
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]/"benchmarks"))

import equal_steps
from bench_curves import HOW, WHY, plan
from equal_steps import Claims, Loop, Run, alf_steps, append, done_in, file_of, order_of, rate_at
from prepared import Projected, linear_modules, prepare

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')


@pytest.fixture(autouse=True)
def short_rows(monkeypatch): monkeypatch.setattr(equal_steps, 'LENGTH', 16)


def base(device='cpu', width=32):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=width, intermediate_size=2*width, num_hidden_layers=6,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    return LlamaForCausalLM(config).to(device).train()


def rows_on(device='cpu'): return torch.randint(64, (12, 16), generator=torch.Generator().manual_seed(0)).to(device)


def trained(how, steps=4, lr=1e-2, device='cpu', graph=False, seed=0, **of_loop):
    "(base, trained model, losses) of a run"
    model, rows = base(device), rows_on(device)
    run = Run('lengths', 'x', 'gsm8k', lr, seed, steps)
    ready = prepare(model, rows, False, seed, **how)
    loop, order, losses = Loop(ready, run, False, graph, warm_up=1, **of_loop), order_of(len(rows), run), []
    if ready.alf: alf_steps(loop, rows, order, float('inf'))
    for k in range(0 if ready.alf else steps):
        loop.step(k, rows[order[k]])
        losses.append(float(loop.loss))
    return model, ready, losses, loop


def moved(model, ready):
    "Names of linear layers → where their weight differs"
    now = {n.replace('base_model.model.', '').replace('.base_layer', ''): p for n, p in ready.model.named_parameters()}
    return {n: (m.weight != now[f'{n}.weight']) for n, m in linear_modules(model).items()}


def test_each_way_moves_what_it_says():
    full = moved(*trained(HOW['full'])[:2])
    assert all(on.any() for on in full.values())
    quarter = [n for n, on in moved(*trained(HOW['random'])[:2]).items() if on.any()]
    assert quarter and len(quarter) < len(full)
    model, ready, *_ = trained(HOW['lora'])
    assert not any(on.any() for on in moved(model, ready).values())     # adapters move, their base does not
    assert any(p.grad is not None for n, p in ready.model.named_parameters() if 'lora_' in n)
    tiny = trained(WHY['tiny-4'][0])
    assert [n for n, on in moved(*tiny[:2]).items() if on.any()] == quarter


@pytest.mark.parametrize('by, dim', [('columns', 0), ('rows', 1), ('top-columns', 0)])
def test_a_mask_leaves_the_rest_as_it_is(by, dim):
    model, ready, *_ = trained(dict(what='masked', budget=.1, by=by))
    for on in moved(model, ready).values():
        some = on.any(dim)          # whole columns: in one of them all entries move, in the others none
        assert some.any() and not some.all()
        assert on.float().mean(dim)[some].min() > .9
    assert ready.share == pytest.approx(.1, rel=.15)


def test_a_projection_on_all_directions_is_none():
    plain, flat = trained(HOW['random'])[2], trained(dict(project=32))[2]
    assert plain == pytest.approx(flat, rel=1e-4)
    assert plain != pytest.approx(trained(dict(project=2))[2], rel=1e-4)


def test_movement_stays_in_its_directions():
    w = torch.nn.Parameter(torch.randn(8, 20))
    flat = Projected([w], 3, space=True)
    w.grad = torch.randn(8, 20)
    flat.mean[0].copy_(w.grad)
    flat.look()
    was = w.detach().clone()
    flat.shape()
    flat.inner[0].data.fill_(.1)
    flat.move()
    assert torch.linalg.matrix_rank(w.detach()-was) <= 3 and not flat.inner[0].any()


def test_alf_runs_in_its_own_loop():
    model, ready, *_ = trained(dict(HOW['alf']), steps=6)
    chosen = [n for n, on in moved(model, ready).items() if on.any()]
    assert 0 < len(chosen) < len(linear_modules(model))


def test_runs_of_a_seed_see_the_same_batches():
    short, long = (Run('lengths', w, 'gsm8k', 1e-3, 1, n) for w, n in (('lora', 5), ('full', 20)))
    assert torch.equal(order_of(30, short), order_of(30, long)[:5])
    assert not torch.equal(order_of(30, short), order_of(30, Run('lengths', 'lora', 'gsm8k', 1e-3, 2, 5)))
    assert sorted(order_of(30, long)[:15].flatten().tolist()) == list(range(30))


def test_the_rate_is_that_of_a_trainer():
    from transformers import get_cosine_schedule_with_warmup
    opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.)
    schedule = get_cosine_schedule_with_warmup(opt, 3, 40)
    for k in range(40):
        assert opt.param_groups[0]['lr'] == pytest.approx(rate_at(k, 40, 3), abs=1e-9)
        opt.step()
        schedule.step()


def test_every_run_is_on_the_list_once_and_taken_once(tmp_path):
    keys = {r.key for r in plan()}
    assert len({(r.study, r.way, r.data, r.lr, r.seed, r.steps, r.batch, str(r.how)) for r in plan()}) == len(keys)
    one, two, run = Claims(tmp_path), Claims(tmp_path), plan()[0]
    assert one.take(run) and not two.take(run)
    one.give_back(run)
    assert two.take(run)


def test_what_the_files_hold_is_not_run_again(tmp_path):
    assert not done_in(tmp_path)
    one, two = Run('why', 'x', 'gsm8k', 1e-3), Run('columns', 'x', 'gsm8k', 1e-3)
    for run in (one, two): append(file_of(run.study, tmp_path), dict(key=run.key))
    assert done_in(tmp_path) == {one.key, two.key} and len(list(tmp_path.iterdir())) == 2


def test_committed_rows_are_of_runs_on_the_list():
    assert len(done := done_in(equal_steps.RESULTS)) > 100
    assert done <= {r.key for r in plan()}


@pytest.mark.cuda
@GPU
@pytest.mark.parametrize('how', [HOW['random'], HOW['lora'], HOW['full'], WHY['tiny-4'][0], dict(project=4),
                                 dict(project=4, space=True), dict(what='masked', budget=.1)], ids=str)
def test_a_captured_step_is_the_step(how):
    eager, graph = (trained(how, 12, 1e-3, 'cuda', g, every=5) for g in (False, True))
    assert graph[3].captured and not eager[3].captured
    assert graph[2] == pytest.approx(eager[2], rel=1e-3)
