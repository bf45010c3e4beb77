"""Killed at any moment, also while it saves, and taken up again: the same losses, selections and weights, bit for bit,
as a run that nobody killed.

Children are forked from a server that has imported everything, so that each death costs a moment."""
import hashlib
import json
import os
import random
import signal
import warnings
from pathlib import Path

import forks
import pytest

STEPS, EVERY = 12, 3
SETTINGS = {
    "default": dict(budget=0.3, interval=4),
    "threshold": dict(threshold=0.6, interval=4),
    "rate": dict(signal="rate", start="rotate", warm_up=4, interval=4, measure_every=2, budget=0.3),
    "coherence": dict(
        signal="coherence", start="rotate", warm_up=4, interval=4, measure_every=2, budget=0.3, explore=0.3
    ),
    "parked": dict(budget=0.2, interval=2, offload="full", signal="grad_norm"),
    "dropped": dict(budget=0.2, interval=2, offload="none", hysteresis=0.2),
    "topk": dict(policy=dict(policy="topk", k=5), interval=4),
    "rotate": dict(policy="rotate", interval=2),
    "inverted": dict(policy="inverted", interval=4),
    "lisa": dict(preset="lisa", interval=2),
    "badam": dict(preset="badam", interval=2),
    "grass": dict(preset="grass", interval=4),
    "static": dict(preset="static-top"),
    "full": dict(preset="full"),
    "8bit": dict(budget=0.3, interval=4, references="8bit", measure_every=2),
    "no references": dict(budget=0.3, interval=4, references="none", measure_every=2),
    "chosen live": dict(budget=0.3, interval=4),
}


def work(folder, name, die):
    "Train, from the newest whole checkpoint if there is one; `die`: where to be killed, None: nowhere"
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments, trainer as hf
    from transformers.trainer_callback import PrinterCallback
    from alf_nb.core import checkpoints
    from alf_nb.train import trainer as ours
    from alf_nb.demo import demo_dataset, demo_model
    torch.set_num_threads(1)
    here = lambda: os.kill(os.getpid(), signal.SIGKILL)

    class Death(TrainerCallback):
        def on_step_end(self, args, state, control, **kw):
            if die == ("step", state.global_step): here()

        def on_substep_end(self, args, state, control, **kw):
            if die == ("substep", state.global_step): here()

        def on_pre_optimizer_step(self, args, state, control, **kw):
            if die == ("update", state.global_step): here()

    class Wish(TrainerCallback):      # as a widget does it
        def on_step_begin(self, args, state, control, **kw):
            if name == "chosen live" and state.global_step == 5: alf.choose(budget=.1)

    if die and die[0] == "save":      # at the n-th file that is written while saving, half of it on disk
        left = [die[1]]

        def dying(write, at):
            def f(*args, **kw):
                out = write(*args, **kw)
                path = Path(args[at] if at >= 0 else out)
                if Path(folder) not in path.parents: return out      # a kernel's cache is none of the run's files
                left[0] -= 1
                if left[0] == 0:
                    if path.is_file(): os.truncate(path, path.stat().st_size//2)
                    here()
                return out
            return f
        hf.torch.save = dying(torch.save, 1)
        ours.save_file = dying(ours.save_file, 1)
        ours.os.replace = dying(os.replace, 1)
        checkpoints.write_manifest = ours.write_manifest = dying(checkpoints.write_manifest, -1)

    torch.manual_seed(0)
    alf = ours.ALFCallback(**SETTINGS[name], seed=5)
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="steps",
        save_steps=EVERY,
        seed=3,
    )
    trainer = Trainer(
        demo_model("gpt2", resid_pdrop=0.1), args, train_dataset=demo_dataset(), callbacks=[Wish(), alf, Death()]
    )
    trainer.remove_callback(PrinterCallback)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train(resume_from_checkpoint=checkpoints.find_checkpoint(folder))
    digest = hashlib.sha256(
        b"".join(p.detach().numpy().tobytes() for p in trainer.model.state_dict().values())
    ).hexdigest()
    (Path(folder) / "end.json").write_text(
        json.dumps(
            dict(
                weights=digest,
                draw=torch.rand(2).tolist(),
                losses=[h["loss"] for h in trainer.state.log_history if "loss" in h],
            )
        )
    )


def figures(folder):
    from alf_nb.core.runlog import RunLog
    log = RunLog(folder)
    return json.loads((folder / "end.json").read_text()) | dict(
        selections=[(s.step, s.names, s.reason) for s in log.selections()],
        chosen=[e["policy"] for e in log.events("choose")],
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "The run that nobody killed, by settings"
    kept = {}

    def get(name):
        if name not in kept:
            folder = tmp_path_factory.mktemp("whole")
            assert forks.run(work, folder, name, None) == 0
            kept[name] = figures(folder)
        return kept[name]
    return get


draw = random.Random(20)
DRAWN = [("step", 6), ("substep", 4), ("update", 3)]
PLACES = [(kind, draw.randrange(1, STEPS)) for kind, n in DRAWN for _ in range(n)]
PLACES += [("save", n) for n in (1, 2, 3, 5, 7, 8, 11, 13, 16, 18)]
CASES = [(name, die) for name, die in zip([*SETTINGS]*2, PLACES)]


@pytest.mark.parametrize("name,die", CASES, ids=lambda v: v if isinstance(v, str) else f"{v[0]}-{v[1]}")
def test_killed_and_resumed_is_never_killed(whole, tmp_path, name, die):
    assert forks.run(work, tmp_path, name, die) == -signal.SIGKILL
    assert forks.run(work, tmp_path, name, None) == 0
    assert figures(tmp_path) == whole(name)


def test_killed_again_and_again(whole, tmp_path):
    for die in (("substep", 2), ("step", 5), ("save", 2), ("update", 8), ("step", 11)):
        assert forks.run(work, tmp_path, "parked", die) == -signal.SIGKILL
    assert forks.run(work, tmp_path, "parked", None) == 0
    assert figures(tmp_path) == whole("parked")


def test_a_damaged_checkpoint_is_passed_over_by_name(whole, tmp_path):
    from alf_nb.core.checkpoints import find_checkpoint
    assert forks.run(work, tmp_path, "default", ("step", 10)) == -signal.SIGKILL
    path = tmp_path/"checkpoint-9"/"model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data)//2] ^= 1
    path.write_bytes(data)
    with pytest.warns(
        UserWarning, match=r"passed over checkpoint-9 \(model.safetensors is damaged\): going on from checkpoint-6"
    ):
        assert find_checkpoint(tmp_path).endswith("checkpoint-6")
    assert forks.run(work, tmp_path, "default", None) == 0
    assert figures(tmp_path) == whole("default")
