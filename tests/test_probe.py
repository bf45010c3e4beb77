"A probe leaves nothing behind: a run with probes trains on the rows, the random numbers, the buffers and the gradients of a run without."
import random

import numpy as np
import pytest
import torch
from small_run import arguments, same, small_trainer, weights
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainerCallback

from alf_nb.demo import demo_dataset, demo_model
from alf_nb.layers import partition_layers
from alf_nb.loop import ALFLoop
from alf_nb.probe import _same_draws, _same_modules, probe_gradients
from alf_nb.trainer import ALFCallback


def draws(): return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()


class Growing(nn.Module):
    "A cache of positions that grows with the text, as rotary embeddings have it"
    def __init__(self): super().__init__(); self.longest = 4; self.register_buffer("table", torch.arange(4.), persistent=False); self.register_buffer("late", None)
    def forward(self, x):
        if x.shape[1] > self.longest: self.longest, self.table = x.shape[1], torch.arange(float(x.shape[1]))
        self.late = torch.ones(1)
        return x*self.table[:x.shape[1]]


def test_modules_and_generators_are_put_back_after_an_error_too():
    net = nn.Sequential(nn.BatchNorm1d(6), Growing()).eval()
    net[1].train()
    table, was = net[1].table, weights(net)
    with _same_draws(): first = draws()
    with pytest.raises(RuntimeError, match="in the middle"), _same_draws(), _same_modules(net):
        net.train(); net(torch.randn(3, 6)); draws()
        assert net[1].longest == 6 and int(net[0].num_batches_tracked) == 1
        raise RuntimeError("in the middle")
    assert draws() == first
    assert same(was, weights(net)) and net[1].table is table and net[1].longest == 4 and net[1].late is None
    assert [m.training for m in net.modules()] == [False, False, True]


def test_gradients_outside_the_model_are_put_back():
    torch.manual_seed(0)
    model, head, scale = demo_model(blocks=2), nn.Linear(32, 3), torch.ones((), requires_grad=True)
    rows = [torch.tensor([r["input_ids"]]) for r in demo_dataset(4)]
    head.weight.grad = kept = torch.full_like(head.weight, 2.)
    probe_gradients(partition_layers(model), rows, loss=lambda m, b: scale*head(m.model(b).last_hidden_state[:, -1]).square().sum())
    assert head.weight.grad is kept and bool((kept == 2).all()) and head.bias.grad is None and scale.grad is None


def test_a_loop_clears_the_gradients_of_a_loss_with_weights():
    torch.manual_seed(0)
    model, head = demo_model(blocks=2), nn.Linear(32, 3)
    rows = [dict(ids=torch.tensor([r["input_ids"]]), y=torch.tensor([i % 3])) for i, r in enumerate(demo_dataset(8))]

    def loss(model, b): return nn.functional.cross_entropy(head(model.model(b["ids"]).last_hidden_state[:, -1]), b["y"])
    optimizer = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=.1)
    with ALFLoop(model, optimizer, rows, 6, budget=.4, loss=loss, interval=3, lock=1.) as alf:
        assert head.weight.grad is None, "the probe has left its gradients"
        while not alf.done:
            loss(model, rows[alf.steps]).backward(); alf.before_step()
            grad = head.weight.grad.clone()
            optimizer.step(); alf.after_step()
            assert head.weight.grad is None and bool(grad.any())
