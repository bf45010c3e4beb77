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


def modules():
    "module → its public names, in the order of `alf_nb.all`"
    named = importlib.import_module('alf_nb.all')._NAMES
    return {module: names.split() for module, names in named.items()} | {'app.cli': ['main']}


def value(x):
    "A default as it would be written, never with an address in it"
    if inspect.isroutine(x) or inspect.isclass(x): return x.__name__
    if isinstance(x, list): return f"[{', '.join(map(value, x))}]"
    if isinstance(x, tuple): return f"({', '.join(map(value, x))}{','*(len(x) == 1)})"
    if x is None or isinstance(x, (bool, int, float, str)): return repr(x)
    return str(x) if type(x).__name__ == 'dtype' else f'{type(x).__name__}(…)'


def default(p):
    "`=default` of a parameter, if it has one"
    if p.default is p.empty: return ''
    return '=…' if p.default is dataclasses.MISSING or repr(p.default) == '<factory>' else f'={value(p.default)}'


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
        stars = {p.VAR_POSITIONAL: '*', p.VAR_KEYWORD: '**'}.get(p.kind, '')
        shown.append(stars + p.name + default(p))
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
    "Every public signature, one a line, sorted by module as they stand and by name"
    for name, names in modules().items():
        module = importlib.import_module(f'alf_nb.{name}')
        for n in names:
            x = getattr(module, n)
            yield f'{name}: ' + (call(x, n) if callable(x) else n)
            if inspect.isclass(x): yield from (f'{name}: {m}' for m in members(x))


def first(x):
    "First paragraph of a docstring"
    return ' '.join((inspect.getdoc(x) or '').partition('\n\n')[0].split())


def about(x, name):
    "What a public name is, in a line; a class without a docstring has its signature there, which says nothing"
    if not callable(x): return f'a constant: {type(x).__name__}'
    return '' if inspect.isclass(x) and first(x).startswith(f'{name}(') else first(x)


def tables():
    "The public names as markdown, by module"
    cell = lambda s: s.replace('|', r'\|')
    for name, names in modules().items():
        module = importlib.import_module(f'alf_nb.{name}')
        yield f'### {name}\n\n{first(module)}\n\n| | what it is |\n|---|---|'
        for n in names:
            x = getattr(module, n)
            args = call(x, '') if callable(x) else ''
            code = f' <code>{cell(args)}</code>' if args else ''
            yield f'| `{n}`{code} | {cell(about(x, n))} |'
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
