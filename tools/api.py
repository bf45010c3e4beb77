"""What others may rely on: `python tools/api.py` writes tests/api.txt, a line for every public signature, and the
tables of nbs/api.ipynb; `--check` only compares.

Public is what `alf_nb.all` holds, and of its classes what has no leading underscore. Annotations are left out: they may
become more precise without breaking anybody.
"""
import dataclasses, functools, importlib, inspect, json, sys
from pathlib import Path

from fastcore.basics import _clsmethod

root = Path(__file__).resolve().parents[1]
# what is bound to the class; the last is what `@patch(cls_method=True)` leaves
BOUND = (staticmethod, classmethod, _clsmethod)
LINES, PAGE = root/'tests'/'api.txt', root/'nbs'/'api.ipynb'


def rooms():
    "module → its public names, in the order of `alf_nb.all`"
    named = importlib.import_module('alf_nb.all')._NAMES
    return {module: names.split() for module, names in named.items()} | {'app.cli': ['main']}


def value(x):
    "A default as it would be written, never with an address in it"
    if inspect.isroutine(x) or inspect.isclass(x): return x.__name__
    if isinstance(x, (tuple, list)):
        return (
            '({})'.format(', '.join(map(value, x)) + ',' * (len(x) == 1))
            if isinstance(x, tuple)
            else '[{}]'.format(', '.join(map(value, x)))
        )
    return (
        repr(x)
        if x is None or isinstance(x, (bool, int, float, str))
        else str(x) if type(x).__name__ == 'dtype' else f'{type(x).__name__}(…)'
    )


def call(f, name):
    "`name(arguments)`, without annotations"
    try: ps = list(inspect.signature(f).parameters.values())
    except (TypeError, ValueError): return f'{name}(…)'
    shown, star = [], False
    for i,p in enumerate(ps):
        if p.kind is p.KEYWORD_ONLY and not star:
            shown.append('*')
            star = True
        star |= p.kind is p.VAR_POSITIONAL
        shown.append(
            {p.VAR_POSITIONAL: '*', p.VAR_KEYWORD: '**'}.get(p.kind, '')
            + p.name
            + (
                ''
                if p.default is p.empty
                else '='
                + ('…' if p.default is dataclasses.MISSING or repr(p.default) == '<factory>' else value(p.default))
            )
        )
        if p.kind is p.POSITIONAL_ONLY and (i+1 == len(ps) or ps[i+1].kind is not p.POSITIONAL_ONLY): shown.append('/')
    return f"{name}({', '.join(shown)})"


def members(cls):
    "What a class of ours adds to its bases: name → line"
    for name, x in sorted(vars(cls).items()):
        at = f'{cls.__name__}.{name}'
        if name.startswith('_') or inspect.isclass(x): continue
        if isinstance(x, (property, functools.cached_property)): yield at
        elif isinstance(x, BOUND): yield call(getattr(cls, name), at)
        elif inspect.isfunction(x) and x.__module__.startswith('alf_nb.'):
            yield call(x, at).replace('(self, ', '(').replace('(self)', '()')


def lines():
    "Every public signature, one a line, sorted by room as they stand and by name"
    for room, names in rooms().items():
        module = importlib.import_module(f'alf_nb.{room}')
        for n in names:
            x = getattr(module, n)
            yield f'{room}: ' + (call(x, n) if callable(x) else n)
            if inspect.isclass(x): yield from (f'{room}: {m}' for m in members(x))


def tables():
    "The public names as markdown, by room"
    first = lambda x: ' '.join((inspect.getdoc(x) or '').partition('\n\n')[0].split())
    cell = lambda s: s.replace('|', r'\|')
    for room, names in rooms().items():
        module = importlib.import_module(f'alf_nb.{room}')
        yield f'### {room}\n\n{first(module)}\n\n| | what it is |\n|---|---|'
        for n in names:
            x = getattr(module, n)
            args = call(x, '') if callable(x) else ''
            text = (
                first(x)
                if callable(x) and not (inspect.isclass(x) and first(x).startswith(f'{n}('))
                else '' if callable(x) else f'a constant: {type(x).__name__}'
            )
            yield f'| `{n}`{f" <code>{cell(args)}</code>" if args else ""} | {cell(text)} |'
        yield ''


def page():
    "nbs/api.ipynb with its tables anew"
    nb = json.loads(PAGE.read_text(encoding='utf-8'))
    cell, = (c for c in nb['cells'] if c['id'] == 'tables')
    cell['source'] = '\n'.join(tables()).strip().splitlines(True)
    return json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + '\n'


def main():
    files = {LINES: '\n'.join(lines()) + '\n', PAGE: page()}
    wrong = [p for p,text in files.items() if not p.exists() or p.read_text(encoding='utf-8') != text]
    if '--check' in sys.argv and wrong:
        sys.exit(
            f"{', '.join(p.relative_to(root).as_posix() for p in wrong)}: not what the code says; run python"
            " tools/api.py"
        )
    if '--check' not in sys.argv:
        for p in wrong: p.write_text(files[p], encoding='utf-8')


if __name__ == '__main__': main()
