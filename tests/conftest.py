"""Files that take long are the first that a worker gets: begun last, one of them would leave the other workers idle."""
import gc
from pathlib import Path

# seconds, roughly; a file that is not here takes less than fifteen
SECONDS = {
    "kernels/test_triton.py": 90,
    "test_processes.py": 80,
    "test_memory.py": 73,
    "browser/test_grid.py": 72,
    "kernels/test_backends.py": 59,
    "test_resume.py": 58,
    "browser/test_finetune_live.py": 56,
    "test_prefix.py": 55,
    "test_background.py": 51,
    "test_plan.py": 48,
    "test_live_run.py": 44,
    "browser/test_live.py": 44,
    "test_docs.py": 44,
    "test_probe.py": 42,
    "test_training.py": 42,
    "test_small_states.py": 38,
    "test_sources.py": 37,
    "test_finish.py": 37,
    "test_quiet.py": 35,
    "test_optimizers.py": 33,
    "test_compare.py": 32,
    "test_demo.py": 29,
    "test_moved.py": 28,
    "test_masters.py": 25,
    "test_tampered.py": 24,
    "test_meter.py": 24,
    "test_two_writers.py": 22,
    "test_policies.py": 22,
    "test_widgets_map.py": 21,
    "test_attention_report.py": 20,
    "test_tools.py": 20,
    "test_busy.py": 19,
    "test_columns.py": 18,
    "test_attention.py": 17,
    "test_peers.py": 17,
    "test_faults.py": 16,
    "test_widgets_dashboard.py": 15,
    # of slow tests, which `make test-all` adds
    "test_ipywidgets7.py": 125,
    "test_efficiency.py": 90,
    "test_audit.py": 70,
    "test_package.py": 60,
    "test_long.py": 30,
    "browser/test_hostile_text.py": 30,
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
