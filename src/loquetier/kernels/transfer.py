"""Small arrays between host and device, without either waiting for the other.

A copy from ordinary memory makes the host wait for the device; one from page-locked memory is queued like a kernel.
torch's own cache of page-locked memory gives a block out again only when the copies that read it have run, so a staging
buffer may be dropped at once. On a CPU nothing is copied.
"""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor


def to_device(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """`array` on `device`, queued and not waited for. On a CPU it shares the array's memory."""
    host = torch.from_numpy(array)
    if device.type == "cpu":
        return host
    return _page_locked(host).to(device, non_blocking=True)


class HostCopy:
    """A tensor on its way to the host: the copy is queued at once, and waited for when it is asked for.

    The tensor must not be written to before `numpy` was called where it lies on a CPU: there it is not copied.
    """

    __slots__ = ("_event", "_host")

    def __init__(self, source: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = source.detach()
        if source.device.type != "cpu":
            self._host = _page_locked_like(source)
            self._host.copy_(source.detach(), non_blocking=True)
            self._event = mark(source.device)

    def numpy(self) -> npt.NDArray[Any]:
        """The values; waits for the device if they are not here yet. This is where a step's host waits, and nowhere
        else."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.numpy()


def mark(device: torch.device) -> torch.cuda.Event | None:
    """A mark behind everything queued so far, to wait for; None on a CPU, where nothing is queued."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def _page_locked_like(source: Tensor) -> Tensor:
    return torch.empty(source.shape, dtype=source.dtype, device="cpu", pin_memory=True)


def _page_locked(host: Tensor) -> Tensor:
    return host.pin_memory()
