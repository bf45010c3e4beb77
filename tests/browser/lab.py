"""A real JupyterLab on loopback, and a notebook in it driven as a person does: Playwright and the system's Chromium."""
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

CHROMIUM = next(
    (p for n in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable") if (p := shutil.which(n))),
    None,
)
QUIET = {
    "@jupyterlab/apputils-extension": (
        "notification",
        {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True},
    ),
    "@jupyterlab/docmanager-extension": ("plugin", {"autosave": False}),
}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def jupyterlab(root, python=sys.executable, timeout=90):
    "Run `jupyter lab` with settings, data and workspaces of its own; yields (url, token)"
    root = Path(root).resolve()
    home = root/".lab"
    port, token = free_port(), secrets.token_hex(12)
    env = dict(
        os.environ,
        HOME=str(home),
        JUPYTER_CONFIG_DIR=str(home / "config"),
        JUPYTER_DATA_DIR=str(home / "data"),
        JUPYTER_RUNTIME_DIR=str(home / "runtime"),
        IPYTHONDIR=str(home / "ipython"),
        JUPYTER_PREFER_ENV_PATH="1",
        JUPYTERLAB_SETTINGS_DIR=str(home / "settings"),
        JUPYTERLAB_WORKSPACES_DIR=str(home / "workspaces"),
        XDG_CACHE_HOME=os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache")),
    )
    for extension, (name, settings) in QUIET.items():
        f = home/"settings"/extension/f"{name}.jupyterlab-settings"
        f.parent.mkdir(parents=True, exist_ok=True)
        f.write_text(json.dumps(settings))
    with open(home/"lab.log", "w") as log:
        server = subprocess.Popen(
            [
                python,
                "-m",
                "jupyterlab",
                "--no-browser",
                "--ip=127.0.0.1",
                f"--port={port}",
                "--ServerApp.port_retries=0",
                f"--IdentityProvider.token={token}",
                f"--ServerApp.root_dir={root}",
                "--LabApp.expose_app_in_browser=True",
                "--allow-root",
                "--ServerApp.terminals_enabled=False",
            ],
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    url, t0 = f"http://127.0.0.1:{port}", time.time()
    try:
        while True:
            try:
                urllib.request.urlopen(f"{url}/api/status?token={token}", timeout=2)
                break
            except OSError:
                if server.poll() is not None or time.time() - t0 > timeout:
                    raise RuntimeError(f"JupyterLab did not start:\n{(home/'lab.log').read_text()[-3000:]}") from None
                time.sleep(.2)
        yield url, token
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try: server.wait(15)
        except subprocess.TimeoutExpired: os.killpg(server.pid, signal.SIGKILL)


@contextmanager
def browser(**kw):
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        b = p.chromium.launch(
            executable_path=CHROMIUM,
            headless=True,
            args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"],
        )
        try: yield b.new_context(viewport=dict(width=1280, height=1500), **kw)
        finally: b.close()


class Notebook:
    "A notebook open in JupyterLab"
    def __init__(self, context, base, path):
        url, token = base
        self.page, self.errors, self.requests = context.new_page(), [], []
        self.page.on("pageerror", lambda e: self.errors.append(str(e)))
        self.page.on(
            "console", lambda m: m.type == "error" and self.errors.append(f"{m.text} ({m.location.get('url', '')})")
        )
        self.page.on("request", lambda r: self.requests.append(r.url))
        self.page.goto(f"{url}/lab/tree/{path}?token={token}&reset")
        self.page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=60_000)
        self.page.wait_for_function(
            "() => !!window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel", timeout=60_000
        )
        self.ready()

    def ready(self):
        "Wait until the kernel is there and idle; one that died has been started again"
        # the status circle says idle before the connection is ready, and a cell run then is dropped
        self.page.evaluate(
            "async () => { const s = window.jupyterapp.shell.currentWidget.sessionContext; await s.ready; await"
            " s.session.kernel.info; }"
        )
        self.page.wait_for_function(
            "() => { const k = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel; return"
            " k.connectionStatus === 'connected' && k.status === 'idle' }",
            timeout=60_000,
        )

    def command(self, name, **args):
        return self.page.evaluate("([c, a]) => window.jupyterapp.commands.execute(c, a).then(() => null)", [name, args])
    def source(self, i):
        return self.page.evaluate(
            "i => window.jupyterapp.shell.currentWidget.content.widgets.filter(c => c.model.type ==="
            " 'code')[i].model.sharedModel.getSource()",
            i,
        )
    def write(self, i, text):
        "Paste `text` into the empty code cell `i`"
        self.cell(i).locator(".jp-InputArea-editor").click()
        self.page.keyboard.insert_text(text)
    def cell(self, i): return self.page.locator(".jp-Notebook .jp-CodeCell").nth(i)
    def output(self, i): return self.cell(i).locator(".jp-OutputArea").inner_text()

    def run(self, i, wait=True, timeout=60):
        "Click into code cell `i` and press Shift-Enter"
        self.cell(i).locator(".jp-InputArea-editor").click(position=dict(x=60, y=8))
        self.page.keyboard.press("Shift+Enter")
        if wait: self.wait_done(i, timeout)

    def ask(self, i, timeout=60):
        "Run the cell and return its last output"
        self.run(i, timeout=timeout)
        said = self.cell(i).locator(".jp-OutputArea-output").last.inner_text().strip()
        assert "Traceback" not in said, said
        return said

    def wait_done(self, i, timeout=60):
        self.page.wait_for_function(
            "i => /^\\[\\d+\\]:$/.test(document.querySelectorAll('.jp-Notebook"
            " .jp-CodeCell')[i].querySelector('.jp-InputPrompt').textContent)",
            arg=i,
            timeout=timeout * 1000,
        )

    def theme(self, name):
        self.command("apputils:change-theme", theme=f"JupyterLab {name}")
        self.page.wait_for_function(
            "name => document.body.dataset.jpThemeName === name", arg=f"JupyterLab {name}", timeout=20_000
        )
        self.page.locator("#jupyterlab-splash").wait_for(state="detached", timeout=20_000)

    def restart(self):
        self.page.evaluate(
            "async () => { const s = window.jupyterapp.shell.currentWidget.sessionContext; await"
            " s.session.kernel.restart(); await s.session.kernel.info; }"
        )

    def close(self):
        self.page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
        self.page.close()
