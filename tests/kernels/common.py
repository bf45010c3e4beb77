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

def judge(items):
    "Σd², Σr² and max|d| of each pair in fp64"
    out = np.zeros((len(items), 3))
    for row,(_,w,r) in zip(out, items):
        w, r = w.detach().cpu().double().reshape(-1).numpy(), r.detach().cpu().double().reshape(-1).numpy()
        row[:] = ((w-r)**2).sum(), (r*r).sum(), np.abs(w-r).max(initial=0.)
    return out

def bits(t): return t.reshape(-1).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])

def same(a, b):
    "Equal bit for bit, any NaN equal to any other"
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(bits(a)[~nan.reshape(-1)], bits(b)[~nan.reshape(-1)])

def sparse(n):
    "n zeros of bf16 that take no memory until they are written"
    m = mmap.mmap(-1, 2*n, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000) # MAP_NORESERVE
    return torch.frombuffer(m, dtype=torch.bfloat16)
