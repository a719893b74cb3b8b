"""Rotary of layers that run the model's own code, done together with the KV write: one C call for a dozen torch ones.

An attention module's own forward looks up `apply_rotary_pos_emb` among its module's globals. Here each module gets that
forward with another such function, for itself alone: in steps that record nothing it hands q and k on as they are, and
the attention function, which also has v and knows the pages, turns them in place and writes K and V. "Verify, then
swap": on a probe every layer's q and k must come out as the model's own code turns them, to the bit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from loquetier.base.context import Binding, StepContext, Turn
from loquetier.base.support import attention_modules
from loquetier.errors import EngineError

log = logging.getLogger("loquetier.base")

FUNCTION = "apply_rotary_pos_emb"
"""What transformers' models call it."""
PROBE_ROWS = 5


def defer_rotary(layers: Sequence[nn.Module], binding: Binding, run: Callable[[StepContext], Any]) -> bool:
    """Leave rotary to the attention wherever that gives the same; False, and nothing changed, where it does not.

    Args:
        run: a forward of the model on the rows of that step, which record nothing.
    """
    modules = [m for layer in layers for m in attention_modules(layer)]
    if not all(_takes(m) for m in modules):
        log.info("rotary runs as the model's own code: it is not where transformers' attention modules have it")
        return False
    probe = _Probe()
    for module in modules:
        _replace(module, probe.hand_over(binding))
    step = StepContext(num_rows=PROBE_ROWS, spans=((0, PROBE_ROWS),), check_turn=probe.check)
    try:
        run(step)
        fault = probe.fault()
    except EngineError as error:  # of the attention, which did not get what the rotary handed on
        fault = str(error)
    finally:
        for module in modules:
            del module.forward  # the class's own is there again
    if fault is not None:
        log.info("rotary runs as the model's own code: %s", fault)
        return False
    for module in modules:
        _replace(module, _hand_over(binding))
    return True


def _takes(module: nn.Module) -> bool:
    """A plain function of the class that calls `FUNCTION` by that name, not replaced before."""
    forward = type(module).forward
    return (
        isinstance(forward, FunctionType)
        and not hasattr(forward, "__wrapped__")
        and "forward" not in vars(module)
        and FUNCTION in forward.__code__.co_names
        and callable(forward.__globals__.get(FUNCTION))
    )


def _replace(module: nn.Module, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    own = type(module).forward
    seen = {**own.__globals__, FUNCTION: make(own.__globals__[FUNCTION])}
    forward = FunctionType(own.__code__, seen, own.__name__, own.__defaults__, own.__closure__)
    forward.__kwdefaults__ = own.__kwdefaults__
    module.forward = MethodType(forward, module)


def _hand_over(binding: Binding) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def make(own: Callable[..., Any]) -> Callable[..., Any]:
        def rotary(*args: Any, **kwargs: Any) -> Any:
            step = binding.step
            if step is None or step.cuts is not None or step.replay or torch.is_grad_enabled():
                return own(*args, **kwargs)
            if len(args) != 4 or kwargs:  # a model that says which axis is which: not the layout that is known here
                return own(*args, **kwargs)
            q, k, cos, sin = args
            step.turns.append(Turn(q, k, (cos[0], sin[0])))
            return q, k

        return rotary

    return make


class _Probe:
    """What the model's own rotary gives in a forward, beside what the attention makes of q and k."""

    def __init__(self) -> None:
        self._expected: list[tuple[Tensor, Tensor]] = []
        self._called = self._turned = 0
        self._fault: str | None = None

    def hand_over(self, binding: Binding) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def make(own: Callable[..., Any]) -> Callable[..., Any]:
            deferred = _hand_over(binding)(own)

            def rotary(*args: Any, **kwargs: Any) -> Any:
                self._called += 1
                self._expected.append(own(*args, **kwargs))
                return deferred(*args, **kwargs)

            return rotary

        return make

    def check(self, q_1HMD: Tensor, k_1KMD: Tensor) -> None:
        """Called by the attention, with what it turned."""
        self._turned += 1
        expected = self._expected.pop()
        if not all(torch.equal(a, b) for a, b in zip((q_1HMD, k_1KMD), expected, strict=True)):
            self._fault = "its angles turn heads in another way"

    def fault(self) -> str | None:
        """None when every call of the model's rotary was done by the attention, with the same result."""
        if self._called == 0:
            return "nothing turns"
        if self._turned < self._called:
            return "something is done to q and k behind it"
        return self._fault
