"Delta checkpoints: bit-identical round trips, every damaged byte refused, nothing half written or half applied."
import os
os.environ['HF_HUB_OFFLINE'] = '1'
import errno, json, signal, warnings
import forks, pytest, torch, transformers as tf
from torch import nn
from alf_nb.model import delta as D, fingerprint as F
from alf_nb.model.delta import apply_delta, read_delta, save_delta
from alf_nb.model.fingerprint import fingerprint

warnings.filterwarnings('ignore', category=FutureWarning)
DEC = dict(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=32,
)

def llama(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**DEC, tie_word_embeddings=True)).to(dtype)

def bits(model): return {k:(t.dtype, t.shape, F.raw_bytes(k, t).tobytes()) for k,t in model.state_dict().items()}

def poke(model, *names):
    "Change the named parameters a little, the first with a NaN and a -0.0"
    ps = dict(model.named_parameters())
    with torch.no_grad():
        for n in names: ps[n].add_(torch.linspace(0.5, 1, ps[n].numel(), dtype=ps[n].dtype).view_as(ps[n]))
        ps[names[0]].view(-1)[0],ps[names[0]].view(-1)[1] = float('nan'),-0.

class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.b = nn.Linear(3, 2),nn.Linear(2, 1)

def small():
    torch.manual_seed(0)
    return Small()

@pytest.fixture
def saved(tmp_path):
    "A delta of `small` with only `a.weight` changed: (folder, trained model)"
    m,base = small(),fingerprint(small(), name='small')
    with torch.no_grad(): m.a.weight += 1
    save_delta(m, base, tmp_path/'d', metadata=dict(steps=3))
    return tmp_path/'d',m

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_round_trip_is_bit_identical(dtype, tmp_path):
    m,base = llama(dtype),fingerprint(llama(dtype))
    # the embedding is tied to the head
    names = 'model.layers.1.mlp.up_proj.weight', 'model.embed_tokens.weight', 'model.norm.weight'
    poke(m, *names)
    d = save_delta(m, base, tmp_path/'d')
    assert set(d.changed) == set(names)
    fresh = llama(dtype)
    assert apply_delta(fresh, tmp_path/'d') == d == read_delta(tmp_path/'d')
    assert bits(fresh) == bits(m)
    size = sum(dict(m.named_parameters())[n].numel() for n in names) * dtype.itemsize
    assert size < d.n_bytes < size + 20_000 and (tmp_path/'d'/'delta.safetensors').stat().st_size == d.n_bytes

@pytest.mark.parametrize('kind', ['fingerprint', 'json', 'model', 'state_dict'])
def test_any_kind_of_base(kind, tmp_path):
    base = dict(
        fingerprint=fingerprint(llama()),
        json=F.BaseFingerprint.from_json(fingerprint(llama()).to_json()),
        model=llama(),
        state_dict=llama().state_dict(),
    )[kind]
    m = llama()
    poke(m, 'model.layers.0.self_attn.q_proj.weight')
    assert save_delta(m, base, tmp_path/'d').changed == ('model.layers.0.self_attn.q_proj.weight',)
    fresh = llama()
    apply_delta(fresh, tmp_path/'d')
    assert bits(fresh) == bits(m)

def test_buffers_scalars_and_empty_tensors(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(3)
            self.scale = nn.Parameter(torch.tensor(1.))
            self.none = nn.Parameter(torch.empty(0, 4))
            self.t = nn.Parameter(torch.arange(6.).view(2, 3).T) # not contiguous
            self.register_buffer('cache', torch.zeros(2), persistent=False)
    m = Odd()
    base = fingerprint(m)
    m.bn(torch.randn(5, 3))
    with torch.no_grad():
        m.scale.mul_(2)
        m.t.add_(1)
        m.cache.add_(1)
    assert save_delta(m, base, tmp_path, also='none').changed == (
        'bn.num_batches_tracked',
        'bn.running_mean',
        'bn.running_var',
        'none',
        'scale',
        't',
    )
    fresh = Odd()
    apply_delta(fresh, tmp_path)
    assert bits(fresh) == bits(m) and fresh.cache.sum() == 0 and fresh.t.stride() == (1, 3)

def test_wrapped_and_bare_models_share_deltas(tmp_path):
    m = llama()
    c = torch.compile(m)
    base = fingerprint(c)
    poke(m, 'model.norm.weight')
    assert save_delta(c, base, tmp_path/'d').changed == ('model.norm.weight',)
    fresh = llama()
    apply_delta(nn.DataParallel(torch.compile(fresh)), tmp_path/'d')
    assert bits(fresh) == bits(m)

def test_peft_adapters(tmp_path):
    peft = pytest.importorskip('peft')
    def make(seed):
        m = llama()
        torch.manual_seed(seed) # adapters are drawn anew each time
        return peft.get_peft_model(m, peft.LoraConfig(r=2, target_modules=['q_proj']))
    m = make(1)
    base = fingerprint(m)
    poke(m, 'base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight')
    assert len(save_delta(m, base, tmp_path/'few')) == 1
    assert len(save_delta(m, base, tmp_path/'all', also='*.lora_*')) == 4
    fresh = make(1)
    apply_delta(fresh, tmp_path/'few')
    assert bits(fresh) == bits(m)
    fresh = make(2)
    with pytest.raises(ValueError, match='strict=False'): apply_delta(fresh, tmp_path/'all')
    # lora_A is not in this delta
    with pytest.raises(ValueError, match='wrong base'): apply_delta(fresh, tmp_path/'few', strict=False)
    apply_delta(fresh, tmp_path/'all', strict=False)
    assert bits(fresh) == bits(m)

def refused(model, path, match, **kw):
    before = bits(model)
    with pytest.raises(ValueError, match=match): apply_delta(model, path, **kw)
    assert bits(model) == before

def test_wrong_bases(saved):
    path,_ = saved
    m = small()
    m.b.bias.data += 1
    refused(m, path, "'b.bias' differ from base 'small'")
    refused(m, path, "'b.bias'", strict=False)
    m = small()
    m.a.weight.data -= 1
    refused(m, path, "'a.weight' differ from base 'small'.*strict=False")
    refused(small().double(), path, "'a.weight' is F64 .* F32")
    m = small()
    m.a = nn.Linear(3, 3)
    refused(m, path, r"'a.weight' is F32 \(3, 3\)")
    m = small()
    m.c = nn.Linear(1, 1)
    refused(m, path, "has no 'c.weight', 'c.bias'")
    m = small()
    del m.b
    refused(m, path, "lacks 'b.bias', 'b.weight'")
    refused(nn.Linear(2, 2), path, 'lacks')
    with torch.device('meta'): m = Small()
    with pytest.raises(ValueError, match='no values'): apply_delta(m, path)

def test_applying_twice_or_after_half_is_fine(saved):
    path,trained = saved
    m = small()
    apply_delta(m, path)
    apply_delta(m, path)
    assert bits(m) == bits(trained)

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_scale_lies_between_base_and_tuned(dtype, tmp_path):
    base, tuned, half = small().to(dtype), small().to(dtype), small().to(dtype)
    with torch.no_grad(): tuned.a.weight += torch.randn(2, 3).to(dtype)
    save_delta(tuned, base, tmp_path/'d')
    apply_delta(half, tmp_path/'d', scale=.25)
    want = (.75*base.a.weight.double() + .25*tuned.a.weight.double()).to(dtype)
    torch.testing.assert_close(half.a.weight.data, want.data, rtol=torch.finfo(dtype).eps, atol=0)
    assert torch.equal(half.b.weight, base.b.weight)
    untouched = small().to(dtype)
    apply_delta(untouched, tmp_path/'d', scale=0)
    assert bits(untouched) == bits(base)
    # from the tuned model the base is not known
    for model in (half, tuned):
        before = bits(model)
        with pytest.raises(ValueError, match="'a.weight' are not the base's"):
            apply_delta(model, tmp_path/'d', scale=.5, strict=False)
        assert bits(model) == before
    with pytest.raises(ValueError, match='scale=1.5'): apply_delta(base, tmp_path/'d', scale=1.5)


def test_a_scale_leaves_no_integer_between_two(tmp_path):
    class Counted(Small):
        def __init__(self):
            super().__init__()
            self.register_buffer('n', torch.tensor(3))
    torch.manual_seed(0)
    tuned = Counted()
    base = fingerprint(tuned)
    fresh = Counted()
    fresh.load_state_dict(tuned.state_dict())
    tuned.n.fill_(8)
    with torch.no_grad(): tuned.b.bias += 1
    save_delta(tuned, base, tmp_path/'d')
    at = fresh.b.bias.item()
    apply_delta(fresh, tmp_path/'d', scale=.5)
    assert fresh.n == 8 and fresh.b.bias.item() == pytest.approx(at + .5)


def test_every_damaged_byte_is_refused(saved):
    path,_ = saved
    file = path/'delta.safetensors'
    raw = file.read_bytes()
    m = small()
    before = bits(m)
    for at in range(len(raw)):
        for flip in (0x01, 0x29): # 0x29 turns a space into a tab: still JSON
            file.write_bytes(raw[:at] + bytes([raw[at] ^ flip]) + raw[at+1:])
            with pytest.raises(ValueError): apply_delta(m, path)
    assert bits(m) == before
    file.write_bytes(raw)
    apply_delta(m, path)

def test_every_truncation_is_refused(saved):
    path,_ = saved
    file = path/'delta.safetensors'
    raw = file.read_bytes()
    for n in range(len(raw)):
        file.write_bytes(raw[:n])
        with pytest.raises(ValueError, match='damaged|not a delta'): read_delta(path)
    file.write_bytes(raw + b'\0')
    refused(small(), path, 'should have')

def hostile(path, info, layout=None, pad=0):
    head = D._header(info, layout or {})
    (path/'delta.safetensors').write_bytes(len(head).to_bytes(8, 'little') + head + bytes(pad))

def test_hostile_files(saved, tmp_path):
    path,_ = saved
    file = path/'delta.safetensors'
    with open(file, 'rb') as f: info,_ = D._read_info(f, file)
    for n in (2**64-1, 2**40, 64 << 20): # absurd header sizes; a sparse file may really be that long
        with open(file, 'wb') as f:
            f.write(n.to_bytes(8, 'little'))
            f.truncate(1 << 20)
        refused(small(), path, 'its header claims')
    with open(file, 'wb') as f:
        f.write((1 << 30).to_bytes(8, 'little'))
        f.truncate(2 << 30)
    refused(small(), path, 'its header claims')
    for raw in (
        b'[' * 100_000,
        b'{}',
        b'[]',
        b'{"__metadata__":[]}',
        b'{"__metadata__":{"alf_nb_delta":"[]"}}',
        b'{"__metadata__":{"alf_nb_delta":"{\\"format\\":1,\\"base\\":[],\\"changed\\":{}}"}}',
    ):
        file.write_bytes(len(raw).to_bytes(8, 'little') + raw)
        refused(small(), path, 'damaged or not a delta')
    for entry in (
        ['F32', [-1], 'x'],
        ['F32', [2**40] * 40, 'x'],
        ['F32', ['9'], 'x'],
        ['F99', [1], 'x'],
        ['F32', '12', 'x'],
        ['F32', [1]],
        'F32',
        None,
        ['F32', [1.0], 'x'],
        ['F32', [True], 'x'],
    ):
        hostile(path, {**info, 'base': {**info['base'], 'b.bias': entry}})
        refused(small(), path, 'damaged or not a delta')
    # consistent, but far larger than the model: refused before its data are read
    big = {**info, 'base': {**info['base'], 'a.weight': ('F32', [1 << 28], 'x')}, 'changed': {'a.weight': 'x'}}
    head = D._header(big, D._layout({'a.weight': ('F32', [1 << 28])}))
    with open(file, 'wb') as f:
        f.write(len(head).to_bytes(8, 'little') + head)
        f.truncate(8 + len(head) + (4 << 28))
    refused(small(), path, r"'a.weight' is F32 \(2, 3\) here")
    # names are looked up in the model, never turned into paths
    hostile(path, {**info, 'base': {**info['base'], '../../evil': ('F32', [], 'x')}, 'changed': {}})
    refused(small(), path, "lacks '../../evil'")
    hostile(path, {**info, 'format': 2, 'base': 'something new'})
    refused(small(), path, 'has format 2; this alf_nb')

def test_a_changed_tensor_is_not_taken_for_another(saved):
    "Bytes of the right size but of another tensor: the hash tells"
    path,_ = saved
    file = path/'delta.safetensors'
    raw = file.read_bytes()
    file.write_bytes(raw[:-24] + F.raw_bytes('w', small().a.weight).tobytes())
    refused(small(), path, "the bytes of 'a.weight' do not match")

def test_failed_write_leaves_the_old_delta(saved, monkeypatch):
    path,m = saved
    old = (path/'delta.safetensors').read_bytes()
    with torch.no_grad(): m.b.weight += 1
    for what, exc in (
        ('fsync', OSError(errno.ENOSPC, 'No space left on device')),
        ('replace', PermissionError(errno.EACCES, 'Permission denied')),
    ):
        def fail(*a, exc=exc): raise exc
        with monkeypatch.context() as mp:
            mp.setattr(os, what, fail)
            with pytest.raises(OSError, match='cannot write a delta to.*(No space|Permission)'):
                save_delta(m, small(), path)
        assert (path / 'delta.safetensors').read_bytes() == old and sorted(p.name for p in path.iterdir()) == [
            'delta.json',
            'delta.safetensors',
        ]
    assert len(save_delta(m, small(), path)) == 2

def killed_while_saving(path):
    "In a process of its own"
    m = small()
    with torch.no_grad(): m.b.weight += 1
    os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)
    save_delta(m, small(), path)

def test_killed_while_writing_leaves_the_old_delta(saved):
    path,_ = saved
    old = (path/'delta.safetensors').read_bytes()
    assert forks.run(killed_while_saving, path) == -signal.SIGKILL
    assert (path/'delta.safetensors').read_bytes() == old
    m = small()
    assert apply_delta(m, path).metadata == dict(steps=3)

def test_weights_that_move_while_saving(tmp_path, monkeypatch):
    m,base = small(),fingerprint(small())
    with torch.no_grad(): m.a.weight += 1
    real = D._header
    def train_on(*a):
        with torch.no_grad(): m.a.weight.add_(1)
        return real(*a)
    monkeypatch.setattr(D, '_header', train_on)
    with pytest.raises(RuntimeError, match='pause training'): save_delta(m, base, tmp_path/'d')
    assert list((tmp_path/'d').iterdir()) == []

def test_unwritable_and_missing_places(saved, tmp_path):
    _,m = saved
    (tmp_path/'file').write_text('x')
    with pytest.raises(OSError, match='cannot write a delta to'): save_delta(m, small(), tmp_path/'file'/'d')
    if os.path.isdir('/proc/self'):
        with pytest.raises(OSError, match='cannot write a delta to'): save_delta(m, small(), '/proc/self/d')
    for p in (tmp_path/'nowhere', tmp_path):
        with pytest.raises(ValueError, match='expected a folder with delta.safetensors'): apply_delta(small(), p)

def test_the_json_is_for_people_only(saved):
    path,m = saved
    note = json.loads((path/'delta.json').read_text())
    assert note['base'] == 'small' and list(note['changed']) == ['a.weight'] and note['metadata'] == dict(steps=3)
    assert (
        note['changed']['a.weight']['sha256']
        == F._describe('a', m.a.weight)[2]
        != note['changed']['a.weight']['base_sha256']
    )
    (path/'delta.json').unlink()
    fresh = small()
    apply_delta(fresh, path/'delta.safetensors') # the file itself will do, too
    assert bits(fresh) == bits(m)
