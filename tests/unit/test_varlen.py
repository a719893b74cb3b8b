"""Packed attention told in each release's words. torch's own needs a GPU: stand-ins here compute what it says."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.parity.training_helpers import ask, make_engine, random_examples, run, start, watch
from torch import Tensor

from loquetier.adapters.spec import LoraSpec
from loquetier.config import TrainingConfig
from loquetier.kernels import varlen
from loquetier.kernels.attention import MaskRule, span_attention
from loquetier.kernels.select import choose_kernels
from loquetier.kernels.varlen import Varlen, adapted, disagreement, packed_attention

CPU = torch.device("cpu")


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    window: int | None,
) -> Tensor:
    """Flash attention's meaning: causal, aligned to the last key, ``[T, H, D]``."""
    assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q[-1] == len(q) and cu_k[-1] == len(k) == len(v)
    assert max_q == cu_q.diff().max() and max_k == cu_k.diff().max()
    parts = []
    for (a, b), (c, d) in zip(cu_q.unfold(0, 2, 1).tolist(), cu_k.unfold(0, 2, 1).tolist(), strict=True):
        q_HLD, k_KPD, v_KPD = (x.transpose(0, 1) for x in (q[a:b], k[c:d], v[c:d]))
        parts.append(span_attention(q_HLD, k_KPD, v_KPD, scale, MaskRule(window)).transpose(0, 1))
    return torch.cat(parts)


def of_2_10(
    q: Tensor, k: Tensor, v: Tensor, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, is_causal: bool = False
) -> Tensor:
    assert is_causal and q.shape[1] == k.shape[1]
    return attend(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, 1 / math.sqrt(q.shape[-1]), None)


def in_between(
    q: Tensor, k: Tensor, v: Tensor, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:  # fmt: skip
    assert is_causal and q.shape[1] == k.shape[1] and scale is not None
    return attend(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, scale, None)


def of_2_13(
    q: Tensor, k: Tensor, v: Tensor, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, *,
    scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    assert window_size[1] == 0 and scale is not None and (enable_gqa or q.shape[1] == k.shape[1])
    window = None if window_size[0] < 0 else window_size[0] + 1
    return attend(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, scale, window)


RELEASES = {"2.10": of_2_10, "in between": in_between, "2.13": of_2_13}


@pytest.mark.parametrize("function", RELEASES.values(), ids=RELEASES.keys())
def test_every_form_agrees_with_a_sequence_at_a_time(function: Callable[..., Tensor]) -> None:
    """The check that a GPU's function must pass too: forward, backward, grouped queries, earlier keys, a window."""
    own = adapted(function)
    assert own is not None
    assert disagreement(own, CPU) is None


def test_the_check_finds_a_window_that_is_one_too_wide() -> None:
    def wrong(*args: Any, scale: float, window_size: tuple[int, int], enable_gqa: bool) -> Tensor:
        left = window_size[0] + 1 if window_size[0] >= 0 else -1
        return of_2_13(*args, scale=scale, window_size=(left, 0), enable_gqa=enable_gqa)

    own = adapted(wrong)
    assert own is not None
    fault = disagreement(own, CPU)
    assert fault is not None and "off by" in fault


def test_what_a_release_cannot_say_is_left_to_sdpa() -> None:
    old, new = adapted(of_2_10), adapted(of_2_13)
    assert old is not None and new is not None
    assert old.takes(MaskRule()) and not old.takes(MaskRule(window=4)) and new.takes(MaskRule(window=4))
    assert not new.takes(MaskRule(softcap=1.0))
    assert adapted(lambda q, k, v, cu_seq_q, cu_seq_k: q) is None, "no way to make it causal"


def test_this_torch_has_a_form_that_we_know() -> None:
    own = varlen.of_this_torch()
    assert own is not None and own.names & {"window_size", "is_causal"}


def test_on_a_cpu_it_is_never_chosen() -> None:
    assert packed_attention(torch.empty(2, 3, 16, dtype=torch.bfloat16), MaskRule()) is None
    assert choose_kernels({}).choices["span_attention"].backend == "reference"
    assert varlen.why_not(CPU) is not None


@pytest.mark.parametrize("tape", ["graph", "replay"])
def test_training_and_evaluation_run_on_it(tape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several examples per step, windows that see earlier rows, evaluation: the gradients are those without it."""
    results = []
    calls: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(len(args[3]) - 1)
        return of_2_13(*args, **kwargs)

    own = Varlen(counted, frozenset({"window_size", "scale", "enable_gqa"}))
    for packed in (False, True):
        if packed:
            monkeypatch.setattr("loquetier.base.attention.packed_attention", lambda q, rule: own)
        engine = make_engine("mistral", tape=tape, train_window=7)
        config = TrainingConfig(learning_rate=1e-2, batch_size=3, max_steps=2, eval_every=1)
        examples, evals = random_examples(5, 6, 14, seed=1), random_examples(3, 6, 14, seed=2)
        job = start(engine, "one", LoraSpec(r=4), config, examples, eval_examples=evals)
        seen = watch(engine, job)
        run(engine)
        engine.check_integrity()
        losses = [r.evaluation.loss for r in job.history if r.evaluation is not None]
        results.append((seen.gradients, losses))
    assert calls and max(calls) > 1
    for ours, theirs in zip(results[1][0], results[0][0], strict=True):
        # float32: sums in another order only where examples lie side by side; a wrong mask shows at 1e-2 and above.
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert results[0][1]
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-6, atol=0)


def test_prompts_that_begin_together_run_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five prompts in chunks of at most 24 rows: some whole, some continued, beside answers under way."""
    results = []
    calls: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(len(args[3]) - 1)
        return of_2_13(*args, **kwargs)

    own = Varlen(counted, frozenset({"window_size", "scale", "enable_gqa"}))
    for packed in (False, True):
        if packed:
            monkeypatch.setattr("loquetier.base.attention.packed_attention", lambda q, rule: own)
        engine = make_engine("llama", max_prefill_rows=24)
        answers = [ask(engine, "tiny", range(10, 10 + n), 4) for n in (5, 7, 30, 3, 4)]
        run(engine)
        engine.check_integrity()
        results.append([a.tokens for a in answers])
    assert results[0] == results[1]
    assert calls and max(calls) > 1
