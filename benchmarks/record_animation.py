"""Record the README's moving picture: a run of SmolLM2 in JupyterLab, steered by mouse.

    python benchmarks/record_animation.py [--out nbs/images/steering.gif] [--steps 60] [--length 64] [--work folder]

Starts JupyterLab and Chromium, trains SmolLM2-135M in the background, drags the budget, applies it, waits until the
map shows it, and pauses. Waiting is cut short: a frame is taken for every step of training, whatever a step takes. The
frames are kept in --work, so that the picture can be made again without a run (--again). Needs Chromium, Playwright
and Pillow.
"""
import argparse
import io
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat

root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root/'tests'/'browser'))
from lab import Notebook, browser, jupyterlab  # noqa: E402

WIDE, HIGH, SHOWN = 1720, 1010, 1000        # pixels of the window, and of the width of the picture
SETUP = """
import warnings; warnings.simplefilter('ignore')
import ipywidgets as W
from alf_nb.all import *
run = finetune(steps={steps}, length={length}, batch_size=1, eval_blocks=4, interval=8, out='run', live=True)
picker, dashboard = ThresholdPicker(run), TrainingDashboard(run)
for view, part in (picker, '0 0 47%'), (dashboard, '0 0 52%'): view.box.layout.flex = part
"""
SHOW = "W.HBox([picker.box, dashboard.box], layout=dict(justify_content='space-between', align_items='flex-start'))"
POINTER = """() => {
  const dot = document.createElement('div'); dot.id = 'pointer';
  dot.style = 'position:fixed;z-index:9999;width:22px;height:22px;border-radius:50%;background:#f59e0bb0;border:2px '
    + 'solid #92400e;pointer-events:none;transform:translate(-50%,-50%);left:-50px;top:-50px';
  document.body.append(dot);
  for (const kind of ['mousemove', 'pointermove']) document.addEventListener(kind, e => {
    dot.style.left = e.clientX + 'px'; dot.style.top = e.clientY + 'px'; }, true);
}"""


class Film:
    "Frames, and how long each is shown"
    def __init__(self, page, clip, folder):
        self.page, self.clip, self.folder, self.ms = page, clip, folder, []

    def shoot(self, ms):
        self.page.screenshot(path=self.folder/f'{len(self.ms):03}.png', clip=self.clip)
        self.ms.append(ms)
        (self.folder/'ms.txt').write_text(' '.join(map(str, self.ms)))


def step_of(cell):
    "The step that the dashboard shows"
    found = re.search(r'step\s+(\d+)\s+of\s+\d+', cell.inner_text())
    return int(found[1]) if found else 0


def watch(film, cell, steps, ms=260, timeout=900):
    "A frame for each of the next steps"
    first = last = step_of(cell)
    end = time.monotonic() + timeout
    while last < first + steps and time.monotonic() < end:
        film.page.wait_for_timeout(300)
        if (now := step_of(cell)) != last:
            last = now
            film.shoot(ms)


def move(film, to, n=5, ms=60):
    "Move the pointer there"
    x, y = to
    at = getattr(film, 'at', (WIDE/2, HIGH/2))
    for i in range(1, n + 1):
        film.page.mouse.move(at[0] + (x-at[0])*i/n, at[1] + (y-at[1])*i/n)
        film.shoot(ms)
    film.at = x, y


def middle(locator):
    box = locator.bounding_box()
    return box['x'] + box['width']/2, box['y'] + box['height']/2


def play(film, cell):
    "Watch, drag the budget, apply, watch, pause"
    button = lambda name: cell.get_by_role('button', name=re.compile(rf'\b{name}$')).first
    cell.get_by_text(re.compile(r'^Training$')).first.wait_for()
    watch(film, cell, 10)
    handle = cell.locator('.noUi-handle:visible').nth(1)        # the budget's
    move(film, middle(handle))
    film.page.mouse.down()
    x, y = film.at
    track = cell.locator('.noUi-target:visible').nth(1).bounding_box()
    goal = track['x'] + .55*track['width']
    for i in range(1, 13):
        film.page.mouse.move(x + (goal-x)*i/12, y)
        film.page.wait_for_timeout(400)
        film.shoot(160)
    film.page.mouse.up()
    film.at = goal, y
    film.page.wait_for_timeout(1500)
    film.shoot(900)
    move(film, middle(button('Apply now')))
    film.page.mouse.down()
    film.shoot(150)
    film.page.mouse.up()
    watch(film, cell, 9)
    move(film, middle(button('Pause')))
    film.page.mouse.click(*film.at)
    button('Resume').wait_for(timeout=300_000)
    film.page.wait_for_timeout(1500)
    film.shoot(1800)


def develop(folder, out):
    "Frames to one picture of few colours that the whole picture shares"
    from PIL import Image
    ms = list(map(int, (folder/'ms.txt').read_text().split()))
    frames = [Image.open(folder/f'{i:03}.png').convert('RGB') for i in range(len(ms))]
    size = SHOWN, round(frames[0].height*SHOWN/frames[0].width)
    frames = [f.resize(size, Image.Resampling.LANCZOS) for f in frames]
    strip = Image.new('RGB', (size[0], size[1]*3))
    for i, f in enumerate((frames[0], frames[len(frames)//2], frames[-1])): strip.paste(f, (0, i*size[1]))
    palette = strip.quantize(160, method=Image.Quantize.MEDIANCUT)
    frames = [f.quantize(palette=palette, dither=Image.Dither.NONE) for f in frames]
    whole = io.BytesIO()
    frames[0].save(whole, 'GIF', save_all=True, append_images=frames[1:], duration=ms, loop=0, optimize=False)
    out.write_bytes(whole.getvalue())
    print(f"{out}: {len(ms)} frames, {sum(ms)/1000:.1f} s, {size[0]} × {size[1]}, {len(whole.getvalue())/1e6:.2f} MB")


def record(folder, steps, length):
    lab_root = Path(tempfile.mkdtemp(prefix='animation-'))
    cells = [nbformat.v4.new_code_cell(s) for s in (SETUP.format(steps=steps, length=length), SHOW, 'run.stop()')]
    kernel = dict(kernelspec=dict(name='python3', display_name='Python 3', language='python'))
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), lab_root/'run.ipynb')
    with jupyterlab(lab_root) as base, browser() as context:
        nb = Notebook(context, base, 'run.ipynb')
        nb.page.set_default_timeout(120_000)
        nb.page.set_viewport_size(dict(width=WIDE, height=HIGH + 400))
        nb.command('application:toggle-left-area')
        nb.run(0, timeout=600)
        nb.run(1, timeout=300)
        cell = nb.cell(1)
        nb.page.screenshot(path=folder/'window.png')
        cell.locator('.noUi-handle:visible').nth(1).wait_for()
        nb.page.evaluate(POINTER)
        cell.locator('.jp-OutputArea').first.scroll_into_view_if_needed()
        nb.page.wait_for_timeout(1000)
        box = cell.locator('.jp-OutputArea-output').first.bounding_box()
        clip = dict(x=box['x'], y=box['y'], width=box['width'], height=min(HIGH, box['height']))
        play(Film(nb.page, clip, folder), cell)
        nb.run(2, timeout=300)
        nb.close()


def main():
    ap = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    ap.add_argument('--out', type=Path, default=root/'nbs'/'images'/'steering.gif')
    ap.add_argument('--steps', type=int, default=60)
    ap.add_argument('--length', type=int, default=64)
    ap.add_argument('--work', type=Path, default=root/'build'/'animation')
    ap.add_argument('--again', action='store_true', help="only make the picture, from the frames in --work")
    a = ap.parse_args()
    a.work.mkdir(parents=True, exist_ok=True)
    if not a.again: record(a.work, a.steps, a.length)
    develop(a.work, a.out)


if __name__ == '__main__': main()
