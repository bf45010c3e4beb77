"""Fail when what is generated is out of step: exporting or cleaning the notebooks must change nothing.

Content is compared before and after, not with git, so it runs with uncommitted work too. What changed stays changed:
look at it and commit it.
"""
import json, subprocess, sys, sysconfig
from pathlib import Path

root = Path(__file__).resolve().parents[1]
scripts = Path(sysconfig.get_path('scripts'))


def generated():
    "Content of everything that nbdev may write"
    files = [
        p
        for d in ('nbs', 'alf_nb')
        for p in (root / d).rglob('*')
        if p.is_file() and not {'__pycache__', '.ipynb_checkpoints'} & set(p.parts)
    ]
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in [*files, root/'pyproject.toml']}


def run(command, what):
    "Run an nbdev command; what it changed, a line for each file"
    before = generated()
    res = subprocess.run([scripts/command], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if res.returncode: sys.exit(f"{res.stdout}{command} failed")
    after = generated()
    return [f"{command} changed {p}: {what}" for p in sorted(before | after) if before.get(p) != after.get(p)]


def stored_widgets():
    "Notebooks with stored widget state: viewers then load scripts from the network and show nothing offline"
    return [
        f"{p.relative_to(root).as_posix()} stores widget state: remove metadata.widgets"
        for p in sorted((root / 'nbs').rglob('*.ipynb'))
        if '.ipynb_checkpoints' not in p.parts and 'widgets' in json.loads(p.read_text(encoding='utf-8'))['metadata']
    ]


def main():
    wrong = (
        run('nbdev-export', "edit the notebook, not the module, and commit both")
        + run('nbdev-clean', "commit notebooks cleaned")
        + stored_widgets()
    )
    if wrong: sys.exit('\n'.join(wrong))
    print("exported modules and notebooks are in step")


if __name__ == '__main__': main()
