"A delta with its card on the Hub: a real HTTP server speaks the Hub's calls, huggingface_hub's own client makes them."
import base64
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import example, given, settings, strategies as st

from alf_nb.app.publish import card_text, push_delta
from alf_nb.model.delta import apply_delta, save_delta
from alf_nb.model.fingerprint import fingerprint
from alf_nb.demo import demo_model


class Hub(BaseHTTPRequestHandler):
    "The calls of an upload: make a repository, ask how to send each file, commit"
    def answer(self, data, code=200):
        body = json.dumps(data).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.server.calls.append(("GET", self.path))
        self.answer({}, 404)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        here = f"http://127.0.0.1:{self.server.server_port}"
        self.server.calls.append(("POST", self.path))
        if self.headers.get("Authorization") != "Bearer right":
            return self.answer(dict(error="Invalid username or password."), 401)
        if self.path == "/api/repos/create":
            self.server.made.append(json.loads(body))
            return self.answer(dict(url=f"{here}/me/delta", name="me/delta", id="me/delta"))
        if self.path == "/api/validate-yaml": return self.answer(dict(errors=[], warnings=[]))
        if self.path.endswith("/preupload/main"):
            return self.answer(
                dict(
                    files=[
                        dict(path=f["path"], uploadMode="regular", shouldIgnore=False)
                        for f in json.loads(body)["files"]
                    ]
                )
            )
        if self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer(
                dict(success=True, commitOid="0" * 40, commitUrl=f"{here}/me/delta/commit/{'0'*40}", hookOutput="")
            )
        self.answer(dict(error="no such call"), 404)

    def log_message(self, *a): pass


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.calls, server.made, server.files = [], [], {}
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def delta(tmp_path):
    model = demo_model()
    base = fingerprint(model, name="someone/tiny")
    with torch.no_grad(): model.lm_head.weight += 1
    save_delta(model, base, tmp_path/"delta")
    (tmp_path/"delta"/"secret.txt").write_text("mine")
    return tmp_path/"delta", model


def test_a_delta_comes_back_from_the_hub(hub, delta, tmp_path):
    folder, model = delta
    url = push_delta(folder, "me/delta", token="right", endpoint=f"http://127.0.0.1:{hub.server_port}", license="mit")
    assert (
        url.endswith("/me/delta")
        and (hub.made[0].get("visibility") == "private" or hub.made[0].get("private"))
        and set(hub.files) == {"delta.safetensors", "delta.json", "README.md"}
    )
    (got := tmp_path/"got").mkdir()
    for name, data in hub.files.items(): (got/name).write_bytes(data)
    again = demo_model()
    apply_delta(again, got)
    assert all(torch.equal(p, q) for p, q in zip(model.state_dict().values(), again.state_dict().values()))
    card = ModelCard.load(got/"README.md")
    assert (
        card.data.base_model == "someone/tiny"
        and card.data.license == "mit"
        and 'snapshot_download("me/delta")' in card.text
    )


def test_a_refusal_is_told_and_nothing_is_lost(hub, delta):
    with pytest.raises(OSError, match="cannot push.*401.*Nothing is lost"):
        push_delta(delta[0], "me/delta", token="wrong", endpoint=f"http://127.0.0.1:{hub.server_port}")
    assert not hub.files and (delta[0]/"README.md").exists()


@pytest.mark.parametrize("name", ["delta.json", "delta.safetensors"])
@pytest.mark.parametrize("odd", ["link", "pipe"])
def test_what_a_link_points_to_is_not_sent(hub, delta, tmp_path, name, odd):
    folder, _ = delta
    (tmp_path/"private").write_text("key")
    (folder/name).unlink()
    if odd == "link": (folder/name).symlink_to(tmp_path/"private")
    else: os.mkfifo(folder/name)
    with pytest.raises(ValueError, match=f"{name} is a {'named pipe' if odd == 'pipe' else odd}, not a file"):
        push_delta(folder, "me/delta", token="right", endpoint=f"http://127.0.0.1:{hub.server_port}")
    assert not hub.files and not hub.made


def test_a_card_is_not_written_through_a_link_and_what_it_points_to_is_not_sent(hub, delta, tmp_path):
    folder, _ = delta
    for target in (tmp_path/"private", tmp_path/"not there"):
        (tmp_path/"private").write_text("key")
        (folder/"README.md").unlink(missing_ok=True)
        (folder/"README.md").symlink_to(target)
        push_delta(folder, "me/delta", token="right", endpoint=f"http://127.0.0.1:{hub.server_port}")
        assert (
            (tmp_path / "private").read_text() == "key"
            and not (tmp_path / "not there").exists()
            and not (folder / "README.md").is_symlink()
        )
        assert hub.files["README.md"].startswith(b"---") and set(hub.files) == {
            "delta.safetensors",
            "delta.json",
            "README.md",
        }


def test_without_a_network_it_says_so(delta, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="HF_HUB_OFFLINE is set"): push_delta(delta[0], "me/delta", token="t")


@settings(max_examples=25, deadline=None)
@given(st.text(min_size=1, max_size=40))
@example("a```\n---\nlicense: mine")
def test_any_name_makes_a_valid_card(tmp_path_factory, name):
    folder = tmp_path_factory.mktemp("card")
    model = torch.nn.Linear(2, 2)
    base = fingerprint(model, name=name)
    with torch.no_grad(): model.weight += 1
    save_delta(model, base, folder)
    text = card_text(folder)
    card = ModelCard(text)
    assert card.data.library_name == "alf_nb" and text.count("```") == 2 and card.data.base_model in (None, name)
