"""Choosing the next token of every sequence of a step, in one vectorised pass over the vocabulary.

Order, as in vLLM: logit bias, min_tokens, penalties, temperature, min_p, top_k, top_p, draw.

Three promises shape the code:

- *A row is not touched by its neighbours.* Options are per-row columns over the rows that use them, with exact neutral
  values. Sums whose order may depend on the batch's shape (a cumulative sum is split differently for one row than for
  many) are taken over fixed-point integers, where order does not matter. Ties are broken by token id.
- *Same seed, same token, given equal logits.* There is no generator to share or save: the uniform number is
  a hash of (seed, number of tokens generated so far), so preemption and batch order cannot move it.
- *One bad row is one failed row.* It is reported in `SampledTokens.failed`; the others are as without it.

On a CPU the C kernels of `kernels.native_sample` do the passes over the vocabulary; the torch code is their reference.
Features that no row uses cost nothing; an all-greedy batch is one max over the logits. The only copy from the
device is one small tensor at the end.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loquetier.config import SamplingParams
from loquetier.engine.columns import column_of, ids_of, index_of
from loquetier.engine.drawing import draw_rows
from loquetier.engine.logprobs import logprob_table, top_dict
from loquetier.engine.uniforms import stream_seed, uniforms
from loquetier.errors import ConfigError
from loquetier.kernels.native_sample import DrawArguments, NativeSample
from loquetier.kernels.select import process_kernels
from loquetier.kernels.transfer import HostCopy, to_device

GREEDY_BELOW = 1e-5
"""Lower temperatures are greedy: the division would overflow float32 (vLLM has the same bound)."""

_F32 = torch.finfo(torch.float32)


class TokenConstraint(Protocol):
    """What a grammar lets come next, for one choice. Called on the engine's thread; must not raise."""

    def allowed_V(self) -> npt.NDArray[np.bool_]:
        """True for each token id that may come next; all False when that cannot be said, which fails the row."""

    def observe(self, token_id: int) -> None:
        """This token has come."""


@dataclass(slots=True, eq=False)
class SamplerState:
    """What sampling must remember of one choice of one request. Survives preemption as it is."""

    params: SamplingParams
    seed: int
    """The choice's own 64-bit stream."""
    eos_token_ids: frozenset[int]
    output_counts_V: Tensor | None = None
    """int32: how often each token was generated. Present only with a penalty."""
    prompt_seen_V: Tensor | None = None
    """bool: tokens of the prompt. Present only with a penalty."""
    bias_ids_B: Tensor | None = None
    """int64 token ids of the logit bias, on the logits' device."""
    bias_B: Tensor | None = None
    """float32 values of the logit bias."""
    ending_ids_E: Tensor | None = None
    """int64 token ids that min_tokens forbids; present only with min_tokens."""
    constraint: TokenConstraint | None = None

    @property
    def is_greedy(self) -> bool:
        """True when the most likely token is taken."""
        return self.params.temperature < GREEDY_BELOW

    def observe(self, token_id: int) -> None:
        """A token has come, in any order with other sequences. Call it once per token that is kept."""
        if self.constraint is not None:
            self.constraint.observe(token_id)

    @property
    def counts(self) -> bool:
        """Whether the tokens generated so far change the next one's logits."""
        return self.output_counts_V is not None

    def count(self, token_1: Tensor) -> None:
        """Count a generated token (int64 ``[1]``) where it lies, so that the next step can run before the host knows
        it. Call it once per token that is sampled; needless where nothing `counts`."""
        if self.output_counts_V is None:
            return
        self.output_counts_V.index_add_(0, token_1, torch.ones_like(token_1, dtype=torch.int32))

    @property
    def needs_host(self) -> bool:
        """Whether the next token can be chosen only when the host knows the last one."""
        return self.constraint is not None


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """One entry per row, plain host data."""

    token_ids: list[int]
    """-1 where `failed`."""
    logprobs: list[float | None]
    """Natural log-probability of the token under the raw logits, before any option (vLLM's default
    ``raw_logprobs``); None where not asked for or failed. Never below `MIN_LOGPROB`, never NaN."""
    top: list[dict[int, float] | None]
    """The ``params.logprobs`` most likely tokens under the raw logits, most likely first, ties by smaller id."""
    failed: list[bool]
    """True when the row has no token: NaN or +inf among its logits, or every token masked."""


def new_state(
    params: SamplingParams,
    choice_index: int,
    prompt_tokens: Sequence[int],
    eos_token_ids: Iterable[int],
    vocab_size: int,
    device: torch.device | str = "cpu",
) -> SamplerState:
    """Build the state of choice `choice_index` (0-based) of a request.

    Raises:
        ConfigError: a token id in `params` or in the prompt is not below `vocab_size`.
    """
    _check_ids("logit_bias", params.logit_bias, vocab_size)
    _check_ids("stop_token_ids", params.stop_token_ids, vocab_size)
    seed = secrets.randbits(64) if params.seed is None else stream_seed(params.seed, choice_index)
    state = SamplerState(params=params, seed=seed, eos_token_ids=frozenset(eos_token_ids))
    if _has_penalty(params):
        _check_ids("prompt", prompt_tokens, vocab_size)
        state.output_counts_V = torch.zeros(vocab_size, dtype=torch.int32, device=device)
        state.prompt_seen_V = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        state.prompt_seen_V.index_fill_(0, ids_of(prompt_tokens, device), True)
    if params.logit_bias:
        state.bias_ids_B = ids_of(params.logit_bias.keys(), device)
        bias = np.fromiter(params.logit_bias.values(), dtype=np.float32)
        state.bias_B = to_device(bias, torch.device(device))
    if params.min_tokens:
        # A model's own end ids may lie in a padded part of the vocabulary that has no logits: nothing to mask there.
        endings = {t for t in state.eos_token_ids if 0 <= t < vocab_size} | set(params.stop_token_ids)
        state.ending_ids_E = ids_of(sorted(endings), device)
    return state


@dataclass(frozen=True, slots=True)
class DeviceTokens:
    """Sampled tokens where they were sampled, and their report on its way to the host."""

    ids_N: Tensor
    """int64, all in the vocabulary, a failed row's too."""
    _report: HostCopy
    _wanted: tuple[int | None, ...]
    _width: int

    def read(self) -> SampledTokens:
        """On the host; waits for the device."""
        report = self._report.numpy()
        if report.ndim == 1:
            ids, n = report.tolist(), len(report)
            return SampledTokens(ids, [None] * n, [None] * n, [token < 0 for token in ids])
        return _on_host(report.tolist(), self._wanted, self._width)


def sample(logits_NV: Tensor, states: Sequence[SamplerState], num_generated: Sequence[int]) -> SampledTokens:
    """`sample_on_device`, read at once."""
    return sample_on_device(logits_NV, states, num_generated).read() if states else SampledTokens([], [], [], [])


def sample_on_device(logits_NV: Tensor, states: Sequence[SamplerState], num_generated: Sequence[int]) -> DeviceTokens:
    """Choose one token per row, of one row or more.

    Args:
        logits_NV: raw model logits, any float dtype; not changed. Computed in float32.
        states: the row's options and memory.
        num_generated: tokens the row's sequence has generated so far; the counter of its random stream.
    """
    assert logits_NV.shape[0] == len(states) == len(num_generated) > 0
    edited_NV = _edit(logits_NV, states, num_generated)
    native = _native()
    if native is not None and native.takes(edited_NV) and native.takes(logits_NV):
        return _sample_native(native, logits_NV, edited_NV, states, num_generated)
    best_N, ids_N = edited_NV.max(dim=-1)
    ok_N = torch.isfinite(best_N)
    if edited_NV is not logits_NV:  # an edit may cover a NaN, and the row is broken all the same
        ok_N &= torch.isfinite(logits_NV.amax(dim=-1))
    rows = [i for i, s in enumerate(states) if not s.is_greedy]
    if rows:
        u_M = uniforms([states[i].seed for i in rows], [num_generated[i] for i in rows])
        drawn_M = draw_rows(edited_NV, best_N, ok_N, rows, [states[i].params for i in rows], u_M)
        ids_N = ids_N.index_copy(0, index_of(rows, ids_N), drawn_M)
    return _reported(logits_NV, ids_N, ok_N, tuple(s.params.logprobs for s in states))


@cache
def _native() -> NativeSample | None:
    library = process_kernels("cpu").native("sample")
    return NativeSample(library) if library else None


def _sample_native(
    native: NativeSample,
    logits_NV: Tensor,
    edited_NV: Tensor,
    states: Sequence[SamplerState],
    num_generated: Sequence[int],
) -> DeviceTokens:
    """`sample_on_device` on the C kernels. Around them numpy: a torch call on 16 numbers takes longer than they do."""
    best_N, ids_N = native.argmax(edited_NV)
    ok_N = np.isfinite(best_N.numpy())
    if edited_NV is not logits_NV:
        ok_N &= np.isfinite(native.argmax(logits_NV)[0].numpy())
    rows = [i for i, s in enumerate(states) if not s.is_greedy]
    if rows:
        u_M = uniforms([states[i].seed for i in rows], [num_generated[i] for i in rows])
        draws = [_draw_of(i, states[i].params, u) for i, u in zip(rows, u_M.tolist(), strict=True)]
        ids_N.numpy()[rows] = native.draw(edited_NV, best_N, draws).numpy()
    wanted = tuple(s.params.logprobs for s in states)
    if any(k is not None for k in wanted):
        return _reported(logits_NV, ids_N, torch.from_numpy(ok_N), wanted)
    return DeviceTokens(ids_N, HostCopy(torch.from_numpy(np.where(ok_N, ids_N.numpy(), -1))), wanted, 0)


def _draw_of(row: int, p: SamplingParams, uniform: float) -> DrawArguments:
    return DrawArguments(row, p.top_k, p.temperature, p.min_p, p.top_p, uniform)


# --- edits of the logits: bias, min_tokens, penalties, grammar -------------------------------------------------------


def _edit(logits_NV: Tensor, states: Sequence[SamplerState], num_generated: Sequence[int]) -> Tensor:
    """Return `logits_NV` itself when no row edits, else an edited float32 copy."""
    biased = [i for i, s in enumerate(states) if s.bias_ids_B is not None]
    unended = [i for i, s in enumerate(states) if s.ending_ids_E is not None and num_generated[i] < s.params.min_tokens]
    penalised = [i for i, s in enumerate(states) if s.output_counts_V is not None]
    bound = [i for i, s in enumerate(states) if s.constraint is not None]
    if not (biased or unended or penalised or bound):
        return logits_NV
    out_NV = logits_NV.to(torch.float32, copy=True)
    if biased:
        at, ids = _flat_entries(biased, [states[i].bias_ids_B for i in biased], out_NV)
        bias = torch.cat([b for i in biased if (b := states[i].bias_B) is not None])
        out_NV[at, ids] = out_NV[at, ids] + bias  # ids are unique within a row: they were dict keys
    if unended:
        at, ids = _flat_entries(unended, [states[i].ending_ids_E for i in unended], out_NV)
        out_NV[at, ids] = -torch.inf
    if penalised:
        index_M = index_of(penalised, out_NV)
        out_NV.index_copy_(0, index_M, _penalise(out_NV.index_select(0, index_M), [states[i] for i in penalised]))
    if bound:  # last, so that nothing brings a forbidden token back
        allowed_BV = np.stack([c.allowed_V() for i in bound if (c := states[i].constraint) is not None])
        index_B = index_of(bound, out_NV)
        forbidden_BV = to_device(~allowed_BV, out_NV.device)
        out_NV.index_copy_(0, index_B, out_NV.index_select(0, index_B).masked_fill(forbidden_BV, -torch.inf))
    return out_NV


def _flat_entries(rows: Sequence[int], ids: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, Tensor]:
    """Row numbers and token ids, flattened over the rows."""
    present = [t for t in ids if t is not None]
    # Repeated on the host: torch would ask the device how long the result is.
    return index_of(np.repeat(rows, [t.numel() for t in present]).tolist(), like), torch.cat(present)


def _penalise(x_MV: Tensor, states: Sequence[SamplerState]) -> Tensor:
    """Repetition over prompt and answer, then presence and frequency over the answer. Neutral values are exact."""
    counts_MV = torch.stack([c for s in states if (c := s.output_counts_V) is not None])
    seen_MV = torch.stack([p for s in states if (p := s.prompt_seen_V) is not None]) | (counts_MV > 0)
    # Any finite penalty > 0 is allowed: kept a normal float32, and overflow kept finite, so that no NaN can arise.
    repetition_M1 = column_of([s.params.repetition_penalty for s in states], x_MV).clamp(_F32.tiny, _F32.max)
    scaled_MV = torch.where(x_MV > 0, x_MV / repetition_M1, x_MV * repetition_M1).clamp(_F32.min, _F32.max)
    y_MV = torch.where(seen_MV & (x_MV > -torch.inf), scaled_MV, x_MV)
    presence_M1 = column_of([s.params.presence_penalty for s in states], x_MV)
    frequency_M1 = column_of([s.params.frequency_penalty for s in states], x_MV)
    return y_MV - presence_M1 * (counts_MV > 0) - frequency_M1 * counts_MV


# --- reporting ------------------------------------------------------------------------------------------------------


def _reported(logits_NV: Tensor, ids_N: Tensor, ok_N: Tensor, wanted: tuple[int | None, ...]) -> DeviceTokens:
    """Tokens, -1 for a failed row; with log-probabilities where wanted all of it in one float64 tensor (exact for ids
    and float32)."""
    n = len(wanted)
    kept_N = torch.where(ok_N, ids_N, -1)
    if all(k is None for k in wanted):
        return DeviceTokens(ids_N, HostCopy(kept_N), wanted, 0)
    rows = [i for i, k in enumerate(wanted) if k is not None]
    width = min(logits_NV.shape[1], max((k for k in wanted if k is not None), default=0))
    packed = torch.stack([kept_N.double(), ok_N.double()], dim=1)
    index = index_of(rows, ids_N)
    table = packed.new_zeros((n, 1 + 2 * width))
    table.index_copy_(0, index, logprob_table(logits_NV, rows, ids_N.index_select(0, index), width))
    return DeviceTokens(ids_N, HostCopy(torch.cat([packed, table], dim=1)), wanted, width)


def _on_host(host: list[list[float]], wanted: Sequence[int | None], width: int) -> SampledTokens:
    asked = [k if host[i][1] else None for i, k in enumerate(wanted)]
    return SampledTokens(
        token_ids=[int(row[0]) for row in host],
        logprobs=[None if k is None else row[2] for row, k in zip(host, asked, strict=True)],
        top=[None if k is None else top_dict(row[2:], k, width) for row, k in zip(host, asked, strict=True)],
        failed=[not row[1] for row in host],
    )


def _has_penalty(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


def _check_ids(name: str, ids: Iterable[int], vocab_size: int) -> None:
    for token in ids:
        if not 0 <= token < vocab_size:
            raise ConfigError(f"{name}: token id {token} is outside the vocabulary; use ids in [0, {vocab_size})")
