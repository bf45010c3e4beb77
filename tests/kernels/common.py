"""Tensors and judgements that all kernel tests share."""
import itertools, mmap
import numpy as np, torch

DTYPES = torch.float32, torch.bfloat16, torch.float16
PAIRS = list(itertools.product(DTYPES, DTYPES))
SIZES = 1, 7, 15, 16, 17, 1023, 2048, 4099, 16384, 16385, 3*16384 + 5

def tensor(n, dtype, seed=0, offset=0):
    "Random tensor of n elements that starts `offset` elements into its storage"
    return torch.randn(n + offset, generator=torch.Generator().manual_seed(seed)).to(dtype)[offset:]

def pair(n, d1, d2, seed=0, o1=0, o2=0): return tensor(n, d1, 2*seed, o1), tensor(n, d2, 2*seed+1, o2)

def f64(t): return (t.dequantize() if hasattr(t, 'dequantize') and not isinstance(t, torch.Tensor) else t).detach().cpu().double().reshape(-1).numpy()

def judge(items):
    "Σd², Σr² and max|d| of each pair in fp64"
    out = np.zeros((len(items), 3))
    for row,(_,w,r,*_) in zip(out, items):
        w, r = f64(w), f64(r)
        row[:] = ((w-r)**2).sum(), (r*r).sum(), np.abs(w-r).max(initial=0.)
    return out

def judge_dot(items):
    "Σg·d and Σ|g·d| of each triple in fp64: terms may cancel, so the second says how exact the first can be"
    terms = [np.zeros(1) if g is None else f64(g)*(f64(w) - f64(r)) for _,w,r,g in items]
    return np.array([t.sum() for t in terms]), np.array([np.abs(t).sum() for t in terms])

def awkward(d):
    "Weights that are hard to round to 8 bits: exact ties, every magnitude, zeros, NaN, infinity, a short last block"
    g = torch.Generator().manual_seed(0); ties = torch.randint(-254, 255, (2560,), generator=g)/2; ties[::256] = 127.
    odd = torch.ones(1024); odd[3], odd[300], odd[600] = float('nan'), float('inf'), -float('inf')
    return torch.cat([ties, torch.zeros(256), torch.randn(25_600, generator=g)*torch.logspace(-40, 37, 100).repeat_interleave(256), odd, torch.randn(77, generator=g)]).to(d)

def bits(t): return t.reshape(-1).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])

def same(a, b):
    "Equal bit for bit, any NaN equal to any other"
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(bits(a)[~nan.reshape(-1)], bits(b)[~nan.reshape(-1)])

def sparse(n):
    "n zeros of bf16 that take no memory until they are written"
    m = mmap.mmap(-1, 2*n, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000) # MAP_NORESERVE
    return torch.frombuffer(m, dtype=torch.bfloat16)
