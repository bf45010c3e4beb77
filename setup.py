"""Reads the nbdev-style `settings.ini` for what `pyproject.toml` declares dynamic."""
import os, re, tempfile
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]

statuses = [
    "0 - Unused",
    "1 - Planning",
    "2 - Pre-Alpha",
    "3 - Alpha",
    "4 - Beta",
    "5 - Production/Stable",
    "6 - Mature",
    "7 - Inactive",
]
init = (here / settings["lib_path"] / "__init__.py").read_text(encoding="utf-8")
version = re.search(r'^__version__\s*=\s*"([^"]+)"', init, re.M).group(1)   # nbdev-bump-version edits this

# The same sources give the same wheel, byte for byte, but for what the build's own setuptools and zlib sign
# as hatchling dates files: the same with and without a git history
os.environ.setdefault("SOURCE_DATE_EPOCH", "1580601600")
scratch = tempfile.TemporaryDirectory(prefix="alf_nb-build-")   # what an earlier build left in build/ stays out


class PlainRights(bdist_wheel):
    "Files get the usual rights, not those that they have in this folder"
    def write_wheelfile(self, wheelfile_base, *args, **kw):         # the last step before packing
        super().write_wheelfile(wheelfile_base, *args, **kw)
        for p in Path(wheelfile_base).parent.rglob("*"): p.chmod(0o755 if p.is_dir() else 0o644)


def words(key): return settings.get(key, "").split()


setup(
    version=version,
    keywords=words("keywords"),
    classifiers=[
        f"Development Status :: {statuses[int(settings['status'])]}",
        f"Intended Audience :: {settings['audience']}",
        f"Natural Language :: {settings['language']}",
        "Programming Language :: Python :: 3",
        "Framework :: Jupyter",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    cmdclass={"bdist_wheel": PlainRights},
    options={"build": {"build_base": scratch.name}},
    packages=find_packages(include=[settings["lib_path"], settings["lib_path"] + ".*"]),
    package_data={settings["lib_path"]: ["static/*", "data/*"]},
    install_requires=words("requirements"),
    extras_require={k: words(f"{k}_requirements") for k in ("dev", "offline", "colab", "quantize")},
    entry_points={
        "console_scripts": words("console_scripts"),
        "nbdev": [f"{settings['lib_path']}={settings['lib_path']}._modidx:d"],
    },
)
