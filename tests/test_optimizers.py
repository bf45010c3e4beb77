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
from alf_nb.model.layers import partition_layers
from alf_nb.train.loop import ALFLoop
from alf_nb.model.optim import apply_selection, check_state
from alf_nb.model.offload import OffloadedStates
from alf_nb.model.states import check_optimizer, optimizer_bytes
from alf_nb.core.runlog import RunLog
from alf_nb.signals.tracker import prior_scores
from alf_nb.train.trainer import ALFCallback
from alf_nb.report.run_state import RunState


class Projector:
    "As GaLore's: no tensor, but it holds one"
    def __init__(self, rank): self.rank, self.matrix = rank, None

    def down(self, g, step):
        if self.matrix is None or step % 3 == 0:
            self.matrix = torch.linalg.qr(g.T @ g + torch.eye(g.shape[1]))[0][:, :self.rank].contiguous()
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
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32, device=codes.device)

    def __init__(self, codes, scale): self.codes, self.scale = codes, scale
    def __tensor_flatten__(self): return ["codes", "scale"], None
    @classmethod
    def __tensor_unflatten__(cls, parts, context, size, stride): return cls(parts["codes"], parts["scale"])
    @classmethod
    def of(cls, x):
        scale = x.abs().max().clamp(min=1e-12)/127
        return cls((x/scale).round().to(torch.int8), scale)
    def value(self): return self.codes.float()*self.scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten.copy_.default:
            new = args[1] if isinstance(args[1], Rounded) else Rounded.of(args[1])
            args[0].codes.copy_(new.codes)
            args[0].scale.copy_(new.scale)
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
                if not s:
                    s["step"], s["exp_avg"], s["exp_avg_sq"] = (
                        torch.tensor(0.0),
                        Rounded.of(torch.zeros_like(p)),
                        torch.zeros_like(p),
                    )
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
        self.parts = [
            (
                torch.optim.Muon(mats, lr=lr)
                if hasattr(torch.optim, "Muon")
                else torch.optim.SGD(mats, lr=lr, momentum=0.9)
            ),
            torch.optim.AdamW(rest, lr=lr),
        ]
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
    low_rank=lambda m: LowRank(m.parameters()),
    eight_bit=lambda m: EightBit(m.parameters()),
    adagrad=lambda m: torch.optim.Adagrad(m.parameters(), lr=1e-2, initial_accumulator_value=0.1),
    chain=Chain,
    merged=Merged,
    adafactor=lambda m: Adafactor(m.parameters(), scale_parameter=True, relative_step=True, warmup_init=False, lr=None),
    nadam=lambda m: torch.optim.NAdam(m.parameters(), lr=1e-2),
)


def real(name):
    "An optimizer of `transformers` that needs a package of its own, as arguments of the Trainer"
    if name == "torchao":
        pytest.importorskip("torchao.optim")
        return dict(optim="adamw_torch_8bit")
    pytest.importorskip(f"{name}_torch")
    return dict(
        optim=f"{name}_adamw",
        optim_args="rank=4, update_proj_gap=5",
        optim_target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    )


@pytest.fixture(autouse=True)
def known_classes():
    "What Trainer may load from optimizer.pt: without this it refuses objects, ALF or not"
    classes = [Projector, Rounded]
    try:
        from galore_torch.galore_projector import GaLoreProjector
        classes.append(GaLoreProjector)
    except ImportError: pass
    try:
        from apollo_torch.random_projector import GradientProjector
        classes.append(GradientProjector)
    except ImportError: pass
    with torch.serialization.safe_globals(classes), torch.compiler.set_stance("force_eager"): yield


class Kinds(TrainerCallback):
    "Remembers of which class every entry of the state was, and of which shape"
    def __init__(self, alf): self.alf, self.seen = alf, {}
    def on_optimizer_step(self, args, state, control, optimizer=None, **kw):
        names = {id(p): n for n, p in self.alf.run.layers.model.named_parameters()}
        for p, s in optimizer.state.items():
            for k, v in s.items():
                self.seen.setdefault((names[id(p)], k), set()).add(
                    (type(v), tuple(v.shape) if isinstance(v, torch.Tensor) else None)
                )


def trained(folder, name, alf, *callbacks, resume=None, steps=12, **kw):
    "A run with an optimizer of `OPTIMIZERS`, or of a package"
    torch.manual_seed(0)
    model = demo_model(blocks=2, hidden_size=64, intermediate_size=128)
    if name in OPTIMIZERS:
        opt = OPTIMIZERS[name](model)
        kw["more"] = dict(
            optimizers=(
                opt,
                AdafactorSchedule(opt) if name == "adafactor" else torch.optim.lr_scheduler.ConstantLR(opt, factor=1.0),
            )
        )
    else: kw |= real(name)
    trainer = small_trainer(folder, alf, *callbacks, model=model, max_steps=steps, **kw)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def rotating(state, **kw):
    return ALFCallback(policy="rotate", budget=.3, interval=2, select_until=1., measure_every=2, offload=state, **kw)


@pytest.mark.parametrize("state", ["second_moment", "full", "none"])
@pytest.mark.parametrize("name", [*OPTIMIZERS, "galore", "apollo", "torchao"])
def test_state_keeps_the_shape_and_class_it_had(tmp_path, name, state):
    """Units leave and return, and no entry of their state is ever of another class or shape; nothing is held for
    what rests"""
    kinds = Kinds(alf := rotating(state))
    trainer = trained(tmp_path, name, alf, kinds)
    assert kinds.seen or name in ("chain",)
    # a first moment or a count that begins anew may be a number where it was one
    assert not {k: v for k, v in kinds.seen.items() if len(v) > 1 and k[1] not in ("RMS",)}
    check_state(alf.run.layers, trainer.optimizer)
    with torch.no_grad(): assert all(p.isfinite().all() for p in trainer.model.parameters())


@pytest.mark.parametrize("name", [*OPTIMIZERS, "galore", "apollo", "torchao"])
@pytest.mark.parametrize("state", ["second_moment", "full", "none"])
def test_a_resume_with_this_optimizer_is_exact(tmp_path, name, state):
    """Stopped in the middle of a window and taken up from its checkpoint: the same losses and weights as without the
    stop"""
    whole = trained(tmp_path / "whole", name, rotating(state), save_strategy="steps", save_steps=7)
    at = str(tmp_path / "whole" / "checkpoint-7")
    again = trained(tmp_path / "again", name, rotating(state, resume_from=at), resume=at)
    assert losses(whole)[7:] == losses(again)[7:] and len(losses(whole)) == 12
    assert same(weights(whole), weights(again))
    a, b = (RunLog(tmp_path / x).events("measure")[-1]["signals"] for x in ("whole", "again"))
    assert a == b


@pytest.mark.parametrize("name", ["chain", "merged"])
def test_a_chain_reports_the_bytes_it_holds(tmp_path, name):
    trainer = trained(tmp_path, name, alf := rotating("none"))
    opt = trainer.optimizer.optimizer
    held = sum(v.nbytes for o in opt.parts for s in o.state.values() for v in s.values())
    assert RunLog(tmp_path).events("memory")[-1]["optimizer_bytes"] == held == optimizer_bytes(opt) > 0
    assert {id(p) for o in opt.parts for p in o.state} == {
        id(p) for n in alf.selection.names for p in alf.run.layers.params(n)
    }


def test_a_chain_whose_members_share_a_parameter_is_refused_by_name():
    model = demo_model(blocks=2)
    chain = Chain(model)
    chain.parts[1].add_param_group(dict(params=[model.model.layers[0].mlp.up_proj.weight]))
    with pytest.raises(ValueError, match="layers.0.mlp.up_proj.weight is in two of the optimizers that Chain chains"):
        check_optimizer(partition_layers(model), chain)


def test_an_optimizer_that_steps_during_the_backward_pass_is_refused_by_name():
    class LayerWise(torch.optim.Optimizer):
        def __init__(self, model):
            self.optimizers = {p: torch.optim.SGD([p], lr=1e-2) for p in model.parameters()}
            super().__init__([torch.nn.Parameter(torch.zeros(1))], dict(lr=1e-2))
    model = demo_model(blocks=2)
    with pytest.raises(ValueError, match="LayerWise holds none of the model's parameters"):
        check_optimizer(partition_layers(model), LayerWise(model))


def test_what_stood_in_the_state_before_step_1_is_put_back_each_time():
    "Also without `OffloadedStates`, for as many turns as one likes"
    model = demo_model(blocks=2)
    layers = partition_layers(model)
    opt = LowRank(model.parameters())
    seeds = {id(p): s["seed"] for p, s in opt.state.items()}
    a, b = [u.name for u in layers.units if u.eligible][:2]
    ids = torch.arange(32).reshape(2, 16) % 200
    for turn in range(4):
        apply_selection(layers, [(a, b)[turn % 2]], opt)
        p, = layers.params((a, b)[turn % 2])
        assert set(opt.state) == {p} and opt.state[p] == dict(seed=seeds[id(p)])
        model(input_ids=ids, labels=ids).loss.backward()
        opt.step()
        opt.zero_grad()
        assert opt.state[p]["seed"] == seeds[id(p)] + 1


def test_bytes_inside_objects_and_classes_are_counted_as_they_are():
    p = torch.nn.Parameter(torch.zeros(64, 64))
    opt = EightBit([p])
    p.grad = torch.randn(64, 64)
    opt.step()
    assert optimizer_bytes(opt) == 4 + (64*64 + 4) + 4*64*64
    parked = OffloadedStates("full")
    parked.park("p", opt.state[p], p)
    assert parked.nbytes == optimizer_bytes(opt) and type(parked.held["p"]["exp_avg"]) is Rounded
    parked = OffloadedStates()
    parked.park("p", opt.state[p], p)
    assert parked.nbytes == 4 + 1 + 4 + 4*64*64, "zeros of a first moment are one number"
    back = parked.fetch("p", p)["exp_avg"]
    assert type(back) is Rounded and back.value().abs().sum() == 0 and back.codes.is_contiguous()
    back.copy_(torch.ones(64, 64))
    assert back.value().unique().numel() == 1


def test_what_no_checkpoint_can_hold_is_said_and_begins_anew(tmp_path):
    "A function in the state: at rest it stays, after a resume the unit's state begins anew"
    class Hooked(torch.optim.AdamW):
        def step(self, closure=None):
            super().step()
            for s in self.state.values(): s.setdefault("hook", len)
        def state_dict(self):
            return {
                **(d := super().state_dict()),
                "state": {k: {e: v for e, v in s.items() if e != "hook"} for k, s in d["state"].items()},
            }
    OPTIMIZERS["hooked"] = lambda m: Hooked(m.parameters(), lr=1e-2)
    try:
        with pytest.warns(
            UserWarning, match=r"holds what a checkpoint cannot, the first is .*\(builtins.builtin_function_or_method\)"
        ) as seen:
            trained(tmp_path, "hooked", rotating("full"), save_strategy="steps", save_steps=4)
        assert sum("what a checkpoint cannot" in str(w.message) for w in seen) == 1
        trained(tmp_path, "hooked", rotating("full"), resume=str(tmp_path / "checkpoint-8"))
    finally: del OPTIMIZERS["hooked"]


def test_a_class_that_nobody_allowed_is_not_made_from_a_checkpoint(tmp_path):
    trained(tmp_path, "low_rank", rotating("full"), save_strategy="steps", save_steps=7)
    file = tmp_path / "checkpoint-7" / "alf" / "state.json"
    state = json.loads(file.read_text())
    k = next(k for k, s in state["parked"].items() if isinstance(s.get("projector"), dict))
    state["parked"][k]["projector"]["of"] = "subprocess.Popen"
    file.write_text(json.dumps(state))
    from alf_nb.core.checkpoints import write_manifest
    write_manifest(tmp_path / "checkpoint-7")
    with pytest.raises(RuntimeError, match="checkpoint-7.*object of class subprocess.Popen, which is not loaded"):
        trained(tmp_path, "low_rank", rotating("full"), resume=str(tmp_path / "checkpoint-7"))


@pytest.mark.parametrize("name", ["adagrad", "chain", "low_rank", "adafactor"])
@pytest.mark.parametrize("kw", [dict(preset="short"), dict(budget=.3, interval=4)], ids=["short", "default"])
def test_the_default_trains_with_any_optimizer_and_the_log_says_what_it_does_not_measure(tmp_path, name, kw):
    trained(tmp_path, name, ALFCallback(**kw, measure_every=3))
    told, = [e for e in RunLog(tmp_path).events("not_measured") if e["why"] == "not kept"]
    assert "rate, coherence and descent are not measured" in told["message"]
    measured = RunLog(tmp_path).events("measure")
    assert len(measured) >= 4
    if name != "chain": assert all(e["signals"] == dict(rate={}, coherence={}, descent={}) for e in measured)


def test_a_choice_by_rate_still_needs_an_optimizer_whose_update_can_be_read(tmp_path):
    with pytest.raises(ValueError, match="the last update of Adagrad cannot be read"):
        trained(tmp_path, "adagrad", ALFCallback(budget=.3, signal="rate", start="rotate", references="none"))


def test_relative_steps_of_adafactor_are_measured_by_the_rates_they_were_made_with(tmp_path):
    "Every parameter has a rate of its own; its window is divided by the sum of them"
    alf = ALFCallback(budget=.3, signal="rate", start="rotate", warm_up=8, measure_every=1, interval=4)
    found = {}

    class Hand(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kw):
            self.before = {n: [p.detach().clone() for p in alf.run.layers.params(n)] for n in alf.selection.names}
        def on_optimizer_step(self, args, state, control, optimizer=None, **kw):
            opt = optimizer.optimizer
            g = opt.param_groups[0]
            for n, ws in self.before.items():
                total = sum(
                    float((p.detach() - w).norm() / opt._get_lr(g, opt.state[p])) ** 2
                    for p, w in zip(alf.run.layers.params(n), ws)
                )
                found.setdefault(state.global_step + 1, {})[n] = math.sqrt(total) / math.sqrt(
                    sum(float(w.norm()) ** 2 for w in ws)
                )
    trained(tmp_path, "adafactor", alf, Hand(), steps=20)
    log = RunLog(tmp_path)
    seen = 0
    for e in log.events("measure"):      # measured at the start of the step after, over the window before
        for n, r in e["signals"]["rate"].items():
            assert r == pytest.approx(found[e["step"]-1][n], rel=2e-3)
            seen += 1
    assert seen > 20
    last = log.events("select")[-1]
    assert last["signal"] == "rate" and any(v is not None for v in last["scores"].values())


def test_a_loop_without_a_learning_rate_in_the_group_trains_and_logs(tmp_path):
    model = demo_model(blocks=2)
    opt = OPTIMIZERS["adafactor"](model)
    rows = [{k: torch.tensor([v]) for k, v in r.items()} for r in demo_dataset(8)]
    with ALFLoop(model, opt, rows, 8, out=tmp_path, budget=.3, measure_every=2, references="device") as alf:
        while not alf.done:
            loss = model(**rows[alf.steps]).loss
            loss.backward()
            alf.step()
            alf.log_loss(loss)
    assert all(0 < e["learning_rate"] < .1 for e in RunLog(tmp_path).events("log"))
    assert all(e["signals"]["rate"] for e in RunLog(tmp_path).events("measure")[1:])


class Secretive(torch.optim.Optimizer):
    "Moves weights by a step of its own while its group says 0 or None"
    def __init__(self, params, lr): super().__init__(params, dict(lr=lr))
    @torch.no_grad()
    def step(self, closure=None):
        for g in self.param_groups:
            for p in g["params"]:
                if p.grad is not None: p.add_(p.grad, alpha=-.01)


@pytest.mark.parametrize("lr", [0., None])
def test_a_signal_that_is_not_measured_is_not_logged_under_its_name(tmp_path, lr):
    model = demo_model(blocks=2)
    opt = Secretive(model.parameters(), lr)
    prior = prior_scores(partition_layers(model)).values
    rows = [{k: torch.tensor([v]) for k, v in r.items()} for r in demo_dataset(8)]
    with pytest.warns(
        UserWarning, match="moved while the learning rate in the optimizer's parameter group is 0 or None"
    ) as seen:
        with ALFLoop(
            model,
            opt,
            rows * 2,
            12,
            out=tmp_path,
            budget=0.3,
            signal="rate",
            start="rotate",
            warm_up=4,
            interval=4,
            measure_every=2,
        ) as alf:
            while not alf.done:
                loss = model(**rows[alf.steps % 8]).loss
                loss.backward()
                alf.step()
                alf.log_loss(loss)
    assert sum("0 or None" in str(w.message) for w in seen) == 1
    chosen = [e for e in RunLog(tmp_path).events("select") if e.get("scores")]
    assert chosen and all(
        e["signal"] == "prior"
        and e["scores"] == pytest.approx({n: prior[n] for n in e["scores"]}, nan_ok=True)
        and "prior" in e["reason"]
        for e in chosen
    )
    state = RunState()
    for e in RunLog(tmp_path).events(): state.add(e)
    assert state.signal == "rate" and state.scores().signal == "prior" and state.scores().known


def two_rates(model, a, b):
    "Weights of the first matrix of every MLP at rate a, all else at rate b; blocks hold both"
    fast = [p for n, p in model.named_parameters() if "gate_proj" in n]
    return torch.optim.SGD(
        [dict(params=fast, lr=a), dict(params=[p for p in model.parameters() if all(p is not q for q in fast)], lr=b)],
        lr=b,
    )


def block_rates(tmp_path, opt_of, **kw):
    torch.manual_seed(0)
    model = demo_model(blocks=2)
    opt = opt_of(model)
    alf = ALFCallback(preset="full", unit="block", measure_every=2, **kw)
    small_trainer(
        tmp_path,
        alf,
        model=model,
        max_steps=6,
        max_grad_norm=0.0,
        more=dict(optimizers=(opt, torch.optim.lr_scheduler.ConstantLR(opt, factor=1.0))),
    ).train()
    return RunLog(tmp_path).events("measure")


@pytest.mark.parametrize("references", ["device", "host", "none"])
def test_every_parameter_is_measured_by_its_own_learning_rate(tmp_path, references):
    """SGD moves by lr·g: 16 times the rate on a part of a block changes its rate and descent per unit of lr hardly
    at all"""
    (one,) = {
        len(x)
        for x in [
            block_rates(tmp_path / "one", lambda m: torch.optim.SGD(m.parameters(), lr=1e-3), references=references)
        ]
    }
    plain = RunLog(tmp_path / "one").events("measure")
    fast = block_rates(tmp_path / "two", lambda m: two_rates(m, 16e-3, 1e-3), references=references)
    for a, b in list(zip(plain, fast))[:2]:
        for s in ("rate", "coherence", "descent"):
            for n in ("block.0", "block.1"):
                assert b["signals"][s][n] == pytest.approx(a["signals"][s][n], rel=.15), (s, n)
    assert one == 3


def test_two_groups_of_one_rate_measure_the_same_bits_as_one_group(tmp_path):
    a = block_rates(tmp_path / "one", lambda m: torch.optim.SGD(m.parameters(), lr=1e-2))
    b = block_rates(tmp_path / "two", lambda m: two_rates(m, 1e-2, 1e-2))
    assert [e["signals"] for e in a] == [e["signals"] for e in b] and [e["sum_lr"] for e in a] == [
        e["sum_lr"] for e in b
    ]


@pytest.mark.parametrize("references", ["device", "none"])
def test_a_unit_with_a_still_part_moves_with_the_rest(tmp_path, references):
    "Learning rate 0 for the first parameter of a unit: the others are measured all the same"
    found = block_rates(
        tmp_path,
        lambda m: (
            two_rates(m, 0.0, 1e-2)
            if references == "none"
            else torch.optim.SGD(
                [
                    dict(params=[m.model.layers[0].self_attn.q_proj.weight], lr=0.0),
                    dict(params=[p for p in m.parameters() if p is not m.model.layers[0].self_attn.q_proj.weight]),
                ],
                lr=1e-2,
            )
        ),
        references=references,
    )
    assert all(
        0 < e["signals"]["rate"]["block.0"] < math.inf and e["signals"]["descent"]["block.0"] > 0 for e in found[1:]
    )


def test_lora_plus_has_the_rate_of_lora(tmp_path):
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    def rates(ratio):
        torch.manual_seed(0)
        model = peft.get_peft_model(
            demo_model(blocks=2),
            peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False),
        )
        opt = create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=1e-5, loraplus_lr_ratio=ratio, loraplus_weight_decay=0.0
        )
        folder = tmp_path / str(ratio)
        small_trainer(
            folder,
            ALFCallback(preset="full", measure_every=3),
            model=model,
            max_steps=6,
            more=dict(optimizers=(opt, torch.optim.lr_scheduler.ConstantLR(opt, factor=1.0))),
        ).train()
        return RunLog(folder).events("measure")[0]["signals"]["rate"]
    plain, plus = rates(1), rates(16)
    assert plain and all(plus[n] == pytest.approx(plain[n], rel=.05) for n in plain)
