"""Copies of a model, ready to train by different ways: what an optimizer holds, what happens to gradients."""
import copy
import math
from dataclasses import dataclass, field

import torch

from alf_nb.core.config import PRESETS
from alf_nb.model.layers import partition_layers
from alf_nb.train.loop import ALFLoop

ATTENTION, MLP = ('q_proj', 'k_proj', 'v_proj', 'o_proj'), ('gate_proj', 'up_proj', 'down_proj')


@dataclass
class Ready:
    "A model, what an optimizer holds of it, and what happens to a gradient before the optimizer's step"
    model:torch.nn.Module
    groups:list                # [(parameters, factor of the learning rate)]
    share:float                # of all parameters
    shape:object = None        # f() behind the backward pass
    move:object = None         # f() behind the optimizer's step
    look:object = None         # f() now and then, between steps
    alf:dict = None            # arguments of `ALFLoop`
    trained:list = field(default_factory=list) # whose gradient is taken


def linear_modules(model):
    "Name → linear layer of a block"
    return {n: m for n, m in model.named_modules() if type(m) is torch.nn.Linear and n.endswith(ATTENTION + MLP)}


def drawn(model, rows, seed, budget, freeze_bottom=.2):
    "Names of the matrices that ALF draws by lot, every role in every third of the depth with its share"
    policy = dict(policy='static', where='random', budget=budget, strata=3)
    batch = dict(input_ids=rows[:2], labels=rows[:2])
    settings = dict(policy=policy, freeze_bottom=freeze_bottom, interval=0, references='none', seed=seed)
    alf = ALFLoop(model, torch.optim.SGD(model.parameters(), lr=1e-3), [batch], 1, **settings)
    with alf: return sorted(alf.selection.names)


def only(model, params):
    "Let these train, and nothing else"
    chosen = {id(p) for p in params}
    for p in model.parameters(): p.requires_grad_(id(p) in chosen)
    return [p for p in model.parameters() if id(p) in chosen]


class Projected:
    """Gradients on their `rank` leading directions, those of a running mean, found anew every `every` steps.

    `space=True`: Adam lives in the space of these directions, and so does the movement, scaled to have the size that
    Adam gives it without a projection (as GaLore, https://arxiv.org/abs/2403.03507); else Adam sees a gradient of full
    shape."""
    def __init__(self, params, rank, space):
        self.params, self.rank, self.space = params, rank, space
        self.mean = [torch.zeros_like(p) for p in params]
        self.tall = [p.shape[0] > p.shape[1] for p in params]
        small = [min(p.shape) for p in params]
        self.basis = [p.new_zeros(n, min(rank, n)) for p, n in zip(params, small)]
        wide = [max(p.shape) for p in params]
        self.inner = [torch.nn.Parameter(p.new_zeros(b.shape[1], n)) for p, b, n in zip(params, self.basis, wide)]
        self.scale = [math.sqrt(b.shape[0]/b.shape[1]) for b in self.basis]

    def look(self):
        for mean, basis, tall in zip(self.mean, self.basis, self.tall):
            g = mean.T if tall else mean
            basis.copy_(torch.svd_lowrank(g, q=basis.shape[1], niter=2)[0])

    def shape(self):
        for p, mean, basis, tall, inner in zip(self.params, self.mean, self.basis, self.tall, self.inner):
            mean.lerp_(p.grad, .1)
            flat = basis.T @ (p.grad.T if tall else p.grad)
            if self.space: inner.grad = flat
            else: p.grad.copy_((basis @ flat).T if tall else basis @ flat)

    @torch.no_grad()
    def move(self):
        for p, basis, tall, inner, scale in zip(self.params, self.basis, self.tall, self.inner, self.scale):
            step = basis @ inner
            p.add_(step.T if tall else step, alpha=scale)
            inner.zero_()


def adapters(model, names, rank):
    "LoRA of this rank on linear layers of these names"
    from peft import LoraConfig, get_peft_model
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2*rank, lora_dropout=0., target_modules=sorted(names)))


def by_role(named, factors):
    "Parameters in groups by the factor of their role's rate; factors: role → factor"
    groups = {}
    for name, p in named.items():
        role = next((r for r in factors if f'.{r}.' in f'.{name}.'), None)
        groups.setdefault(factors.get(role, 1.), []).append(p)
    return [(ps, f) for f, ps in groups.items()]


def masked(model, budget, total, by, seed, grads=None):
    """Linear weights and masks of their gradients that leave `budget` of all parameters, the same share of every matrix

    by: 'columns' or 'rows', drawn by lot; 'top-columns': those of the largest gradient"""
    modules = linear_modules(model)
    share = budget*total/sum(m.weight.numel() for m in modules.values())
    draw, masks = torch.Generator().manual_seed(seed), []
    for m in modules.values():
        w = m.weight
        n = w.shape[0 if by == 'rows' else 1]
        order = torch.randperm(n, generator=draw)
        if by == 'top-columns': order = grads[id(w)].norm(dim=0).argsort(descending=True).cpu()
        on = torch.zeros(n)
        on[order[:round(share*n)]] = 1
        masks.append((on[:, None] if by == 'rows' else on[None]).to(w.device))
    return [m.weight for m in modules.values()], masks


def gradients(model, rows, bf16, batches):
    "id of a parameter → mean gradient over some batches of two rows"
    for k in range(batches): loss_of(model, rows[2*k:2*k+2], bf16).backward()
    found = {id(p): p.grad/batches for p in model.parameters() if p.grad is not None}
    for p in model.parameters(): p.grad = None
    return found


def loss_of(model, ids, bf16):
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
        return model(input_ids=ids, labels=ids, use_cache=False).loss


def count(params): return sum(p.numel() for p in params)


def make_full(model, rows, bf16, seed):
    "Every parameter trains"
    every = list(model.parameters())
    return Ready(model, [(every, 1.)], 1., trained=every)


def make_alf(model, rows, bf16, seed):
    "ALF's default: it says what trains, on its way"
    every = list(model.parameters())
    return Ready(model, [(every, 1.)], math.nan, alf=dict(PRESETS['default'], seed=seed), trained=every)


def make_masked(model, rows, bf16, seed, budget, by='columns'):
    "The same share of every matrix; Adam's state is 0 where a gradient is masked, so nothing moves there"
    grads, total = gradients(model, rows, bf16, 4) if by == 'top-columns' else None, count(model.parameters())
    weights, masks = masked(model, budget, total, by, seed, grads)
    only(model, weights)

    def shape():
        for w, m in zip(weights, masks): w.grad.mul_(m)

    on = sum(float(m.sum())*w.numel()/m.numel() for w, m in zip(weights, masks))
    return Ready(model, [(weights, 1.)], on/total, shape, trained=weights)


def matrices(model, rows, seed, of, budget, freeze_bottom):
    "Name → matrix: all of the blocks, or a draw in strata"
    if of == 'all': names = {f'{n}.weight' for n in linear_modules(model)}
    else:
        layers, names = partition_layers(model), set()
        for unit in drawn(model, rows, seed, budget, freeze_bottom): names |= set(layers.named_params(unit))
    return {n: p for n, p in model.named_parameters() if n in names}


def make_lora(model, rows, bf16, seed, of='all', rank=16, budget=.25, freeze_bottom=.2):
    "LoRA on all matrices of the blocks, or on a draw in strata"
    total, names = count(model.parameters()), matrices(model, rows, seed, of, budget, freeze_bottom)
    model = adapters(model, {n.removesuffix('.weight') for n in names}, rank)
    small = [p for p in model.parameters() if p.requires_grad]
    return Ready(model, [(small, 1.)], count(small)/total, trained=small)


def make_matrices(model, rows, bf16, seed, of='strata', budget=.25, freeze_bottom=.2, tiny=0, tiny_lr=1., factors=None,
                  project=0, space=False):
    "Matrices at full rank; `tiny`: adapters of this rank on the rest, at `tiny_lr` times the rate"
    total, named = count(model.parameters()), matrices(model, rows, seed, of, budget, freeze_bottom)
    chosen, small = list(named.values()), []
    if tiny:
        model = adapters(model, set(linear_modules(model)) - {n.removesuffix('.weight') for n in named}, tiny)
        small = [p for p in model.parameters() if p.requires_grad]
    only(model, [*chosen, *small])
    groups = by_role(named, factors or {}) + ([(small, tiny_lr)] if tiny else [])
    share = count([*chosen, *small])/total
    if not project: return Ready(model, groups, share, trained=[*chosen, *small])
    flat = Projected(chosen, project, space)
    held, move = ([(flat.inner, 1.)], flat.move) if space else (groups, None)
    return Ready(model, held, share, flat.shape, move, flat.look, trained=chosen)


WAYS = dict(full=make_full, alf=make_alf, masked=make_masked, lora=make_lora, matrices=make_matrices)


def prepare(base, rows, bf16, seed, what='matrices', **how):
    "A copy of the model, made ready to train by one of `WAYS`"
    model = copy.deepcopy(base)
    for p in model.parameters(): p.requires_grad_(True)
    torch.manual_seed(seed)
    return WAYS[what](model, rows, bf16, seed, **how)
