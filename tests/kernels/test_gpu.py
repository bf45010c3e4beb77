"""On a real CUDA or ROCm device: values, bits, misaligned views, one copy to the host. Skipped, and counted as
skipped, without one."""
import itertools
import numpy as np, pytest, torch
from alf_nb.kernels import plan as K
from common import *

why = K.available_backends()['triton']
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(why is not True, reason=str(why))]

@pytest.fixture(scope='module')
def items():
    return [
        (i, *(t.cuda() for t in pair(n, a, b, i)))
        for i, ((a, b), n) in enumerate(itertools.product(PAIRS, (*SIZES, 1_000_001)))
    ]

def model(items): return {str(u): [w] for u,w,_ in items}, {str(u): [r] for u,_,r in items}

def test_values_and_refresh(items):
    now, ref = model(items)
    want = judge(items)
    ref = {k: [t.clone() for t in v] for k,v in ref.items()}
    plan = K.DeltaPlan(now, ref)
    assert plan.n_tensors == dict(triton=len(items))
    d = plan.run()
    np.testing.assert_allclose(np.array([d.delta, d.ref, d.max_abs]).T, np.c_[want[:,:2]**.5, want[:,2]], rtol=1e-6)
    assert all(plan.run() == d for _ in range(5)) and plan.run(refresh=True) == d, 'not deterministic'
    for k in now: assert same(ref[k][0], now[k][0].to(ref[k][0].dtype))

def test_misaligned_views():
    base = [t.cuda() for t in pair(100_001, torch.bfloat16, torch.bfloat16)]
    for a,b in itertools.product((0, 1, 8), (0, 1, 8)):
        w, r = base[0][a:a+90_000], base[1][b:b+90_000]
        assert K.delta_norms({'a': [w]}, {'a': [r]}).delta[0] == pytest.approx(judge([(0, w, r)])[0,0]**.5, rel=1e-6)

def test_dot(items):
    items = [(u, w, r, None if u%5 == 4 else tensor(w.numel(), DTYPES[u%3], u).cuda()) for u,w,r in items]
    now, ref = model([i[:3] for i in items])
    dot, size = judge_dot(items)
    plan = K.DeltaPlan(now, ref, dot={str(u): [g] for u,_,_,g in items})
    d = plan.run()
    assert (np.abs(d.dot - dot) <= 1e-6*size).all() and plan.run() == d
    for f in ('delta', 'ref', 'max_abs'):
        np.testing.assert_allclose(getattr(d, f), getattr(K.delta_norms(now, ref), f), rtol=1e-6)

@pytest.mark.parametrize('d', DTYPES)
def test_8_bit_references_are_those_of_the_specification(d):
    for w in (awkward(d), awkward(d)[1:], *(tensor(n, d, n) for n in (*SIZES, 255, 257, 1_000_001))):
        a, b = K.quantize_reference(w.cuda()), K.quantize_reference(w, 'torch')
        assert torch.equal(a.q.cpu(), b.q) and same(a.scale.cpu(), b.scale)
        if not w.isfinite().all(): continue
        # a device may round a product before it is subtracted, or not: 2^-23 of a weight (Cauchy-Schwarz over all)
        size = float(w.double().square().sum())
        assert abs(a.error - b.error) <= 1e-5*b.error + 2**-22*(b.error*size)**.5 + 2**-46*size
        got, want = (K.delta_norms({'a': [x + 1]}, {'a': [r]}) for x,r in ((w.cuda(), a), (w, b)))
        assert got.delta[0] == pytest.approx(want.delta[0], rel=1e-4) and got.ref[0] == pytest.approx(
            want.ref[0], rel=1e-6
        )

def test_nan_and_infinity():
    for bad in (float('nan'), float('inf')):
        w = torch.ones(5000, device='cuda')
        w[4999] = bad
        d = K.delta_norms({'a': [w]}, {'a': [torch.zeros_like(w)]})
        assert d.bad == ('a',) and np.isnan(d.max_abs[0]) == np.isnan(bad)

def test_one_copy_to_the_host(items):
    now, ref = model(items + [(-1, torch.ones(9, device='cuda').double(), torch.zeros(9, device='cuda').double())])
    plan = K.DeltaPlan(now, ref)
    plan.run()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    ) as p:
        plan.run()
    copies = [
        e
        for e in p.events()
        if 'memcpy' in e.name.lower() and ('dtoh' in e.name.lower() or 'devicetohost' in e.name.lower())
    ]
    assert len(copies) == 1
    torch.cuda.set_sync_debug_mode('error')
    try:
        # the one copy is a synchronisation, and the only one
        with pytest.raises(RuntimeError): plan.run()
    finally: torch.cuda.set_sync_debug_mode('default')

def test_from_another_stream_and_thread(items):
    from concurrent.futures import ThreadPoolExecutor
    plan = K.DeltaPlan(*model(items))
    want = plan.run()
    with ThreadPoolExecutor(3) as pool: assert list(pool.map(lambda _: plan.run(), range(6))) == [want]*6
    with torch.cuda.stream(torch.cuda.Stream()): assert plan.run() == want

def test_training_with_the_kernels_of_liger(tmp_path):
    pytest.importorskip('liger_kernel')
    check_liger(*liger_and_plain(tmp_path, 'cuda'))

@pytest.mark.parametrize('offload', ['second_moment', 'none'])
@pytest.mark.parametrize('optim', ['paged_adamw_8bit', 'paged_adamw_32bit'])
def test_paged_moments_stay_in_pages(tmp_path, optim, offload):
    "Where units come and go, and after a resume; a 16-bit model with fp32 for what trains"
    pytest.importorskip('bitsandbytes')
    from small_run import losses, small_trainer
    from alf_nb.demo import demo_model
    from alf_nb.model.optim import _PAGES
    from alf_nb.model.states import unwrap_optimizer
    from alf_nb.train.trainer import ALFCallback
    large = lambda ps: [p for p in ps if p.numel() >= 1e5]      # smaller ones are in no pages
    def run(resume=None):
        torch.manual_seed(0)
        model = demo_model(blocks=2, hidden_size=512, intermediate_size=1024).bfloat16()
        one = ALFCallback(policy='rotate', budget=.3, interval=2, measure_every=2, select_until=1., offload=offload,
                          resume_from=resume)
        t = small_trainer(tmp_path, one, model=model, optim=optim, bf16=True, use_cpu=False, max_steps=22,
                          save_strategy='steps', save_steps=5)
        t.train(resume_from_checkpoint=resume)
        opt = unwrap_optimizer(t.optimizer)
        here = large(opt.state)
        assert here and all(opt.state[p][k].is_paged for p in here for k in ('state1', 'state2'))
        every = large(p for n in one.run.names for p in one.run.layers.params(n))
        assert 0 < sum(b.numel() for b in _PAGES[opt]) <= 2*sum(p.numel() for p in every)
        return losses(t)
    whole = run()
    assert run(str(tmp_path/'checkpoint-5'))[5:] == pytest.approx(whole[5:], rel=.02)
