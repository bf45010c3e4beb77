"""Models that see, hear, and see and speak: from their layers to a run, a delta and a resume, by Trainer; towers are
bands of their own. Weights are random, models tiny."""
import os
os.environ['HF_HUB_OFFLINE'] = '1'
import re, shutil

import pytest, torch, transformers as tf
from transformers.trainer_callback import PrinterCallback

from alf_nb.core.config import ALFConfig
from alf_nb.core.policies import BudgetPolicy, StaticPolicy
from alf_nb.core.policy import match_units, strata_of
from alf_nb.core.records import Scores, by_tower
from alf_nb.core.runlog import RunLog
from alf_nb.model.delta import apply_delta, save_delta
from alf_nb.model.layers import partition_layers
from alf_nb.report.charts import layer_map, role_maps
from alf_nb.study.maps import attention_maps
from alf_nb.train.choosing import preview
from alf_nb.train.loop import ALFLoop
from alf_nb.train.trainer import ALFCallback
from alf_nb.widgets.map import SelectionMap
from alf_nb.widgets.picker import ThresholdPicker

IMAGE = 95      # the token that stands for a piece of an image
TEXT = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=64)
SIGHT = dict(hidden_size=24, intermediate_size=40, num_attention_heads=4, image_size=16, patch_size=8)


def sees():
    "ViT: one stack of blocks"
    config = tf.ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
                          image_size=8, patch_size=4, num_channels=1, num_labels=4, attention_probs_dropout_prob=.1)
    return tf.ViTForImageClassification(config)


def hears():
    "Whisper: an encoder and a decoder"
    config = tf.WhisperConfig(vocab_size=96, d_model=32, encoder_layers=3, decoder_layers=3, encoder_attention_heads=4,
                              decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8,
                              max_source_positions=10, max_target_positions=16, pad_token_id=0, bos_token_id=1,
                              eos_token_id=2, decoder_start_token_id=1, dropout=.1, begin_suppress_tokens=None)
    return tf.WhisperForConditionalGeneration(config)


def speaks(blocks=(3, 6)):
    "LLaVA: a vision tower, a projector and a language model"
    config = tf.LlavaConfig(vision_config=tf.CLIPVisionConfig(**SIGHT, num_hidden_layers=blocks[0]),
                            text_config=tf.LlamaConfig(**TEXT, num_hidden_layers=blocks[1]),
                            image_token_index=IMAGE, vision_feature_layer=-1, image_seq_length=4)
    return tf.LlavaForConditionalGeneration(config)


def rows(model, n=16):
    "Inputs with something to learn: labels follow from them"
    g, out = torch.Generator().manual_seed(1), []
    for i in range(n):
        label, noise = i % 4, lambda *shape: torch.randn(*shape, generator=g)*.1 + (i % 4)/2
        ids = torch.cat([torch.full((4,), IMAGE), torch.arange(6) + 10*label + 3])
        out.append({
            'ViT': lambda: dict(pixel_values=noise(1, 8, 8), labels=label),
            'Whisper': lambda: dict(input_features=noise(8, 20), labels=ids[4:]),
            'Llava': lambda: dict(pixel_values=noise(3, 16, 16), input_ids=ids, attention_mask=torch.ones_like(ids),
                                  labels=torch.where(ids == IMAGE, -100, ids)),
        }[re.match('ViT|Whisper|Llava', type(model).__name__)[0]]())
    return out


MODELS = {'sees': sees, 'hears': hears, 'speaks': speaks}
TOWERS = dict(sees=[''], hears=['encoder', 'decoder'],
              speaks=['vision_tower', 'multi_modal_projector', 'language_model', 'head'])
WAYS = {
    'default': dict(probe_batches=2, interval=4),
    'meter': dict(signal='agreement', start='meter', warm_up=2, meter_steps=2, interval=4),
}


def make(which):
    torch.manual_seed(0)
    return MODELS[which]()


def train(which, folder, steps=8, resume=None, **alf):
    "(model, trainer) of a run"
    model = make(which)
    args = tf.TrainingArguments(str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=3e-3,
                                save_steps=4, logging_steps=1, report_to='none', use_cpu=True, disable_tqdm=True)
    pin = dict(pin='head') if which == 'sees' else {}
    trainer = tf.Trainer(model, args, train_dataset=rows(model), callbacks=[ALFCallback(**pin, **alf)])
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    return model, trainer


@pytest.fixture(scope='module')
def done(tmp_path_factory):
    "(which, way) → (folder, model, trainer) of a run, trained once"
    known = {}

    def run(which, way):
        if (which, way) not in known:
            folder = tmp_path_factory.mktemp(f'{which}-{way}')
            known[which, way] = folder, *train(which, folder, **WAYS[way])
        return known[which, way]
    return run


every = pytest.mark.parametrize('which', MODELS)
both = pytest.mark.parametrize('way', WAYS)


@every
def test_its_layers_and_towers(which):
    model = make(which)
    layers = partition_layers(model)
    assert list(by_tower(layers.units)) == TOWERS[which]
    for u in layers.units:
        assert not u.tower or u.layer == u.tower or u.layer.startswith(u.tower + '.'), u
    named = [n for u in layers.units for n in layers.named_params(u.name)]
    assert sorted(named) == sorted(n for n,_ in model.named_parameters())
    assert {u.kind for u in layers.units if u.eligible} == {'matrix'}
    for tower in filter(None, TOWERS[which]):      # the name of a tower means all of it
        assert match_units(tower, layers.units) == tuple(u.name for u in layers.units if u.tower == tower)


@every
@both
def test_it_trains(which, way, done):
    folder, model, trainer = done(which, way)
    before, layers, log = make(which).state_dict(), partition_layers(model), RunLog(folder)
    selections, losses = log.selections(), [h['loss'] for h in trainer.state.log_history if 'loss' in h]
    assert len(selections) >= 2 and all(0 < s.share <= .25 for s in selections)
    chosen = {n for s in selections for n in s}
    moved = {layers.unit_of(n) for n,p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and moved <= chosen
    # no tower is left out by default
    assert set(TOWERS[which]) - {'head', 'multi_modal_projector'} <= {layers[n].tower for n in chosen}
    assert sum(losses[-2:]) < sum(losses[:2])


@every
def test_the_meter_knows_every_matrix_of_every_tower(which, done):
    folder, model, _ = done(which, 'meter')
    log = RunLog(folder)
    assert not log.events('probe'), 'no batch for measuring'
    chosen = log.events('select')[-1]
    scores = chosen['scores']
    layers = partition_layers(model)
    units = {u.name for u in layers.units if u.eligible} - layers.bottom(.2)      # the default leaves them frozen
    assert chosen['signal'] == 'agreement' and units <= {k for k,v in scores.items() if v is not None}
    assert len(set(scores.values())) > len(units)/2


@every
@both
def test_its_delta_is_exact(which, way, done, tmp_path):
    _, model, _ = done(which, way)
    base = make(which)
    delta = save_delta(model, base, tmp_path/'delta')
    assert 0 < delta.share < .7
    applied = apply_delta(base, tmp_path/'delta')
    assert applied.changed == delta.changed
    for k,v in model.state_dict().items(): assert torch.equal(v, base.state_dict()[k]), k
    torch.manual_seed(1)
    with pytest.raises(ValueError, match='base'): apply_delta(MODELS[which](), tmp_path/'delta')


@every
@both
def test_it_resumes_to_the_bit(which, way, done, tmp_path):
    folder, model, trainer = done(which, way)
    stopped = shutil.copytree(folder, tmp_path/'run', ignore=shutil.ignore_patterns('checkpoint-8'))
    again, resumed = train(which, stopped, resume=str(stopped/'checkpoint-4'), **WAYS[way])
    for (k,v), w in zip(model.state_dict().items(), again.state_dict().values()): assert torch.equal(v, w), k
    assert resumed.state.global_step == 8
    ends = [RunLog(f).selections()[-1] for f in (folder, stopped)]
    assert ends[0].names == ends[1].names


@every
def test_a_picker_and_a_preview_choose_what_trains(which, done):
    folder, model, _ = done(which, 'default')
    layers = partition_layers(model)
    first = preview(make(which), ALFConfig.from_args(budget=.2))
    assert 0 < first.share <= .2
    picker = ThresholdPicker(RunLog(folder))
    assert picker.selection.names == RunLog(folder).selections()[-1].names
    scores = Scores('gain', {u.name: i+1 for i,u in enumerate(layers.units) if u.eligible})
    free = ThresholdPicker(scores=scores, units=layers, policy=BudgetPolicy(.3, strata=3))
    assert free.selection.names == BudgetPolicy(.3, strata=3).select(scores, layers.units).names
    assert {layers[n].tower for n in free.selection} >= {t for t in TOWERS[which] if t.endswith(('coder', 'tower'))}
    picker.close(), free.close()


@every
def test_maps_have_a_heading_per_tower(which, done):
    folder, _, _ = done(which, 'default')
    drawn = [t for t in TOWERS[which] if t not in ('', 'head')]
    heads = lambda html: re.findall(r'class="alf-tower">([^<]+)<', html)
    assert heads(layer_map(RunLog(folder))) == drawn == heads(role_maps(RunLog(folder)))
    m = SelectionMap(RunLog(folder))
    assert heads(m.drawing.value) == drawn and m.hints.value.count('alf-tower') == len(drawn)
    m.zoom.value = 'kinds of matrix'
    assert heads(m.drawing.value) == drawn
    rows = re.findall('class="row"[^>]*>([^<]*)<', m.drawing.value)
    assert not any('.' in r and r.split('.')[0] in drawn for r in rows), rows
    m.close()


def test_towers_are_chosen_in_equal_parts_however_their_scores_differ():
    "Thirds of the depth are those of a tower: three of the vision tower's, three of the language model's"
    layers = partition_layers(speaks((12, 24)))
    units, total = layers.units, lambda t, names: sum(layers[n].n_params for n in names if layers[n].tower == t)
    bands = strata_of([u for u in units if u.eligible], 3)
    for tower, blocks in (('vision_tower', 12), ('language_model', 24)):
        found = [bands[f'{tower}.block.{i}.self_attn.q_proj'][2] for i in range(blocks)]
        assert found == [3*i//blocks for i in range(blocks)]
    loud = {u.name: (1000 if u.tower == 'language_model' else 1) + i/999 for i,u in enumerate(units) if u.eligible}
    for policy in (BudgetPolicy(.3, strata=3), BudgetPolicy(.1, strata=3), StaticPolicy('random', .3, strata=3)):
        names = policy.select(Scores('gain', loud), units).names
        of = {t: total(t, names)/total(t, loud) for t in ('vision_tower', 'language_model')}
        assert abs(of['vision_tower'] - of['language_model']) < .12, of
    unstratified = BudgetPolicy(.3).select(Scores('gain', loud), units).names
    assert not total('vision_tower', unstratified)


def test_a_short_tower_is_not_left_out():
    "Two blocks in three bands would stand alone, each in the middle of its own, below the upper half of any other"
    layers = partition_layers(speaks((2, 12)))
    values = {u.name: (9 if u.tower == 'language_model' else 1) + i/999 for i,u in enumerate(layers.units)
              if u.eligible}
    names = BudgetPolicy(.25, strata=3).select(Scores('gain', values), layers.units).names
    assert any(layers[n].tower == 'vision_tower' for n in names)


def test_a_projector_is_compared_with_all():
    "It has no peers: its score counts, not that it is the only one of its role"
    layers = partition_layers(speaks((6, 12)))
    scores = {u.name: 1. + i/999 for i,u in enumerate(layers.units) if u.eligible}
    projector = [n for n in scores if layers[n].tower == 'multi_modal_projector']

    def chosen(v):
        found = Scores('gain', scores | dict.fromkeys(projector, v))
        return BudgetPolicy(.25, strata=3).select(found, layers.units).names
    assert set(projector) <= set(chosen(9.)) and not set(projector) & set(chosen(.1))


@pytest.mark.parametrize('unit', ['matrix', 'columns'])
def test_freeze_bottom_is_the_lowest_part_of_each_tower(unit, tmp_path):
    budget = dict(budget=.05) if unit == 'columns' else dict(budget=.9, policy='static', where='first')
    if unit == 'matrix': budget = dict(policy=dict(policy='full'))
    model, _ = train('speaks', tmp_path, 2, freeze_bottom=.34, unit=unit, interval=0, **budget)
    before, layers = make('speaks').state_dict(), partition_layers(model)
    moved = {layers[layers.unit_of(n)].layer for n,v in model.state_dict().items()
             if n in before and not torch.equal(v, before[n])}
    want = {f'vision_tower.block.{i}' for i in (1, 2)} | {f'language_model.block.{i}' for i in (2, 3, 4, 5)}
    assert moved == want | {'multi_modal_projector'}


def test_embeddings_of_all_towers_are_below_the_lowest_blocks():
    config = tf.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=4, num_decoder_layers=2, num_heads=4)
    layers = partition_layers(tf.T5ForConditionalGeneration(config))
    low = lambda part: {layers[n].layer for n in layers.bottom(part)}
    assert low(.25) == {'embeddings', 'encoder.block.0'}        # a quarter of two blocks is none
    assert low(.5) == {'embeddings', 'encoder.block.0', 'encoder.block.1', 'decoder.block.0'}
    assert low(.2) == set()


def test_what_takes_texts_alone_says_so(tmp_path):
    with pytest.raises(ValueError, match='pixel_values'): attention_maps(sees(), [1, 2, 3])
    with pytest.raises(ValueError, match='encoder with a decoder'): attention_maps(hears(), [1, 2, 3])
    with pytest.raises(ValueError, match='one stack of blocks, and this model has 2'):
        model = speaks()
        batches = [{k: torch.stack([v]) for k,v in rows(model)[0].items()}]
        optimizer = torch.optim.SGD(model.parameters(), .1)
        ALFLoop(model, optimizer, batches, 2, tmp_path, freeze_bottom=.5, cache_prefix=True)
