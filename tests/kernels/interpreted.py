"""The Triton source under Triton's interpreter: values, memory audit, properties. Run by test_triton.py in a process of its own with TRITON_INTERPRET=1.

The audit comes first: an access out of bounds would kill the process in any other test."""
import os, warnings
assert os.environ.get('TRITON_INTERPRET') == '1', "run through test_triton.py: the interpreter is chosen before triton is imported"
warnings.filterwarnings('ignore')
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from alf_nb import kernels as K
from audit import audit
from common import *

def partials(sweep, refresh=False):
    "All chunk numbers of a sweep, fp32 [3, slots]"
    kept = []
    def empty(*shape, **kw): kept.append(torch.zeros(*shape, **kw)); return kept[-1]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(K.torch, 'empty', empty); sweep(refresh)
    return kept[0]

def sweep(items, refresh=False, chunk=K._CHUNK):
    owners, out = K._TritonSweep(items, chunk)(refresh)
    return out.numpy()

def close(got, want, tol=4e-7): np.testing.assert_allclose(got, want, rtol=tol)

def audited(items, refresh, chunk=K._CHUNK):
    "Run under the audit; every byte read once, references written once or never, nothing else touched"
    names = {f'{k}{i}': t for i,(_,w,r) in enumerate(items) for k,t in (('w', w), ('r', r))}
    with audit(names) as a: out = sweep(items, refresh, chunk)
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
    s = K._TritonSweep(items)
    assert [consts['W_ALIGN'] for *_,consts in s.launches] == [2, 16]
    close(audited(items, False), judge(items))
    s.launches[0][2]['W_ALIGN'] = 16
    with audit(dict(w=items[0][1], r=items[0][2])), pytest.raises(Exception, match='multiple_of'): s(False)

def test_the_audit_can_fail():
    items = [(0, *pair(4096, torch.bfloat16, torch.bfloat16))]
    s = K._TritonSweep(items); s.launches[0][1][2] += 1                            # claims one element more than there is
    with audit(dict(w=items[0][1], r=items[0][2])), pytest.raises(Exception, match='outside every buffer'): s(False)
    s = K._TritonSweep(items*2)                                                    # the same tensor twice
    with audit(dict(w=items[0][1], r=items[0][2])) as a: s(False)
    assert (a.reads['w'] == 2).all()

def test_more_than_2_31_elements():
    n = 2**31 + 40_000
    w, r = sparse(n), sparse(n); hot = [0, 2**31 - 1, 2**31, n - 1]
    for k,i in enumerate(hot): w[i] = k + 1.
    s = K._TritonSweep([(0, w[:1], r[:1])]); chunks = sorted({i//s.chunk for i in hot}) # visit the chunks of interest only
    tables = s.launches[0][1]
    s.launches[0] = len(chunks), [*tables[:2], torch.tensor([n]), *tables[3:4], torch.zeros(len(chunks), dtype=torch.int32), torch.tensor(chunks, dtype=torch.int32)], s.launches[0][2]
    s.n_slots = -(-n//s.chunk); s.unit_start[1] = s.n_slots
    with pytest.MonkeyPatch.context() as m:
        m.setattr(K.torch, 'empty', torch.zeros)                                       # chunks that are not visited count as 0
        with audit(dict(w=w, r=r), count=False): owners, out = s(False)
    assert out[0].tolist() == [1 + 4 + 9 + 16, 0, 4]

@pytest.mark.parametrize('d1,d2', PAIRS)
def test_values(d1, d2):
    items = []
    for i,n in enumerate(SIZES):
        w = tensor(n, d1, i)
        items += [(2*i, w, (w.float() + 1e-2*tensor(n, torch.float32, 99)).to(d2)), (2*i+1, *pair(max(1, n//3), d1, d2, i))]
    close(sweep(items), judge(items))

def test_one_call_takes_all_dtypes_and_alignments():
    items = [(i, *pair(700 + i, a, b, i, o1=i//9, o2=i//9)) for i,(a,b) in enumerate(PAIRS*2)]
    s = K._TritonSweep(items); assert len(s.launches) == 18
    close(s(False)[1].numpy(), judge(items))

def test_units_of_several_tensors():
    items = [(u, *pair(n, torch.bfloat16, torch.bfloat16, n)) for u,n in ((0, 5), (0, 20_000), (3, 40_000), (3, 1))]
    s = K._TritonSweep(items); assert s.owners.tolist() == [0, 3]
    j = judge(items); close(s(False)[1].numpy(), [[*(j[i]+j[i+1])[:2], max(j[i,2], j[i+1,2])] for i in (0, 2)])

def test_units_of_more_chunks_than_the_finish_takes_at_once():
    items = [(0, *pair(16*1030, torch.float32, torch.float32)), (1, *pair(40, torch.float32, torch.float32, 1))]
    close(sweep(items, chunk=16), judge(items))

def test_special_values():
    w = torch.tensor([1e-40, -3e-39, 0., -0., 3e38, 1.]).bfloat16(); r = torch.zeros(6).bfloat16()
    assert sweep([(0, w, r)])[0,2] == w.float().abs().max()
    tiny = torch.full((5000,), 1e-40).bfloat16()                                       # subnormal
    assert sweep([(0, tiny, torch.zeros(5000).bfloat16())])[0,2] == tiny[0].float()
    for bad in (float('nan'), float('inf')):
        for where in (3, 33, 39):                                                      # in the vector body, at its end, in the tail
            w = torch.ones(39 + 1); w[where] = bad; assert not np.isfinite(sweep([(0, w, torch.ones(40))])[0,0])

def test_identical_is_exactly_zero():
    w = tensor(12345, torch.bfloat16); assert sweep([(0, w, w.clone())])[0,[0,2]].tolist() == [0, 0]

@pytest.mark.parametrize('d1,d2', PAIRS)
def test_refresh_rounds_to_nearest_even(d1, d2):
    every = torch.arange(-2**15, 2**15).to(torch.int16)
    w = torch.cat([every.view(d1) if d1.itemsize == 2 else (torch.randn(2**15)*30).exp(), tensor(17, d1)]) if d1 != torch.float32 else \
        torch.cat([every.view(d2).float() if d2.itemsize == 2 else tensor(2**16, d2), tensor(2**15, d1), tensor(2**15 + 17, d1)*1e-6])
    r = torch.zeros(len(w), dtype=d2); want = w.to(d2)
    sweep([(0, w, r)], refresh=True)
    assert same(r, want)

def test_partials_do_not_depend_on_company():
    items = [(i, *pair(n, torch.bfloat16, torch.bfloat16, i)) for i,n in enumerate((5, 40_000, 16384, 999))]
    together = partials(K._TritonSweep(items))
    alone = torch.cat([partials(K._TritonSweep([(0, w, r)])) for _,w,r in items], 1)
    assert torch.equal(together, alone) and torch.equal(together, partials(K._TritonSweep(items)))

def test_through_the_plan():
    now = {f'u{i}': [tensor(n, d, i) for d in (*DTYPES, torch.float64)] for i,n in enumerate(SIZES)}
    ref = {k: [t + .01 for t in v] for k,v in now.items()}
    plan = K.DeltaPlan(now, ref, 'triton'); assert plan.n_tensors == dict(triton=3*len(SIZES), torch=len(SIZES))
    got, want = plan.run(), K.delta_norms(now, ref, 'torch')
    for f in ('delta', 'ref', 'max_abs'): close(getattr(got, f), getattr(want, f))
    assert got == plan.run(refresh=True) and plan.run().max_abs == (0.,)*len(SIZES)
    now['u3'][1][9] = float('nan'); assert plan.run().bad == ('u3',) and np.isnan(plan.run().max_abs[3])

tensors = st.tuples(st.integers(1, 5000), st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.integers(0, 9), st.integers(0, 9))
models = st.lists(st.lists(tensors, max_size=3), min_size=1, max_size=4).filter(any)
chunks = st.sampled_from([1024, 2048, 4096])
def make(spec, seed): return [(u, *pair(n, a, b, seed + i, o1, o2)) for u,unit in enumerate(spec) for i,(n,a,b,o1,o2) in enumerate(unit)]
few = settings(max_examples=20, deadline=None, derandomize=True, database=None)

@few
@given(models, chunks, st.integers(0, 99), st.booleans())
def test_property_any_model_is_read_once_and_right(spec, chunk, seed, refresh):
    items = make(spec, seed); j = judge(items)
    units = sorted({u for u,*_ in items})
    want = [[*j[[u == v for u,*_ in items], :2].sum(0), j[[u == v for u,*_ in items], 2].max()] for v in units]
    close(audited(items, refresh, chunk), want)

@few
@given(models, st.integers(-6, 6), st.integers(0, 99))
def test_property_powers_of_two_scale_exactly(spec, k, seed):
    items = [(u, w.float(), r.float()) for u,w,r in make(spec, seed)]
    scaled = [(u, w*2.**k, r*2.**k) for u,w,r in items]
    assert (sweep(items)*[4.**k, 4.**k, 2.**k] == sweep(scaled)).all()

@few
@given(st.integers(1, 4), st.integers(1, 3000), st.sampled_from(DTYPES), st.integers(0, 99))
def test_property_a_cut_at_a_chunk_boundary_changes_no_bit(c, extra, d, seed):
    w, r = pair(c*1024 + extra, d, d, seed); cut = c*1024
    one, two = K._TritonSweep([(0, w, r)], 1024), K._TritonSweep([(0, w[:cut], r[:cut]), (0, w[cut:], r[cut:])], 1024)
    assert torch.equal(partials(one), partials(two)) and torch.equal(one(False)[1], two(False)[1])

@few
@given(models, st.integers(0, 99))
def test_property_refreshed_means_no_distance(spec, seed):
    items = [(u, w, r.to(w.dtype)) for u,w,r in make(spec, seed)]
    sweep(items, refresh=True); assert (sweep(items)[:,[0,2]] == 0).all()
