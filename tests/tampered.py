"""Checkpoints that somebody has edited and sealed again: each is refused in words before training, or it is counted.

`python tests/tampered.py` tries them all and prints how many were tried and how many were refused. No step is ever
made: a gate behind ALF ends what gets through, so that nothing can crash here."""

import copy
import json
import os
import pickle
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from small_run import same, small_trainer
from transformers import TrainerCallback

from alf_nb.core.checkpoints import write_manifest
from alf_nb.demo import demo_model
from alf_nb.train.loop import ALFLoop
from alf_nb.model.states import unwrap_optimizer
from alf_nb.train.saving import load, read_state, read_tensors
from alf_nb.train.trainer import ALFCallback

NAN, HUGE = float("nan"), 10**400
DEEP = json.loads("[" * 500 + "]" * 500)
FREE = {"selection.reason"}  # any text will do
SIGNED = {"config.seed", "config.policy.seed", "policy.seed"}  # whole numbers of any size and sign
MAYBE = {"config.interval"}  # None is a value of it
RUN = dict(budget=0.2, interval=2, measure_every=1, select_until=1.0, hysteresis=0.0, freeze_bottom=0.0)
SETTINGS = {
    "default": {},
    "device": dict(references="device"),
    "full": dict(offload="full", references="device"),
    "8bit": dict(references="8bit"),
}


class Reached(Exception):
    "Training would have begun"


class Gate(TrainerCallback):
    def on_train_begin(self, *args, **kw):
        raise Reached


def made(folder, training={}, **settings):
    "A whole checkpoint of a real run at step 3, with units that have left; `training` are arguments of the Trainer"
    alf, saves = ALFCallback(**RUN, **settings), dict(save_strategy="steps", save_steps=3)
    small_trainer(folder, alf, model=demo_model(blocks=2), max_steps=3, **saves, **training).train()
    return folder / "checkpoint-3"


# ---------------------------------------------------------------- what may be done to a file

BELOW_0 = tuple(f"tracker.values.{k}." for k in ("agreement", "gain", "descent"))      # may be negative

def others(at, v):
    "Values that cannot stand where `v` stands: (in words, value)"
    if at not in MAYBE and v is not None:
        yield "null", None
    yield "deep", DEEP
    if isinstance(v, bool):
        yield from (("a number", 1), ("text", "true"))
        return
    if isinstance(v, str):
        yield from (("a number", 7), ("a list", ["x"]), ("a dict", {}))
        if at not in (*FREE, "run_id"):
            yield "another name", "nobody"
        if at not in FREE:
            yield from (("nothing", ""), ("a path", "../../etc/passwd"), ("many letters", "a" * 3000))
    elif isinstance(v, (int, float)):
        yield from (("text", "1"), ("true", True), ("NaN", NAN), ("infinity", float("inf")), ("a list", [1]))
        if at not in SIGNED:
            yield from (("10**400", HUGE), ("-10**400", -HUGE))
        if isinstance(v, int):
            yield "a half", 1.5
        if at not in SIGNED and not at.startswith(BELOW_0):
            yield "-1", -1
        if at.endswith("step") or at.startswith(("tracker.steps.", "totals.steps")):
            yield "beyond the run", 4
        if at.endswith(("share", "share_peak", "freeze_bottom", "select_until", "budget")):
            yield "above 1", 1.5
    elif isinstance(v, list):
        yield from (
            ("text", "x"),
            ("a dict", {"x": 1}),
            ("numbers", [7, 7, 7]),
            ("lists", [[1], [2]]),
            ("10**400", [HUGE]),
        )
    elif isinstance(v, dict):
        yield from (("text", "x"), ("a list", [1]), ("a number", 7), ("an unknown name", {**v, "nobody": 1}))


def places(v, at=()):
    "Paths to every field; of names that are the model's, the first one stands for all"
    if at:
        yield at
    if isinstance(v, dict):
        inner = [(k, x) for k, x in v.items() if "." not in k and k not in ("embeddings", "norm", "head")] or list(
            v.items()
        )[:1]
    elif isinstance(v, list):
        inner = list(enumerate(v))[:1]
    else:
        inner = []
    for k, x in inner:
        yield from places(x, (*at, k))


def held_in(state, at):
    for k in at:
        state = state[k]
    return state


def bad_states(state):
    "(in words, JSON text) of every field of state.json × every way to be wrong"
    for at in places(state):
        name = ".".join(map(str, at))
        for words, v in others(name, held_in(state, at)):
            new = copy.deepcopy(state)
            held_in(new, at[:-1])[at[-1]] = v
            yield f"{name}: {words}", json.dumps(new)
        if isinstance(at[-1], int):
            continue
        new = copy.deepcopy(state)
        del held_in(new, at[:-1])[at[-1]]
        yield f"{name}: missing", json.dumps(new)
    more = dict(
        cum_lr=state["cum_lr"] * 2 + [0.0],
        units=state["units"][::-1],
        weights="0" * 64,
        step=2,
        version=2,
        banned=state["selection"]["names"][:1],
        reach={**state["reach"], "dry": state["reach"]["dry"][1:]},
    )
    for k, v in more.items():
        yield f"{k}: of another run", json.dumps({**state, k: v})
    for k, v in dict(names=state["selection"]["names"][::-1] * 2, share=0.9, policy="nobody").items():
        yield f"selection.{k}: does not fit", json.dumps({**state, "selection": {**state["selection"], k: v}})
    for policy in (
        dict(policy="budget", pin=["nobody"]),
        dict(policy="budget", ban=["*"]),
        dict(policy="topk", k=10**6),
        dict(policy="grass"),
        dict(policy="budget", budget=1e-9),
        dict(policy="nobody"),
        {},
        dict(policy="budget", ban="block.0", pin="block.0"),
    ):
        yield f"policy: {policy}", json.dumps({**state, "policy": policy})
    yield from (
        ("empty", ""),
        ("no JSON", "{"),
        ("null", "null"),
        ("a list", "[]"),
        ("deep", "[" * 100_000),
        ("9 × 5000", '{"version": ' + "9" * 5000 + "}"),
        ("no text", "\udcff\udcfe"),
    )


def bad_tensors(tensors):
    "(in words, tensors) of every tensor × every way to be wrong"
    for k, t in tensors.items():
        new = {"missing": None, "another shape": torch.zeros(3, dtype=t.dtype), "one more dimension": t[None].clone()}
        if t.is_floating_point():
            new |= {
                "NaN": torch.full_like(t, NAN),
                "infinity": torch.full_like(t, float("inf")),
                "half": t.half(),
                "whole numbers": t.to(torch.int64),
            }
        else:
            new |= {"float": t.float()}
        if t.dim():
            new |= {"one number": torch.ones((), dtype=t.dtype), "empty": torch.zeros(0, dtype=t.dtype)}
        if k.endswith(("exp_avg_sq", "/step", "/scale", "/error")):
            new |= {"negative": -torch.ones_like(t)}
        if k.endswith("/step"):
            new |= {"beyond the run": torch.full_like(t, 1e9)}
        for words, v in new.items():
            yield f"{k}: {words}", {**{n: x for n, x in tensors.items() if n != k}, **({} if v is None else {k: v})}
    one = next(iter(tensors.values()))
    for k in (
        "nobody",
        "ref/nobody",
        "parked/nobody/exp_avg",
        "parked/exp_avg",
        "parked//step",
        "",
        "../../x",
        next(k for k in tensors if k.startswith("parked/")) + "_2",
    ):
        yield f"{k!r}: unknown", {**tensors, k: one.clone()}
    parked = next(k for k in tensors if k.endswith("/exp_avg_sq"))
    trains = [k[4:].removesuffix("/q") for k in tensors if k.startswith("ref/")]
    for k in trains[:1]:
        yield "parked beside what trains", {**tensors, f"parked/{k}/exp_avg_sq": tensors[parked].clone()}


def bad_optimizers(saved):
    "(in words, state dict) of what Trainer loads into the optimizer, as far as torch itself lets it in"
    for i in list(saved["state"])[:2]:
        p = saved["state"][i]
        new = {
            f"{e}: {w}": {**p, e: f(p[e])}
            for e in ("exp_avg", "exp_avg_sq")
            for w, f in dict(
                shape=lambda t: t.reshape(-1)[:3].clone(),
                scalar=lambda t: t.sum(),
                NaN=lambda t: t * NAN,
                more=lambda t: t[None].clone(),
            ).items()
        }
        new |= {f"step: {v}": {**p, "step": torch.tensor(v)} for v in (NAN, float("inf"), -1.0)} | {
            "step: shape": {**p, "step": torch.ones(5)},
            "exp_avg_sq: negative": {**p, "exp_avg_sq": -p["exp_avg_sq"] - 1},
        }
        new |= {f"{e}: missing": {k: v for k, v in p.items() if k != e} for e in p if e != "step"} | {
            "more": {**p, "more": p["exp_avg"]},
            "text": {**p, "exp_avg": "x"},
            "none": {**p, "exp_avg": None},
        }
        for words, s in new.items():
            yield f"state {i}, {words}", {**saved, "state": {**saved["state"], i: s}}
    for words, change in {
        "lr NaN": dict(lr=NAN),
        "lr text": dict(lr="x"),
        "betas 5": dict(betas=(5.0, 5.0)),
        "betas text": dict(betas="x"),
        "eps NaN": dict(eps=NAN),
        "eps below 0": dict(eps=-1.0),
    }.items():
        yield words, {**saved, "param_groups": [{**g, **change} for g in saved["param_groups"]]}
    yield (
        "a setting less",
        {**saved, "param_groups": [{k: v for k, v in g.items() if k != "eps"} for g in saved["param_groups"]]},
    )


def bad_files(folder):
    "(in words, what to do) with files that are none"
    for name in ("state.json", "tensors.safetensors"):
        f = folder / "alf" / name
        yield f"{name}: missing", f.unlink
        yield f"{name}: a pipe", lambda f=f: (f.unlink(), os.mkfifo(f))
        yield f"{name}: a folder", lambda f=f: (f.unlink(), f.mkdir())
        yield f"{name}: a link", lambda f=f: (f.unlink(), f.symlink_to("/dev/zero"))
        for words, raw in dict(
            empty=b"", cut=f.read_bytes()[:100], pickle=pickle.dumps({}), long=(1 << 62).to_bytes(8, "little") + b"{}"
        ).items():
            yield f"{name}: {words}", lambda f=f, raw=raw: f.write_bytes(raw)


def cases(folder, about):
    "(in words, function that tampers) for a checkpoint; `about`: which of its parts"
    state, tensors = (
        json.loads((folder / "alf" / "state.json").read_text(encoding="utf-8")),
        load_file(folder / "alf" / "tensors.safetensors"),
    )
    if "state" in about:
        for words, text in bad_states(state):
            yield (
                words,
                lambda text=text: (folder / "alf" / "state.json").write_text(
                    text, encoding="utf-8", errors="surrogateescape"
                ),
            )
    if "tensors" in about:
        for words, new in bad_tensors(tensors):
            yield words, lambda new=new: save_file(new, folder / "alf" / "tensors.safetensors")
    if "optimizer" in about:
        for words, new in bad_optimizers(torch.load(folder / "optimizer.pt", weights_only=True)):
            yield words, lambda new=new: torch.save(new, folder / "optimizer.pt")
    if "files" in about:
        yield from bad_files(folder)


# ---------------------------------------------------------------- trying


def attempt(f, named):
    "Empty where it was refused in words that name the checkpoint; else what happened instead"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            f()
    except Reached:
        return "training began"
    except (RuntimeError, ValueError) as e:
        return (
            ""
            if named in str(e) and not isinstance(e, (RecursionError, UnicodeError))
            else f"{type(e).__name__}, without the checkpoint's name: {str(e)[:200]}"
        )
    except Exception as e:
        return f"{type(e).__name__}: {str(e)[:200]}"
    return "it ran"


class Resume:
    "A Trainer and the checkpoint in `folder`, to be resumed again and again up to the first step"

    def __init__(self, folder, settings, **training):
        self.folder, self.model = folder, demo_model(blocks=2)
        self.alf = ALFCallback(**RUN, **settings)
        self.trainer = small_trainer(folder.parent, self.alf, Gate(), model=self.model, max_steps=6, **training)
        self.weights = load_file(folder / "model.safetensors")

    def whole(self):
        "As a user does it, from the seal on; the model has to be as Trainer loaded it"
        write_manifest(self.folder)
        why = attempt(lambda: self.trainer.train(resume_from_checkpoint=str(self.folder)), self.folder.name)
        now = {k: v for k, v in self.model.state_dict().items() if k in self.weights}
        if not why and not (same(now, self.weights) and all(p.requires_grad for p in self.model.parameters())):
            return "refused, but the model was changed"
        return why

    def look(self):
        "What ALF does before it changes anything, with the optimizer loaded as Trainer does it"
        run, step = self.alf.run, self.trainer.state.global_step
        unwrap_optimizer(run.optimizer).load_state_dict(torch.load(self.folder / "optimizer.pt", weights_only=True))
        read = lambda: load(run, step, self.folder.name, read_state(self.folder), lambda: read_tensors(self.folder))
        return attempt(read, self.folder.name) or ""


def try_checkpoint(folder, settings, about, whole=100):
    """(tried, refused, what was not) over all ways to tamper with the checkpoint in `folder`; every `whole`-th
    through a Trainer"""
    good, resume = folder.parent / "good", Resume(folder, settings)
    shutil.copytree(folder, good)
    if (why := resume.whole()) != "training began":
        raise AssertionError(f"the checkpoint itself is refused: {why}")
    tried, odd = 0, []
    for words, tamper in cases(folder, about):
        tamper()
        why = resume.whole() if tried % whole == 0 else resume.look()
        tried += 1
        if why:
            odd.append(f"{words}: {why}")
        put_back(good, folder)
    if (why := resume.whole()) != "training began":
        raise AssertionError(f"the checkpoint was not put back: {why}")
    return tried, tried - len(odd), odd


def put_back(good, folder):
    for name in ("alf/state.json", "alf/tensors.safetensors", "optimizer.pt"):
        f = folder / name
        if f.is_dir():
            f.rmdir()
        elif f.is_symlink() or f.exists():
            f.unlink()
        shutil.copyfile(good / name, f)


def try_loop():
    "The same for what `ALFLoop.state_dict()` gives"
    model = demo_model(blocks=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    new = lambda **kw: ALFLoop(
        model, optimizer, [], 6, **{**dict(start="prior", reprobe_batches=0, signal="rate", budget=0.3), **kw}
    )
    loop = new()
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        loop.step()
    saved = loop.state_dict()
    loop.close()
    new(resume=saved).close()
    state, tensors, row = json.loads(saved["state"]), saved["tensors"], torch.zeros(3, dtype=torch.uint8)
    values = dict(
        step=(-1, HUGE, NAN, "2", None, True, 3, [2]),
        max_steps=(-1, HUGE, "x", None),
        state=(None, {}, b"x", "", "[", "[]", "{}", saved["state"][:-9]),
        tensors=(None, [], {}, {"../x": row}, {**tensors, "more": row}, {1: row}),
    )
    changes = [{k: v} for k, vs in values.items() for v in vs]
    wrong = None, "../x", -1, {"x": 1}
    changes += [dict(state=json.dumps(state | {k: v})) for k in state for v in wrong if v != state[k]]
    changes += [dict(tensors={k: v for k, v in tensors.items() if k != gone}) for gone in tensors]
    changes += [dict(tensors={**tensors, k: v}) for k in tensors for v in (None, b"x", row, tensors[k][:1] * NAN)]
    odd, bad = (
        [],
        [{**saved, **c} for c in changes] + [7, [], {}, dict(saved, more=1), {k: saved[k] for k in ("step", "state")}],
    )
    for i, s in enumerate(bad):
        if why := attempt(lambda: new(resume=s), ""):
            odd.append(f"loop {i}: {why}")
    return len(bad), len(bad) - len(odd), odd


def try_all(folder):
    "Name of a run → (tried, refused, what was not)"
    found = {}
    for name, settings in SETTINGS.items():
        (folder / name).mkdir()
        found[name] = try_checkpoint(
            made(folder / name, **settings),
            settings,
            ("state", "tensors", "optimizer", "files") if name == "default" else ("tensors",),
        )
    return found | {"loop": try_loop()}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as tmp:
        found = try_all(Path(tmp))
    for name, (_, _, odd) in found.items():
        for line in odd:
            print(f"{name}: {line}")
    tried, refused = (sum(f[i] for f in found.values()) for i in (0, 1))
    print(f"tampered states: {tried} tried, {refused} refused")
    sys.exit(tried != refused)
