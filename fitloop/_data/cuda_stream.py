"""A CUDA stream for one run, so that its kernels run beside those of other runs on the device.

Without one, a run uses the default stream of the device, and the kernels of several runs wait for
each other. Owns the order between the run's stream and other streams. `fitloop._data.device`
orders the batches.
"""

from __future__ import annotations

import torch


class NullStreamScope:
    """Leaves the current stream as it is."""

    def enter(self) -> None: ...
    def leave(self) -> None: ...


class CudaStreamScope(NullStreamScope):
    """A CUDA stream that is current while code of the run is executed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._outer = torch.cuda.current_stream(device)

    def enter(self) -> None:
        """Make the run's stream current in this thread; it waits for the stream before."""
        current = torch.cuda.current_stream(self._device)
        if current != self._stream:
            self._outer = current
            self._stream.wait_stream(current)
            torch.cuda.set_stream(self._stream)

    def leave(self) -> None:
        """Make the stream before `enter` current; it and the default stream wait for the run's."""
        torch.cuda.set_stream(self._outer)
        for stream in {self._outer, torch.cuda.default_stream(self._device)}:
            stream.wait_stream(self._stream)
