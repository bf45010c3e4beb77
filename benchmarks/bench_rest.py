"""What the rest may be held in: 16, 8 or 4 bits, beside QLoRA.

    python benchmarks/bench_rest.py [--ways alf-10-nf4 qlora …] [--steps 100] [--seeds 0 1 2] [--out FILE]

SmolLM2-135M learns GSM8K under bf16 autocast for equal steps. ALF chooses a tenth or a quarter by gain, once, trains it
in fp32, and the rest stays in bf16, int8 or nf4 (`quantize_frozen`); QLoRA (PEFT, rank 16, all linear layers of blocks)
trains adapters on an nf4 base. Each way takes its own rate: the best of RATES on the dev half of the held-out text with
the first seed. A row: the losses on both halves, bytes of weights and of training state, and on a GPU the peak.
"""
import argparse
import copy
import json
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainerCallback, TrainingArguments
from transformers import default_data_collator

from bench_masters import emulated

from alf_nb.core.system import versions
from alf_nb.model.quantize import weight_bytes
from alf_nb.model.states import gradient_bytes, optimizer_bytes
from alf_nb.sources.blocks import holdout_split, token_blocks
from alf_nb.sources.losses import evaluate_loss, supports_bf16
from alf_nb.sources.models import load_model
from alf_nb.sources.texts import unrelated_texts
from alf_nb.study.runs import device_name
from alf_nb.train.trainer import ALFCallback

RESULTS = Path(__file__).parent/'results'/'rest.jsonl'
RATES = (1e-4, 2e-4, 4e-4, 8e-4)
RESTS = dict(bf16=None, int8=8, nf4=4)
NAMES = {(budget, rest): f'alf-{round(100*budget)}-{rest}' for budget in (.1, .25) for rest in RESTS}
WAYS = {name: (budget, RESTS[rest]) for (budget, rest), name in NAMES.items()}
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


def qlora(base, rank=16):
    "`base` as QLoRA has it: through a file, as everybody loads it"
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_compute_dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        base.save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, device_map=DEVICE)
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2*rank, target_modules='all-linear', lora_dropout=0.))


def emulated_matmul(real):
    "That of bitsandbytes' backward pass; fp32 stays as it is"
    half = emulated(real)
    return lambda a, b, **kw: half(a, b, **kw) if a.dtype == torch.bfloat16 else real(a, b, **kw)


class Bytes(TrainerCallback):
    "What is there at the last step"
    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kw):
        self.gradients = gradient_bytes(model)

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kw):
        # the first step made the state
        self.weights, self.state = weight_bytes(model), optimizer_bytes(optimizer)


def run(base, rows, dev, test, way, lr, seed, steps):
    "One training; its row"
    torch.manual_seed(seed)
    counted, alf = Bytes(), []
    if way == 'qlora': model = qlora(base)
    else:
        budget, bits = WAYS[way]
        model = copy.deepcopy(base)
        alf = [ALFCallback(budget=budget, quantize_frozen=bits, interval=0, references='none', seed=seed)]
    args = TrainingArguments(
        tempfile.mkdtemp(), max_steps=steps, per_device_train_batch_size=2, learning_rate=lr, seed=seed, bf16=True,
        lr_scheduler_type='cosine', warmup_steps=max(1, steps//10), use_cpu=DEVICE == 'cpu', save_strategy='no',
        report_to=[], disable_tqdm=True,
    )
    if DEVICE == 'cuda': torch.cuda.reset_peak_memory_stats()
    t0 = time.perf_counter()
    trainer = Trainer(model, args, train_dataset=rows, data_collator=default_data_collator, callbacks=[*alf, counted])
    trainer.train()
    wall_s = time.perf_counter() - t0
    peak = torch.cuda.max_memory_allocated() - weight_bytes(base) if DEVICE == 'cuda' else None
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) if way == 'qlora' else None
    share = alf[0].selection.share if alf else trained/sum(p.numel() for p in base.parameters())
    return dict(
        way=way, lr=lr, seed=seed, steps=steps, batch_size=2, length=192, share=share,
        dev_loss=evaluate_loss(model, dev, autocast=True)[0], test_loss=evaluate_loss(model, test, autocast=True)[0],
        weight_bytes=counted.weights, gradient_bytes=counted.gradients, state_bytes=counted.state, peak_bytes=peak,
        wall_s=wall_s, emulated=not supports_bf16(), model='SmolLM2-135M-Instruct', data='180 problems of GSM8K',
        device=device_name(),
        versions=versions(), date=datetime.now(timezone.utc).isoformat(timespec='seconds'),
    )


def main():
    ap = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    ap.add_argument('--ways', nargs='+', choices=[*WAYS, 'qlora'], default=[*WAYS, 'qlora'])
    ap.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    ap.add_argument('--rates', type=float, nargs='+', default=RATES)
    ap.add_argument('--steps', type=int, default=100)
    ap.add_argument('--out', default=str(RESULTS))
    a = ap.parse_args()
    base, tok = load_model(dtype=torch.bfloat16, progress=False)
    base.to(DEVICE)
    if not supports_bf16():
        F.linear, F.scaled_dot_product_attention = map(emulated, (F.linear, F.scaled_dot_product_attention))
        torch.matmul = emulated_matmul(torch.matmul)
    learnt, held = (token_blocks(t, tok, 192) for t in holdout_split(unrelated_texts()))
    dev, test = (held.select(range(k, len(held), 2)) for k in (0, 1))
    print('before:', *(evaluate_loss(base, part, autocast=True)[0] for part in (dev, test)), len(dev), flush=True)

    def keep(row):
        print({k: row[k] for k in ('way', 'lr', 'seed', 'dev_loss', 'test_loss', 'wall_s', 'peak_bytes')}, flush=True)
        with open(a.out, 'a', encoding='utf-8') as f: f.write(json.dumps(row) + '\n')
        return row

    for way in a.ways:
        first = [keep(run(base, learnt, dev, test, way, lr, a.seeds[0], a.steps)) for lr in a.rates]
        best = min(first, key=lambda r: r['dev_loss'])['lr']
        for seed in a.seeds[1:]: keep(run(base, learnt, dev, test, way, best, seed, a.steps))


if __name__ == '__main__': main()
