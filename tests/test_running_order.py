"""In which order the parts of a model run, read from its source: the place of a part is where it is called, however
the call is written."""
import functools, os
os.environ['HF_HUB_OFFLINE'] = '1'
import pytest, torch, transformers as tf
from torch import nn
from torch.utils.checkpoint import checkpoint
from alf_nb.model.layers import partition_layers
from alf_nb.model.stacks import Places
from alf_nb.model.running_order import _uses, runs_before

D = 4

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(D, D), nn.Linear(D, D), nn.LayerNorm(D)
    def forward(self, x): return x + self.down(self.up(self.norm(x)))

class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.tok = nn.Linear(D, D)
    def embed(self): return self.tok
    def features(self, x): return self(x)
    def forward(self, x):
        for layer in self.layers: x = layer(x)
        return x

class Two(nn.Module):
    "`top` is registered first and runs last"
    def __init__(self):
        super().__init__()
        self.top, self.low = Tower(), Tower()
        self.use = True

class Mentioned(Two):
    def forward(self, x):
        x = x.to(self.top.tok.weight.dtype)
        if hasattr(self.top, 'layers') and len(self.top.layers): x = x + 0
        return self.top(self.low(x))

class PartFirst(Two):
    def forward(self, x): return self.top(self.low(self.top.embed()(x)))

class Method(Two):
    def below(self, x): return self.low(x)
    def above(self, x): return self.top(x)
    def forward(self, x):
        above = self.above
        return above(self.below(x))

class MethodOfChild(Two):
    def forward(self, x):
        self.top.embed()
        return self.top.features(self.low.features(x))

class Alias(Two):
    def forward(self, x):
        top, low = self.top, self.low
        second = top
        x = low(x)
        return second(x)

class Choice(Two):
    def forward(self, x):
        if self.use: first, second = self.low, self.top
        else: first, second = None, None
        x = first(x) if first is not None else x
        return second(x)

class Getter(Two):
    def get_decoder(self): return self.top
    def get_tower(self, other=None): return self.low if other is None else other
    def forward(self, x):
        decoder = self.get_decoder()
        return decoder(self.get_tower()(x))

class Argument(Two):
    def forward(self, x): return self.top(x=self.low(x) * 2)

class ByName(Two):
    def forward(self, x):
        last = getattr(self, 'top')
        for name in ('low',): x = getattr(self, 'low')(x)
        return last(x)

class ByMadeUpName(nn.Module):
    def __init__(self):
        super().__init__()
        self.top, self.low0, self.low1 = Tower(), Tower(), Tower()
    def forward(self, x):
        last = self.top
        for i in range(2): x = getattr(self, f'low{i}')(x)
        return last(x)

class Listed(Two):
    def forward(self, x):
        last = self.top
        for part in (self.low, last): x = part(x)
        return x

class Inner(nn.Module):
    "The blocks themselves stand in the module that is asked"
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.start = nn.Linear(D, D)
        self.proj = nn.ModuleDict(dict(a=nn.Linear(D, D)))

class Loop(Inner):
    def forward(self, x):
        norm, x = self.norm, self.proj['a'](self.start(x))
        for i, layer in enumerate(self.layers[:2]): x = layer(x)
        return norm(x)

class Comprehension(Inner):
    def forward(self, x):
        width = self.norm.weight.shape
        x = self.proj['a'](self.start(x))
        x = [layer(x) for layer in self.layers][-1]
        return self.norm(x)

class Index(Inner):
    def forward(self, x):
        x = self.proj['a'](self.start(x))
        for i in range(len(self.layers)): x = self.layers[i].forward(x) if i < 0 else self.layers[i](x)
        return self.norm(x)

class Zipped(Inner):
    def forward(self, x):
        x = self.start(x)
        for p in self.proj.values(): x = p(x)
        for layer, _ in zip(reversed(self.layers), range(2)): x = layer(x)
        return self.norm(x)

class Checkpointed(Inner):
    def forward(self, x):
        x = self.proj['a'](self.start(x))
        for layer in self.layers: x = checkpoint(layer.__call__, x, use_reentrant=False)
        return self.norm(x)

class Closure(Inner):
    def forward(self, x):
        def run(module):
            def inner(*args): return module(*args)
            return inner
        norm = run(self.norm)
        x = self.proj['a'](self.start(x))
        for layer in self.layers: x = run(layer)(x)
        return norm(x)

class Lambda(Inner):
    def forward(self, x):
        end = lambda t: self.norm(t)
        x = self.proj['a'](self.start(x))
        for layer in self.layers: x = (lambda t: layer(t))(x)
        return end(x)

class Partial(Inner):
    def forward(self, x):
        end = functools.partial(self.norm)
        x = self.proj['a'](self.start(x))
        for layer in self.layers: x = functools.partial(layer)(x)
        return end(x)

class Walrus(Inner):
    def forward(self, x):
        with torch.no_grad():
            if (norm := self.norm) is not None: x = self.proj['a'](self.start(x))
        try:
            for layer in self.layers: x = layer(x)
        finally: x = norm(x)
        return x

def through(layers, x, last):
    for layer in layers: x = layer(x)
    return last(x)

class Helper(Inner):
    def forward(self, x): return through(self.layers, self.proj['a'](self.start(x)), last=self.norm)

class Super(Loop):
    def forward(self, x, **kw): return super().forward(x, **kw)

def plain_decorator(f):
    def inner(self, *args, **kwargs): return f(self, *args, **kwargs)
    return inner

class Decorated(Inner):
    @plain_decorator
    def forward(self, x):
        last = self.norm
        x = self.proj['a'](self.start(x))
        for layer in self.layers: x = layer(x)
        return last(x)

class Property(Inner):
    @property
    def last(self): return self.norm
    def forward(self, x):
        last = self.last
        x = self.proj['a'](self.start(x))
        for layer in self.layers: x = layer(x)
        return last(x)

class Recursive(Inner):
    def again(self, x, n=0): return self.again(x, n+1) if n < 2 else self.proj['a'](self.start(x))
    def forward(self, x):
        x = self.again(x)
        for layer in self.layers: x = layer(x)
        return self.norm(x)

STYLES = [
    Mentioned,
    PartFirst,
    Method,
    MethodOfChild,
    Alias,
    Choice,
    Getter,
    Argument,
    ByName,
    ByMadeUpName,
    Listed,
    Loop,
    Comprehension,
    Index,
    Zipped,
    Checkpointed,
    Closure,
    Lambda,
    Partial,
    Walrus,
    Helper,
    Super,
    Decorated,
    Property,
    Recursive,
]

def as_run(m):
    "Children in the order in which their blocks, or where they have none they themselves, run in a real forward pass"
    order, inside = [], {}
    for name, child in m._modules.items():
        blocks = [b for b in child.modules() if isinstance(b, Block)]
        for b in blocks or [c for c in child.modules() if c is not child or not isinstance(c, nn.ModuleDict)]:
            inside[b] = name
    hooks = [b.register_forward_pre_hook(lambda b, _: order.append(inside[b])) for b in inside]
    m(torch.zeros(1, D))
    for h in hooks: h.remove()
    return list(dict.fromkeys(order))

@pytest.mark.parametrize('style', STYLES, ids=lambda c: c.__name__)
def test_the_order_read_is_the_order_run(style):
    m = style()
    ran = as_run(m)
    assert set(ran) == set(m._modules) and ran != list(m._modules)
    read = sorted(m._modules, key=_uses(m).__getitem__)
    assert read == ran
    assert all(runs_before(m, a, b) == (ran.index(a) < ran.index(b)) for a in ran for b in ran if a != b)

def test_what_is_never_called_stands_where_it_is_registered():
    class Odd(Two):
        def forward(self, x): return self.no_such_thing(x)
    assert runs_before(Odd(), 'top', 'low') and not runs_before(Odd(), 'low', 'top')

def test_a_hostile_forward_is_read_in_bounded_time():
    text = (
        '\n'.join(f'    def m{i}(self, x): return ' + ' + '.join(f'self.m{i+1}(x)' for _ in range(9)) for i in range(9))
        + '\n    def m9(self, x): return self.low(x)\n    def forward(self, x): return self.top(self.m0(x))\n'
    )
    import linecache
    source = 'class Deep(Two):\n' + text
    linecache.cache['<deep>'] = len(source), None, source.splitlines(True), '<deep>'
    ns = dict(Two=Two, __name__=__name__)
    exec(compile(source, '<deep>', 'exec'), ns)
    import time
    begun = time.process_time()
    _uses(ns['Deep']())
    assert time.process_time() - begun < 10

def test_reading_a_model_does_not_keep_it_alive():
    import gc, weakref
    m = Loop()
    _uses(m)
    gone = weakref.ref(m)
    del m
    gc.collect()
    assert gone() is None

# class → its stacks in the order in which they run; in all of them `forward` names a later one first, or calls through
# a method or an alias
TOWERS = dict(
    SmolVLMForConditionalGeneration=['vision_model', 'text_model'],
    Idefics2ForConditionalGeneration=['vision_model', 'connector', 'text_model'],
    Idefics3ForConditionalGeneration=['vision_model', 'text_model'],
    GraniteDoclingForConditionalGeneration=['vision_model', 'text_model'],
    PaddleOCRVLForConditionalGeneration=['visual', 'language_model'],
    Kimi_K25ForConditionalGeneration=['vision_tower', 'language_model'],
    VoxtralRealtimeForConditionalGeneration=['audio_tower', 'language_model'],
    T5Gemma2ForConditionalGeneration=['encoder.vision_tower', 'encoder.text_model', 'decoder'],
    FSMTForConditionalGeneration=['encoder', 'decoder'],
    ModernVBertForMaskedLM=['vision_model', 'text_model'],
    Florence2ForConditionalGeneration=['vision_tower', 'language_model.encoder', 'language_model.decoder'],
    LlavaForConditionalGeneration=['vision_tower', 'language_model'],
    Qwen2_5_VLForConditionalGeneration=['visual', 'language_model'],
    WhisperForConditionalGeneration=['encoder', 'decoder'],
    BartForConditionalGeneration=['encoder', 'decoder'],
    MarianMTModel=['encoder', 'decoder'],
    ProphetNetForConditionalGeneration=['prophetnet.encoder', 'prophetnet.decoder'],
)

def shrink(config):
    "Two blocks in every stack"
    for k,v in list(vars(config).items()):
        if (
            k in ('num_hidden_layers', 'num_layers', 'encoder_layers', 'decoder_layers', 'depth', 'num_decoder_layers')
            and isinstance(v, int)
            and v > 2
        ):
            setattr(config, k, 2)
        elif k == 'layer_types' and v: setattr(config, k, v[:2])
        elif isinstance(v, tf.PretrainedConfig): shrink(v)
    return config

@pytest.mark.parametrize('name', TOWERS)
def test_towers_come_before_the_language_model(name):
    if (cls := getattr(tf, name, None)) is None: pytest.skip(f"transformers {tf.__version__} has no {name}")
    with torch.device('meta'): model = cls(shrink(cls.config_class()))
    assert [l.removeprefix('prophetnet.') for l in Places(model).labels] == [
        l.removeprefix('prophetnet.') for l in TOWERS[name]
    ]

def test_a_vision_language_model_learns_from_its_top():
    with torch.device('meta'): model = tf.SmolVLMForConditionalGeneration(shrink(tf.SmolVLMConfig()))
    layers = partition_layers(model)
    depth = {l: layers[ns[0]].depth for l,ns in layers.by_layer.items()}
    assert (
        depth['vision_model.block.1'] < depth['text_model.block.0']
        and depth['connector'] == depth['vision_model.block.1']
    )
    assert (
        layers['connector.modality_projection.proj'].kind == 'matrix'
        and layers['connector.modality_projection.proj'].eligible
    )
