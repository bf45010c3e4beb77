"""Run notebooks and keep the pictures that they end with: `python tools/stills.py NOTEBOOK …`.

Kept are the outputs of cells that show a picture, and of those that had an output before; what other cells print stays
out.
A view keeps its picture up to date until its run is over, so what is kept shows the end.
"""
import os, sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

WIDGET = 'application/vnd.jupyter.widget-view+json'


def plain(output):
    "The output without what needs a kernel; None if nothing is left but a name"
    if 'data' not in output: return output
    data = {k: v for k, v in output['data'].items() if k != WIDGET}
    if WIDGET in output['data'] and 'text/html' not in data: return None
    return nbformat.from_dict(output | dict(data=data, metadata={}))


def keep(old, new):
    "`old` with the pictures of `new`"
    for a, b in zip(old.cells, new.cells):
        found = [o for o in map(plain, b.get('outputs', [])) if o and o.get('name') != 'stderr']
        if not found or not (a['outputs'] or any('text/html' in o.get('data', {}) for o in found)): continue
        for o in found:
            if 'execution_count' in o: o['execution_count'] = None
        a['outputs'] = found
    return old


def main():
    os.environ.setdefault('HF_HUB_OFFLINE', '1')
    for path in map(Path, sys.argv[1:]):
        old, new = (nbformat.read(path, 4) for _ in range(2))
        # the views bring their pictures up to date a second after their run is over
        new.cells.append(nbformat.v4.new_code_cell('import time; time.sleep(3)'))
        client = NotebookClient(new, timeout=1200, resources=dict(metadata=dict(path=str(path.parent))))
        with client.setup_kernel():
            for i, cell in enumerate(new.cells): client.execute_cell(cell, i)
        nbformat.write(keep(old, new), path)
        print(f'{path.name}: kept', flush=True)


if __name__ == '__main__': main()
