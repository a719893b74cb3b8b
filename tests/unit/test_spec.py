"""LoraSpec's ranges, and which linears a spec adapts. No torch; parity with PEFT itself is in tests/parity."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest

from loquetier.adapters.spec import LinearTarget, LoraSpec, matching_part, resolve_modules
from loquetier.errors import AdapterMismatchError, ConfigError

NAMES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
LAYERED = tuple(
    LinearTarget(f"model.layers.{layer}.{name}", layer * 3 + i, 8, 8, layer)
    for layer in range(3)
    for i, name in enumerate(NAMES)
)
TARGETS = (*LAYERED, LinearTarget("lm_head", 9, 8, 32, None))


def adapted(spec: LoraSpec) -> list[str]:
    return [plan.target.path for plan in resolve_modules(spec, TARGETS)]


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 0},
        {"r": -1},
        {"r": 1.0},
        {"r": True},
        {"r": "8"},
        {"r": 10**30},
        {"alpha": 0},
        {"alpha": -1},
        {"alpha": math.nan},
        {"alpha": math.inf},
        {"alpha": 1e30},
        {"alpha": 10**400},
        {"alpha": "16"},
        {"alpha": True},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"dropout": math.nan},
        {"dropout": None},
        {"use_rslora": 1},
        {"target_modules": ()},
        {"target_modules": ""},
        {"target_modules": ("q_proj", "")},
        {"target_modules": None},
        {"target_modules": "(q_proj"},
        {"target_modules": "a)(b"},
        {"target_modules": "(?:q_proj){e<=2}"},
        {"target_modules": "x" * 10_000},
        {"exclude_modules": "["},
        {"exclude_modules": (1,)},
        {"rank_pattern": {"q_proj": 0}},
        {"rank_pattern": {"q_proj": 2.0}},
        {"rank_pattern": {"": 2}},
        {"rank_pattern": {"*": 2}},
        {"rank_pattern": [("q_proj", 2)]},
        {"alpha_pattern": {"q_proj": math.nan}},
        {"alpha_pattern": {"(": 2}},
        {"target_modules": ("q_proj",), "layers_to_transform": ()},
        {"target_modules": ("q_proj",), "layers_to_transform": (-1,)},
        {"target_modules": ("q_proj",), "layers_to_transform": (True,)},
        {"target_modules": ("q_proj",), "layers_to_transform": 1},
        {"target_modules": ("q_proj",), "layers_pattern": ("layers",)},
        {"target_modules": ("q_proj",), "layers_to_transform": (0,), "layers_pattern": "layers"},
        {"target_modules": ("q_proj",), "layers_to_transform": (0,), "layers_pattern": ("(",)},
        {"target_modules": "all-linear", "layers_to_transform": (0,)},
    ],
    ids=lambda settings: repr(settings)[:60],
)
def test_a_value_out_of_range_is_refused_by_field_name(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        LoraSpec(**settings)
    assert any(str(caught.value).startswith(name) for name in settings)
    assert len(str(caught.value)) < 1000


def test_a_spec_is_a_value_of_its_own() -> None:
    ranks = {"q_proj": 2}
    spec = LoraSpec(alpha=4, rank_pattern=ranks, alpha_pattern={"q_proj": 1})
    ranks["q_proj"] = 99
    assert spec.rank_pattern == {"q_proj": 2}
    assert spec == LoraSpec(alpha=4.0, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 1.0})
    assert isinstance(spec.alpha, float)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [t.path for t in LAYERED]),
        ({"target_modules": "ALL-linear"}, [t.path for t in LAYERED]),
        ({"exclude_modules": ("mlp.down_proj", "q_proj")}, [f"model.layers.{i}.self_attn.v_proj" for i in range(3)]),
        ({"exclude_modules": r".*\.[12]\..*"}, [t.path for t in LAYERED[:3]]),
        ({"target_modules": ("q_proj",)}, [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]),
        ({"target_modules": ("lm_head",)}, ["lm_head"]),
        ({"target_modules": r".*\.0\..*_proj|lm_head"}, [*(t.path for t in LAYERED[:3]), "lm_head"]),
        ({"target_modules": ("q_proj",), "layers_to_transform": (2,)}, ["model.layers.2.self_attn.q_proj"]),
        (
            {"target_modules": ("q_proj", "model.layers.0.mlp.down_proj"), "layers_to_transform": (2,)},
            ["model.layers.0.mlp.down_proj", "model.layers.2.self_attn.q_proj"],
        ),
        (
            {"target_modules": ("q_proj",), "layers_to_transform": (1,), "layers_pattern": ("h", "layers")},
            ["model.layers.1.self_attn.q_proj"],
        ),
    ],
)
def test_which_linears_a_spec_adapts(settings: dict[str, Any], expected: list[str]) -> None:
    assert adapted(LoraSpec(**settings)) == expected


def test_plans_are_in_index_order_whatever_order_the_targets_come_in() -> None:
    assert [p.target.index for p in resolve_modules(LoraSpec(), TARGETS[::-1])] == list(range(9))


def test_rank_and_scale_follow_the_first_pattern_that_matches() -> None:
    spec = LoraSpec(
        r=4,
        alpha=8,
        target_modules=("q_proj", "v_proj"),
        use_rslora=True,
        rank_pattern={"self_attn.q_proj": 16, r"layers\.1\..*": 9},
        alpha_pattern={"v_proj": 2.5},
    )
    plans = {p.target.path.removeprefix("model.layers."): (p.rank, p.scale) for p in resolve_modules(spec, TARGETS)}
    assert plans["0.self_attn.q_proj"] == (16, 8 / 4)
    assert plans["1.self_attn.q_proj"] == (16, 8 / 4)
    assert plans["1.self_attn.v_proj"] == (9, 2.5 / 3)
    assert plans["0.self_attn.v_proj"] == (4, 2.5 / 2)


def test_a_pattern_is_a_whole_name_part_and_not_any_ending() -> None:
    with pytest.raises(AdapterMismatchError, match=r"rank_pattern.*'_proj'"):
        resolve_modules(LoraSpec(rank_pattern={"_proj": 2}), TARGETS)
    with pytest.raises(AdapterMismatchError, match=r"'_proj'"):
        resolve_modules(LoraSpec(target_modules=("_proj",)), TARGETS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ("q_proj", "c_attn")}, r"'c_attn'.*available names: q_proj, v_proj, down_proj, lm_head"),
        ({"target_modules": ("embed_tokens",)}, r"'embed_tokens'.*embeddings are not linears"),
        ({"target_modules": r"transformer\..*"}, r"adapts no linear.*available names"),
        ({"exclude_modules": ("q_proj", "v_proj", "down_proj")}, r"adapts no linear"),
        ({"target_modules": ("q_proj",), "layers_to_transform": (0, 40)}, r"\[40\].*last layer is 2"),
        (
            {"target_modules": ("q_proj",), "layers_to_transform": (0,), "layers_pattern": ("blocks",)},
            r"adapts no linear",
        ),
        ({"rank_pattern": {"q_proj": 2, "c_attn": 3}}, r"rank_pattern.*'c_attn'"),
        ({"alpha_pattern": {"lm_head": 2}}, r"alpha_pattern.*'lm_head'"),
        ({"rank_pattern": {f"{'q' * i}_proj": 2 for i in range(1, 30)}}, r"rank_pattern: 29 keys for 9"),
    ],
)
def test_what_matches_nothing_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterMismatchError, match=message):
        resolve_modules(LoraSpec(**settings), TARGETS)


def test_lm_head_of_a_tied_base_is_refused_naming_the_tie() -> None:
    with pytest.raises(AdapterMismatchError, match="tied to the input embedding"):
        resolve_modules(LoraSpec(target_modules=("q_proj", "lm_head")), LAYERED)


def test_the_matching_part_keeps_only_what_fits() -> None:
    spec = LoraSpec(
        target_modules=("q_proj", "c_attn"),
        layers_to_transform=(1, 40),
        rank_pattern={"q_proj": 2, "c_attn": 3},
        alpha_pattern={"v_proj": 3},
    )
    part = matching_part(spec, TARGETS)
    assert part == LoraSpec(target_modules=("q_proj",), layers_to_transform=(1,), rank_pattern={"q_proj": 2})
    assert adapted(part) == ["model.layers.1.self_attn.q_proj"]
    with pytest.raises(AdapterMismatchError, match="c_attn"):
        matching_part(LoraSpec(target_modules=("c_attn",)), TARGETS)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": r"((?:\w|\.)+)+\d"},
        {"exclude_modules": r"(?:.|.)*\d!|(?:(.|\w)(.|\w)*)*\d"},
        {"rank_pattern": {r"((\w|\.)*)*\d": 2}},
    ],
)
def test_a_pattern_that_backtracks_without_bound_is_refused_soon(settings: dict[str, Any]) -> None:
    start = time.monotonic()
    with pytest.raises((ConfigError, AdapterMismatchError)):
        resolve_modules(LoraSpec(**settings), TARGETS)
    # One match may take 0.5 s, and the first that does ends it; the rest is room for a loaded machine.
    assert time.monotonic() - start < 10
