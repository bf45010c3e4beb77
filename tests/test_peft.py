"Adapters of PEFT: what their units are called, and AdaLoRA, which chooses among adapters itself."
import pytest
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainerCallback, TrainingArguments
from alf_nb.demo import demo_dataset, demo_model
from alf_nb.model.layers import partition_layers
from alf_nb.train.trainer import ALFCallback

peft = pytest.importorskip('peft')

def experts(*parameters, modules=()):
    config = MixtralConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    return peft.get_peft_model(
        MixtralForCausalLM(config),
        peft.LoraConfig(r=4, target_modules=list(modules), target_parameters=list(parameters)),
    )

@pytest.mark.parametrize(
    'parameters,modules,names',
    [
        (
            ['mlp.experts.gate_up_proj', 'mlp.experts.down_proj'],
            ['q_proj'],
            ['self_attn.q_proj', 'mlp.experts.gate_up_proj', 'mlp.experts.down_proj'],
        ),
        (
            ['mlp.experts.down_proj', 'mlp.experts.gate_up_proj'],
            [],
            ['mlp.experts.gate_up_proj', 'mlp.experts.down_proj'],
        ),
        (['mlp.experts.down_proj'], [], ['mlp.experts.down_proj']),
        (['mlp.gate.weight', 'mlp.experts.gate_up_proj'], [], ['mlp.gate', 'mlp.experts.gate_up_proj']),
    ],
)
def test_adapters_of_fused_experts_are_named_after_what_they_adapt(parameters, modules, names):
    model = experts(*parameters, modules=modules)
    layers = partition_layers(model)
    eligible = [u for u in layers.units if u.eligible]
    assert [u.name for u in eligible] == [f'block.{i}.{n}' for i in range(2) for n in names]
    assert {u.kind for u in eligible} == {'adapter'} and len({u.role for u in eligible}) == len(names)
    assert {k for u in eligible for k in layers.named_params(u.name)} == {
        k for k, p in model.named_parameters() if p.requires_grad
    }
    modules = dict(model.named_modules())
    for u in eligible:
        if 'experts' not in u.name: continue
        (owner,) = {k.split('.lora_')[0] for k in layers.named_params(u.name)}
        assert modules[owner].parameter_name == u.name.rpartition('.')[2]

class Allocate(TrainerCallback):
    def on_optimizer_step(self, args, state, control, model=None, **kw):
        model.base_model.update_and_allocate(state.global_step + 1)

def adalora(folder, *callbacks):
    model = peft.get_peft_model(
        demo_model(blocks=2),
        peft.AdaLoraConfig(
            init_r=6,
            target_r=3,
            tinit=2,
            tfinal=2,
            deltaT=1,
            total_step=8,
            target_modules=['q_proj', 'v_proj'],
            task_type='CAUSAL_LM',
        ),
    )
    args = TrainingArguments(
        str(folder),
        max_steps=8,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy='no',
        logging_strategy='no',
    )
    return model, Trainer(model, args, train_dataset=demo_dataset(), callbacks=list(callbacks))

@pytest.mark.filterwarnings('ignore:AdaLoRA')
def test_adalora_with_its_allocator_says_what_to_do(tmp_path):
    model, trainer = adalora(tmp_path, ALFCallback(budget=.6), Allocate())
    with pytest.raises(RuntimeError, match=r"needs the gradient of every adapter.*leave the call.*policy='full'"):
        trainer.train()

def test_adalora_is_warned_about_and_trains_without_its_allocator(tmp_path):
    model, trainer = adalora(tmp_path, ALFCallback(budget=.6))
    with pytest.warns(UserWarning, match='update_and_allocate cannot be called while ALF freezes adapters'):
        trainer.train()
    assert trainer.state.global_step == 8 and 'update_and_allocate' not in vars(model.base_model)

def test_adalora_allocates_where_every_adapter_trains(tmp_path, recwarn):
    model, trainer = adalora(tmp_path, ALFCallback(policy='full', interval=0), Allocate())
    trainer.train()
    assert trainer.state.global_step == 8 and model.peft_config['default'].rank_pattern
    assert not [w for w in recwarn if 'AdaLoRA' in str(w.message)]
