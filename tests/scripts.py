"A script of the project as a module: those in tools/ are no package."
import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def script(path):
    "The module that a file is, `path` below the project's root"
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT/path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
