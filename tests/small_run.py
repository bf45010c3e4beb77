"A small Trainer for tests: a demo model on the CPU, seeded, silent, with a loss logged at every step."
import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from alf_nb.demo import demo_dataset, demo_model


def arguments(folder, kind=TrainingArguments, **kw):
    return kind(
        **{
            **dict(
                output_dir=str(folder),
                max_steps=12,
                per_device_train_batch_size=4,
                learning_rate=1e-2,
                logging_steps=1,
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
                save_strategy="no",
                seed=3,
            ),
            **kw,
        }
    )


def small_trainer(folder, *callbacks, model=None, data=None, kind=Trainer, config=TrainingArguments, more={}, **kw):
    "A Trainer, ready to train; `kw` are training arguments, `more` is for the Trainer itself"
    torch.manual_seed(0)
    if "model_init" not in more and model is None: model = demo_model()
    t = kind(
        model,
        arguments(folder, config, **kw),
        train_dataset=demo_dataset() if data is None else data,
        callbacks=list(callbacks),
        **more
    )
    t.remove_callback(PrinterCallback)
    return t


def losses(t): return [h["loss"] for h in t.state.log_history if "loss" in h]


def weights(t):
    return {
        k: v.detach().clone()
        for k, v in (t.state_dict() if isinstance(t, torch.nn.Module) else t.model.state_dict()).items()
    }


def same(a, b): return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)
