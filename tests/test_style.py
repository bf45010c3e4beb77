"The code does not get denser: what tests/style.json counts may only fall (`python tools/style.py --write`)."
import functools
import json
from pathlib import Path

import pytest
from scripts import script

root = Path(__file__).resolve().parents[1]
style = script('tools/style.py')
stock = functools.cache(style.stock)


def test_no_file_gets_denser():
    known = json.loads(style.STOCK.read_text(encoding='utf-8'))
    found = stock()
    worse = [f'{name}: {k} {v}, was {known.get(name, {}).get(k, 0)}' for name, row in found.items()
             for k, v in row.items() if v > known.get(name, {}).get(k, 0)]
    assert not worse, '\n'.join(worse)


def test_the_stock_is_what_is_there():
    "What has become better is written down, so that it stays so"
    assert json.loads(style.STOCK.read_text(encoding='utf-8')) == stock(), "run python tools/style.py --write"


BRANCHES = '\n'.join(f'    if x == {i}: return {i}' for i in range(21))


@pytest.mark.parametrize('src, kind', [
    ('x = 1; y = 2', 'semicolons'),
    ('x = ' + '1'*120, 'long'),
    ('x = 1 if a else 2 if b else 3', 'dense'),
    ('x = [a for a in b], [a for a in b], [a for a in b]', 'dense'),
    (f'def f(x):\n{BRANCHES}', 'complex'),
])
def test_what_is_over_a_limit_is_counted(src, kind):
    assert style.measure(src)[kind] == 1
    assert not any(v for k, v in style.measure(src).items() if k != kind)


def test_a_semicolon_in_a_text_is_none():
    assert not style.measure("x = 'a; b'  # c; d")['semicolons']
