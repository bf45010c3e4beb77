"""Is the plan right? Peak memory of real training steps beside what `plan` says before, in `results/plan.jsonl`.

Every way runs in a process of its own. On a GPU the peak is torch's `max_memory_allocated`, on a CPU the largest
"Total Allocated" of torch.profiler, which sees every allocation of the allocator, those inside kernels too. On a GPU a
row has more, to tell causes apart: `requested` is the peak without what the allocator rounds up, `workspaces` what goes
when cuBLAS gives back what it holds, `marks` what is allocated and the most so far after each part of the work.

    python benchmarks/bench_plan.py [--device cuda] [--shapes minilm] [--ways lora] [--out FILE]
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


def lora(model, bf16):
    from peft import LoraConfig, get_peft_model
    if bf16: model.to(torch.bfloat16)       # PEFT's own weights are fp32
    blocks = [k for k,m in model.named_modules() if type(m) is torch.nn.Linear and '.layer' in k]
    return get_peft_model(model, LoraConfig(r=16, target_modules=blocks, lora_dropout=0.)).base_model.model


def prepared(model, way, bf16):
    "(model, names of the units that ALF trains, or None)"
    if way == 'lora': return lora(model, bf16), None
    if way.startswith('full'): return model, None
    layers = partition_layers(model)
    wanted = {id(p) for p in draw(layers, .25 if '25' in way else .1)}
    return model, [n for n in layers if any(id(p) in wanted for p in layers.params(n))]


def two_steps(model, names, way, inputs, device, bf16, mark):
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
        mark('probe')
        optimizer = opt_for(list(model.parameters()))
        apply_selection(layers, names, optimizer)
        for p in (p for n in names for p in layers.params(n) if mixed): p.data = p.data.float()
        snapshot = Snapshot(layers)
        snapshot.take(names)
        mark('references')
    else: optimizer = opt_for([p for p in model.parameters() if p.requires_grad])
    for step in range(2):
        loss = loss_of(model, inputs)
        mark(f'forward {step}')
        loss.backward()
        del loss
        mark(f'backward {step}')
        optimizer.step()
        optimizer.zero_grad()
        mark(f'step {step}')
    if names is not None: probe()
    mark('end')


def on_cuda(work):
    "What a CUDA device says of `work`"
    marks = {}
    now = lambda: (torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated())
    work(lambda name: marks.update({name: now()}))
    stats,before = torch.cuda.memory_stats(),torch.cuda.memory_allocated()
    torch._C._cuda_clearCublasWorkspaces()
    return dict(measured=stats['allocated_bytes.all.peak'], requested=stats['requested_bytes.all.peak'],
                reserved=stats['reserved_bytes.all.peak'], workspaces=before-torch.cuda.memory_allocated(), marks=marks)


def measured(work, device):
    "Most bytes allocated during `work`, and what else is known"
    if device == 'cuda': return on_cuda(work)
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof: work(lambda name: None)
    with tempfile.TemporaryDirectory() as d:
        prof.export_chrome_trace(f'{d}/trace.json')
        events = json.loads(Path(d, 'trace.json').read_text())['traceEvents']
    return dict(measured=max(e['args']['Total Allocated'] for e in events if e.get('name') == '[memory]'))


def run(shape, way, device, bf16):
    config, batch, length = SHAPES[shape]
    torch.manual_seed(0)
    def work(mark):
        model = getattr(transformers, config.architectures[0])(config)
        model.config.use_cache = False
        # on the host: the fp32 numbers that it is drawn in are no part of a way
        model, names = prepared(model.float().train(), way, bf16)
        model.to(device)
        mark('built')
        inputs = {k: v.to(device) for k,v in example_inputs(model, batch, length).items()}
        two_steps(model, names, way, inputs, device, bf16, mark)
    return measured(work, device)


def row(shape, way, device, bf16):
    config, batch, length = SHAPES[shape]
    argv = [sys.executable, __file__, '--one', shape, way, '--device', device, *(['--bf16'] if bf16 else [])]
    done = subprocess.run(argv, capture_output=True, text=True, env=os.environ)
    if done.returncode: raise RuntimeError(done.stderr[-2000:])
    seen = json.loads(done.stdout.splitlines()[-1])
    probe = '16-bit' not in way
    how = dict(bf16=bf16, probe=probe, device=device, references='device')      # `two_steps` takes some
    ways = plan(config, batch=batch, max_length=length, **how).ways
    found = next(w for w in ways if w.name == way or way == 'lora' == w.method)
    categories = 'weights masters gradients state references activations probe both workspace'.split()
    return dict(shape=shape, way=way, batch=batch, length=length, bf16=bf16, predicted=found.total, **seen,
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
    p.add_argument('--ways', nargs='*', choices=WAYS)
    p.add_argument('--device', default='cpu')
    p.add_argument('--bf16', action='store_true')
    p.add_argument('--out', default=str(HERE/'results/plan.jsonl'))
    a = p.parse_args()
    if a.large: return write_large(HERE/'results/plans.jsonl')
    if a.one: return print(json.dumps(run(*a.one, a.device, a.bf16)))
    name = torch.cuda.get_device_name() if a.device == 'cuda' else platform.processor() or platform.machine()
    made = dict(date=str(date.today()), device=name, kind=a.device, torch=torch.__version__,
                transformers=transformers.__version__)
    for shape in a.shapes or SHAPES:
        for way in a.ways or WAYS:
            bf16 = a.device == 'cuda' or '16-bit' in way or a.bf16
            found = made | row(shape, way, a.device, bf16)
            error = found['predicted']/found['measured']-1
            print(f"{shape:8} {way:24} {found['measured']/2**20:8.0f} MB, {error:+.1%}", flush=True)
            with open(a.out, 'a', encoding='utf-8') as f: f.write(json.dumps(found)+'\n')


if __name__ == '__main__': main()
