"""Bad and hostile input: files that were torn, edited or made up, and arguments of every kind.

Promised of everything that is read from a file or given by a caller: it works, or it is a ValueError or RuntimeError
that says what is wrong. Nothing from a file is executed, no file
but the one that was named is touched, memory is bounded by the size of what is real, and no text from data becomes an
element of a page.
`ALF_FUZZ=50 pytest tests/test_hostile.py` tries fifty times as many examples."""
import ast
import copy
import inspect
import json
import os
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from alf_nb.model import delta as D
from alf_nb.model.fingerprint import fingerprint
from alf_nb.core.checkpoints import MANIFEST, verify_checkpoint, find_checkpoint, write_manifest
from alf_nb.core.policies import POLICIES
from alf_nb.core.policy import Policy
from alf_nb.core.records import Scores, UnitInfo
from alf_nb.report.page import report_html
from alf_nb.report.results_page import compare_results
from alf_nb.report.results import read_results
from alf_nb.report.comparison import compare_runs
from alf_nb.report.summary import summarize, summary_table
from alf_nb.report.page import write_report
from alf_nb.report.results_page import write_comparison
from alf_nb.core.runlog import RunLog
from alf_nb.train.saving import read_tensors, typed_state
from alf_nb.train.trainer import ALFCallback
from fake_run import fake_run

MORE = int(os.environ.get("ALF_FUZZ", 1))
CLEAR = ValueError, RuntimeError, FileNotFoundError


def fuzz(n):
    return settings(
        max_examples=n * MORE,
        deadline=None,
        derandomize=MORE == 1,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


numbers = st.sampled_from(
    [
        0,
        -1,
        1,
        2,
        True,
        False,
        1 << 53,
        -(1 << 63),
        10**400,
        1e308,
        -1e308,
        float("nan"),
        float("inf"),
        1e-320,
        0.25,
        3.5,
    ]
)
texts = st.sampled_from(
    [
        "",
        "x",
        "../../etc/passwd",
        "<script>alert(1)</script>",
        "\x00",
        "\ud800",
        "block.0",
        "*",
        "[",
        "🦙" * 50,
        "a" * 3000,
        "budget",
        "gain",
        "9" * 5000,
    ]
)
plain = st.none() | numbers | texts
junk = st.recursive(
    plain,
    lambda c: st.lists(c, max_size=3)
    | st.dictionaries(texts | st.sampled_from(["policy", "names", "units", "budget"]), c, max_size=3),
    max_leaves=6,
)


def clear(f, *args, **kw):
    "The result, or None where it was refused in words"
    try: return f(*args, **kw)
    except CLEAR as e:
        assert str(e), "an error without a word"
        assert not isinstance(e, (UnicodeError, RecursionError)), repr(e)


# ---------------------------------------------------------------- arguments and policies

ARGUMENTS = list(inspect.signature(ALFCallback).parameters)


@given(st.dictionaries(st.sampled_from(ARGUMENTS), junk | st.builds(object), min_size=1, max_size=3))
@fuzz(150)
def test_arguments(kw):
    one = clear(ALFCallback, **kw)
    if one is not None: json.dumps(one.config.to_dict())


UNITS = tuple(UnitInfo(f"block.{i}.{r}", f"block.{i}", "matrix", r, 10+i, i+1) for i in range(3) for r in "ab")
FIELDS = sorted({f for p in POLICIES.values() for f in p.__dataclass_fields__})


@given(
    st.sampled_from([*POLICIES, "nobody"]) | junk,
    st.dictionaries(st.sampled_from(FIELDS) | texts, junk, max_size=3),
    st.dictionaries(
        st.sampled_from([u.name for u in UNITS]), numbers.filter(lambda v: abs(v) < 1e300 or v != v), max_size=6
    ),
)
@fuzz(150)
def test_policy_json(name, fields, values):
    p = clear(Policy.from_dict, dict(policy=name, **{k: v for k, v in fields.items() if k != "policy"}))
    if p is None: return
    assert type(p) is POLICIES[p.name] and clear(Policy.from_dict, json.loads(json.dumps(p.to_dict()))) == p
    sel = clear(p.select, Scores(p.signal or "gain", values), UNITS)
    if sel is not None: assert set(sel.names) <= {u.name for u in UNITS}


@given(junk)
@fuzz(30)
def test_a_policy_that_is_no_dict(d): clear(Policy.from_dict, d)


# ---------------------------------------------------------------- run logs

@pytest.fixture(scope="module")
def good(tmp_path_factory):
    "Lines of a whole run"
    log = fake_run(tmp_path_factory.mktemp("good"), blocks=2, steps=20, interval=6, every=4)
    log.write("attention", step=20, shift=dict(before={}), words=["x"])
    log.write("choose", step=20, policy=dict(policy="budget"), now=True)
    log.write("pause", step=20)
    log.write("error", step=20, type="X", message="m")
    log.write("resume", step=19, path="p")
    log.close()
    return [json.loads(l) for l in log.path.read_text(encoding="utf-8").splitlines()]


def read_all(folder):
    "Everything that reads a log"
    from alf_nb.widgets.base import LogReader
    log = RunLog(folder)
    log.events()
    log.begin
    log.units
    log.status
    log.selections()
    log.series("log", "loss")
    log._repr_markdown_()
    s = summarize(folder)
    json.dumps(s)
    summary_table(s)
    html = report_html(folder)
    parse(html)
    compare_runs([folder, folder])._repr_markdown_()
    f = LogReader(folder)
    f.update()
    s = f.state
    s.scores()
    s.scores(step=0)
    s.signal
    s.seconds_per_step
    s.n_total
    s.max_steps
    s.config
    return html


def look(folder):
    "Every widget that follows a log"
    from alf_nb.widgets.dashboard import TrainingDashboard
    from alf_nb.widgets.map import SelectionMap
    from alf_nb.widgets.picker import ThresholdPicker
    out = []
    for cls in (TrainingDashboard, SelectionMap, ThresholdPicker):
        v = clear(cls, RunLog(folder))
        if v is None: continue
        try: out += [w.value for w in _all_widgets(v.box) if type(w).__name__ == "HTML"] + [v.static_html()]
        finally: v.close()
    return out


def _all_widgets(w): return [w, *(x for c in getattr(w, "children", ()) for x in _all_widgets(c))]


def mutated(lines, rng, data):
    "Some fields of other types, some gone, some lines torn, doubled or swapped"
    lines = copy.deepcopy(lines)
    for _ in range(data.draw(st.integers(1, 6))):
        e = rng.choice(lines)
        keys = [k for k in e if k != "event"]
        at = e
        while (
            isinstance(at, dict)
            and keys
            and rng.random() < 0.4
            and isinstance(at[k := rng.choice(keys)], dict)
            and at[k]
        ):
            at = at[k]
            keys = list(at)
        if keys:
            k = rng.choice(keys)
            if rng.random() < .25: at.pop(k)
            else: at[k] = data.draw(junk)
    if rng.random() < .3: rng.shuffle(lines)
    raw = [json.dumps(e).encode() for e in lines]
    for _ in range(rng.randrange(3)):
        i = rng.randrange(len(raw))
        raw[i] = rng.choice(
            [
                raw[i][: rng.randrange(len(raw[i]))],
                b"\xff\xfe\x00",
                b"[" * 5000,
                b'{"event":"log","step":1,"loss":1e999}',
                b'{"event":"log","step":' + b"9" * 5000 + b"}",
                raw[i] + b"\n" + raw[i],
                b"null",
                b'{"event":["log"]}',
            ]
        )
    return b"\n".join(raw) + rng.choice([b"\n", b""])


@given(st.integers(0, 1 << 30), st.data())
@fuzz(60)
def test_event_logs(good, tmp_path_factory, seed, data):
    folder = tmp_path_factory.mktemp("log")
    (folder/"events.jsonl").write_bytes(mutated(good, random.Random(seed), data))
    clear(read_all, folder)


@given(st.integers(0, 1 << 30), st.data())
@fuzz(6)
def test_widgets(good, tmp_path_factory, seed, data):
    folder = tmp_path_factory.mktemp("views")
    (folder/"events.jsonl").write_bytes(mutated(good, random.Random(seed), data))
    assert not [h for h in look(folder) if 'class="warning" role="alert"' in h], "a view shows a traceback"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\n\n\n",
        b"\x00" * 5000,
        b"{}\n" * 50,
        b'{"event":"run_begin","units":null}\n',
        b'{"event":"select","step":1,"names":["nobody"]}\n',
        b'{"event":"resume","step":3}\n' * 3,
    ],
)
def test_hardly_a_log(tmp_path, raw):
    (tmp_path/"events.jsonl").write_bytes(raw)
    clear(read_all, tmp_path)
    assert not [h for h in look(tmp_path) if 'role="alert"' in h]


# ---------------------------------------------------------------- pages show text as text

EVIL = '"><script>alert(1)</script><img src=x onerror=alert(1)>\'"&lt;b>'


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.bad, self.n = [], 0

    def handle_starttag(self, tag, attrs):
        self.n += 1
        for k, v in attrs:
            if k.startswith("on") or (
                k in ("src", "href") and not re.match(r"data:image/png;base64,|#|https://", v or "")
            ):
                self.bad.append((tag, k, v))
        if tag in ("script", "iframe", "object", "embed", "link", "form", "base") or (tag == "b" and False):
            self.bad.append((tag,))


def parse(html):
    t = Tags()
    t.feed(html)
    t.close()
    assert not t.bad, t.bad[:3]
    return t.n


def poisoned(x, evil):
    "The same with `evil` in every text and every key that is free, but for the words that the format fixes"
    fixed = {"event", "kind", "t", "run_id", "when"}
    if isinstance(x, list): return [poisoned(v, evil) for v in x]
    if isinstance(x, str): return x + evil
    if not isinstance(x, dict): return x
    free = lambda k: "." in k or k in ("embeddings", "norm", "domain", "other")
    key = lambda k: k + evil if free(k) else k
    return {key(k): v if k in fixed or (k, v) == ("signal", "gain") else poisoned(v, evil) for k, v in x.items()}


def test_no_text_becomes_an_element(good, tmp_path):
    pages = {}
    for name, evil in (("tame", "!"*len(EVIL)), ("evil", EVIL)):
        f = tmp_path/name
        f.mkdir()
        (f / "events.jsonl").write_text(
            "".join(json.dumps(poisoned(e, evil)) + "\n" for e in good if e["event"] != "attention"), encoding="utf-8"
        )
        page = write_report(f).read_text(encoding="utf-8")
        assert evil not in page or name == "tame"
        pages[name] = [parse(page), *map(parse, look(f))]
        if name == "evil": assert page.count("&lt;script&gt;") > 20 and "<script" not in page
    assert pages["evil"] == pages["tame"]              # as many elements as without it: none comes from data


def test_no_text_becomes_an_element_in_comparisons(tmp_path):
    rows = [
        dict(
            key=f"{m}{s}",
            task="t" + EVIL,
            method=m + EVIL,
            lr=1e-3,
            seed=s,
            about=EVIL,
            model=EVIL,
            data=EVIL,
            rule="steps",
            amount=10,
            task_loss=1.0 + s / 10 + len(m) / 100,
            other_loss=2.0,
            other_loss_before=2.1,
            steps=10,
            wall_s=3.0,
            importance_s=0.1,
            state_bytes_peak=1e6,
            trainable_share_peak=0.2,
            seconds_per_step=0.3,
            settings="{}",
            versions={EVIL: EVIL},
            curve=[[0, 0.0, 0, 3.0], [5, 1.0, 9, 2.0], [10, 2.0, 18, 1.5]],
            map={"block.0" + EVIL: "09", "block.1": "99"},
            date=EVIL,
            commit=EVIL,
        )
        for m in ("full", "random", "alf")
        for s in (0, 1)
    ] + [
        dict(
            key="e",
            task="t" + EVIL,
            method="bad",
            lr=1e-3,
            seed=0,
            error=EVIL,
            model=EVIL,
            data=EVIL,
            rule="steps",
            amount=10,
        )
    ]
    (tmp_path/"r.jsonl").write_text("".join(json.dumps(r)+"\n" for r in rows), encoding="utf-8")
    page = write_comparison(tmp_path/"r.jsonl").read_text(encoding="utf-8")
    parse(page)
    assert "<script" not in page and "<img src=x" not in page
    parse(compare_results(tmp_path/"r.jsonl")._repr_html_())
    nb = json.loads((tmp_path/"comparison.ipynb").read_text(encoding="utf-8"))
    for c in nb["cells"]:
        # a name is a string in it, never code
        if c["cell_type"] == "code": ast.parse(c["source"])


ROW = dict(
    key="a",
    task="t",
    method="alf",
    lr=1e-3,
    seed=0,
    task_loss=1.0,
    model="m",
    data="d",
    rule="steps",
    amount=10,
    steps=10,
    wall_s=2.0,
    importance_s=0.1,
    state_bytes_peak=10,
    curve=[[0, 0.0, 0, 3.0], [5, 1.0, 9, 2.0]],
    map={"block.0": "09"},
    versions={},
    settings="{}",
)


@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(list(ROW) + ["error", "other_loss", "diverged", "data_order"]), junk, max_size=2
        ),
        min_size=1,
        max_size=4,
    )
)
@fuzz(60)
def test_results(tmp_path_factory, changes):
    f = tmp_path_factory.mktemp("results")/"r.jsonl"
    lines = [json.dumps({**ROW, "key": str(i), "seed": i, **c}) for i, c in enumerate(changes)]
    f.write_text("\n".join([*lines, "[", "["*5000, "null"]) + "\n", encoding="utf-8")
    read_results(f)
    if (page := clear(write_comparison, f)) is not None: parse(page.read_text(encoding="utf-8"))


# ---------------------------------------------------------------- deltas

class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = torch.nn.Linear(3, 2), torch.nn.Linear(2, 2)


@pytest.fixture(scope="module")
def delta(tmp_path_factory):
    path, m = tmp_path_factory.mktemp("delta"), Small()
    base = fingerprint(m)
    with torch.no_grad(): m.a.weight += 1
    D.save_delta(m, base, path, metadata=dict(steps=3))
    with open(path/"delta.safetensors", "rb") as f: info, _ = D._read_info(f, path)
    return path, info, (path/"delta.safetensors").read_bytes()


@given(st.integers(0, 1 << 30), st.data())
@fuzz(120)
def test_deltas(delta, tmp_path_factory, seed, data):
    "Bytes flipped, and whole headers that are consistent with themselves but made up"
    path, info, raw = delta
    rng, file, m = random.Random(seed), tmp_path_factory.mktemp("d")/"delta.safetensors", Small()
    before = {k: v.clone() for k, v in m.state_dict().items()}
    if rng.random() < .3:         # bytes
        raw = bytearray(raw)
        for _ in range(rng.randrange(1, 5)): raw[rng.randrange(len(raw))] = rng.randrange(256)
        raw = bytes(raw)[:rng.randrange(len(raw)+1) if rng.random() < .3 else None]
    else:
        made = copy.deepcopy(info)
        k = rng.choice([*made, "changed", "base"])
        if k in ("changed", "base") and rng.random() < .7:
            made[k][rng.choice([*made[k], "../../evil", "/etc/passwd"])] = data.draw(
                junk
                | st.tuples(
                    st.sampled_from(["F32", "BF16", "U8", "X"]), st.lists(st.integers(-1, 1 << 40), max_size=3), texts
                )
            )
        else: made[k] = data.draw(junk)
        try:
            layout = D._layout({k: made["base"][k] for k in made["changed"]})
            head = D._header(made, layout)
        except Exception:
            layout = {}
            head = json.dumps(dict(__metadata__=dict(alf_nb_delta=json.dumps(made, default=str)))).encode()
        raw = len(head).to_bytes(8, "little") + head + raw[-24:]
    file.write_bytes(raw)
    if (found := clear(D.read_delta, file)) is not None:
        assert (
            isinstance(found.base, str)
            and isinstance(found.version, str)
            and isinstance(found.metadata, dict)
            and all(isinstance(k, str) for k in found.changed)
        )
    if clear(D.apply_delta, m, file) is None: assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())
    assert [p.name for p in file.parent.iterdir()] == ["delta.safetensors"]


CHILD = """
import resource, sys
from alf_nb.model import delta as D; from alf_nb.core.runlog import RunLog
import torch
used = int(open('/proc/self/statm').read().split()[0])*resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (240 << 20),)*2)
*deltas, log = sys.argv[1:]
for file in deltas:
    for f in (D.read_delta, lambda p: D.apply_delta(torch.nn.Linear(2, 2), p)):
        try: f(file)
        except ValueError as e: assert file in str(e), e
        else: raise SystemExit('accepted')
assert len(RunLog(log).events()) == 2 and len(RunLog(log).poll()) == 2
print('fine')
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is Linux's")
def test_absurd_sizes_cost_no_memory(tmp_path):
    """Readers with 240 MiB to spare: headers that claim gigabytes, in files that really are as long, and a line of
    256 MiB"""
    files = []
    for n in (1 << 62, 8 << 30):
        files.append(tmp_path/f"{n}.safetensors")
        with open(files[-1], "wb") as f:
            # sparse
            f.write(n.to_bytes(8, "little"))
            f.truncate(9 << 30)
    log = tmp_path/"events.jsonl"
    with open(log, "wb") as f:
        f.write(b'{"event":"log","step":1}\n{"event":"log","x":"')
        f.seek(256 << 20)
        f.write(b'"}\n{"event":"log","step":2}\n')
    r = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, files), str(log)], capture_output=True, text=True, timeout=300
    )
    assert r.stdout == "fine\n", r.stderr[-2000:]


def test_big_shapes_with_no_data(delta, tmp_path):
    _, info, _ = delta
    made = {**info, "base": {**info["base"], "a.weight": ("F32", (1 << 20, 1 << 20), "x")}}
    head = D._header(made, D._layout({k: made["base"][k] for k in made["changed"]}))
    (tmp_path/"delta.safetensors").write_bytes(len(head).to_bytes(8, "little") + head)
    with pytest.raises(ValueError, match="delta.safetensors is damaged.*should have 4,398,0"): D.read_delta(tmp_path)


def test_links_lead_nowhere(tmp_path):
    for target in ("/etc/passwd", "/dev/zero", "/dev/stdin", str(tmp_path)):
        d = tmp_path/("d" + str(abs(hash(target))))
        d.mkdir()
        (d/"delta.safetensors").symlink_to(target)
        with pytest.raises(ValueError) as e: D.read_delta(d)
        assert "root:" not in str(e.value)  # nothing of the file is shown
    assert not (tmp_path/"events.jsonl").exists()


# ---------------------------------------------------------------- checkpoints

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    "A whole checkpoint of a real run"
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback
    from alf_nb.demo import demo_dataset, demo_model
    out = tmp_path_factory.mktemp("ckpt")
    t = Trainer(
        demo_model(blocks=1),
        TrainingArguments(
            str(out), max_steps=3, save_strategy="steps", save_steps=3, report_to=[], use_cpu=True, disable_tqdm=True
        ),
        train_dataset=demo_dataset(8),
        callbacks=[ALFCallback(budget=0.3)],
    )
    t.remove_callback(PrinterCallback)
    t.train()
    return out/"checkpoint-3"


@given(st.integers(0, 1 << 30), st.data())
@fuzz(60)
def test_checkpoint_state(checkpoint, tmp_path_factory, seed, data):
    folder, rng = tmp_path_factory.mktemp("c")/"checkpoint-3", random.Random(seed)
    (folder/"alf").mkdir(parents=True)
    state = json.loads((checkpoint/"alf"/"state.json").read_text(encoding="utf-8"))
    for _ in range(rng.randrange(1, 3)):
        at, keys = state, list(state)
        while keys and rng.random() < .5 and isinstance(at[k := rng.choice(keys)], dict) and at[k]:
            at = at[k]
            keys = list(at)
        if rng.random() < .2: at.pop(rng.choice(list(at)))
        else: at[rng.choice(list(at))] = data.draw(junk)
    raw = json.dumps(state).encode()
    (folder/"alf"/"state.json").write_bytes(rng.choice([raw]*5 + [raw[:rng.randrange(len(raw))], b"["*5000, b"null"]))
    tensors = (checkpoint/"alf"/"tensors.safetensors").read_bytes()
    if rng.random() < .2:
        tensors = rng.choice(
            [
                b"",
                (1 << 62).to_bytes(8, "little") + b"{}",
                tensors[: rng.randrange(len(tensors))],
                b"\x80\x04cos\nsystem\n",
            ]
        )
    (folder/"alf"/"tensors.safetensors").write_bytes(tensors)
    try:
        typed_state(folder)
        read_tensors(folder)
    except RuntimeError as e: assert "checkpoint-3" in str(e) and re.search(r"state\.json|tensors\.safetensors", str(e))


@given(st.data())
@fuzz(60)
def test_seals(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("s")/"checkpoint-1"
    folder.mkdir()
    (folder/"a.bin").write_bytes(b"abc")
    (folder.parent/"outside").write_bytes(b"abc")
    write_manifest(folder)
    assert verify_checkpoint(folder) == ""
    made = json.loads((folder/MANIFEST).read_text())
    if data.draw(st.booleans()):
        made["files"][data.draw(st.sampled_from(["a.bin", "../outside", "/etc/passwd", "\ud800", ""]))] = data.draw(
            junk | st.tuples(plain, plain)
        )
    else: made[data.draw(st.sampled_from(["version", "files"]))] = data.draw(junk)
    (folder/MANIFEST).write_text(data.draw(st.sampled_from([json.dumps(made)]*4 + ["["*9000, "", "\x00", "null"])))
    why = verify_checkpoint(folder)
    assert isinstance(why, str)
    # what lies elsewhere is not part of a checkpoint
    if "../outside" in str(made.get("files")) or "/etc" in str(made.get("files")): assert why
    if why:
        with pytest.warns(UserWarning): assert find_checkpoint(folder.parent) is None


def test_a_resume_from_a_sealed_lie_is_refused(checkpoint, tmp_path):
    "The seal is right, the state is not: named, and nothing was trained"
    import shutil
    from transformers import Trainer, TrainingArguments
    from alf_nb.demo import demo_dataset, demo_model
    shutil.copytree(checkpoint, tmp_path/"checkpoint-3")
    state = tmp_path/"checkpoint-3"/"alf"/"state.json"
    for change in (
        dict(marks=7),
        dict(cum_lr=["x"]),
        dict(selection=dict(names=["nobody"])),
        dict(parked=dict(nobody=dict(step=1))),
    ):
        shutil.copy(checkpoint/"alf"/"state.json", state)
        state.write_text(json.dumps({**json.loads(state.read_text()), **change}))
        write_manifest(tmp_path/"checkpoint-3")
        t = Trainer(
            demo_model(blocks=1),
            TrainingArguments(
                str(tmp_path), max_steps=6, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True
            ),
            train_dataset=demo_dataset(8),
            callbacks=[ALFCallback(budget=0.3)],
        )
        with pytest.raises((ValueError, RuntimeError), match="cannot resume from checkpoint-3: alf/state.json"):
            t.train(resume_from_checkpoint=str(tmp_path/"checkpoint-3"))


# ---------------------------------------------------------------- nothing is executed

def test_no_code_comes_from_files():
    "The exported code has no pickle, no eval or exec, no shell, and no torch.load"
    root = Path(__file__).parents[1]/"alf_nb"
    for f in sorted(root.rglob("*.py")):
        tree = ast.parse(f.read_text(encoding="utf-8"))
        for n in ast.walk(tree):
            if isinstance(n, (ast.Import, ast.ImportFrom)):
                names = {a.name.split(".")[0] for a in n.names} | (
                    {(n.module or "").split(".")[0]} if isinstance(n, ast.ImportFrom) and not n.level else set()
                )
                assert not names & {
                    "pickle",
                    "cPickle",
                    "dill",
                    "cloudpickle",
                    "joblib",
                    "marshal",
                    "shelve",
                }, f"{f.name}:{n.lineno}"
            if isinstance(n, ast.Call):
                what = ast.unparse(n.func)
                assert what not in (
                    "eval",
                    "exec",
                    "compile",
                    "__import__",
                    "os.system",
                    "yaml.load",
                    "yaml.unsafe_load",
                ), f"{f.name}:{n.lineno}: {what}"
                if what in ("torch.load", "np.load", "numpy.load"):
                    assert (
                        any(k.arg == "weights_only" and getattr(k.value, "value", None) is True for k in n.keywords)
                        or "np" in what
                        and not any(k.arg == "allow_pickle" for k in n.keywords)
                    ), f"{f.name}:{n.lineno}"
                assert not any(
                    k.arg == "shell" and getattr(k.value, "value", None) for k in n.keywords
                ), f"{f.name}:{n.lineno}"
                assert not any(
                    k.arg == "trust_remote_code" and getattr(k.value, "value", None) is True for k in n.keywords
                ), f"{f.name}:{n.lineno}"
