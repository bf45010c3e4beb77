"""Processes that tests start and kill: forked from a server that has imported everything once, so that each costs a
moment. What they do is a function of a test module."""
import gc
import multiprocessing

PRELOAD = [
    "torch",
    "transformers.trainer",
    "alf_nb.core.checkpoints",
    "alf_nb.train.trainer",
    "alf_nb.study.compare",
    "alf_nb.app.finetune",
    "alf_nb.demo",
]


context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(PRELOAD)
event = context.Event


def _frozen(work, *args):
    "See tests/conftest.py"
    gc.freeze()
    work(*args)


def begin(work, *args):
    "A process that has begun; see multiprocessing.Process"
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
