"""The demo from start to end: load, measure, train while answering, measure again, say what came out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from loquetier.adapters.spec import LoraSpec
from loquetier.config import MIB, DType, EngineConfig, TrainingConfig
from loquetier.demo.clients import ORDER, Clients
from loquetier.demo.facts import QUESTIONS
from loquetier.demo.orders import OrderExample, exact_match, make_orders
from loquetier.demo.plot import write_plot
from loquetier.demo.state import DemoState, StreamState
from loquetier.demo.styles import STYLES, adapter_directory
from loquetier.demo.summary import Quality, Summary, print_summary, summarize, write_summary
from loquetier.demo.view import LiveView, PlainView
from loquetier.errors import JobStateError
from loquetier.finetuning import FinetuneHandle, JobEvent
from loquetier.runtime import Runtime

BASE = "smollm2-135m"
TRAINED = "orders"
"""Name of the adapter that the demo trains."""
NUM_TRAIN, NUM_HELD_OUT = 160, 20
EVAL_EVERY = 10
"""Steps between two looks at the held-out loss."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoOptions:
    """What `loquetier demo` can be told."""

    steps: int = 50
    """Optimizer steps."""
    seconds: float | None = None
    """End the training after this time, but not before its first step; None = when the steps are done."""
    output: Path = Path("demo-output")
    """Where summary.json and demo.png go."""
    dtype: DType = "auto"


def run_demo(options: DemoOptions, console: Console | None = None) -> Summary:
    """Run the demo and print its view and summary.

    Raises:
        LoquetierError: the base or an adapter cannot be loaded, a request failed, or the training did.
        OSError: `options.output` cannot be written; known before anything is loaded.
    """
    started = time.monotonic()
    console = console or Console()
    options.output.mkdir(parents=True, exist_ok=True)
    train, held_out = make_orders(NUM_TRAIN, NUM_HELD_OUT)
    console.print(f"Loading {BASE} and the adapters {', '.join(STYLES)} ...")
    adapters = {style: adapter_directory(style) for style in STYLES}
    with Runtime(BASE, adapters=adapters, config=_engine_config(options)) as runtime:
        console.print(f"Asking the bare base for {len(held_out)} held-out orders ...")
        before = _measure(runtime, None, held_out)
        state = _train_while_answering(runtime, options, train, held_out, console)
        console.print(f"Asking the trained adapter for the same {len(held_out)} orders ...")
        after = _measure(runtime, TRAINED, held_out)
        dtype = runtime.config.dtype
    summary = summarize(state, before, after, base=BASE, dtype=dtype, wall_seconds=time.monotonic() - started)
    print_summary(summary, console)
    written = [write_summary(summary, options.output)]
    plot = write_plot(state, summary, options.output)
    if plot is None:
        console.print("No PNG: matplotlib is not installed. Install it with: pip install 'loquetier[demo]'")
    else:
        written.append(plot)
    console.print(f"Written: {', '.join(str(path) for path in written)}", markup=False, highlight=False, soft_wrap=True)
    return summary


def _engine_config(options: DemoOptions) -> EngineConfig:
    # Two dozen short conversations and five small adapters: what the machine has is not the measure.
    return EngineConfig(dtype=options.dtype, kv_memory=256 * MIB, adapter_memory=128 * MIB)


def _measure(runtime: Runtime, model: str | None, examples: Sequence[OrderExample]) -> Quality:
    """Exact match by greedy answers, all at once, and the loss on the right answers."""
    handles = [runtime.submit(example.prompt, model, ORDER) for example in examples]
    answers = [handle.result().text for handle in handles]
    loss = runtime.evaluate(model, [example.record for example in examples]).loss
    return Quality(exact_match=exact_match(examples, answers), loss=loss, num_examples=len(examples))


def _train_while_answering(
    runtime: Runtime,
    options: DemoOptions,
    train: Sequence[OrderExample],
    held_out: Sequence[OrderExample],
    console: Console,
) -> DemoState:
    """Start the clients and the job together; returns when the job has ended and every client has its answer."""
    state = DemoState(
        total_steps=options.steps,
        streams=[StreamState(style) for style in STYLES],
        live_question=held_out[0].sentence,
        expected=held_out[0].order.to_json(),
    )

    def on_event(event: JobEvent) -> None:
        if event.kind == "step" and event.record is not None:
            with state.lock:
                state.steps.append(event.record)
                state.step_times.append(state.seconds)
        elif event.record is not None and event.record.evaluation is not None:
            with state.lock:
                state.held_out.append((state.seconds, event.record.evaluation.loss))

    clients = Clients(runtime, state)
    clients.start(QUESTIONS, held_out[0], TRAINED)
    try:
        handle = runtime.finetune(
            TRAINED,
            [example.record for example in train],
            lora=LoraSpec(r=8, alpha=16),
            training=TrainingConfig(
                learning_rate=7e-4,
                lr_scheduler_type="linear",
                warmup_ratio=0.1,
                batch_size=4,
                max_steps=options.steps,
                eval_every=EVAL_EVERY,
            ),
            eval_data=[example.record for example in held_out],
            callbacks=[on_event],
        )
        with (LiveView if console.is_terminal else PlainView)(state, console) as view:
            _wait(handle, clients, view, state, options.seconds)
        clients.finish()
    finally:
        clients.stop()
    return state


def _wait(
    handle: FinetuneHandle, clients: Clients, view: LiveView | PlainView, state: DemoState, seconds: float | None
) -> None:
    """Refresh the view until the job has ended, or the time is up, or a client has failed."""
    while True:
        try:
            handle.wait(view.refresh_every)
            view.refresh()
            return
        except TimeoutError:
            view.refresh()
        time_is_up = seconds is not None and state.seconds > seconds and handle.history
        if time_is_up or clients.has_failed:
            try:
                handle.cancel()
            except JobStateError:  # it ended just now
                return
