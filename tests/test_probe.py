"""A probe leaves nothing behind: a run with probes trains on the rows, the random numbers, the buffers and the
gradients of a run without."""
import importlib
import random
from collections import deque, namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from small_run import losses, same, small_trainer, weights
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, WeightedRandomSampler
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, default_data_collator

from alf_nb.demo import demo_dataset, demo_model, demo_tokenizer
from alf_nb.model.layers import partition_layers
from alf_nb.train.loop import ALFLoop
from alf_nb.signals.probe import probe_gradients
from alf_nb.signals.untouched import same_draws, same_modules
from alf_nb.train.trainer import ALFCallback


def draws(): return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()


class Growing(nn.Module):
    "A cache of positions that grows with the text, as rotary embeddings have it"
    def __init__(self):
        super().__init__()
        self.longest = 4
        self.register_buffer("table", torch.arange(4.), persistent=False)
        self.register_buffer("late", None)
    def forward(self, x):
        if x.shape[1] > self.longest: self.longest, self.table = x.shape[1], torch.arange(float(x.shape[1]))
        self.late = torch.ones(1)
        return x*self.table[:x.shape[1]]


def test_modules_and_generators_are_put_back_after_an_error_too():
    net = nn.Sequential(nn.BatchNorm1d(6), Growing()).eval()
    net[1].train()
    table, was = net[1].table, weights(net)
    with same_draws(): first = draws()
    with pytest.raises(RuntimeError, match="in the middle"), same_draws(), same_modules(net):
        net.train()
        net(torch.randn(3, 6))
        draws()
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
    probe_gradients(
        partition_layers(model),
        rows,
        loss=lambda m, b: scale * head(m.model(b).last_hidden_state[:, -1]).square().sum(),
    )
    assert head.weight.grad is kept and bool((kept == 2).all()) and head.bias.grad is None and scale.grad is None


def test_a_loop_clears_the_gradients_of_a_loss_with_weights():
    torch.manual_seed(0)
    model, head = demo_model(blocks=2), nn.Linear(32, 3)
    rows = [dict(ids=torch.tensor([r["input_ids"]]), y=torch.tensor([i % 3])) for i, r in enumerate(demo_dataset(8))]

    def loss(model, b): return nn.functional.cross_entropy(head(model.model(b["ids"]).last_hidden_state[:, -1]), b["y"])
    optimizer = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=.1)
    with ALFLoop(model, optimizer, rows, 6, preset='probe', budget=.4, loss=loss, interval=3, select_until=1.) as alf:
        assert head.weight.grad is None, "the probe has left its gradients"
        while not alf.done:
            loss(model, rows[alf.steps]).backward()
            alf.before_step()
            grad = head.weight.grad.clone()
            optimizer.step()
            alf.after_step()
            assert head.weight.grad is None and bool(grad.any())


ROWS = [dict(r, number=i) for i, r in enumerate(demo_dataset(64))]


# rows of every loss of the last run that no training step asked for: what a Trainer notes while it is probed is put
# back
PROBED = []
GENERATED = []


class Counting(Trainer):
    "Notes the rows of every training step, and of every loss that is asked for beside"
    seen = None

    def training_step(self, model, inputs, *args, **kw):
        self.seen = [*(self.seen or []), inputs["number"].flatten().tolist()]
        self.training = True
        out = super().training_step(model, inputs, *args, **kw)
        self.training = False
        return out

    def compute_loss(self, model, inputs, *args, **kw):
        if not getattr(self, "training", False): PROBED.append(inputs["number"].flatten().tolist())
        return super().compute_loss(model, {k: v for k, v in inputs.items() if k != "number"}, *args, **kw)


class Loading(Counting):
    "Its loader is made by `make`"
    def get_train_dataloader(self): return self.accelerator.prepare(self.make())


def train(folder, make=None, alf=None, kind=Loading, model=None, data=ROWS, **kw):
    "A run of 12 steps with two re-selections; `make` gives its loader"
    t = small_trainer(
        folder,
        *([alf] if alf else []),
        kind=kind,
        model=model or demo_model("gpt2", blocks=2, resid_pdrop=0.1),
        data=data,
        remove_unused_columns=False,
        **kw
    )
    if make: t.make = make
    PROBED.clear()
    t.train()
    t.probed = PROBED[:]
    return t


def probing(**kw): return ALFCallback(**{**dict(preset='probe', budget=.3, interval=4, select_until=1., seed=5), **kw})


def collate(rows): return {k: torch.tensor([r[k] for r in rows]) for k in rows[0]}


class Pages(Dataset):
    "Batches come ready from the dataset"
    def __len__(self): return 16
    def __getitem__(self, i): return collate(ROWS[4*i:4*i+4])


class Bins(Dataset):
    "An item is a bin of rows, which the collate function packs into one"
    def __len__(self): return 64
    def __getitem__(self, i): return [ROWS[j] for j in i] if isinstance(i, list) else ROWS[i]


def pack(bins):
    def joined(rows, k): return sum((r[k] if isinstance(r[k], list) else [r[k]] for r in rows), [])
    return {k: torch.tensor([joined(b, k) for b in bins]) for k in ROWS[0]}


class Drawing:
    "Pairs of four, drawn anew in each epoch from a generator of its own"
    def __init__(self): self.generator, self.epochs = torch.Generator().manual_seed(7), 0
    def __len__(self): return 16
    def __iter__(self):
        self.epochs += 1
        return iter([[i, i+16, i+32, i+48] for i in torch.randperm(16, generator=self.generator).tolist()])


class Own:
    "A loader that is no DataLoader, with numbers and a generator of its own"
    def __init__(self): self.rng, self.begun = np.random.default_rng(3), 0
    def __len__(self): return 16
    def __iter__(self):
        self.begun += 1
        for i in self.rng.permutation(16): yield collate(ROWS[4*i:4*i+4])


class Masking:
    "A collate function that draws, from a generator that it makes when it is first called"
    rng = None
    def __call__(self, rows):
        if self.rng is None: self.rng = np.random.default_rng(1)
        batch = collate(rows)
        batch["labels"][torch.from_numpy(self.rng.random(batch["labels"].shape)) < .3] = -100
        return batch


class Mixed:
    "Rows of two data sets of different columns, each batch of one of them"
    def __getitem__(self, i): return ROWS[i] if i < 32 else {k: v for k, v in ROWS[i].items() if k != "attention_mask"}
    def __len__(self): return 64


class InTurns:
    "Batches of one data set and of the other in turns, as sentence-transformers draws them"
    generator, epoch = None, 0
    def __len__(self): return 16
    def set_epoch(self, epoch): self.epoch = epoch

    def __iter__(self):
        self.generator = self.generator or torch.Generator()
        self.generator.manual_seed(9 + self.epoch)
        order = [
            torch.randperm(32, generator=self.generator).tolist(),
            [32 + i for i in torch.randperm(32, generator=self.generator).tolist()],
        ]
        for k in range(16): yield order[k % 2][k//2*4:k//2*4+4]


FIRST = [[4*i+j for j in range(4)] for i in range(16)]
BINS = [[[i, i + 1], [i + 2, i + 3]] for i in range(0, 64, 4)]


def of_one_class(b): return len({x % 16 for x in b}) == 1


LOADERS = {
    "batches from the dataset": (lambda: DataLoader(Pages(), batch_size=None, shuffle=True), lambda b: b in FIRST),
    "packed": (lambda: DataLoader(Bins(), batch_sampler=BINS, collate_fn=pack), lambda b: b in FIRST),
    "four of a class": (
        lambda: DataLoader(ROWS, batch_sampler=[[i, i + 16, i + 32, i + 48] for i in range(16)], collate_fn=collate),
        of_one_class,
    ),
    "a sampler with a generator": (
        lambda: DataLoader(ROWS, batch_sampler=Drawing(), collate_fn=collate),
        of_one_class,
    ),
    "two data sets": (
        lambda: DataLoader(Mixed(), batch_sampler=InTurns(), collate_fn=collate),
        lambda b: min(b) >= 32 or max(b) < 32,
    ),
    "weighted rows": (
        lambda: DataLoader(
            ROWS, batch_size=4, sampler=WeightedRandomSampler([0.0] * 32 + [1.0] * 32, 64), collate_fn=collate
        ),
        lambda b: min(b) >= 32,
    ),
    "no DataLoader": (Own, lambda b: b in FIRST),
    "a list": (lambda: [collate(ROWS[4 * i : 4 * i + 4]) for i in range(16)], lambda b: b in FIRST),
    "another batch size": (
        lambda: DataLoader(ROWS, batch_size=6, shuffle=True, collate_fn=collate),
        lambda b: len(b) == 6,
    ),
    "masks": (lambda: DataLoader(ROWS, batch_size=4, shuffle=True, collate_fn=Masking()), lambda b: len(b) == 4),
    "workers that live on": (
        lambda: DataLoader(ROWS, batch_sampler=Drawing(), collate_fn=collate, num_workers=1, persistent_workers=True),
        of_one_class,
    ),
}


@pytest.mark.parametrize("name", LOADERS)
def test_the_probe_takes_batches_as_training_does_and_training_does_not_notice(tmp_path, name):
    make, right = LOADERS[name]
    plain = train(tmp_path/"plain", make)
    quick = train(tmp_path/"quick", make, ALFCallback(preset="full"))
    alf = probing()
    probed = train(tmp_path/"alf", make, alf)
    assert probed.seen == plain.seen and losses(quick) == losses(plain)
    assert len(probed.probed) == 8 + 2*2 and all(map(right, probed.probed)), probed.probed
    assert losses(probed)[0] == losses(plain)[0], "the masks of the first step are others"
    again = train(tmp_path/"again", make, probing())
    assert again.probed == probed.probed and losses(again) == losses(probed), "the same seed is the same run"
    if name in ("packed", "four of a class"):
        assert probed.probed[8:10] != probed.probed[10:12], "each probe sees other batches"


def test_a_trainer_that_generates_its_batches_generates_for_the_probe_too(tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")

    def reward(completions, **kw):
        GENERATED.append(len(completions))
        return [len(set(c))/10 for c in completions]

    def run(folder, alf=None):
        torch.manual_seed(0)
        GENERATED.clear()
        args = trl.GRPOConfig(
            str(folder),
            max_steps=6,
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=6,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            save_strategy="no",
        )
        t = trl.GRPOTrainer(
            demo_model(blocks=2),
            reward,
            args,
            train_dataset=datasets.Dataset.from_dict(dict(prompt=[f"the {w} is" for w in "abcdefghijklmnop"])),
            processing_class=demo_tokenizer(),
            callbacks=[alf] if alf else [],
        )
        t.train()
        return t, len(GENERATED)
    (plain, n), (t, m) = run(tmp_path/"plain"), run(tmp_path/"alf", alf := probing(interval=2))
    assert (n, m) == (6, 6 + 8 + 2*2), "a generation for each batch"
    first = [[h for h in x.state.log_history if "reward" in h][0] for x in (plain, t)]
    assert (
        first[0]["reward"] == first[1]["reward"] and first[0]["num_tokens"] == first[1]["num_tokens"]
    ), "the first step trains on what it would have without a probe"
    assert t._step == plain._step == 12 and alf.run.tracker.scores("gain").known
    assert [len(x.state.log_history) for x in (plain, t)] == [7, 7] and not t._metrics["train"]


def test_losses_of_several_data_sets_in_sentence_transformers(tmp_path):
    st, datasets = pytest.importorskip("sentence_transformers"), pytest.importorskip("datasets")
    loss = importlib.import_module("sentence_transformers.losses")
    modules = (
        st.models
        if hasattr(st, "models")
        else pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    )
    demo_model("gpt2", blocks=2, resid_pdrop=.1).save_pretrained(tmp_path/"base")
    demo_tokenizer().save_pretrained(tmp_path/"base")
    letters = "abcdefghijklmnopqrstuvwxyzabcdef"
    pairs = [dict(anchor=f"what is {c}", positive=f"{c} is a letter") for c in letters]
    scored = [
        dict(sentence1=f"{c} is small", sentence2=f"{c} is big", score=i / 32) for i, c in enumerate(letters)
    ]
    data = dict(pairs=datasets.Dataset.from_list(pairs), scored=datasets.Dataset.from_list(scored))

    def run(folder, *callbacks):
        torch.manual_seed(0)
        model = st.SentenceTransformer(
            modules=[modules.Transformer(str(tmp_path / "base")), modules.Pooling(32)], device="cpu"
        )
        args = st.SentenceTransformerTrainingArguments(
            str(folder),
            max_steps=6,
            per_device_train_batch_size=4,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
        )
        t = st.SentenceTransformerTrainer(
            model,
            args,
            train_dataset=data,
            loss=dict(pairs=loss.MultipleNegativesRankingLoss(model), scored=loss.CoSENTLoss(model)),
            callbacks=list(callbacks),
        )
        t.train()
        return t
    plain, t = run(tmp_path/"plain"), run(tmp_path/"alf", alf := probing(interval=3))
    assert losses(plain)[0] == losses(t)[0] and len(losses(t)) == 6 and alf.run.tracker.scores("gain").known


def test_rows_taken_by_chance_are_drawn_as_before(tmp_path):
    "The draw of ordinary loaders, which decides what ordinary runs choose"
    t = train(tmp_path, alf=probing(), kind=Counting)
    order = [
        torch.randperm(64, generator=torch.Generator().manual_seed((5 * 1_000_003 + step) * 1009)).tolist()
        for step in (0, 4, 8)
    ]
    assert t.probed == [o[4*k:4*k+4] for o, n in zip(order, (8, 2, 2)) for k in range(n)]


class Shaping(Counting):
    "Its batches become the model's in `_prepare_inputs`, with a number and a list that count them"
    made, kept = 0, None

    def _prepare_inputs(self, inputs):
        self.made += 1
        self.kept = [*(self.kept or []), self.made]
        if self.model.training: inputs = dict(inputs, labels=inputs["input_ids"], number=inputs["number"])
        return super()._prepare_inputs(inputs)


def test_a_trainer_prepares_the_batches_of_the_probe_and_counts_its_own(tmp_path):
    bare = [{k: v for k, v in r.items() if k != "labels"} for r in ROWS]
    t = train(tmp_path, alf=probing(), kind=Shaping, data=bare)
    assert len(t.probed) == 12 and t.made == 12 and t.kept == [*range(1, 13)]


def stream(kind):
    "Rows one after the other; what can be read only once, and what cannot, in the ways there are"
    class Stream(IterableDataset):
        def __init__(self):
            self.rows = {
                "an iterator": lambda: iter(ROWS * 4),
                "a counted iterator": lambda: iter(ROWS * 4),
                "itself": lambda: iter(ROWS * 4),
                "a queue": lambda: deque(ROWS * 4),
            }.get(kind, lambda: ROWS * 4)()
            self.place = self.epoch = self.count = 0
            self.generator = torch.Generator().manual_seed(1)

        def __iter__(self):
            if kind == "itself": return self
            return self.read()

        def __next__(self):
            return dict(next(self.rows))

        def read(self):
            if kind in ("an iterator", "again"): yield from map(dict, self.rows)
            elif kind == "a counted iterator":
                for r in self.rows:
                    self.count += 1
                    yield dict(r, number=self.count)
            elif kind == "a queue":
                while self.rows: yield dict(self.rows.popleft())
            elif kind == "a buffer":
                held = []
                for r in SOURCE:
                    held.append(r)
                    if len(held) == 5:
                        yield from map(dict, held)
                        held = []
            elif kind == "a place":
                while self.place < len(self.rows):
                    self.place += 1
                    yield dict(self.rows[self.place-1])
            elif kind == "epochs":
                self.epoch += 1
                for i in range(128): yield dict(self.rows[(i*(2*self.epoch+1)) % 64])
            elif kind == "own chance":
                for i in torch.randperm(64, generator=self.generator).tolist()*4: yield dict(self.rows[i])
            elif kind == "chance":
                for i in torch.randperm(64).tolist()*4: yield dict(self.rows[i])
    return Stream()


STREAMS = [
    "an iterator",
    "a counted iterator",
    "itself",
    "a queue",
    "a buffer",
    "a place",
    "again",
    "epochs",
    "own chance",
    "chance",
]


@pytest.mark.parametrize("kind", STREAMS)
def test_no_row_of_a_stream_is_lost(tmp_path, kind, monkeypatch):
    def run(folder, alf=None):
        monkeypatch.setitem(globals(), "SOURCE", iter(ROWS*4))
        return train(folder, alf=alf, kind=Counting, data=stream(kind))
    plain, alf = run(tmp_path/"plain"), run(tmp_path/"alf", probing())
    if kind == "a buffer":      # two readers hold rows back, so the order is another
        flat = sum(alf.seen, [])
        assert sorted(flat) == sorted({*flat}) and set(flat) >= set(range(40))
    else: assert alf.seen == plain.seen
    assert len(alf.probed) == 12 and alf.probed[:8] == plain.seen[:8] or kind in ("a buffer", "chance")
    if kind in ("an iterator", "itself"):
        assert alf.probed[8:] == [
            *plain.seen[5:7],
            *plain.seen[9:11],
        ], "the rows that come next; Trainer reads one batch ahead"
    if kind == "again": assert alf.probed[8:] == plain.seen[:2]*2


def test_batches_that_can_be_read_once_are_handed_on_or_refused(tmp_path):
    class Ready(IterableDataset):
        def __init__(self): self.batches = iter([collate(ROWS[4*i:4*i+4]) for i in range(16)])
        def __iter__(self): yield from self.batches
    t = train(tmp_path/"stream", lambda: DataLoader(Ready(), batch_size=None), probing())
    assert t.seen == FIRST[:12]
    t = train(tmp_path/"sampler", lambda: DataLoader(ROWS, batch_sampler=iter(FIRST), collate_fn=collate), probing())
    assert t.seen == FIRST[:12]

    class Bare(Loading):
        def get_train_dataloader(self): return iter([collate(ROWS[4*i:4*i+4]) for i in range(16)])
    with pytest.raises(
        ValueError,
        match="list_iterator, the training loader, can be read only once.*get_train_dataloader.*signal='rate'",
    ):
        train(tmp_path/"bare", alf=probing(), kind=Bare)
    train(tmp_path/"rate", alf=probing(signal="rate", start="rotate", warm_up=4), kind=Bare)


@pytest.mark.parametrize("settings", [dict(preset="probe", budget=.3), dict(preset="short")], ids=["probe", "quick"])
def test_a_resume_draws_the_same_where_the_sampler_draws_from_the_global_generator(tmp_path, settings):
    def run(resume=None):
        t = small_trainer(
            tmp_path,
            ALFCallback(**settings),
            kind=Counting,
            model=demo_model("gpt2", blocks=2, resid_pdrop=0.1),
            data=ROWS,
            remove_unused_columns=False,
            train_sampling_strategy="group_by_length",
            save_strategy="steps",
            save_steps=6,
        )
        t.train(resume_from_checkpoint=resume)
        return t
    whole, rest = run(), run(str(tmp_path/"checkpoint-6"))
    assert rest.seen == whole.seen[6:] and same(weights(whole), weights(rest))


def test_the_check_of_the_compiler_draws_nothing():
    from alf_nb.train.engine import graphs_see_freezing
    graphs_see_freezing.cache_clear()
    with same_draws(): first = draws()
    graphs_see_freezing()
    assert draws() == first


def test_running_statistics_are_those_of_training(tmp_path):
    g = torch.Generator().manual_seed(0)
    data = [dict(pixel_values=torch.randn(3, 32, 32, generator=g)*3+1, labels=i % 3) for i in range(32)]

    def fit(folder, alf=None, only=None):
        torch.manual_seed(0)
        m = ResNetForImageClassification(
            ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 1], layer_type="basic", num_labels=3)
        )
        for k, p in m.named_parameters(): p.requires_grad_(only is None or k in only)
        t = small_trainer(folder, *([alf] if alf else []), model=m, data=data, max_steps=6, remove_unused_columns=False)
        t.train()
        return t
    alf = ALFCallback(preset='probe', budget=.3, interval=0, ban=("head",))
    t = fit(tmp_path/"alf", alf)
    by_hand = fit(tmp_path/"hand", only={k for n in alf.selection for k in alf.run.layers.named_params(n)})
    assert (
        same(weights(t), weights(by_hand))
        and int(t.model.resnet.embedder.embedder.normalization.num_batches_tracked) == 6
    )


def test_a_part_that_is_kept_in_eval_mode_stays_in_it():
    model = demo_model("gpt2", blocks=2, resid_pdrop=.5)
    model.train()
    model.transformer.h[0].eval()
    modes = []
    model.transformer.h[0].register_forward_pre_hook(lambda m, a: modes.append((m.training, model.training)))
    alf = ALFLoop(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        [collate(ROWS[:4]), collate(ROWS[4:8])],
        4,
        preset="probe",
        budget=0.4,
        loss=lambda m, b: m(b["input_ids"], labels=b["labels"]).loss,
    )
    assert set(modes) == {(False, True)} and not model.transformer.h[0].training and model.training
    alf.close()


Named = namedtuple("Named", "logits loss")


@dataclass
class Plain:
    logits: torch.Tensor
    loss: torch.Tensor


RETURNS = {
    "tuple": lambda o: (o.loss, o.logits),
    "list": lambda o: [o.loss, o.logits],
    "dict": lambda o: dict(logits=o.logits, loss=o.loss),
    "namedtuple": lambda o: Named(o.logits, o.loss),
    "dataclass": lambda o: Plain(o.logits, o.loss),
    "loss alone": lambda o: o.loss,
}


class Returning(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.net, self.what = demo_model(blocks=2), what
    def forward(self, input_ids, attention_mask=None, labels=None):
        return self.what(self.net(input_ids=input_ids, labels=labels))


@pytest.mark.parametrize("how", RETURNS)
def test_a_model_may_return_its_loss_in_any_of_the_usual_forms(how):
    found = [
        probe_gradients(partition_layers(m), [collate(demo_dataset(4)), collate(demo_dataset(8)[4:])])
        for m in (Returning(RETURNS[how]), demo_model(blocks=2))
    ]
    assert (
        found[0].loss == found[1].loss
        and found[0].gain.known
        and [*found[0].gain.values.values()] == [*found[1].gain.values.values()]
    )


def test_a_trainer_takes_the_first_of_a_tuple(tmp_path):
    t = small_trainer(tmp_path, ALFCallback(preset='probe', budget=.3), model=Returning(RETURNS["tuple"]))
    t.train()
    assert len(losses(t)) == 12


@pytest.mark.parametrize(
    "what,said",
    [
        (lambda o: (o.logits, None), r"but tuple of Tensor of shape \(4, 32, \d+\), NoneType"),
        (lambda o: dict(logits=o.logits), "but dict with logits"),
        (lambda o: o.logits, "but Tensor of shape"),
        (lambda o: None, "but NoneType"),
        (lambda o: Plain(o.logits, None), "but Plain with logits, loss"),
    ],
    ids=["tuple", "dict", "tensor", "nothing", "dataclass"],
)
def test_a_model_without_a_loss_is_told_what_it_returned(what, said):
    with pytest.raises(ValueError, match=f"returned no loss for a batch with input_ids.*{said}.*signal='rate'"):
        probe_gradients(partition_layers(Returning(what)), [collate(demo_dataset(4))]*2)
