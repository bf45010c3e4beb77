"""Optimizers of other people: odd states, chains, learning rates of their own, rates that differ inside a unit."""
import json
import math
import warnings

import pytest
import torch
from small_run import losses, same, small_trainer, weights
from torch.utils._python_dispatch import return_and_correct_aliasing
from transformers import TrainerCallback
from transformers.optimization import Adafactor, AdafactorSchedule

from alf_nb.demo import demo_dataset, demo_model
from alf_nb.layers import partition_layers
from alf_nb.loop import ALFLoop
from alf_nb.optim import ParkedStates, apply_selection, check_optimizer, check_state, optimizer_bytes
from alf_nb.runlog import RunLog
from alf_nb.tracker import prior_scores
from alf_nb.trainer import ALFCallback


class Projector:
    "As GaLore's: no tensor, but it holds one"
    def __init__(self, rank): self.rank, self.matrix = rank, None

    def down(self, g, step):
        if self.matrix is None or step % 3 == 0: self.matrix = torch.linalg.qr(g.T @ g + torch.eye(g.shape[1]))[0][:, :self.rank].contiguous()
        return g @ self.matrix


class LowRank(torch.optim.Optimizer):
    "Adam in a low rank: moments of another shape than the weight, a projector, and a seed that is there from the start"
    def __init__(self, params, lr=1e-2, rank=4):
        super().__init__(params, dict(lr=lr, rank=rank))
        for i, p in enumerate(p for g in self.param_groups for p in g["params"]): self.state[p]["seed"] = i

    @torch.no_grad()
    def step(self, closure=None):
        for g in self.param_groups:
            for p in g["params"]:
                if p.grad is None: continue
                s, grad = self.state[p], p.grad
                s["seed"] += 1
                s["step"] = s.get("step", 0) + 1
                if p.dim() == 2:
                    if "projector" not in s: s["projector"] = Projector(g["rank"])
                    grad = s["projector"].down(grad, s["step"])
                if "exp_avg" not in s: s["exp_avg"], s["exp_avg_sq"] = torch.zeros_like(grad), torch.zeros_like(grad)
                s["exp_avg"].lerp_(grad, .1)
                s["exp_avg_sq"].lerp_(grad.square(), .01)
                u = s["exp_avg"] / (s["exp_avg_sq"].sqrt() + 1e-6)
                p.add_(u @ s["projector"].matrix.T if p.dim() == 2 else u, alpha=-g["lr"])


class Rounded(torch.Tensor):
    "A moment in 8 bits: codes and a scale"
    @staticmethod
    def __new__(cls, codes, scale): return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32, device=codes.device)

    def __init__(self, codes, scale): self.codes, self.scale = codes, scale
    def __tensor_flatten__(self): return ["codes", "scale"], None
    @classmethod
    def __tensor_unflatten__(cls, parts, context, size, stride): return cls(parts["codes"], parts["scale"])
    @classmethod
    def of(cls, x): scale = x.abs().max().clamp(min=1e-12)/127; return cls((x/scale).round().to(torch.int8), scale)
    def value(self): return self.codes.float()*self.scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten.copy_.default:
            new = args[1] if isinstance(args[1], Rounded) else Rounded.of(args[1])
            args[0].codes.copy_(new.codes); args[0].scale.copy_(new.scale)
            return args[0]
        if func in (torch.ops.aten.detach.default, torch.ops.aten._to_copy.default):
            out = Rounded(args[0].codes.to(kwargs.get("device")), args[0].scale.to(kwargs.get("device")))
            return return_and_correct_aliasing(func, args, kwargs, out)
        raise NotImplementedError(f"Rounded has no {func}")


class EightBit(torch.optim.Optimizer):
    "Adam with moments of a class of their own, as torchao's"
    def __init__(self, params, lr=1e-2): super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self, closure=None):
        for g in self.param_groups:
            for p in g["params"]:
                if p.grad is None: continue
                s = self.state[p]
                if not s: s["step"], s["exp_avg"], s["exp_avg_sq"] = torch.tensor(0.), Rounded.of(torch.zeros_like(p)), torch.zeros_like(p)
                s["step"] += 1
                m = s["exp_avg"].value().lerp(p.grad, .1)
                s["exp_avg"].copy_(m)
                s["exp_avg_sq"].lerp_(p.grad.square(), .01)
                p.add_(m / (s["exp_avg_sq"].sqrt() + 1e-6), alpha=-g["lr"])


class Chain(torch.optim.Optimizer):
    "Muon for matrices inside the blocks, AdamW for the rest"
    def __init__(self, model, lr=1e-2):
        mats = [p for n, p in model.named_parameters() if p.dim() == 2 and "layers" in n]
        rest = [p for p in model.parameters() if all(p is not q for q in mats)]
        self.parts = [torch.optim.Muon(mats, lr=lr) if hasattr(torch.optim, "Muon") else torch.optim.SGD(mats, lr=lr, momentum=.9), torch.optim.AdamW(rest, lr=lr)]
        super().__init__([dict(params=mats, lr=lr), dict(params=rest, lr=lr)], {})
        self.param_groups = [g for o in self.parts for g in o.param_groups]

    def step(self, closure=None):
        for o in self.parts: o.step()

    def state_dict(self): return dict(parts=[o.state_dict() for o in self.parts])
    def load_state_dict(self, d):
        for o, s in zip(self.parts, d["parts"]): o.load_state_dict(s)
        self.param_groups = [g for o in self.parts for g in o.param_groups]


class Merged(Chain):
    "A chain whose `state` is made anew each time it is asked for"
    @property
    def state(self): return {p: s for o in getattr(self, "parts", ()) for p, s in o.state.items()}
    @state.setter
    def state(self, x): pass


OPTIMIZERS = dict(
    low_rank=lambda m: LowRank(m.parameters()), eight_bit=lambda m: EightBit(m.parameters()), adagrad=lambda m: torch.optim.Adagrad(m.parameters(), lr=1e-2, initial_accumulator_value=.1),
    chain=Chain, merged=Merged, adafactor=lambda m: Adafactor(m.parameters(), scale_parameter=True, relative_step=True, warmup_init=False, lr=None),
    nadam=lambda m: torch.optim.NAdam(m.parameters(), lr=1e-2))


def real(name):
    "An optimizer of `transformers` that needs a package of its own, as arguments of the Trainer"
    if name == "torchao": pytest.importorskip("torchao.optim"); return dict(optim="adamw_torch_8bit")
    pytest.importorskip(f"{name}_torch")
    return dict(optim=f"{name}_adamw", optim_args="rank=4, update_proj_gap=5", optim_target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])


@pytest.fixture(autouse=True)
def known_classes():
    "What Trainer may load from optimizer.pt: without this it refuses objects, ALF or not"
    classes = [Projector, Rounded]
    try: from galore_torch.galore_projector import GaLoreProjector; classes.append(GaLoreProjector)
    except ImportError: pass
    try: from apollo_torch.random_projector import GradientProjector; classes.append(GradientProjector)
    except ImportError: pass
    with torch.serialization.safe_globals(classes), torch.compiler.set_stance("force_eager"): yield


class Kinds(TrainerCallback):
    "Remembers of which class every entry of the state was, and of which shape"
    def __init__(self, alf): self.alf, self.seen = alf, {}
    def on_optimizer_step(self, args, state, control, optimizer=None, **kw):
        names = {id(p): n for n, p in self.alf.layers.model.named_parameters()}
        for p, s in optimizer.state.items():
            for k, v in s.items(): self.seen.setdefault((names[id(p)], k), set()).add((type(v), tuple(v.shape) if isinstance(v, torch.Tensor) else None))


def trained(folder, name, alf, *callbacks, resume=None, steps=12, **kw):
    "A run with an optimizer of `OPTIMIZERS`, or of a package"
    torch.manual_seed(0)
    model = demo_model(blocks=2, hidden_size=64, intermediate_size=128)
    if name in OPTIMIZERS:
        opt = OPTIMIZERS[name](model)
        kw["more"] = dict(optimizers=(opt, AdafactorSchedule(opt) if name == "adafactor" else torch.optim.lr_scheduler.ConstantLR(opt, factor=1.)))
    else: kw |= real(name)
    trainer = small_trainer(folder, alf, *callbacks, model=model, max_steps=steps, **kw)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def rotating(state, **kw): return ALFCallback(policy="rotate", budget=.3, interval=2, lock=1., measure_every=2, state=state, **kw)


@pytest.mark.parametrize("state", ["v", "full", "drop"])
@pytest.mark.parametrize("name", [*OPTIMIZERS, "galore", "apollo", "torchao"])
def test_state_keeps_the_shape_and_class_it_had(tmp_path, name, state):
    "Units leave and return, and no entry of their state is ever of another class or shape; nothing is held for what rests"
    kinds = Kinds(alf := rotating(state))
    trainer = trained(tmp_path, name, alf, kinds)
    assert kinds.seen or name in ("chain",)
    # a first moment or a count that begins anew may be a number where it was one
    assert not {k: v for k, v in kinds.seen.items() if len(v) > 1 and k[1] not in ("RMS",)}
    check_state(alf.layers, trainer.optimizer)
    with torch.no_grad(): assert all(p.isfinite().all() for p in trainer.model.parameters())


@pytest.mark.parametrize("name", [*OPTIMIZERS, "galore", "apollo", "torchao"])
@pytest.mark.parametrize("state", ["v", "full", "drop"])
def test_a_resume_with_this_optimizer_is_exact(tmp_path, name, state):
    "Stopped in the middle of a window and taken up from its checkpoint: the same losses and weights as without the stop"
    whole = trained(tmp_path / "whole", name, rotating(state), save_strategy="steps", save_steps=7)
    again = trained(tmp_path / "again", name, rotating(state), resume=str(tmp_path / "whole" / "checkpoint-7"), save_strategy="no")
    assert losses(whole)[7:] == losses(again)[7:] and len(losses(whole)) == 12
    assert same(weights(whole), weights(again))
    a, b = (RunLog(tmp_path / x).events("measure")[-1]["signals"] for x in ("whole", "again"))
    assert a == b
