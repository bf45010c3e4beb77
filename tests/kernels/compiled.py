"""The Triton source compiled ahead of time, and its machine code read: no GPU, no driver. Run by test_triton.py in a
process of its own without TRITON_INTERPRET.

Widths of loads are checked exactly, counts of instructions as bounds: they depend a little on the ptxas in the
triton wheel."""
import hashlib, re, subprocess, sys, tempfile, os
from collections import Counter
import pytest, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from alf_nb.kernels import triton_sweep as K
from alf_nb.kernels.reference8 import empty_reference
from common import *
assert not triton.knobs.runtime.interpret, "the compiler cannot share a process with the interpreter"

CUDA = {f'sm_{a}': GPUTarget('cuda', a, 32) for a in (80, 86, 89, 90, 100)}
HIP = {g: GPUTarget('hip', g, 64) for g in ('gfx90a', 'gfx942')}
SHORT = {torch.float32: 'fp32', torch.bfloat16: 'bf16', torch.float16: 'fp16', torch.int8: 'int8', None: 'none'}
WARPS = 4

def build(target, fn=K._delta_partials, **consts):
    "Compile a kernel with these constants, as a launch would"
    types = dict(
        w_ptrs='*i64',
        r_ptrs='*i64',
        s_ptrs='*i64',
        g_ptrs='*i64',
        numels='*i64',
        slots='*i32',
        blk_tensor='*i32',
        blk_chunk='*i32',
        part='*fp32',
        start='*i32',
        out='*fp64',
        n_slots='i32',
    )
    sig = {k: 'constexpr' if k in consts else types[k] for k in fn.arg_names}
    attrs = {(i,): [['tt.divisibility', 16]] for i,k in enumerate(fn.arg_names) if sig[k][0] == '*'}
    return triton.compile(
        ASTSource(fn=fn, signature=sig, constexprs=consts, attrs=attrs),
        target=target,
        options=dict(num_warps=WARPS, enable_fp_fusion=True),
    )

def partials(target, d1=torch.bfloat16, d2=torch.bfloat16, d3=None, offset=0, **more):
    """The data pass with the very constants that the host side chooses for such tensors; int8 as dtype of the
    reference: in 8 bits"""
    w = tensor(64, d1, offset=offset)
    g = None if d3 is None else tensor(64, d3)
    n, tables, consts, kernel = K.TritonSweep(
        [(0, w, empty_reference(w) if d2 == torch.int8 else tensor(64, d2), g)]
    ).launches[0]
    return build(
        target,
        kernel,
        **{**consts, **dict(BLOCK=2048 if target.backend == 'hip' else consts['BLOCK'], REFRESH=False), **more}
    )

class Sass:
    "Machine code of an NVIDIA kernel: registers and spills, instructions, the hot loop"
    def __init__(self, cubin):
        with tempfile.NamedTemporaryFile(suffix='.cubin') as f:
            f.write(cubin)
            f.flush()
            tool = lambda flag: subprocess.run(
                [triton.knobs.nvidia.cuobjdump.path, flag, f.name], check=True, capture_output=True, text=True
            ).stdout
            self.text, use = tool('-sass'), tool('-res-usage')
        self.use = {k: int(v) for k,v in re.findall(r'(REG|STACK|LOCAL|SHARED):(\d+)', use)}
        self.code = [
            (int(a, 16), op, args)
            for a, op, args in re.findall(
                r'/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)\s*([^;]*);', self.text
            )
        ]
        assert self.code and self.use
    @property
    def ops(self): return Counter(op for _,op,_ in self.code)
    @property
    def loop(self):
        "The longest loop that loads from global memory"
        best = []
        for at,op,args in self.code:
            to = re.findall(r'0x([0-9a-f]+)', args)
            if op.startswith('BRA') and to and int(to[-1], 16) < at:
                body = [x for x in self.code if int(to[-1], 16) <= x[0] <= at]
                if any(x[1].startswith('LDG') for x in body) and len(body) > len(best): best = body
        return Counter(op for _,op,_ in best)

def clean(s):
    assert s.use['LOCAL'] == s.use['STACK'] == 0 and not only(s.ops, 'LDL', 'STL'), 'spills'
    assert not only(s.ops, 'ATOM', 'RED.', 'REDG'), 'atomics'

def only(counter, *starts): return {k: v for k,v in counter.items() if k.startswith(starts)}

ids = lambda x: '-'.join(map(SHORT.get, x)) if isinstance(x, tuple) else str(x)
BF16, FP16, FP32 = (torch.bfloat16,)*2, (torch.float16,)*2, (torch.float32,)*2
MAIN = [('sm_90', p, refresh) for p in PAIRS for refresh in (False, True)] + [('sm_80', p, p[0] == p[1]) for p in PAIRS]
MORE = [(sm, *case) for sm in ('sm_86', 'sm_89', 'sm_100') for case in ((BF16, True), (FP32, False))]

def quick(sm, dtypes, refresh): return dtypes == BF16 or sm == 'sm_90' and (refresh or dtypes == FP32)

@pytest.mark.parametrize('sm,dtypes,refresh', slow_unless(quick, MAIN + MORE), ids=ids)
def test_nvidia(sm, dtypes, refresh):
    k = partials(CUDA[sm], *dtypes, REFRESH=refresh)
    s = Sass(k.asm['cubin'])
    loop = s.loop
    assert f'.target {sm}' in k.asm['ptx']
    clean(s)
    assert s.use['REG'] <= 64, 'fewer than 8 blocks of 4 warps fit'
    # elements per access, accesses per thread and loop
    sizes = [d.itemsize for d in dtypes]
    per = 16//max(sizes)
    n = 1024//(32*WARPS)//per
    want = Counter()
    for b in sizes: want[f'LDG.E.{8*per*b}'] += n
    assert only(loop, 'LDG') == want, 'every load in the loop is as wide as the dtypes allow'
    assert only(loop, 'STG') == ({f'STG.E.{8*per*sizes[1]}': n} if refresh else {})
    assert not only(loop, 'BAR', 'LDS', 'STS', 'SHFL'), 'shared memory in the loop'
    per_16_bytes = sum(loop.values())*16/(8*sum(sizes))
    rounds = refresh and dtypes[0] != dtypes[1]
    assert per_16_bytes <= (
        76 if rounds else 46 if max(sizes) == 2 else 32
    ), f'{per_16_bytes} instructions per 16 bytes read'

B, H, F, Q = torch.bfloat16, torch.float16, torch.float32, torch.int8
DOT = [
    ('sm_90', (a, b, c), refresh)
    for a, b, c in ((B, B, B), (F, F, F), (F, F, B), (B, B, F), (F, B, H))
    for refresh in (False, True)
] + [(sm, t, False) for sm in ('sm_80', 'sm_86', 'sm_89', 'sm_100') for t in ((B, B, B), (F, F, F))]

def quick_dot(sm, dtypes, refresh): return dtypes == (B, B, B) or sm == 'sm_90' and refresh

@pytest.mark.parametrize('sm,dtypes,refresh', slow_unless(quick_dot, DOT), ids=ids)
def test_dot_on_nvidia(sm, dtypes, refresh):
    s = Sass(partials(CUDA[sm], *dtypes, REFRESH=refresh).asm['cubin'])
    loop = s.loop
    clean(s)
    assert s.use['REG'] <= 64, 'fewer than 8 blocks of 4 warps fit'
    sizes = [d.itemsize for d in dtypes]
    per = 16//max(sizes)
    n = 1024//(32*WARPS)//per
    want = Counter()
    for b in sizes: want[f'LDG.E.{8*per*b}'] += n
    assert only(loop, 'LDG') == want and not only(loop, 'BAR', 'LDS', 'STS', 'SHFL')
    assert sum(loop.values()) * 16 / (8 * sum(sizes)) <= (
        56 if refresh and len({*dtypes[:2]}) > 1 else 42 if max(sizes) == 2 else 32
    )

REF8 = [('sm_90', (d, Q, g), refresh) for d in (B, H, F) for g in (None, B, F) for refresh in (False, True)] + [
    (sm, (d, Q, None), refresh)
    for sm in ('sm_80', 'sm_86', 'sm_89', 'sm_100')
    for d in (B, F)
    for refresh in (False, True)
]

def quick_ref8(sm, dtypes, refresh):
    return refresh and dtypes == (B, Q, None) or sm == 'sm_90' and (refresh if dtypes[2] else dtypes[0] == F)

@pytest.mark.parametrize('sm,dtypes,refresh', slow_unless(quick_ref8, REF8), ids=ids)
def test_ref8_on_nvidia(sm, dtypes, refresh):
    s = Sass(partials(CUDA[sm], *dtypes, REFRESH=refresh).asm['cubin'])
    loop = s.loop
    clean(s)
    # 8 codes per lane, one scale per warp
    sizes = [d.itemsize for d in dtypes if d]
    want = Counter({'LDG.E.64': 1, 'LDG.E': 1})
    for d in dtypes:
        if d and d != Q: want['LDG.E.128'] += d.itemsize//2
    assert only(loop, 'LDG') == want
    assert only(loop, 'STG') == ({'STG.E.64': 1} if refresh else {}), 'codes are written in the loop, scales after it'
    assert not only(loop, 'BAR', 'LDS', 'STS', 'SHFL') and sum(only(loop, 'REDUX', 'CREDUX').values()) == refresh
    assert s.use['REG'] <= (48 if not refresh else 72 if dtypes[2] is None else 96)
    assert sum(loop.values())*16/(8*sum(sizes)) <= (165 if refresh else 72)

def test_ref8_rounds_product_and_sum_apart():
    ptx = partials(CUDA['sm_90'], B, Q, REFRESH=True).asm['ptx']
    assert '0f4B400000' in ptx and 'div.rn.f32' in ptx
    assert not re.search(
        r'fma\S* .*0f4B400000', ptx
    ), 'a fused multiply-add skips a rounding that the other backends make'

def test_the_checks_can_fail():
    s = Sass(partials(CUDA['sm_90'], offset=1).asm['cubin'])  # misaligned: no promise, so no vector loads
    assert s.ops['LDG.E.128'] == 0 and s.ops['LDG.E.U16'] > 8
    s = Sass(partials(CUDA['sm_90'], BLOCK=8192).asm['cubin'])  # far too many registers
    assert s.use['REG'] > 64

def test_offsets_are_64_bit():
    ttir = partials(CUDA['sm_90']).asm['ttir']
    assert re.search(r'arith\.extsi %\S+ : i32 to i64', ttir) and re.search(r'arith\.muli %\S+, %\S+ : i64', ttir)
    assert re.search(r'tt\.addptr %\S+, %\S+ : !tt\.ptr<i16>, i64', ttir)

@pytest.mark.parametrize('sm', CUDA)
def test_finish_on_nvidia(sm):
    s = Sass(build(CUDA[sm], K._delta_finish, BLOCK=1024).asm['cubin'])
    assert s.use['LOCAL'] == s.use['STACK'] == 0 and not only(s.ops, 'ATOM', 'RED.', 'REDG') and s.use['REG'] <= 128

@pytest.mark.parametrize(
    'gfx,dtypes,refresh',
    [('gfx942', p, p[0] == p[1]) for p in PAIRS]
    + [('gfx942', (torch.float32, torch.bfloat16), True), ('gfx90a', BF16, True), ('gfx90a', FP32, False)],
    ids=ids,
)
def test_amd(gfx, dtypes, refresh):
    k = partials(HIP[gfx], *dtypes, REFRESH=refresh)
    check_amd(k)
    assert not refresh or re.search(
        rf'(buffer|global)_store_dwordx{min(4, 4*dtypes[1].itemsize//max(d.itemsize for d in dtypes))}', k.asm['amdgcn']
    )

VARIANTS = [(B, B, B), (F, F, B), *((d, Q, g) for d in (B, F) for g in (None, B))]
ON_AMD = [(gfx, t, r) for gfx in HIP for t in VARIANTS for r in ((False, True) if Q in t else (t[0] == F,))]
def quick_on_amd(gfx, dtypes, refresh):
    return refresh and (gfx == 'gfx942' or dtypes == (B, Q, B)) or dtypes == (B, B, B)

@pytest.mark.parametrize('gfx,dtypes,refresh', slow_unless(quick_on_amd, ON_AMD), ids=ids)
def test_variants_on_amd(gfx, dtypes, refresh):
    k = partials(HIP[gfx], *dtypes, REFRESH=refresh)
    check_amd(k)
    assert Q not in dtypes or re.search(r'(buffer|global)_load_dwordx2', k.asm['amdgcn'])

def check_amd(k):
    asm = k.asm['amdgcn']
    n = lambda key: int(re.search(rf'\.{key}:\s+(\d+)', asm).group(1))
    assert k.asm['hsaco'][:4] == b'\x7fELF'
    assert n('vgpr_spill_count') == n('sgpr_spill_count') == n('private_segment_fixed_size') == 0, 'spills'
    assert n('vgpr_count') <= 96
    assert not re.search(r'_atomic_', asm), 'atomics'
    assert re.search(r'(buffer|global)_load_dwordx4', asm), 'no 128-bit loads'

def test_compiling_twice_gives_the_same_bits(tmp_path):
    "Here, and in another process with nothing in its cache"
    code = "import compiled as c, hashlib; print(hashlib.sha256(c.partials(c.CUDA['sm_90']).asm['cubin']).hexdigest())"
    other = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code],
        env=os.environ | dict(TRITON_CACHE_DIR=str(tmp_path)),
        cwd=os.path.dirname(__file__),
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()[-1]
    assert hashlib.sha256(partials(CUDA['sm_90']).asm['cubin']).hexdigest() == other
