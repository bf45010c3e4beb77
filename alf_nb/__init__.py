"""Which layers of my model should learn? Adaptive layer-wise fine-tuning (ALF) of Hugging Face transformers."""
__version__ = "0.1.0"

# name → the module that has it, loaded when the name is first used: `import alf_nb` alone brings in no torch
_FACE = dict(
    ALFCallback='train.trainer', ALFConfig='core.config', ALFLoop='train.loop', finetune='app.finetune',
    train_in_background='train.background',
    TrainingDashboard='widgets.dashboard', ThresholdPicker='widgets.picker', RunLog='core.runlog',
    write_report='report.page', save_delta='model.delta', apply_delta='model.delta',
    compare_policies='study.compare', audit_signals='study.audit',
)
__all__ = list(_FACE)


def __getattr__(name):
    if name not in _FACE: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib
    from .core.system import quiet_imports      # here: `import alf_nb` costs nothing
    with quiet_imports(): return getattr(importlib.import_module(f'{__name__}.{_FACE[name]}'), name)


def __dir__(): return sorted([*globals(), *_FACE])


def require_versions(*packages):
    """ImportError, in one sentence, if one of `packages` is installed and older than alf_nb's metadata asks for.
    Stands first in modules that import large libraries."""
    import re
    from importlib import metadata      # here: `import alf_nb` costs nothing

    def number(version):
        "2.7.0a0+git of a vendor is 2.7.0"
        return [int(n) for n in re.match(r'[\d.]*', version)[0].split('.') if n]

    def installed(name):
        try: return metadata.version(name)
        except metadata.PackageNotFoundError: return None       # the import that follows says so

    try: needs = metadata.requires(__name__) or ()
    except metadata.PackageNotFoundError: return                # a checkout on the path: nothing says what is needed
    bounds = [m.groups() for r in needs if (m := re.match(r'([\w-]+)>=([\d.]+)', r)) and m[1] in packages]
    for name, least in bounds:
        found = number(installed(name) or '')
        if found and found+[0]*3 < number(least):
            raise ImportError(f"alf_nb {__version__} needs {name}>={least}, found {installed(name)}: "
                              f"pip install -U '{name}>={least}'")
