"""The serving side of a step: requests, their choices, sampling and delivery."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

import numpy as np
import torch
from torch import Tensor

from loquetier.base.model import Base
from loquetier.config import SamplingParams
from loquetier.engine.batch import Batch, head_step
from loquetier.engine.detokenize import IncrementalDetokenizer
from loquetier.engine.hold import HoldState
from loquetier.engine.logprobs import prompt_logprobs
from loquetier.engine.prefix import CacheSpace
from loquetier.engine.request import Choice, FinishReason, Request, TokenEvent, advance
from loquetier.engine.residency import Residency
from loquetier.engine.rows import Sequence, SequenceStatus, StepPlan
from loquetier.engine.sampler import DeviceTokens, TokenConstraint, new_state, sample_on_device
from loquetier.engine.scheduler import Scheduler
from loquetier.engine.stopping import StopChecker
from loquetier.errors import ConfigError, ContextLengthError, EngineError, LoquetierError

log = logging.getLogger("loquetier.serving")

PROMPT_CHUNK_ROWS = 128
"""Rows of prompt logits alive at a time."""


@dataclass(slots=True)
class Serving:
    """Owns every request of the engine."""

    base: Base
    scheduler: Scheduler
    residency: Residency
    max_context: int
    head_module: int | None
    may_share: bool = True
    """False on a base with a sliding window: its sequences share no pages."""
    requests: dict[int, Request] = field(default_factory=dict)
    choices: dict[int, Choice] = field(default_factory=dict)
    """By sequence id."""
    _ids: count[int] = field(default_factory=count)
    _seq_ids: count[int] = field(default_factory=count)
    tokens_generated: int = 0
    """Since the engine began."""

    def add(
        self,
        prompt: list[int],
        model: str,
        params: SamplingParams,
        sink: Callable[[TokenEvent], None],
        priority: int = 0,
        constrain: Callable[[], TokenConstraint] | None = None,
        space: CacheSpace | None = None,
    ) -> Request:
        """Queue a request; all of it is accepted, or nothing is changed and an error raised.

        `constrain` makes what limits the tokens of one choice, for each choice its own. `space`: whose requests share
        KV pages with it; None = those without an owner.

        Raises:
            AdapterNotFoundError, ContextLengthError, OutOfKVMemoryError, ConfigError: see `Runtime.generate`.
        """
        max_total = self._max_total(prompt, params)
        hold = self.residency.acquire(model)
        request = Request(next(self._ids), hold, params, self.base.loaded.eos_token_ids, sink)
        root = self.scheduler.pages.root(hold.version.label, space or CacheSpace()) if self.may_share else None
        try:
            for index in range(params.n):
                choice = self._new_choice(request, index, list(prompt), max_total, priority)
                choice.seq.cache_root = root
                choice.sampler.constraint = None if constrain is None else constrain()
                choice.seq.needs_host = choice.sampler.needs_host
                self.scheduler.check(choice.seq)
                request.choices.append(choice)
            self.residency.start(hold, lambda: self._begin(request), lambda error: self._never_begins(request, error))
        except BaseException:
            for choice in request.choices:
                self._withdraw(choice)
            self.residency.drop(hold)
            raise
        self.requests[request.request_id] = request
        self.choices.update((c.seq.seq_id, c) for c in request.choices)
        request.num_open = len(request.choices)
        return request

    def _begin(self, request: Request) -> None:
        """Its version is in the arena: its sequences take their places in the order in which they arrived."""
        for choice in request.choices:
            if choice.seq.status is SequenceStatus.WAITING:  # not aborted meanwhile
                choice.seq.slot = request.version.slot
                self.scheduler.add(choice.seq)

    def _never_begins(self, request: Request, error: LoquetierError) -> None:
        for choice in request.choices:
            if choice.seq.seq_id in self.choices:
                self.end(choice, error)

    def _withdraw(self, choice: Choice, *, has_failed: bool = False) -> None:
        """Out of the scheduler, if it ever got there."""
        if choice.request.hold.state is HoldState.HELD:
            self.scheduler.abort(choice.seq, has_failed=has_failed)
        else:
            choice.seq.status = SequenceStatus.ABORTED

    def _max_total(self, prompt: list[int], params: SamplingParams) -> int:
        if not prompt:
            raise ConfigError("prompt is empty: at least one token is needed")
        bad = next((t for t in prompt if not 0 <= t < self.base.vocab_size), None)
        if bad is not None:
            raise ConfigError(f"prompt has token id {bad}; ids must be in [0, {self.base.vocab_size})")
        if len(prompt) >= self.max_context:
            raise ContextLengthError(
                f"the prompt has {len(prompt)} tokens and the context is {self.max_context}: no room for an answer. "
                "Shorten the prompt."
            )
        if params.max_tokens is not None and len(prompt) + params.max_tokens > self.max_context:
            raise ContextLengthError(
                f"prompt ({len(prompt)} tokens) plus max_tokens ({params.max_tokens}) is more than the context of "
                f"{self.max_context} tokens. Shorten the prompt or lower max_tokens."
            )
        if params.min_tokens > self.max_context - len(prompt):
            raise ContextLengthError(
                f"min_tokens ({params.min_tokens}) does not fit beside a prompt of {len(prompt)} tokens in the "
                f"context of {self.max_context}. Shorten the prompt or lower min_tokens."
            )
        return self.max_context if params.max_tokens is None else len(prompt) + params.max_tokens

    def _new_choice(self, request: Request, index: int, prompt: list[int], max_total: int, priority: int) -> Choice:
        params, tokenizer = request.params, self.base.tokenizer
        if tokenizer is None and params.stop:
            raise ConfigError("stop strings need a tokenizer, and this base was loaded without one; use stop_token_ids")
        seq = Sequence(
            seq_id=next(self._seq_ids),
            tokens=prompt,
            prompt_len=len(prompt),
            max_total_len=max_total,
            priority=priority,
            needs_prompt_logits=params.prompt_logprobs is not None,
        )
        sampler = new_state(params, index, prompt, request.eos_token_ids, self.base.vocab_size, self.base.device)
        detokenizer = None
        if tokenizer is not None:
            detokenizer = IncrementalDetokenizer(tokenizer, prompt, params.skip_special_tokens)
        return Choice(request, index, seq, sampler, detokenizer, StopChecker(params.stop))

    def begun(self, plan: StepPlan) -> None:
        """The plan's step begins: whoever gets his first rows has waited until now."""
        for chunk in plan.prefill:
            choice = self.choices.get(chunk.seq.seq_id)
            if choice is not None and choice.queue_seconds is None:
                choice.queue_seconds = time.perf_counter() - choice.arrived

    def sample(self, batch: Batch, hidden_MD: Tensor) -> DeviceTokens | None:
        """Sample the next token of every sequence that is complete up to its last token. Nothing waits for the device
        but prompt log-probabilities, where a request asks for them."""
        with torch.no_grad():
            for chunk, row in batch.prompt_chunks:
                self._prompt_logprobs(batch, hidden_MD, chunk.seq, chunk.start, row, chunk.length)
            if not batch.sampled:
                return None
            step = head_step(batch.step, batch.sample_rows, self.head_module, with_grad=False)
            logits_NV = self.base.logits(batch.sampled_of(hidden_MD), step)
            states = [self.choices[seq.seq_id].sampler for seq in batch.sampled]
            tokens = sample_on_device(logits_NV, states, [seq.num_sampled for seq in batch.sampled])
            for i, state in enumerate(states):
                if state.counts:
                    state.count(tokens.ids_N[i : i + 1])
            return tokens

    @staticmethod
    def mark_pending(batch: Batch) -> None:
        """The batch's tokens are sampled, and `deliver` will tell the host which they are. After `Scheduler.commit`."""
        for seq in batch.sampled:
            seq.num_pending += 1

    def _prompt_logprobs(
        self, batch: Batch, hidden_MD: Tensor, seq: Sequence, start: int, row: int, length: int
    ) -> None:
        """Rows of a prompt chunk predict the prompt's next tokens; the last prompt row predicts the answer."""
        choice = self.choices[seq.seq_id]
        k = choice.request.params.prompt_logprobs
        assert k is not None
        stop = min(start + length, seq.prompt_len - 1)
        for at in range(start, stop, PROMPT_CHUNK_ROWS):
            n = min(PROMPT_CHUNK_ROWS, stop - at)
            rows = np.arange(row + at - start, row + at - start + n)
            step = head_step(batch.step, rows, self.head_module, with_grad=False)
            logits_LV = self.base.logits(hidden_MD[rows[0] : rows[-1] + 1], step)
            try:
                found = prompt_logprobs(logits_LV, seq.tokens[at + 1 : at + 1 + n], k)
            except EngineError as error:  # logits that are not finite: this request ends, the step goes on
                choice.error = error
                return
            choice.prompt_logprobs.update(zip(range(at + 1, at + 1 + n), found, strict=True))

    def deliver(self, batch: Batch, tokens: DeviceTokens | None) -> None:
        """Append the sampled tokens, tell the clients, end what is finished. After `mark_pending`."""
        for chunk, _ in batch.prompt_chunks:
            broken = self.choices.get(chunk.seq.seq_id)
            if broken is not None and broken.error is not None:
                self.end(broken, broken.error)
        if tokens is None:
            return
        sampled = tokens.read()
        for i, seq in enumerate(batch.sampled):
            seq.num_pending -= 1
            choice = self.choices.get(seq.seq_id)
            if sampled.failed[i]:
                self.scheduler.pages.distrust(seq)
            if choice is None:
                continue  # ended after this step was planned: its client left, or the step before was its last
            if sampled.failed[i]:
                label = choice.request.version.label
                self.end(choice, EngineError(f"{label} gave logits that are not finite; no token can be chosen"))
                continue
            self.tokens_generated += 1
            event = advance(choice, sampled.token_ids[i], sampled.logprobs[i], sampled.top[i])
            if event.finish_reason is not None:
                self.scheduler.finish(seq)
                self._forget(choice)
            self._tell(choice.request, event)

    def _tell(self, request: Request, event: TokenEvent) -> None:
        """Hand an event to the client; one that cannot take it (its event loop is closed, say) has left."""
        try:
            request.sink(event)
        except Exception:
            log.exception("the client of request %d cannot take its answer; the request ends", request.request_id)
            request.sink = _nobody
            self.abort(request.request_id)

    def end(self, choice: Choice, error: LoquetierError | None) -> None:
        """End one choice early: aborted by its client (no error), or failed."""
        self._withdraw(choice, has_failed=error is not None)
        self._forget(choice)
        reason: FinishReason = "abort" if error is None else "error"
        self._tell(choice.request, TokenEvent(choice.index, None, "", finish_reason=reason, error=error))

    def abort(self, request_id: int, error: LoquetierError | None = None) -> None:
        """End every open choice of a request; one that is finished or unknown is left alone."""
        request = self.requests.get(request_id)
        for choice in list(request.choices) if request else ():
            if choice.seq.seq_id in self.choices:
                self.end(choice, error)

    def _forget(self, choice: Choice) -> None:
        del self.choices[choice.seq.seq_id]
        request = choice.request
        request.num_open -= 1
        if request.num_open == 0:
            del self.requests[request.request_id]
            self.residency.drop(request.hold)


def _nobody(_: TokenEvent) -> None:
    """The sink of a request whose client has left."""
