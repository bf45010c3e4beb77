"""`make mutants`: break the kernels on purpose, one line at a time; every mutant has to be killed by a test. `python tests/kernels/mutants.py [WORD…]` runs those whose name has a WORD."""
import os, re, shutil, subprocess, sys, tempfile, time
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
INTERPRETED, COMPILED, BACKENDS = 'interpreted.py', 'compiled.py', 'test_backends.py'

# name, tests that should kill it, line as it is, line as it should not be
MUTANTS = [
    ('triton: 32-bit offsets',                 INTERPRETED, "start = c.to(tl.int64)*CHUNK", "start = c*CHUNK"),
    ('triton: left-over elements not counted', INTERPRETED, "tl.sum(d2) + tl.sum(d*d)", "tl.sum(d2)"),
    ('triton: left-over max forgotten',        INTERPRETED, "tl.maximum(tl.max(top), tl.max(tl.abs(d)))", "tl.max(top)"),
    ('triton: mask one too far',               INTERPRETED, "m = i + offs < body", "m = i + offs <= body"),
    ('triton: tail one too far',               INTERPRETED, "m = o < left", "m = o < left + 1"),
    ('triton: tail one short',                 INTERPRETED, "m = o < left", "m = o < left - 1"),
    ('triton: body not rounded to 16',         COMPILED,    "body = (left//16)*16", "body = left"),
    ('triton: everything read twice',          INTERPRETED, "for i in range(0, body, BLOCK)", "for i in range(0, body, BLOCK//2)"),
    ('triton: half of it skipped',             INTERPRETED, "for i in range(0, body, BLOCK)", "for i in range(0, body, 2*BLOCK)"),
    ('triton: store without mask',             INTERPRETED, "tl.store(p, raw, mask=m)", "tl.store(p, raw)"),
    ('triton: tail not refreshed',             INTERPRETED, "if REFRESH: _write_ref(rp + o, wraw", "if False: _write_ref(rp + o, wraw"),
    ('triton: always refreshed',               INTERPRETED, "if REFRESH: _write_ref(rp + i", "if True: _write_ref(rp + i"),
    ('triton: bf16 truncated',                 INTERPRETED, "rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16", "rounded = u >> 16"),
    ('triton: bf16 ties rounded up',           INTERPRETED, "rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16", "rounded = (u + 0x8000) >> 16"),
    ('triton: NaN rounded to a number',        INTERPRETED, "tl.where((u & 0x7FFFFFFF) > 0x7F800000, (u >> 16) | 0x40, rounded)", "rounded"),
    ('triton: bf16 read natively',             INTERPRETED, "torch.bfloat16: (tl.uint16, True)", "torch.bfloat16: (tl.bfloat16, False)"),
    ('triton: bits copied across dtypes',      INTERPRETED, "SAME=wd == rd", "SAME=wd.itemsize == rd.itemsize"),
    ('triton: rows swapped',                   INTERPRETED, "tl.store(slot + n_slots,", "tl.store(slot + 2*n_slots,"),
    ('triton: sign not removed',               INTERPRETED, "top = tl.maximum(top, tl.abs(d))", "top = tl.maximum(top, d)"),
    ('triton: false promise',                  INTERPRETED, "w.data_ptr()%16 == 0 and r.data_ptr()%16 == 0", "r.data_ptr()%16 == 0"),
    ('triton: no promise',                     COMPILED,    "W_ALIGN=16*wd.itemsize//widest if aligned else wd.itemsize", "W_ALIGN=wd.itemsize"),
    ('triton: atomics',                        COMPILED,    "    tl.store(slot, ", "    tl.atomic_add(slot, "),
    ('triton: spare loads in the loop',        COMPILED,    "        w = _to_f32(wraw, W_BF16)\n        r = ", "        w = _to_f32(tl.load(wp + i + (offs ^ 1), mask=m, other=0), W_BF16)\n        r = "),
    ('triton: blocks too big for registers',   COMPILED,    "2048 if torch.version.hip else 1024", "8192"),
    ('triton: slots of the wrong tensor',      INTERPRETED, "slot = part + tl.load(slots + t) + c", "slot = part + pid"),
    ('triton: finish one too far',             INTERPRETED, "mask=i + offs < hi", "mask=i + offs <= hi"),
    ('triton: finish stops early',             INTERPRETED, "for i in range(lo, hi, BLOCK)", "for i in range(lo, lo+1, BLOCK)"),
    ('triton: finish adds the maxima',         INTERPRETED, "tl.where(s == 2, tl.max(acc), tl.sum(acc))", "tl.sum(acc)"),
    ('triton: dtype pairs share a launch',     INTERPRETED, "keys.setdefault((w.dtype, r.dtype, ", "keys.setdefault((w.dtype, w.dtype, "),
    ('plan: NaN hidden from the maximum',      INTERPRETED, "top[np.isnan(sums[0])] = np.nan", "pass"),
    ('plan: stale addresses',                  f'{BACKENDS} -k notices', "if self._memory() != self._built_for: self._build()", "pass"),
    ('plan: dtype of new memory unnoticed',    f'{BACKENDS} -k notices', "[(t.data_ptr(), t.dtype)", "[(0, 0)"),
    ('plan: gaps taken for data',              f'{BACKENDS} -k strides', "if w.is_contiguous() and r.is_contiguous() else None", "if w.is_contiguous() else None"),
    ('torch: left-over rows forgotten',        f'{BACKENDS} -k powers or beyond or strides or nan or measured', "x[:n].view(-1, _ROW).sum(1).sum() + x[n:].sum()", "x[:n].view(-1, _ROW).sum(1).sum()"),
    ('torch: subtracts in low precision',      f'{BACKENDS} -k measured_right and torch', "w, r = w.to(dtype), r.to(dtype)", "w, r = w.to(r.dtype).to(dtype), r.to(dtype)"),
    ('torch: refreshed before measured',       f'{BACKENDS} -k strides and torch', "owners.append(u); stats.append(", "owners.append(u); b.copy_(a) if refresh else 0; stats.append("),
    ('numba: past the end',                    f'{BACKENDS} -k beyond', "left = min(chunk, numels[t] - start)", "left = min(chunk, numels[t] - start + 1)"),
    ('numba: one short',                       f'{BACKENDS} -k beyond or strides', "left = min(chunk, numels[t] - start)", "left = min(chunk, numels[t] - start - 1)"),
    ('numba: 32-bit offsets',                  f'{BACKENDS} -k than_2_31', "start = index[c]*chunk", "start = np.int64(np.int32(index[c]*chunk))"),
    ('numba: last block only',                 f'{BACKENDS} -k notices or strides or company', "d2 += dd; r2 += rr", "d2 = dd; r2 = rr"),
    ('numba: overlapping blocks',              f'{BACKENDS} -k strides', "for b in range(0, left, 4096)", "for b in range(0, left, 2048)"),
    ('numba: sign in the maximum',             f'{BACKENDS} -k strides or notices', "_as_u32(d) & np.uint32(0x7fffffff)", "_as_u32(d)"),
    ('numba: bf16 truncated',                  f'{BACKENDS} -k beyond', "rounded = np.uint32(u + np.uint32(0x7fff) + ((u >> np.uint32(16)) & np.uint32(1)))", "rounded = u"),
    ('numba: refresh keeps the old value',     f'{BACKENDS} -k strides', "r[i] = _store(w[i], x, rtag)", "r[i] = r[i]"),
    ('numba: refresh where none was asked',    f'{BACKENDS} -k ask_at_once', "*self.tags, True if refresh else None", "*self.tags, True"),
    ('numba: a range forgotten',               f'{BACKENDS} -k beyond', "for lo in range(0, n, step)", "for lo in range(0, n-step+1, step)"),
    ('numba: shared rows',                     f'{BACKENDS} -k company or strides', "part[c,0] = d2;", "part[0,0] = d2;"),
    ('numba: chunks of the wrong owner',       f'{BACKENDS} -k company', "np.array(self.owner)[self.tensor]", "np.array(self.owner)[self.tensor*0]"),
    ('numba: pool inherited by a fork',        f'{BACKENDS} -k fork', "key = os.getpid(), n_threads", "key = n_threads"),
]

def run(mutant, package):
    "What happened to one mutant: the test that killed it, or None"
    name, tests, old, new = mutant; file, _, words = tests.partition(' -k ')
    source = (ROOT/'alf_nb'/'kernels.py').read_text()
    if source.count(old) < 1: raise SystemExit(f'{name}: the line {old!r} is not in alf_nb/kernels.py any more; update mutants.py')
    (package/'kernels.py').write_text(source.replace(old, new, 1))
    env = os.environ | dict(PYTHONPATH=str(package.parent), TRITON_INTERPRET=str(int(file == INTERPRETED)), OMP_NUM_THREADS='1', PYTHONDONTWRITEBYTECODE='1',
                            NUMBA_CACHE_DIR=tempfile.mkdtemp(dir=package.parent), TRITON_CACHE_DIR=tempfile.mkdtemp(dir=package.parent))
    try: p = subprocess.run([sys.executable, '-m', 'pytest', '-x', '-q', '-o', 'addopts=', '-p', 'no:cacheprovider', file, *(['-k', words] if words else [])], cwd=HERE, env=env, capture_output=True, text=True, timeout=240)
    except subprocess.TimeoutExpired: return 'timeout'
    if p.returncode == 0: return None
    if p.returncode < 0: return f'signal {-p.returncode}'
    found = re.search(r'^(?:FAILED|ERROR) \S+?(?:::(\S+))?(?: -|$)', p.stdout, re.M)
    if not found: raise SystemExit(f'{name}: pytest ended with {p.returncode} but names no test:\n{p.stdout[-2000:]}{p.stderr[-2000:]}')
    return found[1] or 'import'

def main(words):
    todo = [m for m in MUTANTS if not words or any(w in m[0] for w in words)]
    if not todo: raise SystemExit(f"no mutant's name has {' or '.join(words)}")
    alive = []
    with tempfile.TemporaryDirectory() as tmp:
        package = Path(shutil.copytree(ROOT/'alf_nb', Path(tmp)/'alf_nb', ignore=shutil.ignore_patterns('__pycache__')))
        for tests in dict.fromkeys(m[1] for m in todo): # a test that fails anyhow kills nothing
            if killer := run(('unchanged', tests, 'import', 'import'), package): raise SystemExit(f'{tests}: {killer} fails on the unchanged kernels; nothing can be said')
        for m in todo:
            t0 = time.time(); killer = run(m, package)
            print(f"{'killed ' if killer else 'ALIVE  '} {m[0]:42} {time.time()-t0:4.0f} s  {killer or ''}", flush=True)
            if not killer: alive.append(m[0])
    print(f'{len(todo)-len(alive)} of {len(todo)} mutants killed')
    return 1 if alive else 0

if __name__ == '__main__': sys.exit(main(sys.argv[1:]))
