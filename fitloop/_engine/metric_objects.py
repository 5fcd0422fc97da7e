"""The objects of ``metrics=``, as those of torchmetrics: their use in a phase, and their state.

The state of a metric of torchmetrics is not in its ``state_dict``, but in the attributes that its
``_defaults`` name. Objects of any other class have a ``state_dict``, or plain attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fitloop._arguments import expect
from fitloop._errors import ConfigurationError, MetricError, add_note_safely

METHODS = ("update", "compute", "reset")
_COUNT = "_update_count"


def check_metrics(metrics: Any) -> dict[str, Any]:
    """Return the argument ``metrics`` as a dict; raise ConfigurationError if it cannot work."""
    if metrics is None:
        return {}
    items = getattr(metrics, "items", None)
    fits = callable(items) and not isinstance(metrics, type)
    expect(fits, "metrics", metrics, "metric objects by name, as a dict")
    checked = {}
    for name, metric in metrics.items():
        missing = [method for method in METHODS if not callable(getattr(metric, method, None))]
        if not isinstance(name, str) or missing or isinstance(metric, type):
            raise ConfigurationError(
                f"metrics has {name!r}: {metric!r:.80}; expected the name of a metric, and an "
                "object with update(), compute() and reset(), as in torchmetrics"
                + (", an instance of the class" if isinstance(metric, type) else "")
            )
        checked[name] = metric
    return checked


def move_metrics(metrics: Mapping[str, Any], device: torch.device) -> None:
    """Move the metrics that are modules, as those of torchmetrics, to a device."""
    for metric in metrics.values():
        if isinstance(metric, nn.Module):
            metric.to(device)


def update_metrics(metrics: Mapping[str, Any], predictions: Any, targets: Any, name: str) -> None:
    """Update the metrics with the batch of a default step, which has this name.

    Raises ConfigurationError if predictions or targets are not known.
    """
    if not isinstance(predictions, Tensor) or targets is None:
        raise ConfigurationError(
            f"the default {name} does not know the predictions and targets of this batch, which "
            f"metrics= needs; write {name}= and call state.metrics[...].update(...) in it"
        )
    predictions = predictions.detach()
    for key, metric in metrics.items():
        try:
            metric.update(predictions, targets)
        except Exception as error:
            add_note_safely(
                error,
                f"in metrics[{key!r}].update(predictions, targets), which the default {name} calls",
            )
            raise


def computed_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the results of the metrics that were updated in the phase.

    A mapping, as a MetricCollection computes it, gives a result for each of its names.

    Raises MetricError for a result that is no number.
    """
    results: dict[str, float] = {}
    for name, metric in metrics.items():
        if not _is_updated(metric):
            continue
        try:
            with torch.no_grad():
                value = metric.compute()
        except Exception as error:
            add_note_safely(error, f"in metrics[{name!r}].compute()")
            raise
        values = value.items() if isinstance(value, Mapping) else [(name, value)]
        results |= {str(key): _number(str(key), item) for key, item in values}
    return results


def _number(name: str, value: Any) -> float:
    size = 1
    if isinstance(value, Tensor):
        size = value.numel()
    elif isinstance(value, np.ndarray):
        size = value.size
    try:
        if size == 1 and not isinstance(value, str):
            return float(value.item() if isinstance(value, (Tensor, np.ndarray)) else value)
    except (TypeError, ValueError):
        pass
    shape = f"shape {tuple(value.shape)}" if size != 1 else f"{value!r:.60}"
    raise MetricError(
        f"metrics[{name!r}].compute() returned {type(value).__name__} with {shape}; expected one "
        "number, or a mapping of names to numbers: for one value for each class choose an average"
    )


def _is_updated(metric: Any) -> bool:
    """Return whether a metric was updated since its reset; True if it does not count updates."""
    modules = [module for _path, module in _parts(metric) if hasattr(module, _COUNT)]
    return not modules or any(getattr(module, _COUNT) for module in modules)


def _parts(metric: Any) -> list[tuple[str, Any]]:
    """Return the modules in a metric by their path, or the metric itself."""
    return list(metric.named_modules()) if isinstance(metric, nn.Module) else [("", metric)]


# -- the state -------------------------------------------------------------------------------------


class MetricStates:
    """The states of metric objects, a `StatePart` of a run.

    ``is_in_phase`` returns whether a train phase goes on. Outside one, states that a reset of
    torchmetrics forgets are left out, since each phase begins with a reset.
    """

    def __init__(
        self, metrics: Mapping[str, Any], device: torch.device, is_in_phase: Callable[[], bool]
    ) -> None:
        self._metrics, self._device, self._is_in_phase = metrics, device, is_in_phase

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each metric."""
        full = self._is_in_phase()
        return {name: metric_state(metric, full=full) for name, metric in self._metrics.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state of `state_dict`; raise an error if it does not fit."""
        if state and state.keys() != self._metrics.keys():
            raise ValueError(f"metrics= had {sorted(state)}, and has {sorted(self._metrics)}")
        for name, saved in state.items():
            load_metric_state(self._metrics[name], saved, self._device)


class StatefulMetric:
    """A metric of torchmetrics in ``stateful=``, with its whole state in the ``state_dict``."""

    def __init__(self, metric: Any, device: torch.device) -> None:
        self._metric, self._device = metric, device

    def state_dict(self) -> dict[str, Any]:
        """Return the ``state_dict`` of the metric, and the states that it leaves out."""
        return {"state": self._metric.state_dict(), "metric": metric_state(self._metric)}

    def load_state_dict(self, state: Any) -> None:
        """Load a state of `state_dict`, or a ``state_dict`` of the metric."""
        if state.keys() != {"state", "metric"}:  # of an earlier version
            self._metric.load_state_dict(state)
            return
        self._metric.load_state_dict(state["state"])
        load_metric_state(self._metric, state["metric"], self._device)


def has_metric_state(item: Any) -> bool:
    """Return whether an object is a metric of torchmetrics, or has one as a submodule."""
    return isinstance(item, nn.Module) and any(map(_is_torchmetrics, item.modules()))


def _is_torchmetrics(module: Any) -> bool:
    return isinstance(getattr(module, "_defaults", None), dict) and hasattr(module, _COUNT)


def metric_state(metric: Any, *, full: bool = True) -> dict[str, Any]:
    """Return the state of a metric; its tensors are not copied.

    Without ``full``, states that a reset of torchmetrics forgets are left out.
    """
    if has_metric_state(metric):
        parts = [(path, module) for path, module in _parts(metric) if _is_torchmetrics(module)]
        return {path: _attributes(module, full) for path, module in parts}
    if hasattr(metric, "state_dict") and hasattr(metric, "load_state_dict"):
        return dict(metric.state_dict())
    return {name: _listed(value) for name, value in vars(metric).items()}


def _attributes(module: Any, full: bool) -> dict[str, Any]:
    # Beside its states a metric may have tensors that a reset keeps, as MinMaxMetric has.
    tensors = {name for name, value in vars(module).items() if isinstance(value, Tensor)}
    states = {_COUNT, *module._defaults}
    names = tensors | states if full else tensors - states - {"_computed", "_forward_cache"}
    return {name: _listed(getattr(module, name)) for name in sorted(names)}


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value


def load_metric_state(metric: Any, state: Any, device: torch.device) -> None:
    """Load a state of `metric_state`; raise an error if it is not of such a metric."""
    if has_metric_state(metric):
        parts = {path: module for path, module in _parts(metric) if _is_torchmetrics(module)}
        if state.keys() != parts.keys():
            raise ValueError(f"the parts of a metric were {sorted(state)}: it is another one")
        for path, module in parts.items():
            names = {_COUNT, *module._defaults, *vars(module)}
            _set_all(module, state[path], names, _device_of(module, device))
    elif hasattr(metric, "state_dict") and hasattr(metric, "load_state_dict"):
        metric.load_state_dict(state)
    else:
        _set_all(metric, state, vars(metric).keys(), device)


def _set_all(metric: Any, state: Any, names: Iterable[str], device: torch.device) -> None:
    unknown = state.keys() - set(names)
    if unknown:
        raise ValueError(f"{type(metric).__name__} has no {sorted(unknown)}")
    for name, value in state.items():
        if isinstance(value, Tensor):
            value, present = value.to(device), getattr(metric, name, None)
            if isinstance(present, Tensor) and _are_equal(value, present):
                continue  # so that the attribute counts as unchanged
        elif isinstance(value, list):
            value = [item.to(device) if isinstance(item, Tensor) else item for item in value]
        setattr(metric, name, value)


def _are_equal(value: Tensor, other: Tensor) -> bool:
    return (
        value.dtype == other.dtype
        and value.shape == other.shape
        and value.device == other.device
        and torch.equal(value, other)
    )


def _device_of(module: Any, device: torch.device) -> torch.device:
    return torch.device("cpu") if getattr(module, "compute_on_cpu", False) else device
