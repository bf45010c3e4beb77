"""Memory audit on top of Triton's interpreter: what a compiled kernel would never tell, checked without a GPU.

    with audit(dict(w=w, r=r)) as a: …launch…

- An access outside the named buffers and the kernel's own tensor arguments raises IndexError *before* it happens: the
bare interpreter would scribble on the process, or die.
- A `tl.multiple_of` promise that an address breaks raises ValueError: on a GPU that is a misaligned-address fault.
- `a.reads[name]`, `a.writes[name]`: how often each byte was read and written (`count=False` leaves this out, for huge
sparse buffers).
"""
import contextlib
import numpy as np
import triton.runtime.interpreter as I

class Audit:
    def __init__(self, buffers, count=True):
        self.spans, self.reads, self.writes, self.count = {}, {}, {}, count
        for k,t in buffers.items(): self.add(k, t)
    def add(self, k, t):
        span = t.data_ptr(), t.numel()*t.element_size()
        if self.spans.get(k) == span: return # the same tensor given to a second launch
        self.spans[k] = span
        if self.count: self.reads[k], self.writes[k] = np.zeros(span[1], np.int32), np.zeros(span[1], np.int32)
    def hit(self, counts, ptrs, mask):
        width = max(1, ptrs.get_element_ty().primitive_bitwidth//8)
        p, m = np.broadcast_arrays(ptrs.data, mask.data)
        p = p[m].ravel()
        todo = np.ones(p.shape, bool)
        for k,(base,n) in self.spans.items():
            inside = todo & (p >= np.uint64(base)) & (p + np.uint64(width) <= np.uint64(base + n))
            if not inside.any(): continue
            todo &= ~inside
            if self.count:
                off = (p[inside] - np.uint64(base)).astype(np.int64)
                if (np.diff(off) == width).all(): counts[k][off[0]:off[-1] + width] += 1       # one after the other
                else:
                    for i in range(width): np.add.at(counts[k], off + i, 1)
            if not todo.any(): return
        if todo.any():
            raise IndexError(
                f"{'load' if counts is self.reads else 'store'} outside every buffer: {int(todo.sum())} lanes, first"
                f" {int(p[todo][0]):#x}"
            )

@contextlib.contextmanager
def audit(buffers, count=True):
    a = Audit(buffers, count)
    B, T, X = I.InterpreterBuilder, I.TensorHandle, I.GridExecutor
    old = B.create_masked_load, B.create_masked_store, T.set_attr, X._init_args_hst
    def load(self, ptrs, mask, *rest):
        a.hit(a.reads, ptrs, mask)
        return old[0](self, ptrs, mask, *rest)
    def store(self, ptrs, value, mask, *rest):
        a.hit(a.writes, ptrs, mask)
        return old[1](self, ptrs, value, mask, *rest)
    def set_attr(self, key, v):
        if key == 'tt.divisibility' and (np.asarray(self.data).astype(np.uint64) % np.uint64(v[0])).any():
            raise ValueError(f"multiple_of({v[0]}) is false for {int(np.ravel(self.data)[0]):#x}")
        return old[2](self, key, v)
    def init_args(self, args, kwargs):
        for n,t in list(zip(self.arg_names, args)) + list(kwargs.items()):
            if hasattr(t, 'data_ptr'): a.add(f'arg:{n}:{t.data_ptr()}' if n != 'part' and n != 'out' else n, t)
        return old[3](self, args, kwargs)
    B.create_masked_load, B.create_masked_store, T.set_attr, X._init_args_hst = load, store, set_attr, init_args
    try: yield a
    finally: B.create_masked_load, B.create_masked_store, T.set_attr, X._init_args_hst = old
