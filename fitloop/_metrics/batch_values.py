"""`BatchValues`: the results of the batch steps of a phase, collected without waiting for a device.

Numbers are appended at once. Scalars on a device are stacked there, one small kernel for each
batch, and copied to the host in blocks of `CHUNK` batches, without blocking. Only a read waits for
the device. Knows no history.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fitloop._errors import MetricError, UnknownMetricError
from fitloop._types import Phase, Stage

CHUNK = 256
"""number of batches in one copy from a device to the host"""


def as_mapping(values: Any, phase: Phase, stage: Stage) -> Mapping[str, Any]:
    """Return the result of a stage function as a mapping; an empty one for None.

    Raises:
        MetricError: the result is of another type.
    """
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise MetricError(
            f"{phase} {stage} returned {type(values).__name__} {values!r:.60}; expected a dict of "
            "metric names to numbers or tensors, or None"
        )
    return values


def as_numbers(values: Any, phase: Phase, stage: Stage) -> dict[str, float]:
    """Return the metrics of ``epoch_start`` or ``epoch_end`` as floats.

    Raises:
        MetricError: a name is no string, or a value neither a number nor a tensor of one element.
    """
    numbers: dict[str, float] = {}
    for name, value in as_mapping(values, phase, stage).items():
        if isinstance(value, (Tensor, np.ndarray)):
            size = value.numel() if isinstance(value, Tensor) else value.size
            is_nested = getattr(value, "is_nested", False)  # it has no shape
            if size != 1 or is_nested:
                shape = "a nested shape" if is_nested else f"shape {tuple(value.shape)}"
                raise MetricError(
                    f"{phase} {stage} returned {name!r} with {shape}; expected one number: "
                    "reduce it, or return one metric for each element"
                )
            value = value.item()
        _check_name(name, phase, stage)
        numbers[name] = _as_float(name, value, phase, stage)
    return numbers


def _as_float(name: str, value: Any, phase: Phase, stage: Stage) -> float:
    try:
        if not isinstance(value, (str, bytes)):  # float("1") is no error
            return float(value)
    except (TypeError, ValueError):
        pass
    raise MetricError(
        f"{phase} {stage} returned {name!r}: {type(value).__name__} {value!r:.60}; expected a "
        "number or a tensor: leave out what is no metric"
    )


def _check_name(name: object, phase: Phase, stage: Stage) -> None:
    if not isinstance(name, str):
        raise MetricError(
            f"{phase} {stage} returned a metric named {name!r}, a {type(name).__name__}; expected "
            "names to be strings"
        )


class BatchValues:
    """The values of one pass over a loader, by name. For one thread."""

    def __init__(self, phase: Phase) -> None:
        self._phase = phase
        self._numbers: dict[str, array[float]] = {}
        self._append: dict[str, Callable[[float], None]] = {}
        self._tensors: dict[str, list[Tensor]] = {}
        self._device = _DeviceScalars(self._append_number)
        self._first: tuple[str, ...] = ()
        """names in the first batch; until there are gaps, every batch has the same"""
        self._num_names = 0
        """number of these names; -1 since the first batch that has other names"""
        self._batch_nums: dict[str, array[int]] = {}
        """numbers of the batches that had a name, of all names; empty as long as there are no gaps
        """

    def put(self, values: Any, batch_num: int) -> None:
        """Add the result of the step of a batch, counted from 1.

        Raises:
            MetricError: it is no mapping of names to numbers or tensors, or a name is a number in
                one batch and a tensor in another.
        """
        if values is None:
            if not self._num_names:
                return
            values = {}
        if type(values) is not dict:
            values = as_mapping(values, self._phase, Stage.BATCH_STEP)
        on_device: list[tuple[str, Tensor]] | None = None
        for name, value in values.items():
            if type(value) is not float and isinstance(value, Tensor):
                if value.ndim:
                    self._put_tensor(name, value)
                    continue
                if not value.is_cpu:
                    on_device = on_device or []
                    on_device.append((name, value))
                    continue
                value = value.item()
            try:
                self._append[name](value)
            except (KeyError, TypeError):
                if name in self._device.names:
                    self._device.drain()  # keep the order
                self._append_number(name, value)
        if on_device is not None:
            for name, _value in on_device:
                self._refuse_mixed(name, self._tensors)
            self._device.put(on_device, batch_num)
            for name, _value in on_device:
                self._append.pop(name, None)  # a number must wait for those on the device
                if name not in self._first:
                    self._num_names = -1
        if len(values) != self._num_names:
            self._note_gaps(values, batch_num)

    def _note_gaps(self, values: Mapping[str, Any], batch_num: int) -> None:
        """Note the number of a batch for its names, once not all batches have the same ones."""
        if batch_num == 1:
            self._first, self._num_names = tuple(values), len(values)
            return
        if not self._batch_nums:
            self._batch_nums = {name: array("q", range(1, batch_num)) for name in self._first}
        for name in values:
            if name not in self._batch_nums:
                self._batch_nums[name] = array("q")
            self._batch_nums[name].append(batch_num)
        self._num_names = -1

    def _append_number(self, name: str, value: Any) -> None:
        """Add a number with all checks, which the fast path in `put` omits."""
        if name not in self._numbers:
            _check_name(name, self._phase, Stage.BATCH_STEP)
            self._refuse_mixed(name, self._tensors)
        if isinstance(value, np.ndarray):
            if value.size != 1:
                raise MetricError(
                    f"{self._phase} batch_step returned {name!r} as an array of shape "
                    f"{value.shape}; expected a number or a tensor: use torch.as_tensor(...)"
                )
            value = value.item()
        number = _as_float(name, value, self._phase, Stage.BATCH_STEP)
        column = self._numbers.get(name)
        if column is None:
            column = self._numbers[name] = array("d")
            self._num_names = -1 if name not in self._first else self._num_names
        column.append(number)
        if name not in self._device.names:  # else the next number may have to wait for others
            self._append[name] = column.append

    def _put_tensor(self, name: str, value: Tensor) -> None:
        if name not in self._tensors:
            _check_name(name, self._phase, Stage.BATCH_STEP)
            self._refuse_mixed(name, {*self._numbers, *self._device.names})
            self._tensors[name] = []
            self._num_names = -1
        # A copy, since the step may reuse the tensor.
        self._tensors[name].append(value.detach().clone())

    def _refuse_mixed(self, name: str, other_kind: Container[str]) -> None:
        if name in other_kind:
            raise MetricError(
                f"{self._phase} batch_step returned {name!r} as a number in one batch and as a "
                "tensor with dimensions in another; expected one kind throughout"
            )

    def names(self) -> list[str]:
        """Return all names, scalars first."""
        self._device.drain()
        return [*self._numbers, *self._tensors]

    def columns(self) -> dict[str, tuple[Sequence[float], Sequence[int]]]:
        """Return the values of each number, and the indices of their batches.

        A name whose tensors all have one element is a number. Waits for values on a device.
        """
        self._device.drain()
        numbers: dict[str, Sequence[float]] = {**self._numbers}
        for name, tensors in self._tensors.items():
            if all(tensor.numel() == 1 for tensor in tensors):
                numbers[name] = [float(tensor) for tensor in tensors]
        indices = {name: (np.array(nums) - 1).tolist() for name, nums in self._batch_nums.items()}
        return {n: (column, indices.get(n, range(len(column)))) for n, column in numbers.items()}

    def collect(self) -> None:
        """Copy values from a CUDA device to the host without waiting: some come with a later call.

        Other devices would have to be waited for; their values come in blocks of `CHUNK`.
        """
        if self._device.names:
            self._device.collect()

    def drain(self) -> None:
        """Wait for all values on a device."""
        self._device.drain()

    def arrived(self, batches: int) -> int:
        """Return how many of the first ``batches`` batches have all their values on the host."""
        pending = self._device.first_pending
        return batches if pending is None else pending - 1

    def between(self, first: int, last: int) -> dict[str, tuple[array[float], Sequence[int]]]:
        """Return the values of the batches after number ``first`` to ``last``, which have arrived.

        Beside them are the indices of their batches, 0 for the first. Only of numbers and tensors
        without dimensions.
        """
        columns: dict[str, tuple[array[float], Sequence[int]]] = {}
        for name, column in self._numbers.items():
            nums = self._batch_nums.get(name)
            if nums is None:
                columns[name] = column[first:last], range(last - first)
            else:
                begin, end = bisect_right(nums, first), bisect_right(nums, last)
                if end > begin:
                    columns[name] = column[begin:end], [n - first - 1 for n in nums[begin:end]]
        return columns

    def scalars(self, batches: int) -> dict[str, array[float]]:
        """Return the numbers of the first ``batches`` batches; NaN for a batch without a value."""
        scalars = {}
        for name, (values, indices) in self.columns().items():
            column = np.full(batches, np.nan)
            column[indices] = values
            scalars[name] = array("d", column.tobytes())
        return scalars

    def export(self) -> dict[str, Any]:
        """Return all values so far, for `restore`; wait for those on a device."""
        self._device.drain()
        return {
            "numbers": {name: np.array(column) for name, column in self._numbers.items()},
            "tensors": {name: list(values) for name, values in self._tensors.items()},
            "batches": {name: np.array(nums) for name, nums in self._batch_nums.items()},
        }

    def restore(self, values: Any) -> None:
        """Start with the result of `export`."""
        for name, column in values["numbers"].items():
            numbers = self._numbers[name] = array("d", column.tobytes())
            self._append[name] = numbers.append
        self._tensors = {name: list(tensors) for name, tensors in values["tensors"].items()}
        nums = values.get("batches", {})  # an earlier version has none
        self._batch_nums = {name: array("q", column.tobytes()) for name, column in nums.items()}
        self._first = (*self._numbers, *self._tensors)
        self._num_names = -1 if self._batch_nums else len(self._first)

    def __contains__(self, name: object) -> bool:
        return name in self._numbers or name in self._tensors or name in self._device.names

    def __getitem__(self, name: str) -> Tensor | list[Tensor]:
        """Return the values of ``name`` so far: a float64 tensor on the CPU, or a list of tensors.

        Raises:
            UnknownMetricError: no batch step of this phase returned ``name``.
        """
        self._device.drain()
        if name in self._numbers:
            return torch.tensor(self._numbers[name], dtype=torch.float64, device="cpu")
        if name in self._tensors:
            return list(self._tensors[name])
        raise UnknownMetricError(
            name, self.names(), f"the batch values of this {self._phase} epoch"
        )


class _DeviceScalars:
    """Scalars that are still on a device; passed on to ``append`` in the order of the batches.

    Values of different dtypes are stacked separately, so that none loses digits.
    """

    def __init__(self, append: Callable[[str, float], None]) -> None:
        self._append = append
        self.names: frozenset[str] = frozenset()
        self._names_by_dtype: dict[torch.dtype, tuple[str, ...]] = {}
        self._rows: dict[torch.dtype, list[Tensor]] = {}
        """one row for each batch"""
        self._num_rows = 0
        self._first_row = 0
        """number of the batch of the first row"""
        self._blocks: deque[tuple[tuple[str, ...], Tensor, torch.cuda.Event | None, int]] = deque()
        """copies to the host that may not be complete yet, with names, event and first batch"""

    @property
    def first_pending(self) -> int | None:
        """Number of the first batch whose values have not all been passed on; None without one."""
        if self._blocks:
            return self._blocks[0][3]
        return self._first_row if self._num_rows else None

    def put(self, values: list[tuple[str, Tensor]], batch_num: int) -> None:
        groups: dict[torch.dtype, dict[str, Tensor]] = {}
        for name, value in values:
            groups.setdefault(value.dtype, {})[name] = value
        names_by_dtype = {dtype: tuple(group) for dtype, group in groups.items()}
        if names_by_dtype != self._names_by_dtype:
            self.drain()
            self._names_by_dtype = names_by_dtype
            self._rows = {dtype: [] for dtype in groups}
            self.names = frozenset(name for name, _value in values)
        if not self._num_rows:
            self._first_row = batch_num
        for dtype, group in groups.items():
            # Stacking copies the values: the step may reuse its tensors, and the graph is freed.
            self._rows[dtype].append(torch.stack([value.detach() for value in group.values()]))
        self._num_rows += 1
        if self._num_rows >= CHUNK:
            self._copy_to_host()
            self._pass_on_complete()

    def collect(self) -> None:
        """Begin to copy what is on a CUDA device, and pass on what has come; never wait."""
        if self._num_rows and next(rows[0].is_cuda for rows in self._rows.values()):
            self._copy_to_host()
        self._pass_on_complete()

    def _copy_to_host(self) -> None:
        for dtype, rows in self._rows.items():
            if not rows:
                continue
            block = torch.stack(rows)
            rows.clear()
            event = None
            if block.is_cuda:
                host = torch.empty(block.shape, dtype=block.dtype, device="cpu", pin_memory=True)
                host.copy_(block, non_blocking=True)
                event = torch.cuda.current_stream(block.device).record_event()
            else:
                host = block.cpu()
            self._blocks.append((self._names_by_dtype[dtype], host, event, self._first_row))
        self._num_rows = 0

    @staticmethod
    def _is_complete(event: torch.cuda.Event | None) -> bool:
        return event is None or bool(event.query())  # type: ignore[no-untyped-call]

    def _pass_on_complete(self) -> None:
        while self._blocks and self._is_complete(self._blocks[0][2]):
            self._pass_on()

    def _pass_on(self) -> None:
        names, host, event, _first = self._blocks.popleft()
        if event is not None:
            event.synchronize()
        for column, name in enumerate(names):
            for value in host[:, column].tolist():
                self._append(name, value)

    def drain(self) -> None:
        """Pass all values on; wait for the device."""
        self._copy_to_host()
        while self._blocks:
            self._pass_on()
        self.names, self._names_by_dtype = frozenset(), {}
