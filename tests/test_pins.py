"Pins and bans by name: what stands at the ends of any model, whole towers, kinds; and presets that pin what there is."
import os
os.environ['HF_HUB_OFFLINE'] = '1'
import pytest
from test_layers_families import FAMILIES
from alf_nb.model.layers import partition_layers
from alf_nb.core.policy import match_units
from alf_nb.train.trainer import ALFCallback
from alf_nb.core.config import PRESETS

MODELS = {
    k: FAMILIES[k]
    for k in (
        'llama',
        'gpt2',
        'bert',
        't5',
        'bart',
        'whisper',
        'clip',
        'llava',
        'wav2vec2',
        'vit',
        'mixtral',
        'mamba',
        'albert',
        'swin',
    )
}

@pytest.fixture(scope='module')
def model(request): return FAMILIES[request.param]()['model']

@pytest.mark.parametrize('preset', PRESETS)
@pytest.mark.parametrize('model', ['t5', 'bart', 'whisper', 'llava', 'clip', 'vit', 'wav2vec2'], indirect=True)
def test_every_preset_works_on_every_kind_of_model(model, preset):
    assert (
        ALFCallback(preset=preset, budget=0.9 if preset in ('paper', 'grass', 'static-top') else None)
        .preview(model)
        .names
    )

@pytest.mark.parametrize('model', MODELS, indirect=True)
def test_lisa_pins_the_ends_that_a_model_has(model):
    units = partition_layers(model, unit='block').units
    names = set(ALFCallback(preset='lisa', policy=dict(policy='lisa', k=1)).preview(model).names)
    ends = {u.name for u in units if u.layer.split('.')[-1] == 'embeddings' and u.name in names}
    assert ends or not any(u.layer == 'embeddings' for u in units)
    if any(u.layer == 'head' for u in units): assert {u.name for u in units if u.layer == 'head'} <= names
    # what joins two stacks may be drawn like a block
    assert sum(u.kind == 'block' for u in units if u.name in names) <= 1

def test_a_tower_is_banned_by_its_name():
    model = FAMILIES['llava']()['model']
    units = partition_layers(model).units
    tower = match_units('vision_tower', units)
    assert (
        tower
        == tuple(u.name for u in units if u.name.startswith('vision_tower.'))
        == match_units('vision_tower.*', units)
    )
    chosen = ALFCallback(ban=('vision_tower',), budget=.5).preview(model).names
    assert chosen and not any(n.startswith('vision_tower.') for n in chosen)
    assert match_units('language_model.block.1.self_attn', units) == tuple(
        f'language_model.block.1.self_attn.{p}_proj' for p in 'qkvo'
    )

def test_a_name_is_no_beginning_of_another():
    units = partition_layers(FAMILIES['gemma3']()['model']).units
    assert all(n.startswith('block.1.') for n in match_units('block.1', units))
    for wrong in ('blo', 'block.1.self', 'vision', 'embed', 'block.'):
        with pytest.raises(ValueError, match='matches no unit or layer'): match_units(wrong, units)

@pytest.mark.parametrize(
    'family,embeddings,head',
    [
        ('llava', ['vision_tower.embeddings', 'language_model.embeddings'], ['head']),
        ('whisper', ['encoder.embeddings', 'decoder.embeddings'], ['decoder.head']),
        ('t5', ['embeddings'], ['decoder.head']),
        ('llama', ['embeddings'], ['head']),
        ('clip', ['vision_model.embeddings', 'text_model.embeddings'], ['head']),
    ],
)
def test_the_ends_of_a_model_have_one_name_everywhere(family, embeddings, head):
    units = partition_layers(FAMILIES[family]()['model']).units
    layer = {u.name: u.layer for u in units}
    assert list(dict.fromkeys(layer[n] for n in match_units('embeddings', units))) == embeddings
    assert list(dict.fromkeys(layer[n] for n in match_units('head', units))) == head

def test_a_kind_is_named_on_any_model():
    units = partition_layers(FAMILIES['t5']()['model']).units
    assert (
        set(match_units('kind:embedding', units))
        == {u.name for u in units if u.kind == 'embedding'}
        >= {'embeddings.shared'}
    )
    assert set(match_units('kind:norm', units)) == {u.name for u in units if u.kind == 'norm'}
    with pytest.raises(
        ValueError, match="'kind:head' matches no unit: kinds of this model are matrix, embedding, norm"
    ):
        match_units('kind:head', units)
    with pytest.raises(ValueError, match="'kind:heads': kinds are matrix"): match_units('kind:heads', units)

def test_what_the_user_pins_has_to_exist():
    model = FAMILIES['bart']()['model']
    with pytest.raises(
        ValueError, match="'head' matches no unit or layer; a head that is tied to the embeddings is part of them"
    ):
        ALFCallback(preset='lisa', pin='head').preview(model)
    with pytest.raises(ValueError, match='close: .*decoder'): ALFCallback(ban='decodr').preview(model)
