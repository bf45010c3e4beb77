"""The CPU backends where a notebook cell is not enough: properties over random models, huge tensors, foreign
threads, forks, missing packages, caches that cannot be written."""
import os, subprocess, sys, textwrap, threading
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from alf_nb.kernels import plan as K
from alf_nb.kernels.chunks import CHUNK_SIZE
from alf_nb.kernels.reference8 import quantize
from common import *

BACKENDS = [b for b in ('torch', 'numba') if K.available_backends()[b] is True]
tensors = st.tuples(
    st.integers(0, 40_000),
    st.sampled_from((*DTYPES, torch.float64)),
    st.sampled_from((*DTYPES, torch.float64)),
    st.integers(0, 9),
    st.integers(0, 9),
)
models = st.lists(st.lists(tensors, max_size=3), min_size=1, max_size=4)
few_dtypes = st.lists(
    st.lists(
        st.tuples(
            st.integers(0, 40_000),
            st.sampled_from((torch.bfloat16, torch.float32, torch.float64)),
            st.just(torch.float32),
            st.integers(0, 9),
            st.integers(0, 9),
        ),
        max_size=3,
    ),
    min_size=1,
    max_size=4,
)
few = settings(max_examples=40, deadline=None, derandomize=True, database=None)

def make(spec, seed):
    pairs = {
        f'u{u}': [pair(n, a, b, seed + i, o1, o2) for i, (n, a, b, o1, o2) in enumerate(unit)]
        for u, unit in enumerate(spec)
    }
    def side(j): return {k: [p[j] for p in v] for k,v in pairs.items()}
    return side(0), side(1)

def want(now, ref):
    rows = []
    for k in now:
        j = judge([(0, w, r) for w,r in zip(now[k], ref[k])])
        rows.append([*np.sqrt(j[:,:2].sum(0)), j[:,2].max(initial=0.)])
    return np.array(rows).T

def got(d): return np.array([d.delta, d.ref, d.max_abs])
def run_python(code, **env):
    p = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', textwrap.dedent(code)],
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert p.returncode == 0, p.stderr[-3000:]
    return p.stdout

@pytest.mark.parametrize('backend', BACKENDS)
@few
@given(spec=models, seed=st.integers(0, 99), refresh=st.booleans())
def test_any_model_is_measured_right(backend, spec, seed, refresh):
    now, ref = make(spec, seed)
    judged = want(now, ref)
    kept = {k: [t.clone() for t in v] for k,v in now.items()}
    np.testing.assert_allclose(got(K.delta_norms(now, ref, backend, refresh)), judged, rtol=1e-6)
    for k in now:
        for w,old,r in zip(now[k], kept[k], ref[k]):
            assert same(w, old) and (not refresh or same(r, w.to(r.dtype)))

def gradients(now, d, seed):
    return {
        k: [
            None if (i + seed) % 4 == 0 else tensor(w.numel(), (d, torch.float32)[(i + seed) % 2], seed + i)
            for i, w in enumerate(v)
        ]
        for k, v in now.items()
    }
def items(now, ref, grads): return [(k, w, r, g) for k in now for w,r,g in zip(now[k], ref[k], grads[k])]
def per_unit(now, x):
    owners = [k for k in now for _ in now[k]]
    return np.array([sum(v for v,k in zip(x, owners) if k == u) for u in now])

@pytest.mark.parametrize('backend', BACKENDS)
@few
@given(
    spec=few_dtypes,
    seed=st.integers(0, 99),
    refresh=st.booleans(),
    d=st.sampled_from((torch.float32, torch.bfloat16)),
    eight=st.booleans(),
)
def test_any_model_with_gradients_and_8_bits_is_measured_right(backend, spec, seed, refresh, d, eight):
    now, ref = make(spec, seed)
    grads = gradients(now, d, seed)
    if eight: ref = {k: [K.quantize_reference(t, backend) for t in v] for k,v in ref.items()}
    j, (dot, size) = want(now, ref), (per_unit(now, x) for x in judge_dot(items(now, ref, grads)))
    errors = np.array([sum(r.error for r in v) for v in ref.values()]) if eight else np.zeros(len(now))
    out = K.delta_norms(now, ref, backend, refresh, grads)
    np.testing.assert_allclose(
        np.square(out.delta), np.maximum(j[0] ** 2 - errors, 0), rtol=2e-6, atol=2e-6 * max(1e-9, errors.max())
    )
    np.testing.assert_allclose(got(out)[1:], j[1:], rtol=1e-6)
    assert (np.abs(np.array(out.dot) - dot) <= 1e-6*size).all()
    if not eight: assert out.error == ()
    elif refresh:
        for k,w,r,_ in items(now, ref, grads):
            q, scale = quantize(w)
            assert torch.equal(r.q, q) and same(r.scale, scale)
            assert abs(r.error - ((f64(w) - f64(r))**2).sum()) <= 1e-5*r.error + 1e-12*w.numel()

@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('d', (*DTYPES, torch.float64))
def test_codes_and_scales_are_the_specifications(backend, d):
    for w in (awkward(d), awkward(d)[1:], *(tensor(n, d, n) for n in (1, 255, 256, 257, 16385))):
        a, (q, scale) = K.quantize_reference(w, backend), quantize(w)
        assert torch.equal(a.q, q) and same(a.scale, scale) and np.isfinite(a.error) == bool(w.isfinite().all())

@pytest.mark.parametrize('backend', BACKENDS)
def test_nothing_beyond_the_ends_of_8_bit_references_is_touched(backend):
    for n in (1, 15, 255, 257, 4097, 16385):
        w = tensor(n + 64, torch.bfloat16)
        w[:32] = w[-32:] = float('nan')
        m = -(-n//256)
        q, scale = torch.full((n + 64,), 7, dtype=torch.int8), torch.full((m + 2,), 7.)
        d = K.delta_norms(
            {'a': [w[32:-32]]}, {'a': [K.Reference8(q[32:-32], scale[1:-1])]}, backend, True, {'a': [w[32:-32]]}
        )
        assert not d.bad and (q[:32] == 7).all() and (q[-32:] == 7).all() and scale[[0, -1]].tolist() == [7, 7]
        assert torch.equal(q[32:-32], quantize(w[32:-32])[0])

@pytest.mark.parametrize('backend', BACKENDS)
def test_variants_take_any_strides(backend):
    base = tensor(60*80, torch.float32).view(60, 80)
    for w in (base, base.t(), base[::2], base[:,3:50], base[:,0], base[0,0]):
        other = tensor(w.numel(), torch.float32, 1).view(w.shape)
        for g in (w.clone() + 1, torch.ones((*w.shape, 2))[...,0], w.t().contiguous().t() if w.dim() == 2 else w + 2):
            for r in (other.clone(), K.quantize_reference(other)):
                i = [('a', w, r, g)]
                dot, size = judge_dot(i)
                out = K.delta_norms({'a': [w]}, {'a': [r]}, backend, True, {'a': [g]})
                assert abs(out.dot[0] - dot[0]) <= 1e-6*size[0]
                if isinstance(r, K.Reference8): assert (r.dequantize() - w).abs().max() <= r.scale.max()*.5001
                else: assert torch.equal(r, w)

@pytest.mark.parametrize('backend', BACKENDS)
def test_a_correction_of_the_rounding(backend):
    w = tensor(1_000_000, torch.float32)*.02
    r = K.quantize_reference(w, backend)
    assert K.delta_norms({'a': [w]}, {'a': [r]}, backend).delta[0] < 1e-3*r.error**.5
    moved = w + tensor(1_000_000, torch.float32, 1)*2e-5
    true = float((moved.double() - w).norm())
    plan = K.DeltaPlan({'a': [moved]}, {'a': [r]}, backend)
    old = r.error
    first = plan.run(refresh=True)
    assert first.error[0] == old**.5 != r.error**.5
    assert first.delta[0] == pytest.approx(true, rel=.05) and (first.delta[0]**2 + first.error[0]**2)**.5 > 5*true
    # the new reference has an error of its own
    assert plan.run().delta[0] < 1e-3*r.error**.5 and plan.run().error[0] == r.error**.5

def test_a_plan_takes_gradients_of_new_memory_and_dtype():
    w, r, g = (tensor(50_000, torch.float32, i) for i in range(3))
    plan = K.DeltaPlan({'a': [w]}, {'a': [r]}, dot={'a': [g]})
    one = plan.run().dot[0]
    want, size = judge_dot([(0, w, r, g)])
    assert abs(one - want[0]) <= 1e-6*size[0]
    g.data = g.double()*2
    assert abs(plan.run().dot[0] - 2*one) <= 2e-6*size[0] and plan.n_builds == 2      # of what is summed: much cancels

@pytest.mark.parametrize('backend', BACKENDS)
@few
@given(spec=models, k=st.integers(-6, 6), seed=st.integers(0, 99))
def test_powers_of_two_scale_exactly(backend, spec, k, seed):
    def each(f, tensors): return {u: [f(t) for t in v] for u,v in tensors.items()}
    now, ref = (each(torch.Tensor.float, x) for x in make(spec, seed))
    scaled = (each(lambda t: t*2.**k, x) for x in (now, ref))
    assert (got(K.delta_norms(now, ref, backend))*2.**k == got(K.delta_norms(*scaled, backend))).all()

@few
@given(spec=models, seed=st.integers(0, 99), threads=st.integers(1, 5))
def test_no_bit_depends_on_threads_or_company(spec, seed, threads):
    now, ref = make(spec, seed)
    n = torch.get_num_threads()
    for backend in BACKENDS:
        for refs, grads in (
            (ref, None),
            (
                {k: [K.quantize_reference(t, backend) for t in v] for k, v in ref.items()},
                {k: [t.flip(0) for t in v] for k, v in now.items()},
            ),
        ):
            one = K.delta_norms(now, refs, backend, dot=grads)
            try:
                torch.set_num_threads(threads)
                assert K.delta_norms(now, refs, backend, dot=grads) == one
            finally: torch.set_num_threads(n)
            for i,k in enumerate(now):
                alone = K.delta_norms({k: now[k]}, {k: refs[k]}, backend, dot=grads and {k: grads[k]})
                for f in alone._numbers: assert getattr(alone, f) == getattr(one, f)[i:i+1] or not now[k]

@pytest.mark.parametrize('d1,d2', PAIRS)
@pytest.mark.parametrize('backend', BACKENDS)
def test_nothing_beyond_the_ends_is_touched(backend, d1, d2):
    for n in (1, 15, 127, 4097, 16385):
        w, r = tensor(n + 64, d1), torch.full((n + 64,), 7., dtype=d2)
        w[:32] = w[-32:] = float('nan')
        d = K.delta_norms({'a': [w[32:-32]]}, {'a': [r[32:-32]]}, backend, refresh=True)
        assert not d.bad and (r[:32] == 7).all() and (r[-32:] == 7).all() and same(r[32:-32], w[32:-32].to(d2))

@pytest.mark.skipif(
    not sys.platform.startswith('linux') or sys.maxsize < 2**32,
    reason='needs 9 GB of address space without memory behind it',
)
def test_more_than_2_31_elements():
    n = 2**31 + 40_000
    w, r = sparse(n), sparse(n)
    for k,i in enumerate((0, 2**31 - 1, 2**31, n - 1)): w[i] = k + 1.
    plan = K.DeltaPlan({'a': [w]}, {'a': [r]}, 'numba')
    s = plan._sweeps[0][1]
    assert len(s.tensor) == -(-n//CHUNK_SIZE)
    # the other chunks are zeros, and take seconds to read
    visit = np.unique(np.array([0, 2**31 - 1, 2**31, n - 1])//CHUNK_SIZE)
    s.tensor, s.index, s.owners = s.tensor[visit], s.index[visit], s.owners[visit]
    assert plan.run().delta == (30**.5,) and plan.run().max_abs == (4.,)

@pytest.mark.parametrize('backend', BACKENDS)
def test_any_strides(backend):
    base = tensor(60*80, torch.float32).view(60, 80)
    for w in (
        base.t(),
        base[::2],
        base[:, 3:50],
        base[:, 0],
        base[:1].expand(60, 80),
        base.view(3, 4, 5, 80).to(memory_format=torch.channels_last),
    ):
        for r in (w.clone() + 1, torch.ones(w.shape), torch.ones((*w.shape, 2))[...,0]):
            j = want({'a': [w]}, {'a': [r]})
            np.testing.assert_allclose(got(K.delta_norms({'a': [w]}, {'a': [r]}, backend, refresh=True)), j, rtol=1e-6)
            assert torch.equal(w, r)

def test_a_plan_notices_new_memory():
    p, r = torch.nn.Parameter(torch.ones(5000)), torch.zeros(5000)
    plan = K.DeltaPlan({'a': [p]}, {'a': [r]})
    assert plan.run().max_abs == (1.,)
    for t in (torch.full((5000,), 2.), torch.full((5000,), 3.).half(), torch.full((5000,), 4.).double()):
        p.data = t
        assert plan.run().max_abs == (t[0].item(),)
    p.data = torch.ones(7)
    with pytest.raises(ValueError, match='must be equal'): plan.run()

@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('d', DTYPES)
def test_nan_and_infinity_are_reported(backend, d):
    for bad in (float('nan'), float('inf'), -float('inf')):
        for where in (0, 17, 4999):
            w, r = pair(5000, d, d)
            w[where] = bad
            out = K.delta_norms({'a': [w], 'b': [r]}, {'a': [r], 'b': [r + 1]}, backend)
            assert out.bad == ('a',) and np.isnan(out.max_abs[0]) == np.isnan(bad) and not np.isfinite(out.max_abs[0])

def test_many_threads_may_ask_at_once():
    now, ref = make([[(40_000, torch.float32, torch.bfloat16, 0, 0)]]*6, 0)
    plan, first, out = K.DeltaPlan(now, ref), K.delta_norms(now, ref), []
    threads = [threading.Thread(target=lambda: out.extend(plan.run() for _ in range(20))) for _ in range(5)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert out == [first]*100

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork here')
def test_a_forked_child_can_measure():
    out = run_python("""
        import os, signal, torch; from alf_nb.kernels.plan import *
        torch.set_num_threads(1); now = {'a': [torch.ones(400_000)]}; ref = {'a': [torch.zeros(400_000)]}
        torch.get_num_threads = lambda: 3 # helpers of ours, none of OpenMP's
        a = delta_norms(now, ref, 'numba')
        pid = os.fork()
        if not pid: signal.alarm(20); os._exit(0 if delta_norms(now, ref, 'numba') == a else 1)
        print(os.waitpid(pid, 0)[1])""")
    assert out.strip() == '0'

def test_a_thread_that_outlives_the_main_one_can_measure():
    out = run_python("""
        import threading, time, torch; from alf_nb.kernels.plan import *
        torch.set_num_threads(3); now = {'a': [torch.ones(400_000)]}; ref = {'a': [torch.zeros(400_000)]}
        delta_norms(now, ref)
        def later(): time.sleep(.5); print(delta_norms(now, ref).max_abs[0], flush=True)
        threading.Thread(target=later).start()""")
    assert out.strip() == '1.0'

@pytest.mark.parametrize('missing', ['numba', 'triton'])
def test_a_missing_package_is_no_error(missing):
    out = run_python(f"""
        import sys, torch; sys.modules['{missing}'] = None
        from alf_nb.kernels.plan import *
        print(available_backends()['{missing}'])
        a, b = torch.randn(5000), torch.randn(5000)
        found = delta_norms({{'a': [a]}}, {{'a': [b]}}).delta[0]
        assert abs(found - (a.double()-b.double()).norm()) < 1e-3
        compile_kernels()
        try: delta_norms({{'a': [a]}}, {{'a': [b]}}, '{missing}')
        except ValueError as e: print(e)""", TRITON_INTERPRET='0')
    assert f'{missing} cannot be imported' in out and f"backend '{missing}' does not work here" in out

def test_importing_asks_for_no_gpu():
    code = """
        import alf_nb.kernels.plan
        from alf_nb.kernels.triton_sweep import triton
        driver = triton and triton.runtime.driver
        # the second in triton 3.2
        print(driver and (driver._active if hasattr(driver, '_active') else driver.active._obj))"""
    assert run_python(code, TRITON_INTERPRET='0').strip() == 'None'

# the disk is full
# no folder to write to
@pytest.mark.parametrize('how', ["numba.core.caching.CacheImpl._locator_classes = []",
                                 "numba.core.caching.FunctionCache.save_overload = fail"])
def test_a_cache_that_cannot_be_written_is_no_error(how, tmp_path):
    run_python(f"""
        import torch, numba.core.caching
        def fail(*a): raise OSError(28, 'No space left on device')
        {how}
        from alf_nb.kernels.plan import *
        assert delta_norms({{'a': [torch.ones(9)]}}, {{'a': [torch.zeros(9)]}}, 'numba').delta == (3.,)""",
        NUMBA_CACHE_DIR=str(tmp_path))

def test_second_process_does_not_compile_again(tmp_path):
    code = """
        import time, torch, numba.core.compiler as c; from alf_nb.kernels.plan import *
        n = []; old = c.CompilerBase._compile_core; c.CompilerBase._compile_core = lambda *a: (n.append(1), old(*a))[1]
        compile_kernels([torch.float32], backend='numba'); print(len(n))"""
    first, second = (int(run_python(code, NUMBA_CACHE_DIR=str(tmp_path))) for _ in range(2))
    assert first > 0 and second == 0


def test_a_cache_that_was_cut_short_is_made_anew(tmp_path):
    "A process killed or a power cut while kernels are written to disk: what each run made anew serves the next"
    code = """
        import torch
        from alf_nb.kernels import plan as K
        now, ref = [torch.ones(9)], [torch.zeros(9)]
        print(K.delta_norms({'u': now}, {'u': ref}, backend='numba').delta)
    """
    env = dict(NUMBA_CACHE_DIR=str(tmp_path))
    first = run_python(code, **env)
    for kind in ('nbc', 'nbi'):
        files = list(tmp_path.rglob(f'*.{kind}'))
        assert files
        for f in files: os.truncate(f, f.stat().st_size//2)
        assert run_python(code, **env) == first
    assert run_python(code, **env) == first
