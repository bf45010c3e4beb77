"""How fast is one pass over weights and references? Every provider on the same buffers, in turns, beside a pure read
(CPU) or a device copy (GPU) as the limit.

    python benchmarks/bench_delta_norms.py                 # SmolLM2-135M's 272 tensors, fp32 and bf16; appends to
    results/delta_norms.jsonl
    python benchmarks/bench_delta_norms.py --sweep         # 1 M parameters to as many as fit
    python benchmarks/bench_delta_norms.py --quick         # a look: small, appends nothing

`gb_per_s` counts the bytes that have to be read (and written, with refresh) once, whatever a provider moves in fact.
The torch providers compute the two norms only, ours the largest change as well.
Kernel `dot` adds the dot product with gradients of the weights' dtype, `ref8` measures against references in 8 bits
(and `ref8_refresh` takes new ones).
"""
import argparse, datetime, functools, json, platform, statistics, time
from pathlib import Path
import numpy as np, torch
from alf_nb.kernels import plan as K
from alf_nb.kernels.chunks import chunks_of
from alf_nb.kernels.numba_sweep import _in_threads, _pointer, numba
from alf_nb.kernels.triton_sweep import triton
from alf_nb.study.runs import device_name

RESULTS = Path(__file__).parent/'results'/'delta_norms.jsonl'
DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)

def smollm2(hidden=576, inner=1536, kv=192, blocks=30, vocab=49152):
    "Shapes of SmolLM2-135M's 272 tensors (tied embeddings)"
    block = [
        (hidden, hidden),
        (kv, hidden),
        (kv, hidden),
        (hidden, hidden),
        (inner, hidden),
        (inner, hidden),
        (hidden, inner),
        (hidden,),
        (hidden,),
    ]
    return [(vocab, hidden), *block*blocks, (hidden,)]

def plain(n): return [(min(n, 2**22),)]*max(1, n//2**22) # n parameters in tensors of 4 M

class Case:
    "Weights, references, and every provider on them"
    def __init__(self, shapes, dtype, ref_dtype, device):
        self.w = [torch.randn(s, device=device).to(dtype) for s in shapes]
        self.r = [(t.float() + 1e-3*torch.randn(t.shape, device=device)).to(ref_dtype) for t in self.w]
        self.device = torch.device(device)
        self.now = {str(i): [t] for i,t in enumerate(self.w)}
        self.ref = {str(i): [t] for i,t in enumerate(self.r)}
        self.bytes = sum(t.nbytes for t in self.w + self.r)

    def ours(self, backend, refresh=False):
        return lambda plan=K.DeltaPlan(self.now, self.ref, backend): plan.run(refresh)

    @functools.cached_property
    def g(self): return [torch.randn_like(t) for t in self.w]

    def dot(self, backend):
        return lambda plan=K.DeltaPlan(
            self.now, self.ref, backend, {str(i): [t] for i, t in enumerate(self.g)}
        ): plan.run()

    def ref8(self, backend, refresh=False):
        ref = {k: [K.empty_reference(t) for t in v] for k,v in self.now.items()}
        plan = K.DeltaPlan(self.now, ref, backend)
        plan.run(refresh=True)
        return lambda: plan.run(refresh)

    def eager_dot(self):
        "As correct as ours: upcast before subtracting"
        return torch.stack(
            [
                torch.stack(
                    [
                        torch.linalg.vector_norm(d := w.float() - r.float()),
                        torch.linalg.vector_norm(r.float()),
                        (g.float() * d).sum(),
                    ]
                )
                for w, r, g in zip(self.w, self.r, self.g)
            ]
        ).tolist()

    def eager(self):
        "One tensor after the other, in the dtype of the weights"
        return torch.stack(
            [
                torch.stack([torch.linalg.vector_norm(w - r), torch.linalg.vector_norm(r)])
                for w, r in zip(self.w, self.r)
            ]
        ).tolist()

    def eager_fp32(self):
        "As correct as ours: upcast before subtracting"
        return torch.stack(
            [
                torch.stack([torch.linalg.vector_norm(w.float() - r.float()), torch.linalg.vector_norm(r.float())])
                for w, r in zip(self.w, self.r)
            ]
        ).tolist()

    def foreach(self):
        "torch's multi-tensor kernels"
        d = torch._foreach_sub(self.w, self.r)
        return torch.stack([torch.stack(torch._foreach_norm(x)) for x in (d, self.r)]).tolist()

    def compiled(self):
        "inductor, every tensor in one graph"
        def f(w, r):
            return torch.stack(
                [
                    torch.stack([torch.linalg.vector_norm(a.float() - b.float()), torch.linalg.vector_norm(b.float())])
                    for a, b in zip(w, r)
                ]
            )
        g = torch.compile(f, dynamic=False)
        return lambda: g(self.w, self.r).tolist()

    def limit(self):
        """CPU: read every byte and do next to nothing, on the same threads. GPU: copy as many bytes within the
        device (half read, half written)"""
        if self.device.type != 'cpu':
            src = torch.empty(self.bytes//2, dtype=torch.uint8, device=self.device)
            dst = torch.empty_like(src)
            return lambda: (dst.copy_(src), torch.cuda.synchronize())
        tensors = self.w + self.r
        words = np.array([t.nbytes//8 for t in tensors])
        at = np.array([t.data_ptr() for t in tensors])
        tensor, index = chunks_of(words, 8192)
        out = np.zeros(len(tensor), np.uint64)
        tag = np.empty(0, np.uint64)
        return lambda: _in_threads(
            lambda lo, hi: pure_read(at, words, tensor, index, out, lo, hi, 8192, tag),
            len(tensor),
            torch.get_num_threads(),
        )

if numba:
    @numba.njit(nogil=True, boundscheck=False)
    def pure_read(at, words, tensor, index, out, lo, hi, chunk, tag):
        for c in range(lo, hi):
            t = tensor[c]
            n = min(chunk, words[t] - index[c]*chunk)
            x = numba.carray(_pointer(at[t] + index[c]*chunk*8, tag), (n,))
            s = np.uint64(0)
            for i in range(n): s ^= x[i]
            out[c] = s

def providers(case, wanted):
    "(kernel, provider, bytes, callable, seconds to the first result), those that work here"
    fast = 'triton' if case.device.type == 'cuda' else 'numba'
    once, more = case.bytes, sum(t.nbytes for t in case.r)
    wb = once - more
    eight = sum(t.numel() + 4*-(-t.numel()//256) for t in case.w)
    makers = {
        'limit': ('limit', once, case.limit),
        f'alf_{fast}': ('delta_norms', once, lambda: case.ours(fast)),
        f'alf_{fast}_refresh': ('delta_norms_refresh', once + more, lambda: case.ours(fast, True)),
        'alf_torch': ('delta_norms', once, lambda: case.ours('torch')),
        'eager': ('delta_norms', once, lambda: case.eager),
        'eager_fp32': ('delta_norms', once, lambda: case.eager_fp32),
        'foreach': ('delta_norms', once, lambda: case.foreach),
        'compile': ('delta_norms', once, case.compiled),
        f'alf_{fast}_dot': ('dot', once + wb, lambda: case.dot(fast)),
        'eager_dot': ('dot', once + wb, lambda: case.eager_dot),
        f'alf_{fast}_ref8': ('ref8', wb + eight, lambda: case.ref8(fast)),
        f'alf_{fast}_ref8_refresh': ('ref8_refresh', wb + 2 * eight, lambda: case.ref8(fast, True)),
    }
    for name,(kernel, n, make) in makers.items():
        if wanted and name not in wanted and name != 'limit': continue
        t0 = time.perf_counter()
        try:
            f = make()
            f()
        except Exception as e:
            print(f"  {name}: left out ({type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''})")
            continue
        yield kernel, name, n, f, time.perf_counter() - t0

def versions():
    return {
        p: m.__version__ for p, m in (('torch', torch), ('numba', numba), ('triton', triton), ('numpy', np)) if m
    } | dict(python=platform.python_version())

def bench(label, shapes, dtype, ref_dtype, args):
    "Rows of one case: providers take turns, so that all of them see the same machine"
    case = Case(shapes, DTYPES[dtype], DTYPES[ref_dtype], args.device)
    runs = list(providers(case, args.providers))
    times = {name: [] for _,name,*_ in runs}
    for _ in range(args.repeats):
        for _,name,_,f,_ in runs:
            t0 = time.perf_counter()
            f()
            times[name].append(time.perf_counter() - t0)
    med = {name: statistics.median(t) for name,t in times.items()}
    limit = case.bytes/med['limit']/1e9
    print(f"{label}: {len(shapes)} tensors, {case.bytes/1e9:.3f} GB, {dtype}/{ref_dtype}, {args.device}")
    for kernel,name,n,_,first in runs:
        p20, p80 = np.percentile(times[name], [20, 80])
        row = dict(
            kernel=kernel,
            provider=name,
            dtype=dtype if dtype == ref_dtype else f'{dtype}/{ref_dtype}',
            model=label,
            n_tensors=len(shapes),
            bytes=n,
            median_s=med[name],
            p20_s=p20,
            p80_s=p80,
            gb_per_s=n / med[name] / 1e9,
            limit_gb_per_s=limit,
            share_of_limit=n / med[name] / 1e9 / limit,
            first_call_s=first,
            repeats=args.repeats,
            device=device_name(args.device, model=True),
            versions=versions(),
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'),
        )
        print(
            f"  {name:22} {med[name]*1e3:9.2f} ms  {row['gb_per_s']:7.1f} GB/s  {row['share_of_limit']:6.1%} of the"
            f" limit   first call {first:5.2f} s"
        )
        yield row

def main(argv=None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--device', default='cpu', help="cpu or cuda")
    ap.add_argument(
        '--dtypes', nargs='+', default=['fp32', 'bf16'], help="fp32, bf16, fp16 or weights/reference such as fp32/bf16"
    )
    ap.add_argument('--providers', nargs='*', help="only these, such as alf_numba eager foreach compile")
    ap.add_argument('--repeats', type=int, default=15)
    ap.add_argument('--threads', type=int, help="torch's number of threads; ours and the limit follow it")
    ap.add_argument('--sweep', action='store_true', help="1 M parameters to as many as fit, ours only")
    ap.add_argument('--quick', action='store_true', help="small and short; appends nothing")
    ap.add_argument('--out', type=Path, default=RESULTS, help="file to append rows to")
    args = ap.parse_args(argv)
    if args.threads: torch.set_num_threads(args.threads)
    if args.quick: args.repeats = 3
    fast = 'alf_triton' if args.device == 'cuda' else 'alf_numba'
    cases = [('smollm2-135m', smollm2() if not args.quick else smollm2(blocks=2, vocab=2048))]
    if args.sweep:
        import psutil
        free = torch.cuda.mem_get_info()[0] if args.device == 'cuda' else psutil.virtual_memory().available
        args.providers = args.providers or [fast]
        # fp32 pair and a temporary
        cases = [
            (f'{n/1e6:.0f}M', plain(n))
            for n in [10**6 * 4**k for k in range(7)] + [8 * 10**9]
            if n * 20 < free and (not args.quick or n < 10**7)
        ]
    torch.manual_seed(0)
    rows = []
    for label,shapes in cases:
        for d in args.dtypes:
            d1, _, d2 = d.partition('/')
            if unknown := {d1, d2 or d1} - set(DTYPES):
                ap.error(f"unknown dtype {', '.join(unknown)}; there are {', '.join(DTYPES)}")
            rows += bench(label, shapes, d1, d2 or d1, args)
    if not args.quick:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with open(args.out, 'a') as f: f.writelines(json.dumps(r) + '\n' for r in rows)
        print(f'{len(rows)} rows appended to {args.out}')
    return rows

if __name__ == '__main__': main()
