"""`finetune(…, live=True)`: the same run as the blocking one, in the background, with delta, card, summary and report
at every end."""
import json
import re
import time
import warnings

import pytest
import torch
from live_run import wait_for
from transformers import LlavaConfig, ViTConfig, WhisperConfig

from alf_nb.app import finetune as app
from alf_nb.app.finetune import finetune
from alf_nb.core.runlog import RunLog
from alf_nb.demo import demo_model, demo_tokenizer
from alf_nb.model.delta import apply_delta, read_delta
from alf_nb.train.trainer import ALFCallback
from alf_nb.widgets.base import still_bundle
from alf_nb.widgets.compare import CompareView
from alf_nb.widgets.dashboard import TrainingDashboard

warnings.simplefilter("ignore", FutureWarning)
STEPS = 12
SETTINGS = dict(steps=STEPS, max_length=32, eval_blocks=4, lr=1e-2, interval=4, measure_every=3,
                bf16=False, progress=False)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text")/"text.txt"
    words = [("cat", "dog"), ("sun", "moon")]*60
    path.write_text("\n\n".join(f"The {a} {b} follows the {a}. A {b} is never a {a}, and {i} times {i} is {i*i}."
                                for i, (a, b) in enumerate(words)))
    return path


def job(text, out, net=None, **kw):
    net = net or (demo_model(), demo_tokenizer())
    return finetune(net, text, out, other=text, **{**SETTINGS, **kw})


def until_step(run, n): wait_for(lambda: run.step >= n or not run.alive, 60)


def held(text, out, **kw):
    "A live run that waits behind a step"
    run = job(text, out, live=True, **kw)
    run.pause()
    wait_for(lambda: run.status == "paused", 60)
    return run


def weights(net): return [v.clone() for v in net.state_dict().values()]
def same(a, b): return all(map(torch.equal, a, b))
def left(out): return sorted(p.name for p in out.iterdir() if not p.name.startswith("checkpoint"))


ALL = ["delta", "events.jsonl", "report.html", "run.yaml", "summary.json"]


def test_live_is_the_blocking_run_bit_for_bit(tmp_path, text):
    plain, live = [(demo_model(), demo_tokenizer()) for _ in range(2)]
    summary = job(text, tmp_path/"plain", plain)
    run = job(text, tmp_path/"live", live, live=True)
    assert run.alive and run.wait() and run.status == "complete"
    assert left(tmp_path/"live") == left(tmp_path/"plain") == ALL
    assert same(weights(plain[0]), weights(live[0]))
    names = "domain_loss_before domain_loss_after other_loss_before other_loss_after trainable_share_mean steps".split()
    assert {k: run.result[k] for k in names} == {k: summary[k] for k in names}
    losses = lambda n: [e["loss"] for e in RunLog(tmp_path/n).events("log")]
    assert losses("live") == losses("plain")
    base = demo_model()
    apply_delta(base, tmp_path/"live"/"delta")
    assert same(weights(base), weights(live[0]))


def test_it_is_looked_at_where_layers_are_selected_anew(tmp_path, text):
    run = job(text, tmp_path, live=True)
    run.wait()
    log = RunLog(tmp_path)
    anew = [e["step"] for e in log.events("select") if 0 < e["step"] < STEPS]
    looks = log.events("eval", when="during")
    assert anew and [e["step"] for e in looks] == anew == [e["step"] for e in log.events("sample", when="during")]
    assert {e["name"] for e in looks} == {"domain"} and all(e["wall_s"] > 0 for e in looks)
    tokens = {e["tokens"] for e in log.events("eval", name="domain")}
    assert len(tokens) == 1         # the same blocks as before and after
    assert all(0 < e["used_bytes"] < e["device_bytes"] for e in log.events("memory"))


def test_a_sample_at_a_selection_costs_one_pass_over_one_token_for_each_that_comes(tmp_path, text):
    net, seen = (demo_model(), demo_tokenizer()), []
    net[0].config.use_cache = False                 # as gradient checkpointing leaves it

    def look(module, args, kw):
        ids = kw.get("input_ids")
        if not module.training and len(ids) == 1: seen.append((ids.shape[1], torch.is_grad_enabled()))
    net[0].register_forward_pre_hook(look, with_kwargs=True)
    run = job(text, tmp_path, net, live=True, batch_size=2)
    run.wait()
    n = len(RunLog(tmp_path).events("sample", when="during"))
    starts = [i for i, (wide, _) in enumerate(seen) if wide > 1] + [len(seen)]
    passes = [b-a for a, b in zip(starts, starts[1:]) if b-a > 1]
    assert n > 1 and len(passes) == n + 2 and not any(grad for _, grad in seen)
    assert max(passes[1:-1]) <= 24 and max(passes) <= 40


def test_the_bar_tells_the_time_of_steps_that_train_and_says_when_it_measures(tmp_path, text, monkeypatch):
    seen, since, probing, end = [], [], app.Bar.probing, app.Bar.on_step_end

    def slow(bar, done, total):
        since.append(time.monotonic())
        time.sleep(1)
        probing(bar, done, total)

    def step(bar, *args, **kw):
        end(bar, *args, **kw)
        seen.append((bar.left_s, time.monotonic()-since[0], bar.bar.desc))
    monkeypatch.setattr(app.Bar, "probing", slow)
    monkeypatch.setattr(app.Bar, "on_step_end", step)
    job(text, tmp_path/"probe", progress=True, start="probe")
    left, gone, _ = seen[0]                         # behind a probe of some seconds, and one step
    assert gone > 3 and left < gone*(STEPS-1)/2 and seen[-1][0] == 0
    seen.clear()
    job(text, tmp_path/"meter", progress=True, start="meter")
    measured = [left is None for left, *_ in seen]
    assert measured[0] and not measured[-1] and {desc for *_, desc in seen} == {"training", "measuring"}


def test_two_runs_at_once_side_by_side(tmp_path, text):
    runs = [held(text, tmp_path/n, seed=i) for i, n in enumerate("ab")]
    v = CompareView(runs)
    assert v.names == ["a", "b"] and v.status == ("paused", "paused") and v.live
    steps = lambda: [int(n) for n in re.findall(r"</th>.*?<td>(\d+)</td>", v.table.value)]
    before = steps()
    for run in runs: run.resume()
    wait_for(lambda: v.table.value.count("complete") == 2 and steps() == [STEPS, STEPS], 120)
    assert max(before) < STEPS and not v.live and not v.error.value
    assert [r.result["steps"] for r in runs] == [STEPS, STEPS] and len(v.states[0].series("log", "loss")[0]) > 1
    v.close()


def test_a_new_run_in_a_folder_does_not_show_the_one_before(tmp_path, text):
    job(text, tmp_path/"a")
    run = job(text, tmp_path/"a", live=True)
    v = CompareView([run])
    if run.run_id is None: assert v.states[0].step == 0 and v.status == ("starting",)
    run.wait()
    v.close()


@pytest.mark.parametrize("config,what", [(ViTConfig, "an image model"), (WhisperConfig, "a speech model"),
                                         (LlavaConfig, "a vision-language model")])
@pytest.mark.parametrize("live", [False, True])
def test_a_model_that_does_not_read_text_is_refused_before_anything_is_done(tmp_path, config, what, live):
    config().save_pretrained(tmp_path/"model")
    with pytest.raises(ValueError, match=f"is {what}, and finetune.. takes causal language models.*ALFCallback"):
        finetune(str(tmp_path/"model"), tmp_path/"no text here", tmp_path/"run", live=live)
    assert not (tmp_path/"run").exists()


def test_eval_every_looks_without_being_live(tmp_path, text):
    job(text, tmp_path, eval_every=5)
    assert [e["step"] for e in RunLog(tmp_path).events("eval", when="during")] == [5, 10]
    with pytest.raises(ValueError, match="eval_every=-1"): job(text, tmp_path/"bad", eval_every=-1)


def test_bad_arguments_are_refused_in_the_cell(tmp_path, text):
    for kw, words in (
        (dict(budget=0.), "above 0"),
        (dict(steps=0), "steps=0"),
        (dict(resume=True), "nothing to resume"),
        (dict(data=tmp_path/"none.txt"), "none.txt"),
        (dict(model="nowhere/at-all"), "nowhere/at-all"),
    ):
        kw = {"model": (demo_model(), demo_tokenizer()), "data": text, **SETTINGS, **kw}
        with pytest.raises((ValueError, OSError), match=words): finetune(out=tmp_path/"bad", live=True, **kw)
    run = held(text, tmp_path/"run")
    with pytest.raises(RuntimeError, match="is training in the background"):
        job(text, tmp_path/"other", (run.model, demo_tokenizer()), live=True)
    with pytest.raises(RuntimeError, match="is writing to"): job(text, tmp_path/"run")
    run.resume()
    run.wait()


def test_stopped_it_has_all_and_goes_on_to_the_same_end(tmp_path, text):
    plain, net = [(demo_model(), demo_tokenizer()) for _ in range(2)]
    job(text, tmp_path/"plain", plain)
    out = tmp_path/"run"
    run = held(text, out, net=net)
    run.stop()
    run.wait()
    made = run.step
    assert run.status == "stopped" and made < STEPS and left(out) == ALL
    assert (run.result["status"], run.result["steps"]) == ("stopped", made)
    assert read_delta(out/"delta").metadata["steps"] == made and run.result["domain_loss_after"] is not None
    base = demo_model()
    apply_delta(base, out/"delta")
    assert same(weights(base), weights(net[0]))
    assert run.checkpoint and run.line.startswith("finetune((model, tokenizer), ") and "resume=True" in run.line
    card = (out/"delta"/"README.md").read_text()
    run.resume()
    assert run.alive and run.run_id == RunLog(out).begin["run_id"]
    run.wait()
    assert run.status == "complete" and same(weights(plain[0]), weights(net[0]))
    assert (out/"delta"/"README.md").read_text() != card and run.result["status"] == "complete"
    with pytest.raises(RuntimeError, match="cannot resume: this run is complete"): run.resume()


def test_stopped_without_saving_it_keeps_nothing_and_says_so(tmp_path, text):
    run = held(text, tmp_path)
    run.stop(save=False)
    run.wait()
    assert run.status == "stopped" and run.checkpoint is None and left(tmp_path) == ALL[1:]
    assert not list(tmp_path.glob("checkpoint-*"))
    assert run.result["delta_bytes"] is None and run.result["status"] == "stopped"
    assert "without saving" in (tmp_path/"report.html").read_text()
    with pytest.raises(RuntimeError, match="left no checkpoint"): run.resume()


def test_stopped_while_it_loads_it_leaves_nothing(tmp_path, text):
    demo_model().save_pretrained(tmp_path/"model")
    demo_tokenizer().save_pretrained(tmp_path/"model")
    run = job(text, tmp_path/"run", str(tmp_path/"model"), live=True)
    run.stop()
    run.wait()
    assert (run.status, run.step) == ("stopped", 0) and not (tmp_path/"run"/"delta").exists()


def fails_at(monkeypatch, step, error):
    end_step = ALFCallback.on_step_end

    def fail(self, args, state, control, **kw):
        end_step(self, args, state, control, **kw)
        if state.global_step == step: raise error
    monkeypatch.setattr(ALFCallback, "on_step_end", fail)


@pytest.mark.parametrize("live", [True, False])
def test_failed_it_says_where_to_go_on(tmp_path, text, monkeypatch, live):
    plain, net = [(demo_model(), demo_tokenizer()) for _ in range(2)]
    job(text, tmp_path/"plain", plain)
    with monkeypatch.context() as m:
        fails_at(m, 7, MemoryError("no memory left, said the test"))
        if live:
            run = job(text, tmp_path/"run", net, live=True, save_steps=3)
            with pytest.raises(MemoryError): run.wait()
            assert run.status == "failed" and run.checkpoint.endswith("checkpoint-6")
        else:
            with pytest.raises(MemoryError): job(text, tmp_path/"run", net, save_steps=3)
    assert left(tmp_path/"run") == ALL[1:] and len(RunLog(tmp_path/"run").events("error")) == 1
    page = (tmp_path/"run"/"report.html").read_text()
    assert "no memory left" in page and "checkpoint-6" in page and "resume=True" in page
    assert json.loads((tmp_path/"run"/"summary.json").read_text())["status"] == "failed"
    if not live: return
    run.resume()
    run.wait()
    assert run.status == "complete" and run.error is None and same(weights(plain[0]), weights(net[0]))


def test_a_failure_before_the_first_step_is_not_told_of_the_run_before(tmp_path, text):
    job(text, tmp_path)
    run = job(text, tmp_path, live=True, pin=["no.such.unit"])
    with pytest.raises(ValueError, match="no.such.unit"): run.wait()
    assert run.status == "failed" and run.run_id is None
    assert RunLog(tmp_path).status == "complete" and not RunLog(tmp_path).events("error")
    d = TrainingDashboard(run)          # follows its own run, not the one before it in the folder
    assert d.state.step == 0 and "no.such.unit" in d.what.value and f"step {STEPS}" not in d.progress.value
    d.close()


def test_a_checkpoint_now_also_while_it_waits(tmp_path, text):
    run = held(text, tmp_path)
    at = run.step
    run.save()
    wait_for(lambda: RunLog(tmp_path).events("save"))
    wait_for(lambda: run.status == "paused")
    assert run.step == at and (tmp_path/f"checkpoint-{at}"/"alf"/"state.json").is_file()
    run.resume()
    run.wait()
    assert run.status == "complete"


def test_a_prompt_is_answered_between_two_steps_and_changes_nothing(tmp_path, text):
    plain, net = [(demo_model(), demo_tokenizer()) for _ in range(2)]
    job(text, tmp_path/"plain", plain)
    run = held(text, tmp_path/"run", net=net)
    said = run.ask("The cat").result(60)
    assert isinstance(said, str) and run.status == "paused"
    with pytest.raises(ValueError, match="the prompt is empty"): run.ask(" ")
    run.resume()
    waits = run.ask("The sun")
    run.wait()
    assert isinstance(waits.result(0), str) or waits.exception() is not None
    assert RunLog(tmp_path/"run").events("sample", when="asked")[0]["text"] == said
    assert same(weights(plain[0]), weights(net[0]))
    with pytest.raises(RuntimeError, match="cannot ask: this run is complete"): run.ask("The cat")


def test_a_picture_of_what_goes_on_says_when_it_was_drawn(tmp_path, text):
    run = held(text, tmp_path)
    d = TrainingDashboard(run)
    assert re.search(r"as of \d\d \w+ \d{4}, \d\d:\d\d;", still_bundle(d)["text/html"])
    run.stop(save=False)
    run.wait()
    assert " as of " not in still_bundle(d)["text/html"]
    d.close()


class Later(ALFCallback):
    "Asks for another learning rate behind a step"
    at = None

    def on_step_end(self, args, state, control, **kw):
        if state.global_step == 4 and self.at is not None: self.scale_lr(self.at)
        super().on_step_end(args, state, control, **kw)


def test_the_learning_rate_is_steered_and_survives_a_resume(tmp_path, text, monkeypatch):
    asked = lambda at: monkeypatch.setattr("alf_nb.app.finetune.ALFCallback", type("Asks", (Later,), dict(at=at)))
    rates = lambda n: {e["step"]: e["learning_rate"] for e in RunLog(tmp_path/n).events("log")}
    nets = {n: (demo_model(), demo_tokenizer()) for n in ("plain", "half", "resumed")}
    job(text, tmp_path/"plain", nets["plain"])
    asked(.5)
    job(text, tmp_path/"half", nets["half"])
    plain, half = rates("plain"), rates("half")
    assert all(half[s] == plain[s] for s in range(1, 5))
    assert all(half[s] == pytest.approx(plain[s]/2) for s in range(5, STEPS+1))
    (e,) = RunLog(tmp_path/"half").events("scale_lr")
    assert (e["step"], e["factor"]) == (4, .5)
    with monkeypatch.context() as m:
        fails_at(m, 9, MemoryError("killed"))
        with pytest.raises(MemoryError): job(text, tmp_path/"resumed", nets["resumed"], save_steps=3)
    asked(None)
    again = (demo_model(), demo_tokenizer())
    job(text, tmp_path/"resumed", again, save_steps=3, resume=True)
    assert rates("resumed") == half and same(weights(again[0]), weights(nets["half"][0]))
    run = held(text, tmp_path/"live")
    for bad in (0, -1, "fast", float("nan")):
        with pytest.raises(ValueError, match="factor"): run.scale_lr(bad)
    run.scale_lr(2)
    wait_for(lambda: RunLog(tmp_path/"live").events("scale_lr"))
    run.resume()
    run.wait()
