"""Files that take long are the first that a worker gets: begun last, one of them would leave the other workers idle."""
import gc
from pathlib import Path

# seconds of CPU, roughly; a file that is not here takes less than twenty
SECONDS = {
    "test_demo.py": 240,
    "kernels/test_triton.py": 200,
    "test_two_writers.py": 180,
    "test_compare.py": 150,
    "test_ipywidgets7.py": 125,
    "browser/test_live.py": 115,
    "test_processes.py": 110,
    "test_tampered.py": 100,
    "test_resume.py": 95,
    "test_finish.py": 90,
    "test_efficiency.py": 90,
    "test_background.py": 85,
    "kernels/test_backends.py": 80,
    "test_training.py": 80,
    "test_faults.py": 80,
    "test_peers.py": 75,
    "test_audit.py": 70,
    "test_probe.py": 70,
    "test_masters.py": 70,
    "test_plan.py": 65,
    "test_quantize.py": 60,
    "test_package.py": 60,
    "test_tools.py": 55,
    "test_quiet.py": 50,
    "test_memory.py": 50,
    "test_rates.py": 50,
    "test_small_states.py": 45,
    "test_sources.py": 45,
    "test_optimizers.py": 45,
    "test_moved.py": 45,
    "test_policies.py": 40,
    "test_runlog.py": 35,
    "test_long.py": 30,
    "browser/test_hostile_text.py": 30,
    "test_docs.py": 30,
}


def seconds(path): return SECONDS.get(path.relative_to(Path(__file__).parent).as_posix(), 0)


def pytest_collection_modifyitems(items):
    "Stable, so tests of a file stay together and in their order; with --no-loadscope-reorder xdist keeps it"
    items.sort(key=lambda i: -seconds(i.path))


def pytest_collection_finish():
    """What has been imported stays, so nobody looks through it again: Trainer collects garbage each time it starts, and
    torch and transformers are a million objects, a third of a second"""
    gc.collect()
    gc.freeze()
