"""Adapter directories from hostile or unlucky hands: typed errors only, nothing changed. Valid ones: tests/parity."""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from loquetier.adapters import peft_write
from loquetier.adapters.peft_io import AdapterWeights, read_adapter, write_adapter
from loquetier.adapters.spec import LinearTarget, LoraSpec, resolve_modules
from loquetier.errors import (
    AdapterError,
    AdapterExistsError,
    AdapterMismatchError,
    AdapterNotFoundError,
    OutOfAdapterMemoryError,
    UnsupportedAdapterError,
)

TARGETS = tuple(
    LinearTarget(f"model.layers.{layer}.self_attn.{name}", 2 * layer + i, 4, 6, layer)
    for layer in range(2)
    for i, name in enumerate(("q_proj", "v_proj"))
)
SPEC = LoraSpec(r=2, alpha=3.5, target_modules=("q_proj",), rank_pattern={r"layers\.1\..*": 3})
Q0_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Q0_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
Tensors = dict[str, Tensor]


def factors_of(spec: LoraSpec, fill: float = 1.0) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        p.target.path: (torch.full((p.rank, 4), fill), torch.full((6, p.rank), fill + 1))
        for p in resolve_modules(spec, TARGETS)
    }


def write(directory: Path, spec: LoraSpec = SPEC, fill: float = 1.0, **more: Any) -> str:
    more.setdefault("factors", factors_of(spec, fill))
    return write_adapter(directory, spec=spec, modules=resolve_modules(spec, TARGETS), base_name="b", **more)


def read(directory: Path, **more: Any) -> AdapterWeights:
    return read_adapter(directory, TARGETS, **more)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    write(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(directory: Path, change: Callable[[Tensors], object]) -> None:
    path = directory / "adapter_model.safetensors"
    tensors = safetensors.torch.load(path.read_bytes())
    change(tensors)
    safetensors.torch.save_file(tensors, path)


def snapshot(directory: Path) -> Mapping[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


# --- config ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", 1),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [1]),
        ("target_parameters", ["experts.w"]),
        ("fan_in_fan_out", True),
        ("layer_replication", [[0, 2]]),
        ("megatron_config", {"a": 1}),
        ("loftq_config", {"loftq_bits": 4}),
        ("corda_config", {"corda_method": "ipm"}),
        ("lora_ga_config", {"scale": "unit"}),
        ("kasa_config", {"beta": 1}),
        ("monteclora_config", {"num_samples": 8}),
        ("arrow_config", {"top_k": 3}),
        ("alora_invocation_tokens", [1, 2]),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("ensure_weight_tying", True),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("peft_type", "LOHA"),
        ("peft_type", None),
        ("auto_map", {"AutoModel": "evil.Model"}),
        ("enable_lora", [True, False]),
    ],
)
def test_a_feature_we_do_not_honour_is_refused_by_key(adapter: Path, key: str, value: object) -> None:
    edit_config(adapter, **{key: value})
    with pytest.raises(UnsupportedAdapterError, match=key):
        read(adapter)


@pytest.mark.parametrize("version", ["0.22.0", "1.0", "99", 21, "", "new"])
def test_an_unknown_key_of_a_newer_peft_is_refused(adapter: Path, version: object) -> None:
    edit_config(adapter, peft_version=version, from_the_future={"x": 1})
    with pytest.raises(UnsupportedAdapterError, match=r"unknown key 'from_the_future'.*remove it if"):
        read(adapter)
    edit_config(adapter, from_the_future=False)
    assert read(adapter).ignored == (), "switched off it means nothing"


@pytest.mark.parametrize("version", [None, "0.21.0", "0.18.2.dev0@abc"])
def test_a_key_that_is_none_of_pefts_is_ignored_and_told(adapter: Path, version: str | None) -> None:
    before = read(adapter)
    edit_config(adapter, peft_version=version, a_note={"x": 1}, another=0.5, off=None)
    after = read(adapter)
    assert after.ignored == ("a_note", "another") and before.ignored == ()
    assert (after.spec, after.modules, after.digest) == (before.spec, before.modules, before.digest)


@pytest.mark.parametrize(
    "changes",
    [
        {"task_type": None, "auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "x"}},
        {"peft_version": "99.0", "revision": "main", "inference_mode": False, "megatron_core": "x"},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"init_lora_weights": False, "runtime_config": {"ephemeral_gpu_offload": True}},
        {"qalora_group_size": 32, "loftq_config": {}, "modules_to_save": [], "enable_lora": None, "merge": False},
        {"base_model_name_or_path": None},
    ],
)
def test_what_does_not_change_the_answer_is_accepted(adapter: Path, changes: dict[str, Any]) -> None:
    before = read(adapter)
    edit_config(adapter, **changes)
    after = read(adapter)
    assert (after.spec, after.modules, after.digest) == (before.spec, before.modules, before.digest)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 0}, "r=0"),
        ({"r": 10**50}, "r=1000"),
        ({"r": "8"}, "r='8'"),
        ({"r": None}, "r is missing"),
        ({"lora_alpha": None}, "lora_alpha is missing"),
        ({"target_modules": None}, "target_modules is missing"),
        ({"lora_alpha": 1e30}, "alpha=1e"),
        ({"lora_alpha": "16"}, "alpha='16'"),
        ({"lora_dropout": 2}, "dropout=2"),
        ({"use_rslora": "yes"}, "use_rslora='yes'"),
        ({"target_modules": []}, r"target_modules=\(\)"),
        ({"target_modules": [1]}, r"target_modules=\(1,\)"),
        ({"target_modules": {"q_proj": 1}}, "target_modules="),
        ({"target_modules": "("}, "not a valid regular expression"),
        ({"rank_pattern": [1]}, "rank_pattern="),
        ({"rank_pattern": {"q_proj": "2"}}, "rank_pattern"),
        ({"layers_to_transform": "0"}, "layers_to_transform='0'"),
        ({"layers_to_transform": True}, "layers_to_transform=.*True"),
        ({"layers_pattern": 3, "layers_to_transform": [0]}, "layers_pattern=3"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path=5"),
    ],
)
def test_a_malformed_value_is_refused_by_name(adapter: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(adapter, **changes)
    with pytest.raises(AdapterError, match=message):
        read(adapter)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe{}",
        b"[" * 100_000,
        b'{"peft_type": "LORA", "r": NaN}',
        b'{"peft_type": "LORA", "peft_type": "LORA"}',
        b'{"peft_type": "LORA", "r": ' + b"9" * 5000 + b"}",
        b'{"a": "' + b"x" * (1 << 20) + b'"}',
    ],
    ids=lambda text: repr(text[:30]),
)
def test_a_config_that_is_not_a_small_json_object_is_refused(adapter: Path, text: bytes) -> None:
    (adapter / "adapter_config.json").write_bytes(text)
    with pytest.raises(AdapterError):
        read(adapter)


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_a_pickle_is_refused_and_not_opened(adapter: Path, name: str) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    os.mkfifo(adapter / name)  # opening it would wait for ever
    with pytest.raises(UnsupportedAdapterError, match="only safetensors"):
        read(adapter)


def test_a_missing_directory_or_file_is_not_found(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterNotFoundError, match="No adapter found"):
        read(tmp_path / "nowhere")
    with pytest.raises(AdapterNotFoundError, match=r"adapter_config\.json"):
        read(tmp_path)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterNotFoundError, match=r"adapter_model\.safetensors"):
        read(adapter)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("kind", ["fifo", "directory", "device", "loop"])
def test_what_is_not_a_regular_file_is_refused_without_waiting(adapter: Path, name: str, kind: str) -> None:
    path = adapter / name
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else path)
    with pytest.raises(AdapterError):
        read(adapter)


def test_odd_paths_are_refused(adapter: Path) -> None:
    with pytest.raises(AdapterError):
        read(adapter / "adapter_config.json")
    with pytest.raises(AdapterError):
        read(Path("a\0b"))
    with pytest.raises(AdapterError):
        read(adapter / ("x" * 5000))


def test_a_link_to_a_regular_file_is_read(adapter: Path, tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).rename(tmp_path / name)
        (adapter / name).symlink_to(tmp_path / name)
    assert read(adapter).spec == SPEC


# --- tensors --------------------------------------------------------------------------------------------------------


def drop(*names: str) -> Callable[[Tensors], object]:
    return lambda tensors: [tensors.pop(name) for name in names]


def put(name: str, tensor: Tensor) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.__setitem__(name, tensor)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (drop(Q0_B), AdapterMismatchError, r"1 of 4 tensors are missing.*lora_B"),
        (put(Q0_A, torch.zeros(4, 4)), AdapterMismatchError, r"q_proj\.lora_A\.weight: shape \[4, 4\].*\[2, 4\]"),
        (put(Q0_A, torch.zeros(2, 5)), AdapterMismatchError, r"q_proj\.lora_A\.weight: shape \[2, 5\].*\[2, 4\]"),
        (put(Q0_B, torch.zeros(2, 6)), AdapterMismatchError, r"q_proj\.lora_B\.weight: shape \[2, 6\].*\[6, 2\]"),
        (put(Q0_A, torch.zeros(8)), AdapterMismatchError, r"shape \[8\]"),
        (put(Q0_A, torch.full((2, 4), torch.nan)), AdapterError, r"q_proj\.lora_A\.weight: 8 of 8 weights are NaN"),
        (put(Q0_B, torch.full((6, 2), torch.inf)), AdapterError, r"q_proj\.lora_B\.weight: 12 of 12"),
        (put(Q0_A, torch.zeros(2, 4, dtype=torch.float64)), UnsupportedAdapterError, "dtype 'F64'"),
        (put(Q0_A, torch.zeros(2, 4, dtype=torch.int8)), UnsupportedAdapterError, "dtype 'I8'"),
        (put(Q0_A.replace("q_", "v_"), torch.zeros(2, 4)), AdapterMismatchError, "1 of 5 tensors belong to no adapted"),
        (put("stray", torch.zeros(1)), AdapterMismatchError, "'stray'"),
        (put(Q0_A.replace("A.weight", "A.default.weight"), torch.zeros(1)), UnsupportedAdapterError, "adapter name"),
        (put(Q0_B.replace("weight", "bias"), torch.zeros(6)), UnsupportedAdapterError, "lora_bias"),
        (put(Q0_A.replace("A.weight", "magnitude_vector"), torch.zeros(6)), UnsupportedAdapterError, "DoRA"),
        (put("base_model.model.model.embed_tokens.weight", torch.zeros(9, 4)), UnsupportedAdapterError, "embedding"),
        (put("base_model.model.lm_head.modules_to_save.weight", torch.zeros(9, 4)), UnsupportedAdapterError, "modules"),
        (put(Q0_A.replace("lora_A", "base_layer"), torch.zeros(6, 4)), UnsupportedAdapterError, "cannot be compared"),
    ],
)
@pytest.mark.parametrize("allow_partial", [False, True])
def test_tensors_that_do_not_fit_are_named(
    adapter: Path, change: Callable[[Tensors], object], error: type[AdapterError], message: str, allow_partial: bool
) -> None:
    edit_tensors(adapter, change)
    before = snapshot(adapter)
    if allow_partial and "belong to no" in message:
        assert read(adapter, allow_partial=True).factors.keys() == factors_of(SPEC).keys()
    else:
        with pytest.raises(error, match=message):
            read(adapter, allow_partial=allow_partial)
    assert snapshot(adapter) == before


def test_a_config_rank_that_is_not_the_weights_rank_names_the_tensor(adapter: Path) -> None:
    edit_config(adapter, r=4096)
    with pytest.raises(AdapterMismatchError, match=r"layers\.0.*lora_A\.weight: shape \[2, 4\].*\[4096, 4\]"):
        read(adapter)


def test_a_partly_matching_adapter_is_refused_unless_allowed(adapter: Path, tmp_path: Path) -> None:
    edit_config(adapter, target_modules=["q_proj", "c_attn"], rank_pattern={r"layers\.1\..*": 3, "c_attn": 5})
    edit_tensors(adapter, put(Q0_A.replace("self_attn.q_proj", "c_attn"), torch.zeros(5, 4)))
    with pytest.raises(AdapterMismatchError, match="'c_attn'"):
        read(adapter)
    part = read(adapter, allow_partial=True)
    assert part.spec == SPEC
    write_adapter(tmp_path / "part", spec=part.spec, modules=part.modules, factors=part.factors, base_name=None)
    assert read(tmp_path / "part").modules == part.modules
    edit_config(adapter, target_modules=["c_attn"])
    with pytest.raises(AdapterMismatchError, match="'c_attn'"):
        read(adapter, allow_partial=True)


def test_the_byte_limit_holds_before_the_weights_are_read(adapter: Path) -> None:
    size = sum(a.nbytes + b.nbytes for a, b in read(adapter).factors.values())
    assert read(adapter, max_bytes=size).spec == SPEC
    with pytest.raises(OutOfAdapterMemoryError, match=f"{size} bytes; the limit is {size - 1}"):
        read(adapter, max_bytes=size - 1)


# --- safetensors header ---------------------------------------------------------------------------------------------


def entry(start: int, end: int, shape: object = (1,), dtype: object = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def with_header(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (b"", "header length"),
        (b"\0" * 7, "header length"),
        (with_header({}, length=2**63), "limit"),
        (with_header({}, length=100_000_000), "limit"),
        (with_header({}, length=1000), "in a file of"),
        (with_header(b"[]"), "not a JSON object"),
        (with_header(b"{nonsense"), "not valid JSON"),
        (with_header(b'{"a":' * 100_000), "nested too deeply"),
        (with_header(b'{"a": {}, "a": {}}'), "duplicate key 'a'"),
        (with_header(b'{"a": {"dtype": "F32", "dtype": "F16"}}'), "duplicate key 'dtype'"),
        (with_header(b'{"a": Infinity}'), "not JSON"),
        (with_header(b'{"\xff": 1}'), "not valid JSON"),
        (with_header({"__metadata__": {"a": 1}}), "__metadata__"),
        (with_header({"__metadata__": []}), "__metadata__"),
        (with_header({"a": 1}), "exactly the fields"),
        (with_header({"a": {**entry(0, 4), "more": 1}}, b"\0" * 4), "exactly the fields"),
        (with_header({"a": entry(0, 4, (1,), "F64")}, b"\0" * 4), "dtype 'F64'"),
        (with_header({"a": entry(0, 4, (1,), ["F32"])}, b"\0" * 4), "dtype"),
        (with_header({"a": entry(0, 4, [True])}, b"\0" * 4), "shape"),
        (with_header({"a": entry(0, 4, [1.0])}, b"\0" * 4), "shape"),
        (with_header({"a": entry(0, 4, [-1])}, b"\0" * 4), "shape"),
        (with_header({"a": entry(0, 0, [0])}), "shape"),
        (with_header({"a": entry(0, 4, [1] * 9)}, b"\0" * 4), "shape"),
        (with_header({"a": entry(0, 4, [2**62, 4])}, b"\0" * 4), "shape"),
        (with_header({"a": entry(4, 0)}, b"\0" * 4), "data_offsets"),
        (with_header({"a": entry(0, 8)}, b"\0" * 8), "takes 4 bytes"),
        (with_header({"a": entry(4, 8)}, b"\0" * 8), "hole"),
        (with_header({"a": entry(0, 4), "b": entry(0, 4)}, b"\0" * 4), "overlaps"),
        (with_header({"a": entry(0, 4), "b": entry(8, 12)}, b"\0" * 12), "hole"),
        (with_header({"a": entry(0, 4)}, b"\0" * 3), "cut short"),
        (with_header({"a": entry(0, 4)}, b"\0" * 5), "left over"),
    ],
    ids=lambda value: value if isinstance(value, str) else repr(value[:40]),
)
def test_a_hostile_header_is_refused(adapter: Path, blob: bytes, message: str) -> None:
    (adapter / "adapter_model.safetensors").write_bytes(blob)
    with pytest.raises(AdapterError, match=message):
        read(adapter)


def test_a_header_of_as_many_tensors_as_fit_is_refused_soon(adapter: Path) -> None:
    tensors = {f"t{i:05}": entry(4 * i, 4 * i + 4) for i in range(50_000)}
    blob = with_header(json.dumps(tensors, separators=(",", ":")).encode(), b"\0" * 200_000)
    assert len(blob) < (4 << 20) + 200_000
    (adapter / "adapter_model.safetensors").write_bytes(blob)
    start = time.monotonic()
    with pytest.raises(AdapterError):
        read(adapter)
    assert time.monotonic() - start < 5  # about 0.3 s alone; the rest is room for a loaded machine


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["adapter_model.safetensors", "adapter_config.json"]),
    position=st.integers(0, 5000),
    replacement=st.binary(max_size=12),
    cut=st.integers(0, 12),
)
def test_random_corruption_gives_typed_errors_only(
    adapter: Path, name: str, position: int, replacement: bytes, cut: int
) -> None:
    path = adapter / name
    good = path.read_bytes()
    position %= len(good)
    path.write_bytes(good[:position] + replacement + good[position + cut :])
    try:
        adapted = read(adapter)
    except (AdapterError, AdapterNotFoundError):
        pass
    else:
        # Corruption that still reads must read as a whole adapter.
        assert {plan.target.path for plan in adapted.modules} == adapted.factors.keys()
    finally:
        path.write_bytes(good)


# --- writing --------------------------------------------------------------------------------------------------------


def test_the_same_adapter_gives_the_same_bytes_and_digest(tmp_path: Path) -> None:
    spec = LoraSpec(r=2, target_modules="all-linear")
    assert write(tmp_path / "a", spec) == write(tmp_path / "b", spec) == read(tmp_path / "a").digest
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")
    assert write(tmp_path / "c", spec, fill=2.0) != read(tmp_path / "a").digest
    assert write(tmp_path / "d", LoraSpec(r=2, alpha=17, target_modules="all-linear")) != read(tmp_path / "a").digest


def test_mixed_dtypes_and_strided_tensors_are_written_exactly(tmp_path: Path) -> None:
    factors = {
        path: (torch.randn(4, a.shape[0]).T.to(torch.bfloat16), torch.randn(b.shape).half())
        for path, (a, b) in factors_of(SPEC).items()
    }
    write(tmp_path / "a", factors=factors)
    found = read(tmp_path / "a").factors
    for path, (a, b) in factors.items():
        assert found[path][0].dtype == torch.bfloat16 and torch.equal(found[path][0], a)
        assert found[path][1].dtype == torch.float16 and torch.equal(found[path][1], b)
    stock = safetensors.torch.load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert torch.equal(stock[Q0_A], factors[TARGETS[0].path][0])


def test_the_target_list_in_an_edited_config_wins_over_the_note(tmp_path: Path) -> None:
    write(tmp_path / "a", LoraSpec(r=2, target_modules=r".*q_proj"))
    paths = [t.path for t in TARGETS if t.path.endswith("q_proj")]
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == paths  # a list, because SGLang reads nothing else
    assert read(tmp_path / "a").spec.target_modules == r".*q_proj"
    edit_config(tmp_path / "a", target_modules=paths[:1])
    edit_tensors(tmp_path / "a", lambda tensors: [tensors.pop(k) for k in list(tensors) if "layers.1" in k])
    assert read(tmp_path / "a").spec.target_modules == tuple(paths[:1])


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda f: f.pop(TARGETS[0].path), AdapterMismatchError),
        (lambda f: f.update(other=f[TARGETS[0].path]), AdapterMismatchError),
        (lambda f: f.update({TARGETS[0].path: (torch.ones(3, 4), torch.ones(6, 3))}), AdapterMismatchError),
        (lambda f: f[TARGETS[0].path][0].fill_(torch.nan), AdapterError),
        (lambda f: f.update({TARGETS[0].path: (torch.ones(2, 4).double(), torch.ones(6, 2))}), AdapterError),
    ],
)
def test_what_could_not_be_read_back_is_not_written(
    tmp_path: Path, change: Callable[[dict[str, tuple[Tensor, Tensor]]], object], error: type[AdapterError]
) -> None:
    factors = factors_of(SPEC)
    change(factors)
    with pytest.raises(error):
        write(tmp_path / "a", factors=factors)
    assert list(tmp_path.iterdir()) == []


def test_a_spec_that_does_not_give_these_modules_is_not_written(tmp_path: Path) -> None:
    modules = resolve_modules(SPEC, TARGETS)
    wrong = LoraSpec(r=2, alpha=99, target_modules=("q_proj",), rank_pattern=SPEC.rank_pattern)
    with pytest.raises(AdapterMismatchError, match="resolve_modules"):
        write_adapter(tmp_path / "a", spec=wrong, modules=modules, factors=factors_of(SPEC), base_name=None)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_path_is_replaced_only_on_request_and_only_if_it_is_an_adapter(adapter: Path) -> None:
    before = snapshot(adapter)
    with pytest.raises(AdapterExistsError, match="overwrite=True"):
        write(adapter, fill=5.0)
    assert snapshot(adapter) == before
    digest = write(adapter, fill=5.0, overwrite=True)
    assert read(adapter).digest == digest
    assert [p.name for p in adapter.parent.iterdir()] == ["adapter"]
    (adapter / "notes.txt").write_text("mine")
    with pytest.raises(AdapterExistsError, match=r"notes\.txt"):
        write(adapter, overwrite=True)
    assert (adapter / "notes.txt").read_text() == "mine"
    (adapter.parent / "file").write_text("mine")
    with pytest.raises(AdapterExistsError, match="not a directory"):
        write(adapter.parent / "file", overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("call", ["rename", "fsync"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_failure_at_any_call_leaves_the_old_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool, call: str, count: int
) -> None:
    place = tmp_path / "adapter"
    if overwrite:
        write(place)
    before = snapshot(tmp_path)
    real, calls = getattr(os, call), 0

    def fails(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(peft_write.os, call, fails)
    renames = 2 if overwrite else 1
    if call == "rename" and count > renames:
        write(place, fill=5.0, overwrite=overwrite)
        assert read(place).factors[TARGETS[0].path][0][0, 0] == 5
        return
    with pytest.raises(OSError, match="No space left"):
        write(place, fill=5.0, overwrite=overwrite)
    assert snapshot(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == (["adapter"] if overwrite else [])
