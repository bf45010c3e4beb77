"""`make mutants`: break the kernels on purpose, one line at a time; every mutant has to be killed by a test. `python
tests/kernels/mutants.py [WORD…]` runs those whose name has a WORD."""
import os, re, shutil, subprocess, sys, tempfile, time
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
INTERPRETED, COMPILED, BACKENDS = 'interpreted.py', 'compiled.py', 'test_backends.py'

# name, tests that should kill it, line as it is, line as it should not be
MUTANTS = [
    ('triton: 32-bit offsets', INTERPRETED, "start = c.to(tl.int64)*CHUNK", "start = c*CHUNK"),
    ('triton: left-over elements not counted', INTERPRETED, "tl.sum(d2) + tl.sum(d*d)", "tl.sum(d2)"),
    ('triton: left-over max forgotten', INTERPRETED, "tl.maximum(tl.max(top), tl.max(tl.abs(d)))", "tl.max(top)"),
    ('triton: mask one too far', INTERPRETED, "m = i + offs < body", "m = i + offs <= body"),
    ('triton: tail one too far', INTERPRETED, "m = o < left", "m = o < left + 1"),
    ('triton: tail one short', INTERPRETED, "m = o < left", "m = o < left - 1"),
    ('triton: body not rounded to 16', COMPILED, "body = (left//16)*16", "body = left"),
    ('triton: everything read twice', INTERPRETED,
     "for i in range(0, body, BLOCK)", "for i in range(0, body, BLOCK//2)"),
    ('triton: half of it skipped', INTERPRETED, "for i in range(0, body, BLOCK)", "for i in range(0, body, 2*BLOCK)"),
    ('triton: store without mask', INTERPRETED, "tl.store(p, raw, mask=m)", "tl.store(p, raw)"),
    ('triton: tail not refreshed', INTERPRETED,
     "o, m, R_TY, W_BF16, R_BF16, G_BF16, SAME, DOT, REFRESH)",
     "o, m, R_TY, W_BF16, R_BF16, G_BF16, SAME, DOT, False)"),
    ('triton: always refreshed', INTERPRETED, "if REFRESH: _write_ref(rp + at", "if True: _write_ref(rp + at"),
    ('triton: bf16 truncated', INTERPRETED, "rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16", "rounded = u >> 16"),
    ('triton: bf16 ties rounded up', INTERPRETED,
     "rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16", "rounded = (u + 0x8000) >> 16"),
    ('triton: NaN rounded to a number', INTERPRETED,
     "tl.where((u & 0x7FFFFFFF) > 0x7F800000, (u >> 16) | 0x40, rounded)", "rounded"),
    ('triton: bf16 read natively', INTERPRETED,
     "torch.bfloat16: (tl.uint16, True)", "torch.bfloat16: (tl.bfloat16, False)"),
    ('triton: bits copied across dtypes', INTERPRETED, "SAME=wd == rd", "SAME=wd.itemsize == rd.itemsize"),
    ('triton: rows swapped', INTERPRETED, "tl.store(slot + n_slots,", "tl.store(slot + 2*n_slots,"),
    ('triton: sign not removed', INTERPRETED, "top = tl.maximum(top, tl.abs(d))", "top = tl.maximum(top, d)"),
    ('triton: false promise', INTERPRETED,
     "t.data_ptr()%16 == 0 for t in ts)", "t.data_ptr()%16 == 0 for t in ts[1:])"),
    ('triton: no promise', COMPILED, "W_ALIGN=align(wd)", "W_ALIGN=wd.itemsize"),
    ('triton: atomics', COMPILED, "    tl.store(slot, ", "    tl.atomic_add(slot, "),
    ('triton: spare loads in the loop', COMPILED,
     "    w = _to_f32(wraw, W_BF16)\n    r = ",
     "    w = _to_f32(tl.load(wp + (at ^ 1), mask=m, other=0), W_BF16)\n    r = "),
    ('triton: blocks too big for registers', COMPILED, "2048 if torch.version.hip else 1024", "8192"),
    ('triton: slots of the wrong tensor', INTERPRETED,
     "_store_stats(part + tl.load(slots + t) + c, n_slots, d2, r2, top, gd, 0.)",
     "_store_stats(part + tl.program_id(0), n_slots, d2, r2, top, gd, 0.)"),
    ('triton: finish one too far', INTERPRETED, "mask=i + offs < hi", "mask=i + offs <= hi"),
    ('triton: finish stops early', INTERPRETED, "for i in range(lo, hi, BLOCK)", "for i in range(lo, lo+1, BLOCK)"),
    ('triton: finish adds the maxima', INTERPRETED, "tl.where(s == 2, tl.max(acc), tl.sum(acc))", "tl.sum(acc)"),
    ('triton: dtype pairs share a launch', INTERPRETED, "*(t.dtype for t in ts), all(", "*(w.dtype for t in ts), all("),
    ('plan: NaN hidden from the maximum', INTERPRETED, "top[np.isnan(sums)] = np.nan", "pass"),
    ('plan: stale addresses', f'{BACKENDS} -k notices',
     "if self._rows.memory() != self._built_for: self._build()", "pass"),
    ('plan: dtype of new memory unnoticed', f'{BACKENDS} -k notices', "[(t.data_ptr(), t.dtype)", "[(0, 0)"),
    ('plan: gaps taken for data', f'{BACKENDS} -k strides',
     "if not all(t.is_contiguous() for t in ts): return None", "pass"),
    ('torch: left-over rows forgotten', f'{BACKENDS} -k powers or beyond or strides or nan or measured',
     "x[:n].view(-1, _ROW).sum(1).sum() + x[n:].sum()", "x[:n].view(-1, _ROW).sum(1).sum()"),
    ('torch: subtracts in low precision', f'{BACKENDS} -k measured_right and torch',
     "w, r = w.to(dtype), r.to(dtype)", "w, r = w.to(r.dtype).to(dtype), r.to(dtype)"),
    ('torch: refreshed before measured', f'{BACKENDS} -k strides and torch',
     "                stats.append(_torch_stats(a",
     "                if refresh: b.copy_(a)\n                stats.append(_torch_stats(a"),
    ('numba: past the end', f'{BACKENDS} -k beyond',
     "left = min(chunk, numels[t] - start)", "left = min(chunk, numels[t] - start + 1)"),
    ('numba: one short', f'{BACKENDS} -k beyond or strides',
     "left = min(chunk, numels[t] - start)", "left = min(chunk, numels[t] - start - 1)"),
    ('numba: 32-bit offsets', f'{BACKENDS} -k than_2_31',
     "start = index[c]*chunk", "start = np.int64(np.int32(index[c]*chunk))"),
    ('numba: last block only', f'{BACKENDS} -k notices or strides or company', "part[c,0] += dd", "part[c,0] = dd"),
    ('numba: overlapping blocks', f'{BACKENDS} -k strides',
     "for b in range(0, left, 4096)", "for b in range(0, left, 2048)"),
    ('numba: sign in the maximum', f'{BACKENDS} -k strides or notices',
     "_as_u32(d) & np.uint32(0x7fffffff)", "_as_u32(d)"),
    ('numba: bf16 truncated', f'{BACKENDS} -k beyond',
     "rounded = np.uint32(u + np.uint32(0x7fff) + ((u >> np.uint32(16)) & np.uint32(1)))", "rounded = u"),
    ('numba: refresh keeps the old value', f'{BACKENDS} -k strides', "r[i] = _store(w[i], x, rtag)", "r[i] = r[i]"),
    ('numba: refresh where none was asked', f'{BACKENDS} -k ask_at_once',
     "write = True if refresh else None", "write = True"),
    ('numba: a range forgotten', f'{BACKENDS} -k beyond',
     "for lo in range(0, n, step)", "for lo in range(0, n-step+1, step)"),
    ('numba: shared rows', f'{BACKENDS} -k company or strides', "part[c,0] += dd", "part[0,0] += dd"),
    ('numba: chunks of the wrong owner', f'{BACKENDS} -k company',
     "np.array(self.owner)[self.tensor]", "np.array(self.owner)[self.tensor*0]"),
    ('numba: pool inherited by a fork', f'{BACKENDS} -k fork', "key = os.getpid(), n_threads", "key = n_threads"),
    ('dot: weights instead of the difference', f'{INTERPRETED} -k test_dot_',
     "other=0), G_BF16)*d\n    if REFRESH", "other=0), G_BF16)*w\n    if REFRESH"),
    ('dot: left-over elements not counted', f'{INTERPRETED} -k test_dot_',
     "if DOT: dot = tl.sum(gd) + tl.sum(g)", "if DOT: dot = tl.sum(gd)"),
    ('dot: tail read without end', f'{INTERPRETED} -k test_dot_',
     "tl.load(gp + at, mask=m, other=0)", "tl.load(gp + at)"),
    ('dot: gradient read twice', f'{INTERPRETED} -k test_dot_',
     "if DOT: gd = _to_f32(", "if DOT: gd = 0*_to_f32(tl.load(gp + at, mask=m, other=0), G_BF16) + _to_f32("),
    ('dot: bf16 taken for something else', f'{INTERPRETED} -k test_dot_', "G_BF16=g_bf16", "G_BF16=w_bf16"),
    ('dot: gradients of other dtypes share', f'{INTERPRETED} -k test_dot_',
     "return eight, *(t.dtype for t in ts), all(",
     "return eight, *(t.dtype for t in ts[:2]), *([ts[0].dtype] if g is not None else []), all("),
    ('dot: false promise for gradients', f'{INTERPRETED} -k test_dot_',
     "t.data_ptr()%16 == 0 for t in ts)", "t.data_ptr()%16 == 0 for t in ts[:2])"),
    ('dot: no promise for gradients', f'{COMPILED} -k dot', "G_ALIGN=align(gd or wd)", "G_ALIGN=(gd or wd).itemsize"),
    ('dot: slot of no gradient not zero', f'{INTERPRETED} -k test_dot_', "    dot = 0.\n", "    dot = tl.sum(r2)\n"),
    ('dot: unused slot left as it was', f'{INTERPRETED} -k test_dot_',
     "    tl.store(slot + 4*n_slots, e2)", "    pass"),
    ('numba dot: last block only', f'{BACKENDS} -k takes_gradients', "part[c,3] += dot", "part[c,3] = dot"),
    ('numba dot: wrong offset', f'{BACKENDS} -k takes_gradients',
     "numba.carray(_pointer(gs[t] + at*gtag.itemsize",
     "numba.carray(_pointer(gs[t] + b*gtag.itemsize"),
    ('numba dot: weights not the difference', f'{BACKENDS} -k takes_gradients',
     "dot += _load(g[i])*d\n        if refresh is not None: r[i]",
     "dot += _load(g[i])*x\n        if refresh is not None: r[i]"),
    ('torch dot: subtracts in low precision', f'{BACKENDS} -k gradients_and_8 and torch',
     "total(g.to(dtype), d)", "total(g.to(dtype), (w - r).bfloat16().to(dtype))"),
    ('plan: gradients of another order taken', f'{BACKENDS} -k variants_take_any_strides',
     "if not all(t.is_contiguous() for t in ts):\n", "if not all(t.is_contiguous() for t in ts[:2]):\n"),
    ('plan: gradients mixed up by dtype', f'{BACKENDS} -k gradients_and_8',
     "for t in (w, r, g)) # `Ref", "for t in (w, r)), g is None # `Ref"),
    ('plan: new gradients unnoticed', f'{BACKENDS} -k takes_gradients',
     "for t in (w, *_parts(r), g) if t is not None]", "for t in (w, *_parts(r))]"),
    ('plan: not corrected', f'{BACKENDS} -k correction', "np.maximum(d2 - e2, 0) if eight else d2", "d2"),
    ('plan: corrected by the next error', f'{BACKENDS} -k correction',
     "        error[k] = r.error\n        if fresh is not None: r.error = float(fresh[k])",
     "        if fresh is not None: r.error = float(fresh[k])\n        error[k] = r.error"),
    ('plan: error not kept', f'{BACKENDS} -k correction', "if fresh is not None: r.error = float(fresh[k])", "pass"),
    ('ref8: not bit for bit: fused', f'{COMPILED} -k ref8_rounds',
     "k = tl.minimum(tl.where(inv > 0, w*inv, 0.), 127.) + 12582912.", "k = tl.where(inv > 0, w*inv, 0.) + 12582912."),
    ('ref8: ties away from even', f'{INTERPRETED} -k ref8_codes',
     "k = tl.minimum(tl.where(inv > 0, w*inv, 0.), 127.) + 12582912.",
     "k = tl.floor(tl.minimum(tl.where(inv > 0, w*inv, 0.), 127.) + .5) + 12582912."),
    ('ref8: approximate division', f'{COMPILED} -k ref8_rounds', "tl.div_rn(127., high)", "127./high"),
    ('ref8: scale divided, not multiplied', f'{INTERPRETED} -k ref8_codes', "high*INV127)", "high/127.)"),
    ('ref8: NaN lost in the maximum', f'{INTERPRETED} -k ref8_codes',
     "high = tl.max(w.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1, keep_dims=True).to(tl.float32, bitcast=True)",
     "high = tl.max(tl.abs(w), 1, keep_dims=True)"),
    ('ref8: NaN counts as zero', f'{INTERPRETED} -k ref8_codes',
     "tl.where(high < TINY, 0., high*INV127)", "tl.where(high >= TINY, high*INV127, 0.)"),
    ('ref8: tiny blocks scaled', f'{INTERPRETED} -k ref8_codes',
     "new = tl.where(high < TINY, 0., high*INV127)", "new = high*INV127"),
    ('ref8: error of the old reference', f'{INTERPRETED} -k ref8_each', "e = w - (k - 12582912.)*new", "e = d"),
    ('ref8: codes stored without mask', f'{INTERPRETED} -k ref8_each', "tl.int8), mask=m)", "tl.int8))"),
    ('ref8: row one too far', f'{INTERPRETED} -k ref8_each', "has = i + row < whole", "has = i + row <= whole"),
    ('ref8: scales one too far', f'{INTERPRETED} -k ref8_each',
     "mask=lane*ROWS + row < whole)", "mask=lane*ROWS + row <= whole)"),
    ('ref8: scales of the wrong rows', f'{INTERPRETED} -k ref8_each', "lane == i//ROWS, new", "lane == i, new"),
    ('ref8: last scale forgotten', f'{INTERPRETED} -k ref8_each',
     "if REFRESH: tl.store(sp + last, new", "if False: tl.store(sp + last, new"),
    ('ref8: last row not counted', f'{INTERPRETED} -k ref8_each',
     "return tl.sum(d2) + tl.sum(a), ", "return tl.sum(d2), "),
    ('ref8: last row without maximum', f'{INTERPRETED} -k ref8_each',
     "tl.maximum(tl.max(top), tl.max(x))", "tl.max(top)"),
    ('ref8: last row without error', f'{INTERPRETED} -k ref8_each', "tl.sum(e2) + tl.sum(e)", "tl.sum(e2)"),
    ('ref8: last row without gradient', f'{INTERPRETED} -k ref8_each',
     "\n    dot = tl.sum(gd) + tl.sum(g)", "\n    dot = tl.sum(gd)"),
    ('ref8: 32-bit offsets', f'{INTERPRETED} -k ref8_more_than', "start = c.to(tl.int64)*CHUNK", "start = c*CHUNK"),
    ('ref8: 32-bit scale offsets', f'{INTERPRETED} -k ref8_more_than', "+ start//256", "+ (start.to(tl.int32)*1)//256"),
    ('ref8: scales stored in the loop', f'{COMPILED} -k ref8_on',
     "scales = tl.where(lane == i//ROWS, new, scales)", "tl.store(sp + i + row, new, mask=has)"),
    ('ref8: accumulators of 8 registers', f'{COMPILED} -k ref8_on',
     "    return tl.sum(tl.reshape(x, [x.shape[0], 32, 8]), 2)",
     "    return tl.sum(tl.reshape(x, [x.shape[0], 8, 32]), 1)"),
    ('ref8: no promise for codes', f'{COMPILED} -k ref8_on', "R_ALIGN=align(rd)", "R_ALIGN=rd.itemsize"),
    ('numba 8: rounds half up', f'{BACKENDS} -k codes_and_scales',
     "return _rint(x*inv)", "return np.floor(x*inv + np.float32(.5))"),
    ('numba 8: NaN counts as zero', f'{BACKENDS} -k codes_and_scales',
     "new = np.float32(0) if a < np.float32(ZERO_BELOW)", "new = np.float32(0) if not a >= np.float32(ZERO_BELOW)"),
    ('numba 8: tiny blocks scaled', f'{BACKENDS} -k codes_and_scales',
     "new = np.float32(0) if a < np.float32(ZERO_BELOW) else a*np.float32(ONE_127TH)", "new = a*np.float32(ONE_127TH)"),
    ('numba 8: scale of the first block', f'{BACKENDS} -k correction',
     "scale[b//GROUP], refresh)", "scale[0], refresh)"),
    ('numba 8: scales of the first chunk', f'{BACKENDS} -k correction', "ss[t] + start//GROUP*stag.itemsize", "ss[t]"),
    ('numba 8: only the last error', f'{BACKENDS} -k correction', "part[c,4] += ee", "part[c,4] = ee"),
    ('numba 8: sign in the maximum', f'{BACKENDS} -k codes_and_scales',
     "high = max(high, _as_u32(x) & np.uint32(0x7fffffff))", "high = max(high, _as_u32(x))"),
    ('torch 8: reciprocal first', f'{BACKENDS} -k codes_and_scales and numba',
     "torch.full_like(top, 127).div(top)", "127/top"),
    ('8 bits: wrong order of dimensions', f'{BACKENDS} -k variants_take_any_strides',
     "if isinstance(r, Reference8): return None", "pass"),
]

KERNELS = Path('alf_nb')/'kernels'

def place(mutant):
    "The file that holds a mutant's line; a line that changed, or that two files have, is an error"
    name, _, old, _ = mutant
    found = [p for p in sorted((ROOT/KERNELS).glob('*.py')) if old in p.read_text(encoding='utf-8')]
    if len(found) == 1: return found[0]
    where = ', '.join(p.name for p in found) or f'no file of {KERNELS}'
    raise SystemExit(f'{name}: the line {old!r} is in {where}, and has to be in one; update mutants.py')

def write(mutant, package):
    "Break a copy of the kernels, and only there"
    shutil.copytree(ROOT/KERNELS, package/'kernels', ignore=shutil.ignore_patterns('__pycache__'), dirs_exist_ok=True)
    if not mutant: return
    file, (_, _, old, new) = place(mutant), mutant
    (package/'kernels'/file.name).write_text(file.read_text(encoding='utf-8').replace(old, new, 1), encoding='utf-8')

def run(tests, package):
    "The test that fails on this package, or None"
    file, _, words = tests.partition(' -k ')
    env = os.environ | dict(
        PYTHONPATH=str(package.parent),
        TRITON_INTERPRET=str(int(file == INTERPRETED)),
        OMP_NUM_THREADS='1',
        PYTHONDONTWRITEBYTECODE='1',
        NUMBA_CACHE_DIR=tempfile.mkdtemp(dir=package.parent),
        TRITON_CACHE_DIR=tempfile.mkdtemp(dir=package.parent),
    )
    try:
        chosen = [file, *(['-k', words] if words else [])]
        quiet = ['-x', '-q', '-o', 'addopts=', '-p', 'no:cacheprovider']
        p = subprocess.run([sys.executable, '-m', 'pytest', *quiet, *chosen], cwd=HERE, env=env, capture_output=True,
                           text=True, timeout=240)
    except subprocess.TimeoutExpired: return 'timeout'
    if p.returncode == 0: return None
    if p.returncode < 0: return f'signal {-p.returncode}'
    found = re.search(r'^(?:FAILED|ERROR) \S+?(?:::(\S+))?(?: -|$)', p.stdout, re.M)
    if not found:
        raise SystemExit(
            f'{tests}: pytest ended with {p.returncode} but names no test:\n{p.stdout[-2000:]}{p.stderr[-2000:]}'
        )
    return found[1] or 'import'

def main(words):
    todo = [m for m in MUTANTS if not words or any(w in m[0] for w in words)]
    if not todo: raise SystemExit(f"no mutant's name has {' or '.join(words)}")
    alive = []
    with tempfile.TemporaryDirectory() as tmp:
        package = Path(shutil.copytree(ROOT/'alf_nb', Path(tmp)/'alf_nb', ignore=shutil.ignore_patterns('__pycache__')))
        for tests in dict.fromkeys(m[1] for m in todo): # a test that fails anyhow kills nothing
            write(None, package)
            if killer := run(tests, package):
                raise SystemExit(f'{tests}: {killer} fails on the unchanged kernels; nothing can be said')
        for m in todo:
            t0 = time.time()
            write(m, package)
            killer = run(m[1], package)
            print(f"{'killed ' if killer else 'ALIVE  '} {m[0]:42} {time.time()-t0:4.0f} s  {killer or ''}", flush=True)
            if not killer: alive.append(m[0])
    print(f'{len(todo)-len(alive)} of {len(todo)} mutants killed')
    return 1 if alive else 0

if __name__ == '__main__': sys.exit(main(sys.argv[1:]))
