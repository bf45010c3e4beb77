"""The moving picture of the README: a run that learns and is steered, in a real JupyterLab.

    python tools/animation.py [--out nbs/images/steering.webp]

SmolLM2 learns from the Python reference with short steps. Every second a picture is taken; between them the budget is
lowered in the dashboard, applied at once, and the run is paused. Needs Playwright, Chromium or Chrome, and Pillow.
"""
import argparse
import io
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'tests'/'browser'))
from lab import Notebook, browser, jupyterlab  # noqa: E402

CELLS = (
    "import warnings; warnings.simplefilter('ignore')\nfrom alf_nb.all import *\n"
    "run = finetune(steps=90, max_length=64, batch_size=2, eval_blocks=4, interval=15, warm_up=6, budget=.3, live=True,"
    " out='run')",
    'TrainingDashboard(run)',
)
WIDE, HIGH = 720, 1290             # of the written picture, and of what is taken of the page, pixels
SHOWN_MS, LAST_MS = 130, 2500      # of a frame, and of the last one


class Film:
    "Pictures of what a cell shows, one after the other, each once"
    def __init__(self, nb):
        self.nb, self.frames = nb, []

    def shoot(self):
        shown = self.nb.cell(1).locator('.jp-OutputArea-output').first
        shown.evaluate('e => e.scrollIntoView()')      # it grows
        box = shown.bounding_box()
        clip = dict(x=box['x'], y=max(0, box['y']), width=box['width']+8, height=HIGH)
        frame = Image.open(io.BytesIO(self.nb.page.screenshot(clip=clip))).convert('RGB')
        if not self.frames or frame.tobytes() != self.frames[-1].tobytes(): self.frames.append(frame)

    def roll(self, until, seconds=240, least=0):
        "A picture a second until something is true"
        begun = time.time()
        while not until() or time.time() < begun+least:
            if time.time() > begun+seconds: raise TimeoutError(f"after {len(self.frames)} pictures it is still not so")
            self.shoot()
            time.sleep(1)

    def write(self, path):
        w, h = self.frames[0].size
        small = [f.resize((WIDE, round(h*WIDE/w)), Image.LANCZOS) for f in self.frames]
        lasting = [SHOWN_MS]*(len(small)-1) + [LAST_MS]
        small[0].save(path, save_all=True, append_images=small[1:], duration=lasting, loop=0, quality=70, method=6)


def act(nb, film):
    "What a person does"
    cell = nb.cell(1)
    button = lambda name: cell.get_by_role('button', name=name, exact=False).first
    step = lambda: int(nb.page.evaluate(
        "() => +(/step (\\d+) of/.exec(document.querySelectorAll('.jp-CodeCell')[1].innerText) || [0, 0])[1]"))
    while not step(): time.sleep(1)
    film.roll(lambda: step() > 30)
    button('Threshold').click()
    film.roll(lambda: True, least=3)
    budget = cell.get_by_label('budget ≤, %').first
    for percent in ('25', '20', '15'):
        budget.fill(percent)
        budget.press('Enter')
        film.roll(lambda: True, least=2)
    button('Apply now').click()
    film.roll(lambda: True, least=3)
    button('Threshold').click()
    film.roll(lambda: step() > 70, least=3)
    button('Pause').click()
    film.roll(lambda: button('Resume').is_visible(), least=2)


def main():
    ap = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    ap.add_argument('--out', type=Path, default=ROOT/'nbs'/'images'/'steering.webp')
    a = ap.parse_args()
    with tempfile.TemporaryDirectory() as folder, jupyterlab(Path(folder)) as base, browser() as context:
        cells = [nbformat.v4.new_code_cell(c) for c in CELLS]
        kernel = dict(name='python3', display_name='Python 3', language='python')
        notebook = nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=kernel))
        nbformat.write(notebook, Path(folder)/'film.ipynb')
        nb = Notebook(context, base, 'film.ipynb')
        nb.run(0, timeout=180)
        nb.run(1)
        film = Film(nb)
        nb.cell(1).get_by_role('button', name='Pause').first.wait_for(timeout=120_000)
        act(nb, film)
        nb.close()
    film.write(a.out)
    print(f"{a.out.name}: {len(film.frames)} pictures, {a.out.stat().st_size/1e6:.1f} MB")


if __name__ == '__main__': main()
