"""Processes that tests start and kill: forked from a server that has imported everything once, so that each costs a
moment. What they do is a function of a test module."""
import gc
import multiprocessing
import os
from multiprocessing import forkserver
from pathlib import Path

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["warm"])
event = context.Event


def start():
    "The server; it imports from the path of the environment, not from ours"
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *([before] if before else [])])
    forkserver.ensure_running()
    if before is None: del os.environ["PYTHONPATH"]
    else: os.environ["PYTHONPATH"] = before


def _frozen(work, *args):
    "See conftest.py: of the imports of a test module, too"
    gc.freeze()
    work(*args)


def begin(work, *args):
    "A process that has begun; see multiprocessing.Process"
    start()
    process = context.Process(target=_frozen, args=(work, *args))
    process.start()
    return process


def run(work, *args, timeout=300):
    "The exit code of `work`; the number of the signal that killed it, negative"
    process = begin(work, *args)
    process.join(timeout)
    if process.is_alive():
        process.kill()
        raise AssertionError(f"{work.__name__} hangs")
    return process.exitcode
