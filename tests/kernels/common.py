"""Tensors and judgements that all kernel tests share."""
import itertools, mmap
import numpy as np, pytest, torch

DTYPES = torch.float32, torch.bfloat16, torch.float16
PAIRS = list(itertools.product(DTYPES, DTYPES))
SIZES = 1, 7, 15, 16, 17, 1023, 2048, 4099, 16384, 16385, 3*16384 + 5

def slow_unless(keep, cases):
    "Every case; those that `keep` does not name are slow ones"
    return [c if keep(*c) else pytest.param(*c, marks=pytest.mark.slow) for c in cases]

def tensor(n, dtype, seed=0, offset=0):
    "Random tensor of n elements that starts `offset` elements into its storage"
    return torch.randn(n + offset, generator=torch.Generator().manual_seed(seed)).to(dtype)[offset:]

def pair(n, d1, d2, seed=0, o1=0, o2=0): return tensor(n, d1, 2*seed, o1), tensor(n, d2, 2*seed+1, o2)

def f64(t):
    return (
        (t.dequantize() if hasattr(t, 'dequantize') and not isinstance(t, torch.Tensor) else t)
        .detach()
        .cpu()
        .double()
        .reshape(-1)
        .numpy()
    )

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
    g = torch.Generator().manual_seed(0)
    ties = torch.randint(-254, 255, (2560,), generator=g)/2
    ties[::256] = 127.
    odd = torch.ones(1024)
    odd[3], odd[300], odd[600] = float('nan'), float('inf'), -float('inf')
    return torch.cat(
        [
            ties,
            torch.zeros(256),
            torch.randn(25_600, generator=g) * torch.logspace(-40, 37, 100).repeat_interleave(256),
            odd,
            torch.randn(77, generator=g),
        ]
    ).to(d)

def bits(t): return t.reshape(-1).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])

def same(a, b):
    "Equal bit for bit, any NaN equal to any other"
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(bits(a)[~nan.reshape(-1)], bits(b)[~nan.reshape(-1)])

def sparse(n):
    "n zeros of bf16 that take no memory until they are written"
    m = mmap.mmap(-1, 2*n, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000) # MAP_NORESERVE
    return torch.frombuffer(m, dtype=torch.bfloat16)

def liger_and_plain(folder, device, **sizes):
    "(losses, selections, trainer) of a small run with the kernels of Liger, and of the same run without"
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback
    from alf_nb.demo import demo_dataset, demo_model
    from alf_nb.core.runlog import RunLog
    from alf_nb.train.trainer import ALFCallback
    for liger in (False, True):      # the kernels stay in transformers' module: the plain run comes first
        torch.manual_seed(0)
        args = TrainingArguments(
            output_dir=str(folder / str(liger)),
            max_steps=4,
            per_device_train_batch_size=1,
            learning_rate=1e-2,
            logging_steps=1,
            report_to=[],
            use_cpu=device == 'cpu',
            disable_tqdm=True,
            save_strategy='no',
            seed=3,
            use_liger_kernel=liger,
        )
        t = Trainer(
            demo_model(**sizes),
            args,
            train_dataset=demo_dataset(16, length=8),
            callbacks=[
                ALFCallback(budget=0.15, hysteresis=0.0, interval=2, probe_batches=2, measure_every=1, select_until=1.0)
            ],
        )
        t.remove_callback(PrinterCallback)
        t.train()
        yield (
            [h['loss'] for h in t.state.log_history if 'loss' in h],
            [s.names for s in RunLog(folder / str(liger)).selections()],
            t,
        )

def check_liger(plain, liger):
    "Liger is really in the model, trains like the model without it, and under selections that change"
    model = liger[2].model
    inner = model.model
    for f in (model.forward, inner.norm.forward, inner.layers[0].mlp.forward):
        # head with its loss, norms, SwiGLU
        assert f.__func__.__module__.startswith('liger_kernel.'), f
    from transformers.models.llama import modeling_llama
    assert modeling_llama.apply_rotary_pos_emb.__module__.startswith('liger_kernel.')
    np.testing.assert_allclose(liger[0], plain[0], rtol=1e-4)
    assert liger[1] == plain[1] and len(set(plain[1])) > 1, 'the same selections, and they change'
