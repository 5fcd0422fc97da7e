"""A CUDA stream for one run, on which its kernels go beside those of others on the same device.

Without one a run uses the device's default stream, as a loop written by hand does, and the kernels
of several runs wait for each other. Owns what orders the two: a run begins after all that was begun
on the stream its thread had, and what is begun on the default stream afterwards comes after the
run. Batches cross by `fitloop._data.device`.
"""

from __future__ import annotations

import torch


class NullStreamScope:
    """The default stream of whatever device."""

    def enter(self) -> None:
        """See `CudaStreamScope`."""

    def leave(self) -> None:
        """See `CudaStreamScope`."""

    def resume(self) -> None:
        """See `CudaStreamScope`."""

    def pause(self) -> None:
        """See `CudaStreamScope`."""


class CudaStreamScope(NullStreamScope):
    """The stream of a run on a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._outside = self._between = torch.cuda.current_stream(device)

    def enter(self) -> None:
        """Have the calling thread's kernels go here, after those it has begun elsewhere."""
        current = torch.cuda.current_stream(self._device)
        if current != self._stream:
            self._outside = current
            self._stream.wait_stream(current)
            torch.cuda.set_stream(self._stream)

    def leave(self) -> None:
        """Have the calling thread's kernels go where they went, after those of the run."""
        torch.cuda.set_stream(self._outside)
        for after in {self._outside, torch.cuda.default_stream(self._device)}:
            after.wait_stream(self._stream)

    def resume(self) -> None:
        """Have the kernels of the event loop's thread go here, for one step of a coroutine."""
        self._between = torch.cuda.current_stream(self._device)
        torch.cuda.set_stream(self._stream)

    def pause(self) -> None:
        """End `resume`."""
        torch.cuda.set_stream(self._between)
