"""Is the plan right? Peak memory of real training steps beside what `plan` says before, in `results/plan.jsonl`.

Every way runs in a process of its own. On a GPU the peak is torch's `max_memory_allocated`, on a CPU the largest
"Total Allocated" of torch.profiler, which sees every allocation of the allocator, those inside kernels too.

    python benchmarks/bench_plan.py [--device cuda] [--shapes minilm] [--out benchmarks/results/plan.jsonl]
"""
import argparse, json, os, platform, subprocess, sys, tempfile
from datetime import date
from pathlib import Path

import torch
import transformers

from alf_nb.model.dry_run import example_inputs
from alf_nb.model.layers import partition_layers
from alf_nb.model.needs import draw
from alf_nb.model.optim import apply_selection
from alf_nb.signals.probe import probe_gradients
from alf_nb.signals.snapshots import Snapshot
from alf_nb.study.plan import plan

HERE = Path(__file__).parent
LLAMA = dict(num_attention_heads=16, num_key_value_heads=4, architectures=['LlamaForCausalLM'])
SHAPES = dict(      # name → (configuration, batch, length)
    smollm2=(transformers.LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, tie_word_embeddings=True, architectures=['LlamaForCausalLM']), 1, 128),
    wide=(transformers.LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, vocab_size=8192, **LLAMA), 2, 128),
    minilm=(transformers.BertConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12,
        architectures=['BertForSequenceClassification']), 8, 64),
)
WAYS = ('full, fp32', 'alf 25 %', 'alf 10 %', 'alf 10 %, 16-bit rest', 'lora')


def lora(model):
    from peft import LoraConfig, get_peft_model
    blocks = [k for k,m in model.named_modules() if type(m) is torch.nn.Linear and '.layer' in k]
    return get_peft_model(model, LoraConfig(r=16, target_modules=blocks, lora_dropout=0.)).base_model.model


def prepared(model, way):
    "(model, names of the units that ALF trains, or None)"
    if way == 'lora': return lora(model), None
    if way.startswith('full'): return model, None
    layers = partition_layers(model)
    wanted = {id(p) for p in draw(layers, .25 if '25' in way else .1)}
    return model, [n for n in layers if any(id(p) in wanted for p in layers.params(n))]


def two_steps(model, names, way, inputs, device, bf16):
    "A probe if ALF makes one, then two steps: the second has all state there is"
    opt_for = lambda ps: torch.optim.AdamW(ps, lr=1e-5, fused=True)
    optimizer, snapshot, mixed = None, None, '16-bit' in way
    def loss_of(model, batch):
        with torch.autocast(device, torch.bfloat16, enabled=bf16): return model(**batch).loss
    if mixed: model.to(torch.bfloat16)
    if names is not None:
        layers = partition_layers(model)
        probe = lambda: probe_gradients(layers, [inputs, inputs], loss=loss_of)
        if mixed: probe = lambda: None      # needs the masters that are made below
        probe()
        optimizer = opt_for(list(model.parameters()))
        apply_selection(layers, names, optimizer)
        for p in (p for n in names for p in layers.params(n) if mixed): p.data = p.data.float()
        snapshot = Snapshot(layers)
        snapshot.take(names)
    else: optimizer = opt_for([p for p in model.parameters() if p.requires_grad])
    for step in range(2):
        loss_of(model, inputs).backward()
        optimizer.step()
        optimizer.zero_grad()
    if names is not None: probe()


def measured(work, device):
    "Most bytes allocated during `work`"
    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated()
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof: work()
    with tempfile.TemporaryDirectory() as d:
        prof.export_chrome_trace(f'{d}/trace.json')
        events = json.loads(Path(d, 'trace.json').read_text())['traceEvents']
    return max(e['args']['Total Allocated'] for e in events if e.get('name') == '[memory]')


def run(shape, way, device, bf16):
    config, batch, length = SHAPES[shape]
    torch.manual_seed(0)
    def work():
        with torch.device(device): model = getattr(transformers, config.architectures[0])(config)
        model.config.use_cache = False
        model, names = prepared(model.float().train(), way)
        inputs = {k: v.to(device) for k,v in example_inputs(model, batch, length).items()}
        two_steps(model, names, way, inputs, device, bf16)
    return measured(work, device)


def row(shape, way, device, bf16):
    config, batch, length = SHAPES[shape]
    argv = [sys.executable, __file__, '--one', shape, way, '--device', device, *(['--bf16'] if bf16 else [])]
    done = subprocess.run(argv, capture_output=True, text=True, env=os.environ)
    if done.returncode: raise RuntimeError(done.stderr[-2000:])
    peak = int(done.stdout.split()[-1])
    probe = '16-bit' not in way
    ways = plan(config, batch=batch, length=length, bf16=bf16, probe=probe).ways
    found = next(w for w in ways if w.name == way or way == 'lora' == w.method)
    categories = 'weights masters gradients state references activations probe both'.split()
    return dict(shape=shape, way=way, batch=batch, length=length, bf16=bf16, predicted=found.total, measured=peak,
                n_params=found.n_params, by_category={k: getattr(found, k) for k in categories})


def write_large(out):
    "Plans of shapes that do not fit here"
    names = 'Llama-2-7B', 'Llama-2-13B', 'Llama-2-70B'
    plans = [plan(n, '24GB', checkpointing=True, budgets=(.1,)).to_json() for n in names]
    Path(out).write_text('\n'.join(plans)+'\n', encoding='utf-8')


def main():
    p = argparse.ArgumentParser()
    p.add_argument('--one', nargs=2)
    p.add_argument('--large', action='store_true', help='write plans of 7 B, 13 B and 70 B to results/plans.jsonl')
    p.add_argument('--shapes', nargs='*', choices=tuple(SHAPES))
    p.add_argument('--device', default='cpu')
    p.add_argument('--bf16', action='store_true')
    p.add_argument('--out', default=str(HERE/'results/plan.jsonl'))
    a = p.parse_args()
    if a.large: return write_large(HERE/'results/plans.jsonl')
    if a.one: return print(run(*a.one, a.device, a.bf16))
    name = torch.cuda.get_device_name() if a.device == 'cuda' else platform.processor() or platform.machine()
    made = dict(date=str(date.today()), device=name, kind=a.device, torch=torch.__version__,
                transformers=transformers.__version__)
    for shape in a.shapes or SHAPES:
        for way in WAYS:
            bf16 = a.device == 'cuda' or '16-bit' in way
            if way == 'lora' and bf16: continue     # its weights are fp32 here
            found = made | row(shape, way, a.device, bf16)
            error = found['predicted']/found['measured']-1
            print(f"{shape:8} {way:24} {found['measured']/2**20:8.0f} MB, {error:+.1%}", flush=True)
            with open(a.out, 'a', encoding='utf-8') as f: f.write(json.dumps(found)+'\n')


if __name__ == '__main__': main()
