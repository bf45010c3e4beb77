"""Every family by name: which blocks, embeddings, heads, norms and biases `partition_layers` finds on tiny random
models."""
import os
os.environ['HF_HUB_OFFLINE'] = '1'
import pytest, torch, transformers as tf
from packaging.version import Version
from torch import nn
from alf_nb.model.layers import partition_layers

V,D = 96,32
DEC = dict(
    vocab_size=V,
    hidden_size=D,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
ENC = {k:v for k,v in DEC.items() if k != 'num_key_value_heads'}
EDC = dict(
    vocab_size=V,
    d_model=D,
    encoder_layers=3,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
)
VIS = dict(hidden_size=D, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8)
QKVO,GUD = 'q_proj k_proj v_proj o_proj'.split(),'gate_proj up_proj down_proj'.split()
BERT = 'query key value attention.output.dense intermediate.dense output.dense'.split()
BERT_EMB = [f'embeddings.{n}_embeddings' for n in ('word', 'position', 'token_type')]
BERT_BEGIN = dict.fromkeys(BERT_EMB, 'embedding') | {'embeddings.LayerNorm': 'norm'}
NEOX = 'query_key_value dense dense_h_to_4h dense_4h_to_h'.split()
FAIRSEQ = 'q_proj k_proj v_proj out_proj fc1 fc2'.split()
BART = [f'{a}.{m}' for a in ('self_attn', 'encoder_attn') for m in FAIRSEQ[:4]] + FAIRSEQ[4:]
T5 = [f'{a}.{m}' for a in ('SelfAttention', 'EncDecAttention') for m in 'qkvo'] + ['wi', 'wo']
RWKV = [f'{a}.{m}' for a in ('attention', 'feed_forward') for m in ('key', 'value', 'receptance')] + ['output']
LN2 = ['input_layernorm', 'post_attention_layernorm']

# family → model, {stack: blocks}, roles of the matrices of the last block, its norms, its number of biases, every unit
# outside the blocks, tied names
FAMILIES = {
    'llama': lambda: dict(
        model=tf.LlamaForCausalLM(tf.LlamaConfig(**DEC)),
        stacks={'block': 3},
        matrices=QKVO + GUD,
        norms=LN2,
        biases=0,
        rest={'embeddings.embed_tokens': 'embedding', 'head.norm': 'norm', 'head.lm_head': 'head'},
    ),
    'qwen3': lambda: dict(
        model=tf.Qwen3ForCausalLM(tf.Qwen3Config(**DEC, head_dim=8, tie_word_embeddings=True)),
        stacks={'block': 3},
        matrices=QKVO + GUD,
        norms=['q_norm', 'k_norm'] + LN2,
        biases=0,
        rest={'embeddings.embed_tokens': 'embedding', 'head.norm': 'norm'},
        tied={'lm_head.weight': 'embeddings.embed_tokens'},
    ),
    'qwen2': lambda: dict(
        model=tf.Qwen2ForCausalLM(tf.Qwen2Config(**DEC)),
        stacks={'block': 3},
        matrices=QKVO + GUD,
        norms=LN2,
        biases=3,
        rest={'embeddings.embed_tokens': 'embedding', 'head.norm': 'norm', 'head.lm_head': 'head'},
    ),
    'gemma3': lambda: dict(
        model=tf.Gemma3ForCausalLM(
            tf.Gemma3TextConfig(**{**DEC, 'num_hidden_layers': 7}, head_dim=8, sliding_window=16)
        ),
        stacks={'block': 7},
        matrices=QKVO + GUD,
        norms=[
            'q_norm',
            'k_norm',
            'input_layernorm',
            'post_attention_layernorm',
            'pre_feedforward_layernorm',
            'post_feedforward_layernorm',
        ],
        biases=0,
        rest={'embeddings.embed_tokens': 'embedding', 'head.norm': 'norm'},
        tied={'lm_head.weight': 'embeddings.embed_tokens'},
    ),
    'mistral': lambda: dict(
        model=tf.MistralForCausalLM(tf.MistralConfig(**DEC)),
        stacks={'block': 3},
        matrices=QKVO + GUD,
        norms=LN2,
        biases=0,
        rest={'embeddings.embed_tokens': 'embedding', 'head.norm': 'norm', 'head.lm_head': 'head'},
    ),
    'mixtral': lambda: dict(
        model=tf.MixtralForCausalLM(tf.MixtralConfig(**DEC, num_local_experts=4)),
        stacks={'block': 3},
        matrices=QKVO + ['gate', 'gate_up_proj', 'down_proj'],
        norms=LN2,
        biases=0,
        rest={'embeddings.embed_tokens': 'embedding', 'head.norm': 'norm', 'head.lm_head': 'head'},
    ),
    # block 0 is dense
    'qwen3_moe': lambda: dict(
        model=tf.Qwen3MoeForCausalLM(
            tf.Qwen3MoeConfig(
                **DEC, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, mlp_only_layers=[0]
            )
        ),
        stacks={'block': 3},
        matrices=QKVO + ['gate', 'gate_up_proj', 'experts.down_proj'],
        norms=['q_norm', 'k_norm'] + LN2,
        biases=0,
        rest={'embeddings.embed_tokens': 'embedding', 'head.norm': 'norm', 'head.lm_head': 'head'},
    ),
    'phi': lambda: dict(
        model=tf.PhiForCausalLM(tf.PhiConfig(**{**DEC, 'num_key_value_heads': 4})),
        stacks={'block': 3},
        matrices='q_proj k_proj v_proj dense fc1 fc2'.split(),
        norms=['input_layernorm'],
        biases=6,
        rest={
            'embeddings.embed_tokens': 'embedding',
            'head.final_layernorm': 'norm',
            'head.lm_head': 'head',
            'head.lm_head.bias': 'bias',
        },
    ),
    # Conv1D, not Linear
    'gpt2': lambda: dict(
        model=tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=V, n_embd=D, n_layer=3, n_head=4, n_positions=64)),
        stacks={'block': 3},
        matrices='c_attn attn.c_proj c_fc mlp.c_proj'.split(),
        norms=['ln_1', 'ln_2'],
        biases=4,
        rest={'embeddings.wte': 'embedding', 'embeddings.wpe': 'embedding', 'head.ln_f': 'norm'},
        tied={'lm_head.weight': 'embeddings.wte'},
    ),
    'gpt_neox': lambda: dict(
        model=tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**ENC)),
        stacks={'block': 3},
        matrices=NEOX,
        norms=LN2,
        biases=4,
        rest={'embeddings.embed_in': 'embedding', 'head.final_layer_norm': 'norm', 'head.lm_head': 'head'},
    ),
    'falcon': lambda: dict(
        model=tf.FalconForCausalLM(
            tf.FalconConfig(vocab_size=V, hidden_size=D, num_hidden_layers=3, num_attention_heads=4)
        ),
        stacks={'block': 3},
        matrices=NEOX,
        norms=['input_layernorm'],
        biases=0,
        rest={'embeddings.word_embeddings': 'embedding', 'head.ln_f': 'norm'},
        tied={'lm_head.weight': 'embeddings.word_embeddings'},
    ),
    'bloom': lambda: dict(
        model=tf.BloomForCausalLM(tf.BloomConfig(vocab_size=V, hidden_size=D, n_layer=3, n_head=4)),
        stacks={'block': 3},
        matrices=NEOX,
        norms=LN2,
        biases=4,
        rest={
            'embeddings.word_embeddings': 'embedding',
            'embeddings.word_embeddings_layernorm': 'norm',
            'head.ln_f': 'norm',
        },
        tied={'lm_head.weight': 'embeddings.word_embeddings'},
    ),
    'opt': lambda: dict(
        model=tf.OPTForCausalLM(
            tf.OPTConfig(
                vocab_size=V,
                hidden_size=D,
                ffn_dim=48,
                num_hidden_layers=3,
                num_attention_heads=4,
                max_position_embeddings=64,
                word_embed_proj_dim=16,
            )
        ),
        # project_out and the final norm are registered before the blocks
        stacks={'block': 3},
        matrices=FAIRSEQ,
        norms=['self_attn_layer_norm', 'final_layer_norm'],
        biases=6,
        rest={
            'embeddings.embed_tokens': 'embedding',
            'embeddings.embed_positions': 'embedding',
            'embeddings.project_in': 'embedding',
            'head.project_out': 'head',
            'head.final_layer_norm': 'norm',
        },
        tied={'lm_head.weight': 'embeddings.embed_tokens'},
    ),
    'bert': lambda: dict(
        model=tf.BertForSequenceClassification(tf.BertConfig(**ENC)),
        stacks={'block': 3},
        matrices=BERT,
        norms=['attention.output.LayerNorm', 'output.LayerNorm'],
        biases=6,
        rest={
            **BERT_BEGIN,
            'head.pooler.dense': 'head',
            'head.pooler.dense.bias': 'bias',
            'head.classifier': 'head',
            'head.classifier.bias': 'bias',
        },
    ),
    'roberta': lambda: dict(
        model=tf.RobertaForMaskedLM(tf.RobertaConfig(**ENC)),
        stacks={'block': 3},
        matrices=BERT,
        norms=['attention.output.LayerNorm', 'output.LayerNorm'],
        biases=6,
        rest={
            **BERT_BEGIN,
            'head.lm_head.dense': 'head',
            'head.lm_head.dense.bias': 'bias',
            'head.lm_head.layer_norm': 'norm',
            'head.lm_head.bias': 'bias',
        },
        tied={'lm_head.decoder.weight': 'embeddings.word_embeddings', 'lm_head.decoder.bias': 'head.lm_head.bias'},
    ),
    'distilbert': lambda: dict(
        model=tf.DistilBertForSequenceClassification(
            tf.DistilBertConfig(vocab_size=V, dim=D, hidden_dim=48, n_layers=3, n_heads=4, max_position_embeddings=64)
        ),
        stacks={'block': 3},
        matrices='q_lin k_lin v_lin out_lin lin1 lin2'.split(),
        norms=['sa_layer_norm', 'output_layer_norm'],
        biases=6,
        rest={
            'embeddings.word_embeddings': 'embedding',
            'embeddings.position_embeddings': 'embedding',
            'embeddings.LayerNorm': 'norm',
            'head.pre_classifier': 'head',
            'head.pre_classifier.bias': 'bias',
            'head.classifier': 'head',
            'head.classifier.bias': 'bias',
        },
    ),
    't5': lambda: dict(
        model=tf.T5ForConditionalGeneration(
            tf.T5Config(vocab_size=V, d_model=D, d_kv=8, d_ff=48, num_layers=3, num_decoder_layers=2, num_heads=4)
        ),
        stacks={'encoder.block': 3, 'decoder.block': 2},
        matrices=T5,
        norms=['layer_norm'] * 3,
        biases=0,
        rest={
            'embeddings.shared': 'embedding',
            'encoder.head.final_layer_norm': 'norm',
            'decoder.head.final_layer_norm': 'norm',
        },
        tied={
            'lm_head.weight': 'embeddings.shared',
            'encoder.embed_tokens.weight': 'embeddings.shared',
            'decoder.embed_tokens.weight': 'embeddings.shared',
        },
    ),
    # the first norm is registered after the blocks
    'bart': lambda: dict(
        model=tf.BartForConditionalGeneration(tf.BartConfig(**EDC, max_position_embeddings=64)),
        stacks={'encoder.block': 3, 'decoder.block': 2},
        matrices=BART,
        norms=['self_attn_layer_norm', 'encoder_attn_layer_norm', 'final_layer_norm'],
        biases=10,
        rest={
            'embeddings.shared': 'embedding',
            'encoder.embeddings.embed_positions': 'embedding',
            'encoder.embeddings.layernorm_embedding': 'norm',
            'decoder.embeddings.embed_positions': 'embedding',
            'decoder.embeddings.layernorm_embedding': 'norm',
        },
        tied={'lm_head.weight': 'embeddings.shared', 'model.decoder.embed_tokens.weight': 'embeddings.shared'},
    ),
    'vit': lambda: dict(
        model=tf.ViTForImageClassification(tf.ViTConfig(**{**VIS, 'num_hidden_layers': 3})),
        stacks={'block': 3},
        matrices=QKVO + ['fc1', 'fc2'],
        norms=['layernorm_before', 'layernorm_after'],
        biases=6,
        rest={
            'embeddings.cls_token': 'embedding',
            'embeddings.position_embeddings': 'embedding',
            'embeddings.patch_embeddings.projection': 'embedding',
            'embeddings.patch_embeddings.projection.bias': 'bias',
            'head.layernorm': 'norm',
            'head.classifier': 'head',
            'head.classifier.bias': 'bias',
        },
    ),
    'whisper': lambda: dict(
        model=tf.WhisperForConditionalGeneration(
            tf.WhisperConfig(
                **EDC,
                num_mel_bins=8,
                max_source_positions=32,
                max_target_positions=32,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                decoder_start_token_id=1,
            )
        ),
        stacks={'encoder.block': 3, 'decoder.block': 2},
        matrices=BART,
        norms=['self_attn_layer_norm', 'encoder_attn_layer_norm', 'final_layer_norm'],
        biases=8,
        frozen=['encoder.embeddings.embed_positions'],
        rest={
            'encoder.embeddings.conv1': 'embedding',
            'encoder.embeddings.conv1.bias': 'bias',
            'encoder.embeddings.conv2': 'embedding',
            'encoder.embeddings.conv2.bias': 'bias',
            'encoder.embeddings.embed_positions': 'embedding',
            'encoder.head.layer_norm': 'norm',
            'decoder.embeddings.embed_tokens': 'embedding',
            'decoder.embeddings.embed_positions': 'embedding',
            'decoder.head.layer_norm': 'norm',
        },
        tied={'proj_out.weight': 'decoder.embeddings.embed_tokens'},
    ),
    # vision runs first
    'clip': lambda: dict(
        model=tf.CLIPModel(
            tf.CLIPConfig(
                text_config=dict(ENC, projection_dim=16, eos_token_id=2), vision_config=VIS, projection_dim=16
            )
        ),
        stacks={'vision_model.block': 2, 'text_model.block': 3},
        matrices=FAIRSEQ,
        norms=['layer_norm1', 'layer_norm2'],
        biases=6,
        rest={
            'vision_model.embeddings.class_embedding': 'embedding',
            'vision_model.embeddings.patch_embedding': 'embedding',
            'vision_model.embeddings.position_embedding': 'embedding',
            'vision_model.embeddings.pre_layrnorm': 'norm',
            'vision_model.head.post_layernorm': 'norm',
            'visual_projection': 'matrix',
            'text_model.embeddings.token_embedding': 'embedding',
            'text_model.embeddings.position_embedding': 'embedding',
            'text_model.head.final_layer_norm': 'norm',
            'head.logit_scale': 'head',
            'head.text_projection': 'head',
        },
    ),
    'llava': lambda: dict(
        model=tf.LlavaForConditionalGeneration(
            tf.LlavaConfig(text_config=tf.LlamaConfig(**DEC), vision_config=tf.CLIPVisionConfig(**VIS))
        ),
        stacks={'vision_tower.block': 2, 'language_model.block': 3},
        matrices=QKVO + GUD,
        norms=LN2,
        biases=0,
        rest={
            'vision_tower.embeddings.class_embedding': 'embedding',
            'vision_tower.embeddings.patch_embedding': 'embedding',
            'vision_tower.embeddings.position_embedding': 'embedding',
            'vision_tower.embeddings.pre_layrnorm': 'norm',
            'vision_tower.head.post_layernorm': 'norm',
            'multi_modal_projector.linear_1': 'matrix',
            'multi_modal_projector.linear_1.bias': 'bias',
            'multi_modal_projector.linear_2': 'matrix',
            'multi_modal_projector.linear_2.bias': 'bias',
            'language_model.embeddings.embed_tokens': 'embedding',
            'language_model.head.norm': 'norm',
            'head.lm_head': 'head',
        },
    ),
    'mamba': lambda: dict(
        model=tf.MambaForCausalLM(tf.MambaConfig(vocab_size=V, hidden_size=D, num_hidden_layers=3, state_size=4)),
        stacks={'block': 3},
        # two biases and the vector D
        matrices='A_log conv1d in_proj x_proj dt_proj out_proj'.split(),
        norms=['norm'],
        biases=3,
        rest={'embeddings.embeddings': 'embedding', 'head.norm_f': 'norm'},
        tied={'lm_head.weight': 'embeddings.embeddings'},
    ),
    # blocks of two classes
    'jamba': lambda: dict(
        model=tf.JambaForCausalLM(
            tf.JambaConfig(
                **{**DEC, 'num_hidden_layers': 4},
                num_experts=2,
                attn_layer_period=2,
                attn_layer_offset=1,
                expert_layer_period=2,
                expert_layer_offset=1,
            )
        ),
        stacks={'block': 4},
        matrices=QKVO + ['router', 'gate_up_proj', 'experts.down_proj'],
        norms=['input_layernorm', 'pre_ff_layernorm'],
        biases=0,
        rest={'embeddings.embed_tokens': 'embedding', 'head.final_layernorm': 'norm', 'head.lm_head': 'head'},
    ),
    # 2-d biases of fused experts
    'gpt_oss': lambda: dict(
        model=tf.GptOssForCausalLM(
            tf.GptOssConfig(
                **DEC, head_dim=8, num_local_experts=4, rope_parameters=dict(rope_type='default', rope_theta=1e4)
            )
        ),
        stacks={'block': 3},
        matrices=QKVO + ['router', 'gate_up_proj', 'down_proj'],
        norms=LN2,
        biases=8,
        rest={'embeddings.embed_tokens': 'embedding', 'head.norm': 'norm', 'head.lm_head': 'head'},
    ),
    'wav2vec2': lambda: dict(
        model=tf.Wav2Vec2ForCTC(
            tf.Wav2Vec2Config(
                vocab_size=V,
                hidden_size=D,
                num_hidden_layers=3,
                num_attention_heads=4,
                intermediate_size=48,
                conv_dim=(16, 16),
                conv_stride=(5, 2),
                conv_kernel=(10, 3),
                # the convolutions are no stack
                feat_extract_norm='layer',
                num_feat_extract_layers=2,
                num_conv_pos_embeddings=16,
                num_conv_pos_embedding_groups=4,
            )
        ),
        stacks={'block': 3},
        matrices=['q_proj', 'k_proj', 'v_proj', 'out_proj', 'intermediate_dense', 'output_dense'],
        norms=['layer_norm', 'final_layer_norm'],
        biases=6,
        rest=None,
        layers=['embeddings', 'block.0', 'block.1', 'block.2', 'head'],
    ),
    # one block, run three times
    'albert': lambda: dict(
        model=tf.AlbertForMaskedLM(tf.AlbertConfig(**ENC, embedding_size=16)),
        stacks={'block': 1},
        matrices='query key value dense ffn ffn_output'.split(),
        norms=['LayerNorm', 'full_layer_layer_norm'],
        biases=6,
        rest=None,
        layers=['embeddings', 'block.0', 'head'],
    ),
    'swin': lambda: dict(
        model=tf.SwinForImageClassification(
            tf.SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4)
        ),
        stacks={'layers.0.block': 2, 'layers.1.block': 2},
        matrices=QKVO + ['fc1', 'fc2'],
        norms=['layernorm_before', 'layernorm_after'],
        biases=7,
        rest=None,
        layers=[
            'embeddings',
            'layers.0.block.0',
            'layers.0.block.1',
            'layers.0.head',
            'layers.1.block.0',
            'layers.1.block.1',
            'head',
        ],
    ),
    'convnext': lambda: dict(
        model=tf.ConvNextForImageClassification(
            tf.ConvNextConfig(hidden_sizes=[8, 16], depths=[2, 1], num_stages=2, image_size=32)
        ),
        stacks={'stages.0.block': 2, 'stages.1.block': 1},
        matrices=['dwconv', 'pwconv1', 'pwconv2'],
        norms=['layernorm'],
        biases=4,
        rest=None,
        layers=[
            'embeddings',
            'stages.0.block.0',
            'stages.0.block.1',
            'stages.1.embeddings',
            'stages.1.block.0',
            'head',
        ],
    ),
    # vectors of shape (1,1,d)
    'rwkv': lambda: dict(
        model=tf.RwkvForCausalLM(tf.RwkvConfig(vocab_size=V, hidden_size=D, num_hidden_layers=3, context_length=32)),
        stacks={'block': 3},
        matrices=RWKV,
        norms=['ln1', 'ln2'],
        biases=7,
        rest={'embeddings.embeddings': 'embedding', 'head.ln_out': 'norm', 'head.head': 'head'},
    ),
}

# transformers whose modules have the names above, or (phi) whose model can be built at all; found by trying 5.0, 5.4,
# 5.8 and 5.23
SINCE = dict(phi='5.4', mamba='5.4', clip='5.8', gpt_neox='5.23', vit='5.23', llava='5.23', swin='5.23')

def check_parameters(model, layers):
    "Every parameter once, tied weights once, no buffers"
    unique = dict(model.named_parameters())
    held = [k for n in layers for k in layers.named_params(n)]
    assert sorted(held) == sorted(unique)
    assert sum(u.n_params for u in layers.units) == sum(p.numel() for p in unique.values())
    assert layers.total == sum(p.numel() for p in unique.values() if p.requires_grad)
    assert all(layers.unit_of(k) in layers for k,_ in model.named_parameters(remove_duplicate=False))

def check_blocks(layers, blocks, stacks):
    assert [l for l in layers.by_layer if l.rpartition('.')[0] in stacks] == blocks
    assert layers.n_blocks == len(blocks)
    assert [layers[layers.by_layer[b][0]].depth for b in blocks] == list(range(1, len(blocks)+1))
    assert all(u.depth == layers.n_blocks+1 for u in layers.units if u.layer == 'head')
    depths = [u.depth for u in layers.units]
    assert depths == sorted(depths)

def check_last_block(last, f):
    "What stands in it"
    assert sorted(u.role for u in last if u.kind == 'matrix') == sorted(f['matrices'])
    assert sorted(u.role for u in last if u.kind == 'norm') == sorted(f['norms'])
    assert sum(u.kind == 'bias' for u in last) == f['biases']
    assert all(u.name.startswith(u.layer + '.') for u in last)

def check_outside(layers, rest, f):
    "What stands outside the blocks"
    if f['rest'] is None: assert list(layers.by_layer) == f['layers']
    else: assert rest == f['rest']
    frozen = f.get('frozen', [])
    assert all(u.eligible == (u.kind == 'matrix' and u.name not in frozen) for u in layers.units)

def check_by_block(by_block, layers, blocks, rest):
    "The same by blocks"
    assert [u.name for u in by_block.units if u.kind == 'block'] == blocks
    assert all(by_block[b].n_params == sum(layers[n].n_params for n in layers.by_layer[b]) for b in blocks)
    assert {u.name:u.kind for u in by_block.units if u.kind != 'block'} == rest

@pytest.mark.parametrize('family', FAMILIES)
def test_family(family):
    torch.manual_seed(0)
    older = Version(tf.__version__) < Version(SINCE.get(family, '5'))
    if older and family == 'phi': pytest.skip(f"transformers {tf.__version__} cannot build a Phi")
    f = FAMILIES[family]()
    model,layers = f['model'],partition_layers(f['model'])
    check_parameters(model, layers)
    if older:
        pytest.skip(
            f"transformers {tf.__version__} names the modules of {family} otherwise; every parameter is in one unit"
        )
    for name,unit in f.get('tied', {}).items(): assert layers.unit_of(name) == unit
    blocks = [f'{s}.{i}' for s,n in f['stacks'].items() for i in range(n)]
    rest = {u.name:u.kind for u in layers.units if u.layer not in blocks}
    check_blocks(layers, blocks, f['stacks'])
    check_last_block([layers[n] for n in layers.by_layer[blocks[-1]]], f)
    check_outside(layers, rest, f)
    check_by_block(partition_layers(model, unit='block'), layers, blocks, rest)

@pytest.mark.parametrize(
    'cls,config,key',
    [('LlamaForCausalLM', 'LlamaConfig', 'num_hidden_layers'), ('GPT2LMHeadModel', 'GPT2Config', 'n_layer')],
)
def test_eleven_blocks_are_told_apart(cls, config, key):
    kw = {**DEC, key:11} if key != 'n_layer' else dict(vocab_size=V, n_embd=D, n_head=4, n_positions=64, n_layer=11)
    model = getattr(tf, cls)(getattr(tf, config)(**kw))
    layers = partition_layers(model)
    n1,n10 = ({k for n in layers.by_layer[b] for k in layers.named_params(n)} for b in ('block.1', 'block.10'))
    assert n1 and n10 and not n1 & n10 and all('.1.' in k for k in n1) and all('.10.' in k for k in n10)

@pytest.mark.parametrize(
    'family,targets,tuned',
    [('llama', ['q_proj', 'v_proj'], ['self_attn.q_proj', 'self_attn.v_proj']), ('gpt2', ['c_attn'], ['attn.c_attn'])],
)
@pytest.mark.parametrize('unit', ['matrix', 'block'])
def test_peft_adapters_are_the_units(family, targets, tuned, unit):
    peft = pytest.importorskip('peft')
    plain = FAMILIES[family]()['model']
    names = set(partition_layers(plain))
    model = peft.get_peft_model(plain, peft.LoraConfig(r=2, target_modules=targets))
    layers = partition_layers(model, unit=unit)
    eligible = [u for u in layers.units if u.eligible]
    trainable = {k for k,p in model.named_parameters() if p.requires_grad}
    assert {k for u in eligible for k in layers.named_params(u.name)} == trainable
    assert (
        layers.total
        == sum(u.n_params for u in eligible)
        == sum(p.numel() for p in model.parameters() if p.requires_grad)
    )
    if unit == 'matrix':
        assert [u.name for u in eligible] == [f'block.{i}.{m}' for i in range(3) for m in tuned]
        assert {u.kind for u in eligible} == {'adapter'} and all(len(u.shapes) == 2 for u in eligible)
        assert {n.replace('.base_layer', '') for n in layers} == names # base weights keep their names, one hop deeper
    else:
        assert [u.name for u in eligible] == ['block.0', 'block.1', 'block.2']
        assert layers['block.0.frozen'].n_params > layers['block.0'].n_params and not layers['block.0.frozen'].eligible

def test_peft_extra_head_and_embedding_adapters():
    peft = pytest.importorskip('peft')
    model = peft.get_peft_model(
        tf.BertForSequenceClassification(tf.BertConfig(**ENC)),
        peft.LoraConfig(r=2, target_modules=['query', 'word_embeddings'], modules_to_save=['classifier']),
    )
    layers = partition_layers(model)
    assert {u.name for u in layers.units if u.eligible} == {
        'embeddings.word_embeddings',
        'head.classifier',
        *(f'block.{i}.attention.self.query' for i in range(3)),
    }
    assert {k for u in layers.units if u.eligible for k in layers.named_params(u.name)} == {
        k for k, p in model.named_parameters() if p.requires_grad
    }

def test_second_adapter_is_frozen_beside_the_active_one():
    peft = pytest.importorskip('peft')
    model = peft.get_peft_model(FAMILIES['llama']()['model'], peft.LoraConfig(r=2, target_modules=['q_proj']))
    model.add_adapter('other', peft.LoraConfig(r=3, target_modules=['q_proj']))
    layers = partition_layers(model)
    assert layers['block.0.self_attn.q_proj'].eligible and not layers['block.0.self_attn.q_proj.frozen'].eligible
    assert layers['block.0.self_attn.q_proj'].shapes == ((2, D), (D, 2))

@pytest.mark.parametrize('family', ['llama', 'gpt2', 't5', 'llava', 'swin'])
def test_wrappers_change_no_name(family):
    model = FAMILIES[family]()['model']
    want = list(partition_layers(model))
    class Wrapped(nn.Module): # DDP from outside
        def __init__(self, module):
            super().__init__()
            self.module = module
    assert list(partition_layers(Wrapped(model))) == want
    assert list(partition_layers(torch.compile(model))) == want
    assert list(partition_layers(Wrapped(torch.compile(model)))) == want

def test_blocks_compiled_one_by_one():
    model = FAMILIES['llama']()['model']
    want = list(partition_layers(model))
    for i,b in enumerate(model.model.layers): model.model.layers[i] = torch.compile(b)
    assert list(partition_layers(model)) == want

class ShallowBlock(nn.Module):
    def __init__(self, d=8):
        super().__init__()
        self.norm,self.up,self.down = nn.LayerNorm(d),nn.Linear(d, 2*d),nn.Linear(2*d, d)

class Experts(nn.Module):
    "A block whose experts are an old-style list of modules"
    def __init__(self, d=8):
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.gate = nn.Linear(d, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(d, 64), nn.ReLU(), nn.Linear(64, d)) for _ in range(4))

class OldMoE(nn.Module):
    def __init__(self):
        super().__init__()
        # the first is dense: members differ in shape
        self.tok,self.layers = nn.Embedding(10, 8),nn.ModuleList([ShallowBlock(), Experts(), Experts()])

class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.tok,b = nn.Embedding(10, 8),nn.TransformerEncoderLayer(8, 2, 16)
        self.layers = nn.ModuleList([b, nn.TransformerEncoderLayer(8, 2, 16), b])

class Late(nn.Module):
    "Head and decoder are registered first, but run last"
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(8, 10)
        self.decoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 3)
        self.tok = nn.Embedding(10, 8)
    def forward(self, x): return self.out(self.decoder(self.encoder(self.tok(x))))

def test_experts_in_a_list_are_no_stack():
    layers = partition_layers(OldMoE())
    assert list(layers.by_layer) == ['embeddings', 'block.0', 'block.1', 'block.2']
    assert layers['block.2.experts.3.0'].kind == 'matrix' and layers['block.2.experts.3.0'].role == 'experts.*.0'

def test_a_shared_block_counts_once():
    layers = partition_layers(Shared())
    assert layers.n_blocks == 3 and list(layers.by_layer) == ['embeddings', 'block.0', 'block.1']
    assert layers.unit_of('layers.2.linear1.weight') == 'block.0.linear1'

def test_running_order_beats_registration():
    layers = partition_layers(Late())
    assert list(layers.by_layer) == [
        'embeddings',
        'encoder.block.0',
        'encoder.block.1',
        'encoder.block.2',
        'decoder.block.0',
        'decoder.block.1',
        'head',
    ]
    assert layers['head.out'].kind == 'head' and layers['decoder.block.1.self_attn.in_proj_weight'].depth == 5

def test_running_order_without_source():
    ns = dict(Late=Late)
    exec(
        "class Typed(Late):\n    def forward(self, x):\n        x = self.tok(x)\n        x = self.encoder(x)\n        x"
        " = self.decoder(x)\n        return self.out(x)",
        ns,
    )
    assert list(partition_layers(ns['Typed']()).by_layer) == list(partition_layers(Late()).by_layer)

def test_small_lists_of_heads_are_no_stack():
    m = Late()
    m.boxes = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)) for _ in range(3))
    assert partition_layers(m).n_blocks == 5

def test_lazy_modules_get_a_clear_error():
    with pytest.raises(ValueError, match='run one batch'):
        partition_layers(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 3)))

def test_a_model_on_the_meta_device():
    with torch.device('meta'):
        model = tf.LlamaForCausalLM(
            tf.LlamaConfig(
                hidden_size=4096,
                intermediate_size=14336,
                num_hidden_layers=32,
                num_attention_heads=32,
                num_key_value_heads=8,
                vocab_size=128256,
            )
        )
    layers = partition_layers(model)
    assert layers.n_blocks == 32 and layers.total == 8_030_261_248

class Sub(nn.Module):
    def __init__(self, d=8):
        super().__init__()
        self.mlp,self.norm = ShallowBlock(d),nn.LayerNorm(d)

class SubLists(nn.Module):
    "Blocks of one width whose weight lies mostly in a list of their own, as in MobileBERT"
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(3):
            b = nn.Module()
            b.ffn,b.out = nn.ModuleList(Sub() for _ in range(4)),Sub()
            self.layers.append(b)

def test_a_list_inside_a_block_is_no_stack():
    assert list(partition_layers(SubLists()).by_layer) == ['block.0', 'block.1', 'block.2']

def test_a_tied_weight_belongs_to_the_embedding():
    m = nn.Module()
    m.lm_head,m.tok = nn.Linear(8, 10, bias=False),nn.Embedding(10, 8)
    m.lm_head.weight = m.tok.weight
    layers = partition_layers(m, kinds='embedding')
    assert (
        list(layers) == ['tok']
        and layers['tok'].kind == 'embedding'
        and list(layers.named_params('tok')) == ['lm_head.weight']
    )
