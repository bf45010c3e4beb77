"""Which layers of my model should learn? Adaptive layer-wise fine-tuning (ALF) of Hugging Face transformers."""
__version__ = "0.1.0"


def _require(*packages):
    "ImportError, in one sentence, if one of `packages` is installed and older than alf_nb's metadata asks for; stands first in rooms that import large libraries"
    import re
    from importlib import metadata      # here: `import alf_nb` costs nothing
    number = lambda version: [int(n) for n in re.match(r'[\d.]*', version)[0].split('.') if n]       # 2.7.0a0+git of a vendor is 2.7.0
    def installed(name):
        try: return metadata.version(name)
        except metadata.PackageNotFoundError: return None               # the import that follows says so
    try: needs = metadata.requires(__name__) or ()
    except metadata.PackageNotFoundError: return                        # a checkout on the path: nothing says what is needed
    for name,least in (m.groups() for r in needs if (m := re.match(r'([\w-]+)>=([\d.]+)', r)) and m[1] in packages):
        if (found := number(installed(name) or '')) and found+[0]*3 < number(least):
            raise ImportError(f"alf_nb {__version__} needs {name}>={least}, found {installed(name)}: pip install -U '{name}>={least}'")
