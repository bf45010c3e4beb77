"""Run the notebooks as `nbdev-test` does, each in a process of its own, as many at a time as there are cores.

A notebook runs the code that it exports, so it changes classes of modules that others use too (`@patch`): in the
processes of nbdev-test, which run one notebook after another, the next one sees that. Here none does. What
takes long to import is imported once, before the processes part. Those that take longest come first, or one of them
would run alone at the end.
"""
import argparse, contextlib, gc, importlib, multiprocessing, os, sys, time
from importlib.util import find_spec
from multiprocessing.connection import wait
from pathlib import Path

from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import test_nb

import interpreter

root = Path(__file__).resolve().parents[1]
# 54 to 12 s of CPU
LONGEST = (
    '4_compare',
    '2_choose_live',
    '9_big_model',
    '6_classifier',
    '8_package',
    '06_plan',
    '10_images',
    '19_trainer',
)


# what our modules import and takes long; our own are imported by each notebook, since they change classes of others
HEAVY = 'torch', 'transformers.trainer', 'datasets', 'peft', 'numba', 'ipywidgets', 'accelerate', 'safetensors.torch'


def import_all():
    "What takes long to import"
    for name in HEAVY:
        with contextlib.suppress(ImportError): importlib.import_module(name)     # of an extra that is not installed
    if os.environ.get('TRITON_INTERPRET') == '1' and find_spec('triton'): interpreter.look_once()
    # Trainer collects garbage at each start, and would look through all of it again
    gc.collect()
    gc.freeze()


def run(path, config):
    "Ends this process with status 1 if a cell fails, and says which"
    os.chdir(path.parent)
    passed, _ = test_nb(
        path, skip_flags=config.tst_flags, basepath=config.config_path, cell_timeout=config.cell_timeout
    )
    sys.exit(not passed)


def run_all(paths, workers, config):
    "Seconds of each notebook, and those that failed"
    parts = multiprocessing.get_context('spawn' if sys.platform == 'darwin' else 'fork')
    todo, running, took, failed = list(paths), {}, {}, []
    while todo or running:
        while todo and len(running) < workers:
            path = todo.pop(0)
            process = parts.Process(target=run, args=(path, config))
            process.start()
            running[process.sentinel] = path, process, time.monotonic()
        for sentinel in wait(list(running)):
            path, process, begun = running.pop(sentinel)
            process.join()
            took[path] = time.monotonic() - begun
            if process.exitcode: failed.append(path)
    return took, failed


def main():
    ap = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    ap.add_argument('paths', nargs='*', type=Path, help="all notebooks if none is named")
    ap.add_argument('--workers', type=int, default=os.cpu_count())
    ap.add_argument('--timing', action='store_true', help="how long each took")
    a = ap.parse_args()
    import_all()
    config = get_config(root)
    paths = sorted(p.absolute() for p in a.paths or nbglob(config.nbs_path, as_path=True))
    paths.sort(key=lambda p: LONGEST.index(p.stem) if p.stem in LONGEST else len(LONGEST))
    took, failed = run_all(paths, a.workers, config)
    if a.timing:
        for p in sorted(took, key=took.get, reverse=True): print(f"{took[p]:6.1f} s {p.name}")
    if failed: sys.exit("failed: " + ', '.join(p.name for p in failed))
    print(f"{len(took)} notebooks ran")


if __name__ == '__main__': main()
