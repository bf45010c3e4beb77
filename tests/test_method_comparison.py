"What stands in for PEFT's own in its method comparison; with all of their code it is `--trial` that shows it."
import copy
import sys
from pathlib import Path

import pytest
import torch

from alf_nb.demo import demo_dataset, demo_model
from alf_nb.train.loop import ALFLoop

sys.path.insert(0, str(Path(__file__).parent.parent/'benchmarks'))
import bench_method_comparison as mc    # noqa: E402

N = 12


def theirs(model, *, max_steps, lr):
    "As their `get_optimizer_and_scheduler`"
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step/max_steps)


def batches():
    rows = demo_dataset(4*N)
    part = lambda i, k: torch.tensor([r[k] for r in rows[i:i+4]])
    return [{k: part(i, k) for k in ('input_ids', 'labels')} for i in range(0, 4*N, 4)]


def test_their_loop_trains_what_ours_would():
    a = demo_model(blocks=6)
    b = copy.deepcopy(a)
    ours = mc.Ours(.3, theirs)
    optimizer, scheduler = ours.optimizer_and_scheduler(a, max_steps=N, lr=1e-2)
    some, all_of_it = a.get_nb_trainable_parameters()
    assert all_of_it == sum(p.numel() for p in a.parameters()) and 0 < some <= .3*all_of_it
    for batch in batches():             # as theirs goes
        optimizer.zero_grad()
        a(**batch).loss.backward()
        optimizer.step()
        scheduler.step()
    by_hand, rate = theirs(b, max_steps=N, lr=1e-2)
    with ALFLoop(b, by_hand, [], N, budget=.3) as loop:
        for batch in batches():
            b(**batch).loss.backward()
            loop.step()
            rate.step()
    for p, q in zip(a.parameters(), b.parameters()): assert torch.equal(p, q)
    moved = sum(p.numel() for p, q in zip(a.parameters(), demo_model(blocks=6).parameters()) if not torch.equal(p, q))
    assert 4*moved < ours.file_size(a, clean=True) < 4*moved + 50_000
    assert all(p.requires_grad for p in a.parameters())


def test_a_folder_without_their_code_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['bench', str(tmp_path)])
    with pytest.raises(SystemExit): mc.main()
    assert 'give method_comparison/MetaMathQA' in capsys.readouterr().err
