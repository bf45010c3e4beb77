"With the tools people use, the real packages: TRL's SFTTrainer, early stopping with the best model at the end, a compiled model."
import sys

import pytest
import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from alf_nb.checkpoints import find_checkpoint
from alf_nb.demo import demo_dataset, demo_model, demo_tokenizer
from alf_nb.runlog import RunLog
from alf_nb.trainer import ALFCallback


def bits(model): return {k: v.detach().clone() for k, v in model.state_dict().items()}


def arguments(folder, kind=TrainingArguments, **kw):
    return kind(**{**dict(output_dir=str(folder), max_steps=10, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", seed=3), **kw})


@pytest.mark.skipif(sys.version_info < (3, 11), reason="TRL needs Python 3.11")
@pytest.mark.parametrize("packing", [False, True])
def test_sft_trainer(tmp_path, packing):
    from trl import SFTConfig, SFTTrainer
    texts = Dataset.from_list([dict(text=f"number {i} is a number, and so is {i+1}.") for i in range(60)])

    def sft(folder, resume=None, **kw):
        torch.manual_seed(0)
        alf = ALFCallback(budget=.3, interval=4)
        t = SFTTrainer(demo_model(), args=arguments(folder, SFTConfig, max_length=64, packing=packing, bf16=False, **kw), train_dataset=texts, processing_class=demo_tokenizer(), callbacks=[alf])
        t.remove_callback(PrinterCallback)
        before = bits(t.model)
        t.train(resume_from_checkpoint=resume)
        return t, alf, before
    t, alf, before = sft(tmp_path/"a", save_strategy="steps", save_steps=5)
    after, chosen = bits(t.model), {n for s in RunLog(tmp_path/"a").selections() for n in s.names}
    moved = {alf.layers.unit_of(k) for k in before if not torch.equal(before[k], after[k])}
    assert moved == chosen and 0 < alf.summary()["trainable_share_peak"] <= .3
    again, _, _ = sft(tmp_path/"a", resume=str(tmp_path/"a"/"checkpoint-5"))
    assert all(torch.equal(after[k], v) for k, v in bits(again.model).items())


def test_the_best_model_at_the_end_and_early_stopping(tmp_path):
    torch.manual_seed(0)
    alf = ALFCallback(budget=.3, interval=4)
    noise = [dict(r, input_ids=ids, labels=ids) for r in demo_dataset(8) for ids in [torch.randint(64, 258, (32,)).tolist()]]      # what training makes worse
    t = Trainer(demo_model(), arguments(tmp_path, max_steps=60, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, load_best_model_at_end=True, metric_for_best_model="eval_loss", save_total_limit=2),
                train_dataset=demo_dataset(), eval_dataset=noise, callbacks=[alf, EarlyStoppingCallback(3)])
    t.remove_callback(PrinterCallback)
    t.train()
    assert t.state.global_step < 60 and RunLog(tmp_path).events("run_end")[-1]["stopped"]
    assert t.evaluate()["eval_loss"] == pytest.approx(t.state.best_metric, rel=1e-5)                 # and the best weights are in the model
    assert all(p.requires_grad for p in t.model.parameters()) and find_checkpoint(tmp_path)


def test_a_compiled_model(tmp_path):
    def train(folder, **kw):
        torch.manual_seed(0)
        alf = ALFCallback(budget=.3, interval=4)
        t = Trainer(demo_model(), arguments(folder, **kw), train_dataset=demo_dataset(), callbacks=[alf])
        t.remove_callback(PrinterCallback)
        t.train()
        return [h["loss"] for h in t.state.log_history if "loss" in h], [s.names for s in RunLog(folder).selections()], t
    (plain, names, _), (compiled, same, t) = train(tmp_path/"a"), train(tmp_path/"b", torch_compile=True, torch_compile_backend="aot_eager")
    assert same == names and compiled == pytest.approx(plain, rel=1e-4)
