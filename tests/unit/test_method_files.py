"""Settings and files of IA3 and DoRA: what is read, what is written, and what is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loquetier.adapters.methods.ia3 import IA3Spec
from loquetier.adapters.peft_config import canonical_json, parse_config
from loquetier.adapters.peft_io import AdapterWeights, read_adapter, write_adapter
from loquetier.adapters.peft_keys import expected_factors
from loquetier.adapters.spec import AdapterSpec, LinearTarget, LoraSpec, resolve_modules
from loquetier.errors import AdapterError, AdapterMismatchError, ConfigError, UnsupportedAdapterError
from loquetier.training.checkpoint_state import decode_spec, encode_spec

TARGETS = tuple(
    LinearTarget(f"model.layers.{layer}.{name}", 3 * layer + i, 4, 6 if name != "mlp.down_proj" else 4, layer)
    for layer in range(2)
    for i, name in enumerate(("self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"))
)
DORA = LoraSpec(r=2, target_modules=("k_proj", "down_proj"), use_dora=True)
SPECS: dict[str, AdapterSpec] = {
    "dora": DORA,
    "ia3": IA3Spec(),
    "ia3-none": IA3Spec(target_modules=("v_proj",), feedforward_modules=()),
    "ia3-all": IA3Spec(target_modules="all-linear"),
    "ia3-regex": IA3Spec(target_modules=r".*layers\.1.*proj", feedforward_modules=r".*mlp.*"),
    "ia3-excluded": IA3Spec(target_modules="all-linear", exclude_modules=("v_proj",)),
    "ia3-mixed": IA3Spec(target_modules=("k_proj", "mlp.down_proj"), feedforward_modules=r".*down_proj"),
}


def write(directory: Path, spec: AdapterSpec) -> AdapterSpec:
    modules = resolve_modules(spec, TARGETS)
    by_path: dict[str, list[torch.Tensor]] = {}
    for number, key in enumerate(expected_factors(modules).values()):
        by_path.setdefault(key.path, []).append(torch.full(key.shape, 1.0 + number))
    factors = {path: tuple(tensors) for path, tensors in by_path.items()}
    write_adapter(directory, spec=spec, modules=modules, factors=factors, base_name=None)
    return spec


def read(directory: Path, **more: Any) -> AdapterWeights:
    return read_adapter(directory, TARGETS, **more)


@pytest.mark.parametrize("name", list(SPECS))
def test_written_and_read_back(name: str, tmp_path: Path) -> None:
    spec = write(tmp_path / "a", SPECS[name])
    found = read(tmp_path / "a")
    assert found.modules == resolve_modules(spec, TARGETS)
    assert found.spec.method == spec.method and found.spec.target_modules == spec.target_modules
    for path, tensors in found.factors.items():
        assert all(torch.isfinite(t).all() for t in tensors), path
    written = load_file(tmp_path / "a" / "adapter_model.safetensors")
    keys = expected_factors(found.modules)
    assert written.keys() == keys.keys()
    assert all(torch.equal(found.factors[key.path][key.number], written[name]) for name, key in keys.items())


def test_ia3s_config_is_pefts() -> None:
    """Feed-forward names must be target names to PEFT: where targets were a string, both are written as paths."""
    from peft import IA3Config

    from loquetier.adapters.peft_config import render_config

    for spec in SPECS.values():
        if not isinstance(spec, IA3Spec):
            continue
        modules = resolve_modules(spec, TARGETS)
        fields = render_config(spec, modules, None)
        config = IA3Config(**{key: value for key, value in fields.items() if key != "peft_type"})  # its own checks
        assert config.peft_type == "IA3" and isinstance(fields["target_modules"], list)
        again = parse_config(json.dumps(fields).encode()).spec
        assert resolve_modules(again, TARGETS) == modules


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ()}, "target_modules"),
        ({"target_modules": 3}, "target_modules"),
        ({"target_modules": ("k_proj",), "feedforward_modules": ("down_proj",)}, "not in target_modules"),
        ({"feedforward_modules": None}, "feedforward_modules"),
        ({"target_modules": "(", "feedforward_modules": ()}, "target_modules"),
        ({"feedforward_modules": "("}, "feedforward_modules"),
        ({"exclude_modules": ("",)}, "exclude_modules"),
    ],
)
def test_a_setting_of_ia3_that_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        IA3Spec(**settings)


def test_ia3s_names_that_match_nothing_are_refused() -> None:
    with pytest.raises(AdapterMismatchError, match=r"feedforward_modules: \['.\*nothing'\]"):
        resolve_modules(IA3Spec(feedforward_modules=".*nothing"), TARGETS)
    with pytest.raises(AdapterMismatchError, match="fc2"):
        resolve_modules(IA3Spec(target_modules=("k_proj", "fc2"), feedforward_modules=("fc2",)), TARGETS)
    with pytest.raises(AdapterMismatchError, match=r"feedforward_modules: \['down_proj'\]"):
        resolve_modules(IA3Spec(exclude_modules=("down_proj",)), TARGETS)


def test_pefts_feedforward_rule_is_the_end_of_the_string() -> None:
    """``key.endswith(name)`` in peft/tuners/ia3/model.py: no dots asked for."""
    spec = IA3Spec(target_modules="all-linear", feedforward_modules=("n_proj",))
    assert [p.form for p in resolve_modules(spec, TARGETS)] == ["output", "output", "input"] * 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda c: c.update(modules_to_save=["lm_head"]), UnsupportedAdapterError, "modules_to_save="),
        (lambda c: c.update(fan_in_fan_out=True), UnsupportedAdapterError, "fan_in_fan_out="),
        (lambda c: c.update(new_feature=1, peft_version="0.22"), UnsupportedAdapterError, "unknown key 'new_feature'"),
        (lambda c: c.update(r=8, peft_version="0.22"), UnsupportedAdapterError, "unknown key 'r'"),
        (lambda c: c.pop("feedforward_modules"), AdapterError, "feedforward_modules is missing"),
        (lambda c: c.update(target_modules=None), AdapterError, "target_modules is missing"),
        (lambda c: c.update(feedforward_modules=[1]), AdapterError, "feedforward_modules"),
        (lambda c: c.update(peft_type="VERA"), UnsupportedAdapterError, "'LORA', 'IA3'"),
        (lambda c: c.update(feedforward_modules=["k_proj"]), AdapterMismatchError, r"shape .*k_proj|k_proj.*shape"),
    ],
)
def test_a_config_of_ia3_that_is_not_honoured_is_refused(
    change: Callable[[dict[str, Any]], object], error: type[AdapterError], message: str, tmp_path: Path
) -> None:
    write(tmp_path / "a", IA3Spec())
    path = tmp_path / "a" / "adapter_config.json"
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))
    with pytest.raises(error, match=message):
        read(tmp_path / "a")


def test_dora_needs_its_magnitudes_and_lora_has_none(tmp_path: Path) -> None:
    write(tmp_path / "a", DORA)
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    config = tmp_path / "a" / "adapter_config.json"
    save_file({k: t for k, t in tensors.items() if "layers.0.mlp.down_proj.lora_mag" not in k}, path)
    with pytest.raises(AdapterMismatchError, match=r"1 of 12 tensors are missing.*down_proj\.lora_magnitude_vector"):
        read(tmp_path / "a")
    save_file(tensors, path)
    config.write_text(config.read_text().replace('"use_dora": true', '"use_dora": false'))
    with pytest.raises(UnsupportedAdapterError, match="DoRA in a config without use_dora"):
        read(tmp_path / "a")
    config.write_text(config.read_text().replace('"use_dora": false', '"use_dora": 1'))
    with pytest.raises(UnsupportedAdapterError, match="use_dora=1"):
        read(tmp_path / "a")


@pytest.mark.parametrize("spec", [DORA, IA3Spec()], ids=["dora", "ia3"])
def test_the_part_that_fits(spec: AdapterSpec, tmp_path: Path) -> None:
    """`allow_partial` leaves out what the base lacks, magnitudes and vectors included."""
    write(tmp_path / "a", spec)
    smaller = tuple(t for t in TARGETS if t.path.endswith("k_proj"))
    with pytest.raises(AdapterMismatchError):
        read_adapter(tmp_path / "a", smaller)
    found = read_adapter(tmp_path / "a", smaller, allow_partial=True)
    assert [p.target.path for p in found.modules] == [t.path for t in smaller]
    assert found.spec.target_modules == ("k_proj",)


def test_settings_of_different_methods_have_different_digests_and_loras_stay() -> None:
    plain = LoraSpec(r=2, target_modules=("k_proj", "down_proj"))
    assert len({canonical_json(spec) for spec in (plain, *SPECS.values())}) == len(SPECS) + 1
    assert b"dora" not in canonical_json(plain) and b"method" not in canonical_json(plain)  # as before there were any


@pytest.mark.parametrize("name", list(SPECS))
def test_a_spec_survives_a_checkpoint(name: str) -> None:
    assert decode_spec(json.loads(json.dumps(encode_spec(SPECS[name])))) == SPECS[name]
