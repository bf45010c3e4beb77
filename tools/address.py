"""Set whose repository this is: `python tools/address.py OWNER`, the name on GitHub, or without one say it.

`user` in settings.ini is the one setting; name, badges, links and documentation say the same in many files, which a
test compares. This writes it into all of them.
"""
import configparser, re, subprocess, sys
from pathlib import Path

root = Path(__file__).resolve().parents[1]


def settings():
    config = configparser.ConfigParser(delimiters=['='])
    config.read(root/'settings.ini', encoding='utf-8')
    return config['DEFAULT']


def places(repo):
    "What names the owner: the repository, and its pages"
    return re.compile(rf'(?<=github\.com/)[\w-]+(?=/{repo}\b)|(?<=https://)[\w-]+(?=\.github\.io/{repo}\b)'
                      rf'|(?<=colab\.research\.google\.com/github/)[\w-]+(?=/{repo}\b)')


def files():
    "Text files of the project that name an owner"
    listed = subprocess.run(['git', 'ls-files', '-z'], cwd=root, capture_output=True, text=True, check=True).stdout
    found = places(settings()['repo'])
    for path in (root/name for name in listed.split('\0') if name):
        if path.suffix in ('.png', '.gif', '.gz', '.jsonl') or not path.is_file(): continue
        text = path.read_text(encoding='utf-8', errors='surrogateescape')
        if found.search(text): yield path, text


def owners():
    "file → whom it names"
    found = places(settings()['repo'])
    return {path.relative_to(root).as_posix(): set(found.findall(text)) for path, text in files()}


def move(owner):
    "Write the owner everywhere; returns how many files changed"
    if not re.fullmatch(r'[A-Za-z0-9](?:[A-Za-z0-9]|-(?=[A-Za-z0-9])){0,38}', owner):
        sys.exit(f"{owner!r} is no name on GitHub: letters, digits and single hyphens between them")
    found, changed = places(settings()['repo']), list(files())
    for path, text in changed: path.write_text(found.sub(owner, text), encoding='utf-8', errors='surrogateescape')
    ini = root/'settings.ini'
    ini.write_text(re.sub(r'(?m)^user = .*$', f'user = {owner}', ini.read_text(encoding='utf-8')), encoding='utf-8')
    return len(changed) + 1


def main():
    if len(sys.argv) < 2: sys.exit(f"the owner is {settings()['user']}; another: python tools/address.py OWNER")
    print(f'{move(sys.argv[1])} files name {sys.argv[1]}: run `make export`, and look at `git diff`')


if __name__ == '__main__': main()
