"""The Triton source under Triton's interpreter: values, memory audit, properties. Run by test_triton.py in a process of
its own with TRITON_INTERPRET=1.

The audit comes first: an access out of bounds would kill the process in any other test."""
import itertools, os, sys, warnings
from pathlib import Path
assert (
    os.environ.get('TRITON_INTERPRET') == '1'
), "run through test_triton.py: the interpreter is chosen before triton is imported"
warnings.filterwarnings('ignore')
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from alf_nb.kernels import plan as K
from alf_nb.kernels.reference8 import ONE_127TH
from alf_nb.kernels.triton_sweep import TritonSweep, CHUNK_SIZE
from audit import audit
from common import *
sys.path.insert(0, str(Path(__file__).resolve().parents[2]/'tools'))
from interpreter import look_once

look_once()

def partials(sweep, refresh=False):
    "All chunk numbers of a sweep, fp32 [5, slots]"
    kept = []
    def empty(*shape, **kw):
        kept.append(torch.zeros(*shape, **kw))
        return kept[-1]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(K.torch, 'empty', empty)
        sweep(refresh)
    return kept[0]

def full(items): return [(*i, *[None]*(4 - len(i))) for i in items]
def sweep(items, refresh=False, chunk=CHUNK_SIZE, columns=3):
    owners, out = TritonSweep(full(items), chunk)(refresh)
    return out.numpy()[:,:columns]

def close(got, want, tol=4e-7): np.testing.assert_allclose(got, want, rtol=tol)

def audited(items, refresh, chunk=CHUNK_SIZE, columns=3):
    "Run under the audit; every byte read once, references written once or never, nothing else touched"
    names = {
        f'{k}{i}': t
        for i, (_, w, r, g) in enumerate(full(items))
        for k, t in (('w', w), *((f'r{j}_', x) for j, x in enumerate(K._parts(r))), ('g', g))
        if t is not None
    }
    with audit(names) as a: out = sweep(items, refresh, chunk, columns)
    for k in names:
        assert (a.reads[k] == 1).all(), f'{k} is not read exactly once'
        assert (a.writes[k] == (refresh and k[0] == 'r')).all(), f'{k} is written {a.writes[k].max()} times'
    assert (a.writes['part'] == 1).all() and (a.reads['part'] == 1).all() and (a.writes['out'] == 1).all()
    return out

@pytest.mark.parametrize('refresh', [False, True])
@pytest.mark.parametrize('d1,d2', PAIRS)
def test_each_byte_once_and_nothing_else(d1, d2, refresh):
    items = [(i, *pair(n, d1, d2, i)) for i,n in enumerate((1, 7, 16, 1023, 4099, 16384, 16385))]
    close(judge(items), audited(items, refresh))

def test_a_misaligned_tensor_gets_no_promise():
    items = [(0, *pair(4096, torch.bfloat16, torch.bfloat16, o1=1)), (1, *pair(4096, torch.bfloat16, torch.bfloat16))]
    s = TritonSweep(full(items))
    assert [consts['W_ALIGN'] for *_,consts,_ in s.launches] == [2, 16]
    close(audited(items, False), judge(items))
    s.launches[0][2]['W_ALIGN'] = 16
    with audit(dict(w=items[0][1], r=items[0][2])), pytest.raises(Exception, match='multiple_of'): s(False)

def test_the_audit_can_fail():
    items = [(0, *pair(4096, torch.bfloat16, torch.bfloat16))]
    # claims one element more than there is
    s = TritonSweep(full(items))
    s.launches[0][1][3] += 1
    with audit(dict(w=items[0][1], r=items[0][2])), pytest.raises(Exception, match='outside every buffer'): s(False)
    s = TritonSweep(full(items*2))                                                    # the same tensor twice
    with audit(dict(w=items[0][1], r=items[0][2])) as a: s(False)
    assert (a.reads['w'] == 2).all()

def test_more_than_2_31_elements():
    n = 2**31 + 40_000
    w, r = sparse(n), sparse(n)
    hot = [0, 2**31 - 1, 2**31, n - 1]
    for k,i in enumerate(hot): w[i] = k + 1.
    # visit the chunks of interest only
    s = TritonSweep([(0, w[:1], r[:1], None)])
    chunks = sorted({i//s.chunk for i in hot})
    tables = s.launches[0][1]
    s.launches[0] = (
        len(chunks),
        [
            *tables[:3],
            torch.tensor([n]),
            *tables[4:5],
            torch.zeros(len(chunks), dtype=torch.int32),
            torch.tensor(chunks, dtype=torch.int32),
        ],
        *s.launches[0][2:],
    )
    s.n_slots = -(-n//s.chunk)
    s.start[1] = s.n_slots
    with pytest.MonkeyPatch.context() as m:
        m.setattr(K.torch, 'empty', torch.zeros)  # chunks that are not visited count as 0
        with audit(dict(w=w, r=r), count=False): owners, out = s(False)
    assert out[0].tolist() == [1 + 4 + 9 + 16, 0, 4, 0, 0]

TRIPLES = list(itertools.product(DTYPES, DTYPES, DTYPES))
def triples(d1, d2, d3, sizes): return [(i, *pair(n, d1, d2, i), tensor(n, d3, 77 + i)) for i,n in enumerate(sizes)]
def near(got, items):
    want, size = judge_dot(items)
    assert (np.abs(got - want) <= 4e-7*size).all()

def latin(*dtypes):
    "A third of all: with each pair of dtypes at each pair of places"
    return sum(map(DTYPES.index, dtypes)) % 3 == 0

@pytest.mark.parametrize('d1,d2,d3', slow_unless(latin, TRIPLES))
def test_dot_each_byte_once_and_right(d1, d2, d3):
    items = triples(d1, d2, d3, (1, 15, 17, 1023, 4099, 16385))
    j, (want, size) = judge(items), judge_dot(items)
    out = audited(items, d2 == d3, columns=5)
    close(out[:,:3], j)
    assert (np.abs(out[:,3] - want) <= 4e-7*size).all() and (out[:,4] == 0).all()

def test_dot_without_some_gradients():
    items = [(i, w, r, g if i%2 else None) for i,w,r,g in triples(*[torch.bfloat16]*3, (5, 5, 40_000, 40_000))]
    s = TritonSweep(items)
    assert len(s.launches) == 2
    near(s(False)[1].numpy()[:,3], items)

def test_dot_of_a_misaligned_gradient_gets_no_promise():
    items = [(0, *pair(4096, torch.bfloat16, torch.float32), tensor(4096, torch.bfloat16, 9, offset=1))]
    c = TritonSweep(items).launches[0][2]
    assert (c['W_ALIGN'], c['R_ALIGN'], c['G_ALIGN']) == (2, 4, 2)
    near(audited(items, False, columns=4)[:,3], items)

def eights(d, sizes, g=None):
    return [
        (
            i,
            tensor(n, d, i),
            K.quantize_reference(tensor(n, torch.float32, 50 + i), 'torch'),
            None if g is None else tensor(n, g, 77 + i),
        )
        for i, n in enumerate(sizes)
    ]
SIZES8 = 1, 15, 16, 255, 256, 257, 511, 1023, 1024, 1025, 4099, 16383, 16384, 16385, 3*16384 + 700

ALL8 = list(itertools.product(DTYPES, [None, *DTYPES], [False, True]))

@pytest.mark.parametrize('d,g,refresh', slow_unless(lambda d, g, refresh: refresh or g in (None, d), ALL8))
def test_ref8_each_byte_once_and_nothing_else(d, g, refresh):
    items = eights(d, (1, 16, 255, 257, 1025, 16385) if g else SIZES8, g)
    j = judge(items)
    dots = judge_dot(items)
    out = audited(items, refresh, columns=5)
    close(out[:,:3], j)
    assert (np.abs(out[:,3] - dots[0]) <= 4e-7*dots[1]).all()
    for (_,w,r,_),row in zip(items, out):
        assert not refresh or abs(row[4] - ((f64(w) - f64(r))**2).sum()) <= 1e-5*row[4] + 1e-12*w.numel()

@pytest.mark.parametrize('aligned', [False, True])
@pytest.mark.parametrize('d', DTYPES)
def test_ref8_codes_and_scales_are_the_specifications(d, aligned):
    for w in (awkward(d), *(tensor(n, d, n) for n in (1, 255, 257, 16385))):
        w = torch.cat([w[:1], w])[1:] if not aligned else w
        assert aligned or w.data_ptr()%16
        a, b = K.empty_reference(w), K.quantize_reference(w, 'torch')
        out = sweep([(0, w, a)], refresh=True, columns=5)
        assert torch.equal(a.q, b.q) and same(a.scale, b.scale)
        if w.isfinite().all(): assert abs(out[0,4] - b.error) <= 1e-5*b.error + 1e-12*w.numel()
        else: assert not np.isfinite(out[0,4])

def test_ref8_a_refreshed_reference_has_its_error_as_distance():
    w = tensor(70_001, torch.float32)
    r = K.empty_reference(w)
    new = sweep([(0, w, r)], refresh=True, columns=5)[0,4]
    assert sweep([(0, w, r)])[0,0] == pytest.approx(new, rel=1e-6) and new > 0

def test_ref8_more_than_2_31_elements():
    n = 2**31 + 40_000
    w = sparse(n)
    hot = [0, 2**31 - 1, 2**31, n - 1]
    q, scale = sparse((n + 1)//2).view(torch.int8), torch.zeros(-(-n//256))
    for k,i in enumerate(hot): w[i] = k + 1.
    s = TritonSweep([(0, w[:1], K.quantize_reference(w[:1]), None)])
    chunks = sorted({i//s.chunk for i in hot})
    t = s.launches[0][1]
    t[1], t[2] = torch.tensor([q.data_ptr()]), torch.tensor([scale.data_ptr()])
    s.launches[0] = (
        len(chunks),
        [
            *t[:4],
            torch.tensor([n]),
            *t[5:6],
            torch.zeros(len(chunks), dtype=torch.int32),
            torch.tensor(chunks, dtype=torch.int32),
        ],
        *s.launches[0][2:],
    )
    s.n_slots = -(-n//s.chunk)
    s.start[1] = s.n_slots
    with pytest.MonkeyPatch.context() as m:
        m.setattr(K.torch, 'empty', torch.zeros)
        with audit(dict(w=w, q=q, scale=scale), count=False): assert s(True)[1][0,[0,2]].tolist() == [30, 4]
    assert q[hot].tolist() == [127] * 4 and scale[[0, -1]].tolist() == [
        np.float32(ONE_127TH),
        np.float32(4) * np.float32(ONE_127TH),
    ]

@pytest.mark.parametrize('d1,d2', PAIRS)
def test_values(d1, d2):
    items = []
    for i,n in enumerate(SIZES):
        w = tensor(n, d1, i)
        items += [
            (2 * i, w, (w.float() + 1e-2 * tensor(n, torch.float32, 99)).to(d2)),
            (2 * i + 1, *pair(max(1, n // 3), d1, d2, i)),
        ]
    close(sweep(items), judge(items))

def test_one_call_takes_all_dtypes_and_alignments():
    items = [(i, *pair(700 + i, a, b, i, o1=i//9, o2=i//9)) for i,(a,b) in enumerate(PAIRS*2)]
    s = TritonSweep(full(items))
    assert len(s.launches) == 18
    close(s(False)[1].numpy()[:,:3], judge(items))

def test_units_of_several_tensors():
    items = [(u, *pair(n, torch.bfloat16, torch.bfloat16, n)) for u,n in ((0, 5), (0, 20_000), (3, 40_000), (3, 1))]
    s = TritonSweep(full(items))
    assert s.owners.tolist() == [0, 3]
    j = judge(items)
    close(s(False)[1].numpy()[:,:3], [[*(j[i]+j[i+1])[:2], max(j[i,2], j[i+1,2])] for i in (0, 2)])

def test_units_of_more_chunks_than_the_finish_takes_at_once():
    items = [(0, *pair(16*1030, torch.float32, torch.float32)), (1, *pair(40, torch.float32, torch.float32, 1))]
    close(sweep(items, chunk=16), judge(items))

def test_special_values():
    w = torch.tensor([1e-40, -3e-39, 0., -0., 3e38, 1.]).bfloat16()
    r = torch.zeros(6).bfloat16()
    assert sweep([(0, w, r)])[0,2] == w.float().abs().max()
    tiny = torch.full((5000,), 1e-40).bfloat16()                                       # subnormal
    assert sweep([(0, tiny, torch.zeros(5000).bfloat16())])[0,2] == tiny[0].float()
    for bad in (float('nan'), float('inf')):
        for where in (3, 33, 39):  # in the vector body, at its end, in the tail
            w = torch.ones(39 + 1)
            w[where] = bad
            assert not np.isfinite(sweep([(0, w, torch.ones(40))])[0,0])

def test_identical_is_exactly_zero():
    w = tensor(12345, torch.bfloat16)
    assert sweep([(0, w, w.clone())])[0,[0,2]].tolist() == [0, 0]

@pytest.mark.parametrize('d1,d2', PAIRS)
def test_refresh_rounds_to_nearest_even(d1, d2):
    every = torch.arange(-2**15, 2**15).to(torch.int16)
    if d1 == torch.float32:
        edge = every.view(d2).float() if d2.itemsize == 2 else tensor(2**16, d2)
        w = torch.cat([edge, tensor(2**15, d1), tensor(2**15 + 17, d1)*1e-6])
    else: w = torch.cat([every.view(d1), tensor(17, d1)])
    r = torch.zeros(len(w), dtype=d2)
    want = w.to(d2)
    sweep([(0, w, r)], refresh=True)
    assert same(r, want)

def test_partials_do_not_depend_on_company():
    items = [(i, *pair(n, torch.bfloat16, torch.bfloat16, i)) for i,n in enumerate((5, 40_000, 16384, 999))]
    for its in (full(items), [(i, w, K.quantize_reference(r), w) for i,w,r in items]):
        together = partials(TritonSweep(its))
        alone = torch.cat([partials(TritonSweep([(0, w, r, g)])) for _,w,r,g in its], 1)
        assert torch.equal(together, alone) and torch.equal(together, partials(TritonSweep(its)))

def test_through_the_plan():
    sizes = 1, 16, 1023, 16385
    now = {f'u{i}': [tensor(n, d, i) for d in (*DTYPES, torch.float64)] for i,n in enumerate(sizes)}
    ref = {k: [t + .01 for t in v] for k,v in now.items()}
    plan = K.DeltaPlan(now, ref, 'triton')
    assert plan.n_tensors == dict(triton=3*len(sizes), torch=len(sizes))
    got, want = plan.run(), K.delta_norms(now, ref, 'torch')
    for f in ('delta', 'ref', 'max_abs'): close(getattr(got, f), getattr(want, f))
    assert got == plan.run(refresh=True) and plan.run().max_abs == (0.,)*len(sizes)
    now['u3'][1][9] = float('nan')
    assert plan.run().bad == ('u3',) and np.isnan(plan.run().max_abs[3])

def test_variants_through_the_plan():
    now = {f'u{i}': [tensor(n, d, i) for d in (*DTYPES, torch.float64)] for i,n in enumerate((1, 300, 20_000))}
    grads = {k: [None, *(t.flip(0) for t in v[1:])] for k,v in now.items()}
    old = {k: [t + .01 for t in v] for k,v in now.items()}
    def quantized(backend): return {k: [K.quantize_reference(t, backend) for t in v] for k,v in old.items()}
    ref, twin = quantized('triton'), quantized('torch')
    plan = K.DeltaPlan(now, ref, 'triton', grads)
    assert plan.n_tensors == dict(torch=3, triton=9)
    for refresh in (False, True, False):
        got, want = plan.run(refresh), K.delta_norms(now, twin, 'torch', refresh, grads)
        np.testing.assert_allclose(got.delta, want.delta, atol=2e-3*max(want.error))
        for f in ('ref', 'max_abs'): close(getattr(got, f), getattr(want, f))
        np.testing.assert_allclose(got.error, want.error, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(got.dot, want.dot, rtol=1e-3, atol=1e-5)
    now['u1'][1][9] = float('nan')
    assert plan.run(True).bad == ('u1',) and plan.run().bad == ('u1',)

tensors = st.tuples(
    st.integers(1, 5000), st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.integers(0, 9), st.integers(0, 9)
)
models = st.lists(st.lists(tensors, max_size=3), min_size=1, max_size=4).filter(any)
chunks = st.sampled_from([1024, 2048, 4096])
variants = st.sampled_from([None, *DTYPES]), st.booleans() # dtype of gradients, 8-bit references?
def vary(items, g, eight):
    refs = [K.quantize_reference(r, 'torch') if eight else r for _,_,r in items]
    grads = [None if g is None else tensor(w.numel(), g, 5*i) for i,(_,w,_) in enumerate(items)]
    return [(u, w, r, grad) for (u,w,_),r,grad in zip(items, refs, grads)]
def make(spec, seed):
    return [(u, *pair(n, a, b, seed + i, o1, o2)) for u,unit in enumerate(spec) for i,(n,a,b,o1,o2) in enumerate(unit)]
few = settings(max_examples=20, deadline=None, derandomize=True, database=None)

@few
@given(models, chunks, st.integers(0, 99), st.booleans(), *variants)
def test_property_any_model_is_read_once_and_right(spec, chunk, seed, refresh, g, eight):
    items = vary(make(spec, seed), g, eight)
    j, (dot, size) = judge(items), judge_dot(items)
    units = sorted({u for u,*_ in items})
    of = lambda v: [u == v for u,*_ in items]
    out = audited(items, refresh, chunk, columns=4)
    close(out[:,:3], [[*j[of(v), :2].sum(0), j[of(v), 2].max()] for v in units])
    assert (
        np.abs(out[:, 3] - [dot[of(v)].sum() for v in units]) <= 4e-7 * np.array([size[of(v)].sum() for v in units])
    ).all()

@few
@given(models, st.integers(-6, 6), st.integers(0, 99), st.booleans())
def test_property_powers_of_two_scale_exactly(spec, k, seed, eight):
    items = [(u, w.float(), r.float(), w.flip(0).float()) for u,w,r in make(spec, seed)]
    scaled = [(u, w*2.**k, r*2.**k, g*2.**k) for u,w,r,g in items]
    if eight: items, scaled = ([(u, w, K.quantize_reference(r, 'torch'), g) for u,w,r,g in x] for x in (items, scaled))
    assert (sweep(items, eight, columns=5)*[4.**k, 4.**k, 2.**k, 4.**k, 4.**k] == sweep(scaled, eight, columns=5)).all()
    if eight:
        assert all(
            torch.equal(a[2].q, b[2].q) and torch.equal(a[2].scale * 2.0**k, b[2].scale) for a, b in zip(items, scaled)
        )

@few
@given(st.integers(1, 4), st.integers(1, 3000), st.sampled_from(DTYPES), st.integers(0, 99))
def test_property_a_cut_at_a_chunk_boundary_changes_no_bit(c, extra, d, seed):
    w, r = pair(c*1024 + extra, d, d, seed)
    cut = c*1024
    one = TritonSweep([(0, w, r, w)], 1024)
    two = TritonSweep([(0, w[:cut], r[:cut], w[:cut]), (0, w[cut:], r[cut:], w[cut:])], 1024)
    assert torch.equal(partials(one), partials(two)) and torch.equal(one(False)[1], two(False)[1])

@few
@given(models, st.integers(0, 99))
def test_property_refreshed_means_no_distance(spec, seed):
    items = [(u, w, r.to(w.dtype)) for u,w,r in make(spec, seed)]
    sweep(items, refresh=True)
    assert (sweep(items)[:,[0,2]] == 0).all()

def test_training_with_the_kernels_of_liger(tmp_path, monkeypatch):
    """Two things that this interpreter lacks are given to it: a Python float as a kernel's argument, and libdevice's
    rsqrt"""
    from triton import language as tl
    from triton.runtime import interpreter as I
    from liger_kernel.ops import rms_norm
    convert = I._implicit_cvt
    monkeypatch.setattr(
        I,
        '_implicit_cvt',
        lambda x: (
            tl.tensor(I.TensorHandle(np.array([x], dtype=np.float32), tl.float32), tl.float32)
            if isinstance(x, float)
            else convert(x)
        ),
    )
    # looked up late: the interpreter has its own while a kernel runs
    monkeypatch.setattr(rms_norm, 'rsqrt', lambda x: tl.rsqrt(x))
    check_liger(*liger_and_plain(tmp_path, 'cpu', blocks=2))
