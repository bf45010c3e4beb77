"""What a first user tried and found broken: other optimizers, the Trainer's own loss, a start that keeps to pins,
bans and budget, a batch size that Trainer finds."""
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments
from transformers.optimization import Adafactor
from transformers.trainer_callback import PrinterCallback

from alf_nb.demo import demo_dataset, demo_model, demo_tokenizer
from alf_nb.model.delta import apply_delta
from alf_nb.sources.models import load_model
from alf_nb.train.loop import ALFLoop
from alf_nb.core.policy import Policy
from alf_nb.report.summary import summarize
from alf_nb.core.runlog import RunLog
from alf_nb.train.trainer import ALFCallback


def train(folder, alf, model=None, kind=Trainer, data=None, settings=TrainingArguments, **kw):
    own = {k: kw.pop(k) for k in ("compute_loss_func", "processing_class", "train_dataset") if k in kw}
    args = settings(
        **{
            **dict(
                output_dir=str(folder),
                max_steps=6,
                per_device_train_batch_size=4,
                learning_rate=1e-2,
                logging_steps=1,
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
                save_strategy="no",
            ),
            **kw,
        }
    )
    t = kind(
        model or demo_model(blocks=3), args=args, **{"train_dataset": data or demo_dataset(16), **own}, callbacks=[alf]
    )
    t.remove_callback(PrinterCallback)
    t.train()
    return t


@pytest.mark.parametrize(
    "make",
    [
        lambda ps: torch.optim.Adamax(ps),
        lambda ps: torch.optim.RMSprop(ps, momentum=0.9, centered=True),
        lambda ps: torch.optim.NAdam(ps),
        lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
        lambda ps: Adafactor(ps, lr=1e-3, beta1=0.9, relative_step=False, scale_parameter=False),
    ],
    ids=["adamax", "rmsprop", "nadam", "sgd", "adafactor"],
)
def test_state_of_other_optimizers_returns(make):
    "A unit that left and comes back has every entry its optimizer asks for, with the first moment at 0"
    torch.manual_seed(0)
    batch = [dict({k: torch.tensor([v]) for k, v in r.items()}) for r in demo_dataset(4)]
    model = demo_model(blocks=2)
    opt = make(model.parameters())
    with ALFLoop(model, opt, batch, 12, policy="rotate", budget=.3, interval=1) as alf:
        seen, back = set(), 0
        while not alf.done:
            names = set(alf.selection.names)
            back += any(opt.state.get(p) for n in names & seen for p in alf.run.layers.params(n))
            seen |= names
            model(**batch[alf.steps % 4]).loss.backward()
            alf.step()
    assert back > 3 or type(opt).__name__ == "SGD"


@pytest.mark.parametrize("start", ["rotate", "warm-up"])
def test_a_start_keeps_to_pins_and_bans(tmp_path, start):
    alf = ALFCallback(
        budget=0.4,
        start=start,
        warm_up=4,
        reprobe_batches=0,
        signal="rate",
        pin=("embeddings",),
        ban=("block.1",),
        freeze_bottom=0.4,
    )
    train(tmp_path, alf)
    first, *more = RunLog(tmp_path).selections()
    assert first.step == 0 and more[-1].step == 4
    for s in (first, *more):
        # banned, and in the frozen bottom
        assert not any(n.startswith(("block.0", "block.1")) for n in s.names) and "embeddings.embed_tokens" in s.names
        assert start == "warm-up" and s.step < 4 or s.share <= .4


def test_a_start_that_cannot_end_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(ValueError, match="too small for any unit"):
        train(tmp_path, ALFCallback(preset="paper", warm_up=4, budget=.1))
    assert not RunLog(tmp_path).events("select")


def test_the_probe_asks_for_the_trainers_own_loss(tmp_path):
    "Without labels in the data, scaled, or smoothed: what the probe measures is what training lowers"
    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            out = model(input_ids=inputs["input_ids"])
            loss = 7*cross_entropy(out.logits[:, :-1].flatten(0, 1), inputs["input_ids"][:, 1:].flatten())
            return (loss, out) if return_outputs else loss
    probe = lambda name, **kw: (
        train(tmp_path / name, ALFCallback(preset="probe", probe_batches=2), max_steps=1, **kw),
        RunLog(tmp_path / name).events("probe")[0],
    )[1]
    plain = probe("plain")
    own = probe("own", kind=Own, data=[{k: v for k, v in r.items() if k != "labels"} for r in demo_dataset(16)])
    assert own["loss"] == pytest.approx(7*plain["loss"], rel=1e-4)
    n = max(plain["signals"]["gain"], key=lambda n: plain["signals"]["gain"][n] or 0)
    assert own["signals"]["gain"][n] == pytest.approx(7*plain["signals"]["gain"][n], rel=1e-3)
    func = probe(
        "func",
        compute_loss_func=lambda out, labels, num_items_in_batch=None: 3
        * cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()),
    )
    assert func["loss"] == pytest.approx(3*plain["loss"], rel=1e-4)
    assert probe("smooth", label_smoothing_factor=.5)["loss"] != plain["loss"]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="TRL needs Python 3.11")
def test_dpo_trainer(tmp_path):
    from trl import DPOConfig, DPOTrainer
    demo_model(blocks=2).save_pretrained(tmp_path/"base")
    demo_tokenizer().save_pretrained(tmp_path/"base")
    from transformers import AutoModelForCausalLM
    pairs = Dataset.from_list([dict(prompt=f"say {i}: ", chosen=f"yes {i}", rejected=f"no {i}") for i in range(12)])
    alf = ALFCallback(preset="probe", budget=.4, interval=3, probe_batches=2)
    t = train(
        tmp_path / "run",
        alf,
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        DPOTrainer,
        settings=DPOConfig,
        train_dataset=pairs,
        processing_class=demo_tokenizer(),
        bf16=False,
        max_length=64,
    )
    probes, logs = RunLog(tmp_path/"run").events("probe"), [h for h in t.state.log_history if "num_tokens" in h]
    # -log σ(0): nobody has moved yet
    assert [p["step"] for p in probes] == [0, 3] and probes[0]["loss"] == pytest.approx(.6931, abs=1e-3)
    each = logs[0]["num_tokens"]
    assert logs[-1]["num_tokens"] < 8*each, "batches of the probe are not training"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="TRL needs Python 3.11")
def test_the_recipe_for_preference_pairs_runs_as_it_is_written(tmp_path, monkeypatch):
    tutorial = json.loads((Path(__file__).parents[1]/"nbs"/"tutorials"/"5_your_own.ipynb").read_text(encoding="utf-8"))
    text = "\n".join("".join(c["source"]) for c in tutorial["cells"] if c["cell_type"] == "markdown")
    recipe, = re.findall(r"```python\n(.*?DPOTrainer.*?)```", text, re.S)
    monkeypatch.chdir(tmp_path)
    demo_model(blocks=2).save_pretrained("runs/your_own/model")
    demo_tokenizer().save_pretrained("runs/your_own/model")
    known = {}
    exec("from alf_nb.all import *\n" + recipe, known)
    log = RunLog("runs/your_own/dpo")
    assert log.status == "complete" and [s.step for s in log.selections()][0] == 0 and len(log.selections()) > 1
    losses = [v for v in log.series("log", "loss")[1] if v is not None]
    fresh = load_model("runs/your_own/model", progress=False)[0]
    apply_delta(fresh, "runs/your_own/dpo/delta")
    assert losses and all(map(torch.equal, fresh.state_dict().values(), known["model"].state_dict().values()))


def test_a_batch_size_that_trainer_finds_is_the_probes_too(tmp_path):
    class Small(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = demo_model(blocks=2)
            self.seen = []
        def forward(self, input_ids, labels=None, attention_mask=None):
            self.seen.append(len(input_ids))
            if len(input_ids) > 14: raise RuntimeError("CUDA out of memory.")
            return self.net(input_ids=input_ids, labels=labels)
    model = Small()
    train(
        tmp_path,
        ALFCallback(budget=0.4, probe_batches=2),
        model,
        data=demo_dataset(28),
        per_device_train_batch_size=16,
        auto_find_batch_size=True,
        max_steps=2,
    )
    assert model.seen[0] == 16 and set(model.seen[1:]) == {14} and RunLog(tmp_path).events("memory")


SETTINGS = dict(preset="probe", budget=.3, interval=0, probe_batches=2, measure_every=2)


def half(folder, resume=False, **settings):
    "A run of 8 steps that saves at 4, or its second half with other settings"
    alf = ALFCallback(**{**SETTINGS, **settings})
    args = TrainingArguments(
        str(folder),
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    t = Trainer(demo_model(blocks=3), args=args, train_dataset=demo_dataset(16), callbacks=[alf])
    t.remove_callback(PrinterCallback)
    t.train(resume_from_checkpoint=str(folder/"checkpoint-4") if resume else None)
    return alf, [e for e in RunLog(folder).events() if e["step"] >= 4]


@pytest.mark.filterwarnings("ignore:resuming with other settings")
@pytest.mark.parametrize(
    "settings",
    [dict(budget=0.1), dict(ban=("block.2",)), dict(kinds=("norm",), budget=0.3)],
    ids=["budget", "ban", "kinds"],
)
def test_a_resume_with_another_wish_takes_it_at_once(tmp_path, settings):
    half(tmp_path)
    alf, events = half(tmp_path, True, **settings)
    assert [e["step"] for e in events if e["event"] == "select"] == [
        4
    ], "what was asked for at the resume is in force from there on, although no re-selection was left"
    # who replays the log knows, too
    assert "kinds" in settings or [Policy.from_dict(e["policy"]) for e in events if e["event"] == "choose"] == [
        alf.run.policy
    ]
    assert alf.selection.share <= settings.get("budget", 0.3) and not any(
        n.startswith("block.2") for n in alf.selection.names if "ban" in settings
    )
    if "kinds" in settings: assert {u.kind for u in alf.run.units if u.name in alf.selection.names} == {"norm"}


@pytest.mark.filterwarnings("ignore:resuming with other settings")
@pytest.mark.parametrize("first, then", [("device", "8bit"), ("8bit", "host"), ("none", "device"), ("device", "none")])
def test_a_resume_with_other_references(tmp_path, first, then):
    half(tmp_path, references=first)
    alf, events = half(tmp_path, True, references=then)
    snapshot, chosen = alf.run.windows.snapshot, tuple(n for n in alf.run.names if n in alf.selection.names)
    assert snapshot is None if then == "none" else snapshot.names == chosen and snapshot.nbytes > 0
    last = [e for e in events if e["event"] == "measure"][-1]
    assert last["step"] == 8 and set(last["signals"]["rate"]) == set(alf.selection.names)


def test_a_resume_with_nothing_left_to_make(tmp_path):
    """Trainer makes a step too many from a checkpoint of the last step: a run that died there is finished from its
    weights"""
    from alf_nb.app.finetune import finetune
    import shutil
    notes = tmp_path/"notes.txt"
    notes.write_text("\n\n".join(f"note {i}: the quick brown fox jumps over the lazy dog. "*6 for i in range(20)))
    job = lambda steps=4, **kw: finetune(
        (demo_model(blocks=2), demo_tokenizer()),
        str(notes),
        tmp_path / "run",
        steps=steps,
        max_length=32,
        eval_blocks=2,
        save_steps=2,
        probe_batches=2,
        budget=0.4,
        progress=False,
        **kw
    )
    first = job()
    with pytest.raises(ValueError, match="has made 4 steps, and its delta is written"): job(resume=True)
    log = tmp_path/"run"/"events.jsonl"
    lines = log.read_text().splitlines(True)
    # as if killed behind the last checkpoint
    log.write_text("".join(l for l in lines if '"run_end"' not in l and '"path":"delta"' not in l.replace(" ", "")))
    shutil.rmtree(tmp_path/"run"/"delta")
    again = job(resume=True)
    assert again["steps"] == first["steps"] == 4 and not RunLog(tmp_path / "run").events(
        "resume"
    ), "all steps were made: nothing is trained again"
    assert {k: again[k] for k in first if "loss" in k} == {k: first[k] for k in first if "loss" in k}
    with pytest.warns(UserWarning, match="all 8 steps are made"):
        half(tmp_path/"b")
        shutil.rmtree(tmp_path/"b"/"checkpoint-4")
        (tmp_path/"b"/"checkpoint-8").rename(tmp_path/"b"/"checkpoint-4")
        half(tmp_path/"b", True, resume_from=str(tmp_path/"b"/"checkpoint-4"))


def test_settings_that_would_do_nothing_are_told():
    with pytest.raises(ValueError, match="signal='rate' given, but policy 'grass' chooses by 'grad_norm'"):
        ALFCallback(preset="grass", signal="rate")
    with pytest.warns(UserWarning, match="warm_up=9 changes nothing"): ALFCallback(preset="probe", warm_up=9)


def test_a_loop_and_its_report(tmp_path, recwarn):
    rows = [{k: torch.tensor([v]) for k, v in r.items()} for r in demo_dataset(4)]
    model = demo_model(blocks=2)
    opt = torch.optim.AdamW(model.parameters())
    with ALFLoop(model, opt, rows, 2, out=tmp_path, preset="lisa", policy=dict(policy="lisa", k=1)) as alf:
        loss = model(**rows[0]).loss
        loss.backward()
        alf.step()
        alf.log_loss(loss, entropy=loss/2)
    assert not [w for w in recwarn if "requires_grad" in str(w.message)]
    assert summarize(tmp_path)["signal"] is None, "LISA draws by chance, and does not choose by gain"
    with pytest.raises(ValueError, match="a batch is a tuple, not keyword arguments"):
        ALFLoop(model, opt, [(rows[0]["input_ids"],)]*2, 2, preset="probe", probe_batches=2)


def test_comparisons_that_cannot_be_made(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification
    from alf_nb.study.compare import compare_policies
    from alf_nb.study.task import Task
    rows = [dict(input_ids=[2+i, 5, 7], attention_mask=[1]*3, labels=float(i)) for i in range(6)]
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=16,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            num_labels=1,
        )
    )
    task = Task(model, rows, rows, bf16=False)
    assert set(task.evaluate(model, rows)) == {"loss"}, "a regression has no accuracy"
    with pytest.raises(ValueError, match="rows hold pixel_values, but no input_ids"):
        Task(model, [dict(pixel_values=1)], rows)
    run = lambda task: compare_policies(
        task, methods="full", amount=1, seeds=0, lrs=(1e-3,), out=tmp_path / "p.jsonl", progress=False
    )
    run(task)
    with pytest.raises(ValueError, match="bf16=False, and this would be bf16=True"):
        run(Task(model, rows, rows, bf16=True))


def test_the_command_names_a_missing_run_in_words(tmp_path, capsys):
    from alf_nb.app.cli import main
    assert main(["report", str(tmp_path/"nope")]) == 2
    assert capsys.readouterr().err.startswith("alf: error: no run here: ")
