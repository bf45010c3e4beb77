"""Files of text that are not what they should be: refused in words that name file, row and column, before a model is
loaded."""
import json
import pytest
from alf_nb.demo import demo_model, demo_tokenizer
from alf_nb.app.finetune import finetune
from alf_nb.sources.blocks import token_blocks
from alf_nb.sources.texts import load_texts

def parquet(texts, kind='string'):
    "A parquet file whose bytes are not looked at while it is made"
    import io
    import pyarrow as pa, pyarrow.parquet as pq
    data = [t if isinstance(t, bytes) else t.encode() for t in texts]
    column = pa.array(data, pa.binary())
    if kind == 'string': column = pa.Array.from_buffers(pa.string(), len(data), column.buffers())
    out = io.BytesIO()
    pq.write_table(pa.table({'text': column}), out)
    return out.getvalue()

GOOD = [{'text': 'one'}, {'text': 'two'}]
HOSTILE = {
    'surrogate.jsonl': (
        b'{"text": "one"}\n{"text": "tw\\ud83d"}\n',
        r"row 2, column 'text' of .*surrogate.jsonl holds half a character, the lone surrogate U\+D83D at 2",
    ),
    'surrogate.json': (b'[{"body": "one"}, {"body": "\\udc00two"}]', r"row 2, column 'body' of .*U\+DC00 at 0"),
    'strings.json': (b'["one", "\\ud83d!"]', r"row 2, column 'text' of .*strings.json"),
    'swapped.jsonl': (b'{"text": "\\ude00\\ud83d"}\n', r"row 1, .*U\+DE00"),
    'nul.txt': (b'one\0two', 'nul.txt is not text: it holds NUL bytes'),
    'latin.txt': ('Zoë'.encode('latin-1'), 'latin.txt is not UTF-8 text: byte 0xeb at 2'),
    'cut.txt': ('Zoë'.encode()[:-1], 'cut.txt is not UTF-8'),
    'utf8-surrogate.txt': (b'a\xed\xa0\xbdb', 'is not UTF-8 text: byte 0xed at 1'),
    'utf16.txt': ('one'.encode('utf-16'), r'utf16.txt is not UTF-8 text \(it begins as UTF-16 does\)'),
    'utf16be.txt': (b'\xfe\xff' + 'one'.encode('utf-16-be'), 'begins as UTF-16'),
    'utf16-bare.txt': ('one'.encode('utf-16-le'), 'it holds NUL bytes'),
    'utf16.csv': ('text\none\n'.encode('utf-16'), 'begins as UTF-16'),
    'utf16.jsonl': (json.dumps(GOOD[0]).encode('utf-16'), 'begins as UTF-16'),
    'empty.txt': (b'', 'is empty'),
    'blank.txt': (b' \n\t\n', 'is empty'),
    'bom.txt': (b'\xef\xbb\xbf', 'is empty'),
    'empty.jsonl': (b'', 'is empty'),
    'empty.json': (b'[]', 'is empty'),
    'head.csv': (b'text\n', 'is empty'),
    'nulls.jsonl': (b'{"text": null}\n{"text": " "}\n', 'is empty'),
    'number.jsonl': (b'{"text": "one"}\n{"text": 2}\n', r"holds int; a text was expected \(row 2\)"),
    'list.jsonl': (b'{"text": ["one"]}\n', 'holds list'),
    'flag.json': (b'[{"text": true}]', 'holds bool'),
    'nan.jsonl': (b'{"text": NaN}\n', 'holds float'),
    'row.jsonl': (b'"one"\n', 'row 1 is not a JSON object'),
    'half.jsonl': (b'{"text": "one"}\n{"text"', 'line 2 is not JSON'),
    'deep.json': (b'[' * 100_000, 'deep.json is not JSON'),
    'deep.jsonl': (b'{"text": "a"}\n{"a":' * 1 + b'[' * 100_000 + b'\n', 'line 2 is not JSON'),
    'long.jsonl': (b'{"text": ' + b'9' * 10_000 + b'}\n', 'line 1 is not JSON|holds int'),
    'not.parquet': (b'text', 'is not a parquet file'),
    'bytes.parquet': (parquet(['one'], 'binary'), 'holds bytes'),
    'invalid.parquet': (parquet([b'one', b'\xff\xfe']), 'invalid.parquet is not a parquet file'),
}

def no_model(*args, **kwargs): raise AssertionError('a model was loaded')

@pytest.mark.parametrize('name', HOSTILE)
def test_a_file_that_is_no_text_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch, name):
    content, said = HOSTILE[name]
    (tmp_path/name).write_bytes(content)
    with pytest.raises(ValueError, match=said) as e: load_texts(tmp_path/name)
    str(e.value).encode()       # the error itself can be printed
    monkeypatch.setattr('alf_nb.app.finetune.given_model', no_model)
    with pytest.raises(ValueError, match=said): finetune(data=str(tmp_path/name), out=tmp_path/'run', progress=False)

def test_a_folder_names_the_file(tmp_path):
    (tmp_path/'a.txt').write_text('fine')
    (tmp_path/'b.md').write_bytes(b'\xff')
    with pytest.raises(ValueError, match='b.md is not UTF-8'): load_texts(tmp_path)

def test_a_list_names_the_text():
    with pytest.raises(ValueError, match=r'text 2 of the list holds half a character'): load_texts(['one', 'two\ud800'])
    with pytest.raises(ValueError, match='text 2 holds half a character'):
        token_blocks(['one', 'two\ud800'], demo_tokenizer(), 4)
    with pytest.raises(ValueError, match='text 1 is NoneType; a text was expected'):
        token_blocks([None], demo_tokenizer(), 4)
    with pytest.raises(ValueError, match='the prompt holds half a character'):
        finetune((demo_model(), demo_tokenizer()), ['abc '*400]*4, prompt='\udfff', progress=False)

def test_what_is_odd_but_text_is_taken(tmp_path):
    (tmp_path/'pair.jsonl').write_bytes(b'{"text": "smile \\ud83d\\ude00"}\n')  # an escaped pair is one character
    assert load_texts(tmp_path/'pair.jsonl') == ['smile 😀']
    (tmp_path/'limit.jsonl').write_bytes(b'{"text": "one"}\n{"text": "\\ud83d"}\n')
    assert load_texts(tmp_path/'limit.jsonl', limit=1) == ['one']  # what is not kept is not judged
    (tmp_path/'long.jsonl').write_text(json.dumps({'text': 'word '*2_000_000}))
    (text,) = load_texts(tmp_path/'long.jsonl')
    assert len(text) == 10_000_000
    (tmp_path/'long.txt').write_text('x'*5_000_000)
    assert len(load_texts(tmp_path/'long.txt')[0]) == 5_000_000
    (tmp_path/'bom.csv').write_bytes('text\nZoë\n'.encode('utf-8-sig'))
    assert load_texts(tmp_path/'bom.csv') == ['Zoë']
    (tmp_path/'fine.parquet').write_bytes(parquet(['one', 'zwei ß']))
    assert load_texts(tmp_path/'fine.parquet') == ['one', 'zwei ß']
