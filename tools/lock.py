"""Write requirements.lock: what settings.ini asks for, resolved by pip for every supported Python, each pin with `==`.

    python tools/lock.py [INTERPRETER …]     # default: python3.10 python3.11 python3.12 python3.13

Each interpreter resolves for itself (`pip install --dry-run`), so that its own markers and wheels count; a package
whose versions differ gets
one line for each range of Pythons. Packages that only torch asks for on Linux (CUDA) are left to torch, which pins them
itself.
"""
import json, re, subprocess, sys, tempfile
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).resolve().parents[1]
HEAD = """\
# Written by `make lock` from settings.ini: every package that setting up, testing and the demo need, for Python \
{first} to {last}.
# Do not edit: change settings.ini and run `make lock` again.
"""


def canonical(name): return re.sub(r'[-_.]+', '-', name).lower()


def asked():
    "Requirements of settings.ini that a developer's environment needs, and the pins that hold some of them fast"
    config = ConfigParser(delimiters=['='])
    config.read(root/'settings.ini', encoding='utf-8')
    words = lambda k: config['DEFAULT'].get(f'{k}requirements', '').split()
    return list(dict.fromkeys([*words(''), *words('offline_'), *words('dev_')])), words('lock_')


def resolve(python, requirements, pins):
    "(3, minor) of this interpreter, and {package: version} as its pip resolves it"
    with tempfile.TemporaryDirectory() as tmp:
        report = Path(tmp)/'report.json'
        cmd = [
            python,
            '-m',
            'pip',
            '--disable-pip-version-check',
            'install',
            '-q',
            '--dry-run',
            '--ignore-installed',
            '--only-binary=:all:',
            '--report',
            str(report),
            *requirements,
            *pins,
        ]
        if subprocess.run(cmd).returncode: sys.exit(f"{python} cannot resolve settings.ini: see pip's message above")
        found = json.loads(report.read_text(encoding='utf-8'))
    minor = tuple(map(int, found['environment']['python_version'].split('.')))
    versions = {canonical(o['metadata']['name']): o['metadata']['version'].split('+')[0] for o in found['install']}
    return minor, {k: v for k,v in versions.items() if not k.startswith(('nvidia-', 'cuda-'))}


def lines(table, linux=()):
    "One line for each package and range of Pythons with the same version; `linux`: names of those that only Linux gets"
    pythons = sorted(table)
    for name in sorted({n for v in table.values() for n in v}):
        runs = []                                     # [first, last, version] of neighbouring Pythons
        for p in pythons:
            v = table[p].get(name)
            if runs and runs[-1][2] == v: runs[-1][1] = p
            else: runs.append([p, p, v])
        for first, last, v in runs:
            if v is None: continue
            marker = [f'python_version >= "{first[0]}.{first[1]}"'] if first != pythons[0] else []
            if last != pythons[-1]: marker.append('python_version < "{}.{}"'.format(*pythons[pythons.index(last)+1]))
            if name in linux: marker.append('platform_system == "Linux"')
            yield f"{name}=={v}" + (f" ; {' and '.join(marker)}" if marker else '')


def main():
    requirements, pins = asked()
    table = dict(resolve(p, requirements, pins) for p in sys.argv[1:] or [f'python3.{m}' for m in range(10, 14)])
    first, last = ('.'.join(map(str, f(table))) for f in (min, max))
    body = list(
        lines(
            table,
            {
                canonical(re.split('[^A-Za-z0-9._-]', r)[0])
                for r in (*requirements, *pins)
                if 'platform_system=="Linux"' in r
            },
        )
    )
    (root / 'requirements.lock').write_text(
        HEAD.format(first=first, last=last) + '\n'.join(body) + '\n', encoding='utf-8'
    )
    print(f"requirements.lock: {len(body)} pins for Python {first} to {last}")


if __name__ == '__main__': main()
