"""The demo's clients: one thread per stream of questions, one that asks the adapter in training, one that samples."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from loquetier.config import SamplingParams
from loquetier.demo.orders import OrderExample
from loquetier.demo.state import DemoState, LiveAnswer, Sample, StreamState
from loquetier.errors import LoquetierError
from loquetier.runtime import Runtime

ANSWER = SamplingParams(temperature=0, max_tokens=48)
ORDER = SamplingParams(temperature=0, max_tokens=24)
SAMPLE_EVERY = 0.5
"""Seconds between two readings of the engine's counters."""


class Clients:
    """Threads that use the runtime until `stop`. An error in one of them comes out of `stop`."""

    def __init__(self, runtime: Runtime, state: DemoState) -> None:
        self._runtime, self._state = runtime, state
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []
        self._errors: list[Exception] = []
        self._is_measuring = True

    def start(self, questions: Sequence[str], live: OrderExample, live_name: str) -> None:
        """Begin all: every stream goes through the questions from another place in the list."""
        for number, stream in enumerate(self._state.streams):
            first = number * len(questions) // len(self._state.streams)
            mine = [*questions[first:], *questions[:first]]
            self._spawn(lambda stream=stream, mine=mine: self._ask_forever(stream, mine))  # type: ignore[misc]
        self._spawn(lambda: self._ask_live(live, live_name))
        self._spawn(self._sample_forever)

    def finish(self) -> None:
        """The training has ended: take the last sample, so that the samples span exactly the training."""
        self._is_measuring = False
        self._sample(is_last=True)

    def stop(self) -> None:
        """Let the answers under way end, and wait for the threads.

        Raises:
            LoquetierError: the first error that one of the clients met.
        """
        self._ended.set()
        for thread in self._threads:
            thread.join()
        if self._errors:
            raise self._errors[0]

    def _spawn(self, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
            except LoquetierError as error:
                self._errors.append(error)
                self._ended.set()

        thread = threading.Thread(target=run, daemon=True, name="demo-client")
        self._threads.append(thread)
        thread.start()

    @property
    def has_failed(self) -> bool:
        """A client met an error: the demo must not wait for the training's end."""
        return bool(self._errors)

    def _ask_forever(self, stream: StreamState, questions: Sequence[str]) -> None:
        number = 0
        while not self._ended.is_set():
            self._ask(stream, questions[number % len(questions)])
            number += 1

    def _ask(self, stream: StreamState, question: str) -> None:
        lock, started = self._state.lock, time.monotonic()
        handle = self._runtime.submit([{"role": "user", "content": question}], stream.model, ANSWER)
        with lock:
            stream.question, stream.text, stream.version, stream.began = question, "", handle.model, started
        for event in handle:
            with lock:
                stream.text += event.text
                stream.num_tokens += event.token_id is not None
        with lock:
            stream.answered += 1
            stream.seconds += time.monotonic() - started

    def _ask_live(self, example: OrderExample, name: str) -> None:
        """Ask the fixed question whenever there is a newer version than the one that answered last."""
        state = self._state
        while not self._ended.is_set():
            # Before its first publish the adapter does not exist: the base answers.
            handle = self._runtime.submit(example.prompt, name if state.steps else None, ORDER)
            with state.lock:
                state.live_text, state.live_version = "", handle.model
            for event in handle:
                with state.lock:
                    state.live_text += event.text
            with state.lock:
                state.live_answers.append(LiveAnswer(handle.model, state.live_text))
            seen = len(state.steps)
            while len(state.steps) == seen and not self._ended.wait(0.05):
                pass

    def _sample_forever(self) -> None:
        while not self._ended.is_set() and self._is_measuring:
            self._sample()
            self._ended.wait(SAMPLE_EVERY)

    def _sample(self, is_last: bool = False) -> None:
        stats = self._runtime.stats()
        with self._state.lock:
            if self._is_measuring or is_last:
                self._state.samples.append(Sample(self._state.seconds, stats.tokens_generated, stats.totals.train_rows))
                self._state.stats = stats
