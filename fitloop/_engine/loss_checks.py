"""Checks whether the first outputs of a model in a phase suit the loss function.

Torch computes a loss from many outputs that do not suit it, and the training goes wrong silently.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fitloop._data.batch_sizes import describe
from fitloop._engine.class_losses import torch_function
from fitloop._errors import ConfigurationError, LossWarning, warn_user

_ELEMENTWISE = (
    *(kind.forward for kind in (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss)),
    *(kind.forward for kind in (nn.PoissonNLLLoss, nn.HingeEmbeddingLoss)),
    *(functional.mse_loss, functional.l1_loss, functional.smooth_l1_loss, functional.huber_loss),
    *(functional.poisson_nll_loss, functional.hinge_embedding_loss),
)
"""the losses of torch that compare two tensors of one shape, and at most warn of other shapes"""
_TAKE_SCORES = (nn.CrossEntropyLoss.forward, functional.cross_entropy)
_TAKE_LOGITS = (nn.BCEWithLogitsLoss.forward, functional.binary_cross_entropy_with_logits)
_TAKE_PROBABILITIES = (nn.BCELoss.forward, functional.binary_cross_entropy)
_TAKE_LOG_PROBABILITIES = (
    *(nn.NLLLoss.forward, functional.nll_loss),
    *(nn.KLDivLoss.forward, functional.kl_div),
)
_ROUNDING = 1e-4
"""how far a sum of probabilities is from 1, at most"""
_VIEWS = ("View", "Squeeze", "Unsqueeze", "Reshape", "Select", "Slice", "Transpose", "ToCopy")


def checked_loss(
    loss_function: Any, predictions: Any, targets: Any, *, looks_at_values: bool
) -> Any:
    """Return the loss of the first batch of a phase, with a look at what it is computed from.

    With ``looks_at_values`` gives a LossWarning for predictions that are not what this loss
    function of torch takes. This waits for their device.

    Raises ConfigurationError if the loss compares each prediction with the targets of others, and
    with ``looks_at_values`` for targets of a dtype, and predictions of BCELoss, that torch refuses.
    """
    if not _is_plain(predictions) or not _is_plain(targets):
        return loss_function(predictions, targets)
    if looks_at_values:
        _look_at_values(loss_function, predictions.detach(), targets, predictions.grad_fn)
    if predictions.shape == targets.shape:
        return loss_function(predictions, targets)
    if torch_function(loss_function) in _ELEMENTWISE:
        _refuse(loss_function, predictions, targets)
    grown = _broadcast_shape(predictions, targets)
    if grown is None:
        return loss_function(predictions, targets)
    with _BroadcastWatch(predictions, targets, grown) as watch:
        loss = loss_function(predictions, targets)
    if watch.is_found:
        _refuse(loss_function, predictions, targets)
    return loss


def _is_plain(value: Any) -> bool:
    """Return whether a value is a dense tensor, which has a shape and a minimum."""
    is_dense = isinstance(value, Tensor) and value.layout is torch.strided
    return is_dense and not value.is_nested and value.numel() > 0


def _name_of(loss_function: Any) -> str:
    return str(getattr(loss_function, "__name__", type(loss_function).__name__))


def _refuse(loss_function: Any, predictions: Tensor, targets: Tensor) -> NoReturn:
    raise ConfigurationError(
        f"the model returns {describe(predictions)} for targets {describe(targets)}, and "
        f"{_name_of(loss_function)} would compare each prediction with all targets; give both the "
        "same shape, such as targets.unsqueeze(1) for (samples, 1), or write train_step="
    )


# -- values ----------------------------------------------------------------------------------------


def _look_at_values(loss_function: Any, predictions: Tensor, targets: Tensor, origin: Any) -> None:
    """Warn of values that are not what a loss function of torch takes, or refuse them.

    ``origin`` is the operation that has computed the predictions; None without gradients.
    """
    function, name = torch_function(loss_function), _name_of(loss_function)
    if not predictions.is_floating_point():
        return
    _check_dtype(function, name, predictions, targets)
    # NaN is told by torch.
    if function in _TAKE_PROBABILITIES and (predictions.min() < 0 or predictions.max() > 1):
        raise ConfigurationError(
            f"{name} takes probabilities from 0 to 1, and the model returns "
            f"{predictions.min().item():.4g} to {predictions.max().item():.4g}; let the model end "
            "in a sigmoid, or use BCEWithLogitsLoss, which takes scores"
        )
    problem = ""
    if function in _TAKE_SCORES:
        problem = _problem_of_scores(predictions, targets)
    elif function in _TAKE_LOGITS and _is_sigmoid(origin):
        problem = (
            "takes scores and applies sigmoid itself, and the model ends in a sigmoid. The loss "
            "cannot come near 0; leave the sigmoid out of the model, or use BCELoss"
        )
    elif function in _TAKE_LOG_PROBABILITIES and predictions.max() > _ROUNDING:
        problem = (
            "takes log-probabilities, which are not above 0, and the model returns "
            f"{predictions.max().item():.4g}. The loss then has no least value; let the model end "
            "in log_softmax(scores, dim=1), or use CrossEntropyLoss, which takes scores"
        )
    if problem:
        warn_user(f"{name} {problem}", LossWarning)


def _check_dtype(function: Any, name: str, predictions: Tensor, targets: Tensor) -> None:
    """Refuse targets of a dtype that torch refuses too, without saying which it takes."""
    is_floating = targets.is_floating_point()
    if function in (*_TAKE_LOGITS, *_TAKE_PROBABILITIES) and not is_floating:
        raise ConfigurationError(
            f"{name} takes targets of a floating dtype, and the batch has {describe(targets)}; "
            "give targets.float()"
        )
    takes_classes = function in (*_TAKE_SCORES, nn.NLLLoss.forward, functional.nll_loss)
    if takes_classes and is_floating and targets.ndim == predictions.ndim - 1:
        raise ConfigurationError(
            f"{name} takes classes as integers, and the batch has {describe(targets)}; give "
            "targets.long()"
        )


def _problem_of_scores(scores: Tensor, targets: Tensor) -> str:
    """Return in words what is wrong with the scores for CrossEntropyLoss; empty if nothing is."""
    remedy = "return a score for each class, or use BCEWithLogitsLoss"
    if scores.ndim > 1 and scores.shape[1] == 1:
        return (
            "compares the scores of classes, and the model returns only one score, "
            f"{describe(scores)}: loss and gradients are always 0; {remedy}"
        )
    if scores.ndim == 1 and targets.is_floating_point():
        return (
            f"takes {describe(scores)} for the scores of {len(scores)} classes of one sample; for "
            f"{len(scores)} samples {remedy}"
        )
    if _are_probabilities(scores):
        return (
            "takes scores and applies softmax itself, and the outputs of the model are "
            "probabilities: those of each sample sum to 1. The loss cannot come near 0; leave the "
            "softmax out of the model"
        )
    return ""


def _are_probabilities(scores: Tensor) -> bool:
    """Return whether no scores are below 0, and those of all classes sum to 1 everywhere."""
    if scores.ndim < 2 or scores.shape[1] < 2 or scores.dtype not in (torch.float, torch.double):
        return False  # in other dtypes sums are too far from 1
    is_sum_1 = (scores.sum(1) - 1).abs().max() < _ROUNDING
    return bool(is_sum_1 and scores.min() >= 0)


def _is_sigmoid(origin: Any) -> bool:
    """Return whether a tensor is the result of a sigmoid, perhaps in another shape."""
    while origin is not None and origin.name().startswith(_VIEWS):
        origin = origin.next_functions[0][0]
    return origin is not None and origin.name().startswith("Sigmoid")


# -- shapes ----------------------------------------------------------------------------------------


def _broadcast_shape(predictions: Tensor, targets: Tensor) -> torch.Size | None:
    """Return the shape of ``predictions - targets`` if it has more elements than both have.

    None if they do not have the same number of elements, or no such shape.
    """
    if predictions.numel() != targets.numel():
        return None
    try:
        shape = torch.broadcast_tensors(predictions, targets)[0].shape  # type: ignore[no-untyped-call]
    except RuntimeError:
        return None
    return shape if shape.numel() > targets.numel() else None


class _BroadcastWatch(TorchFunctionMode):
    """Finds an operation of predictions and targets whose result has the shape ``grown``.

    What a function of torch computes from only one of the two, in the same shape, counts as it.
    """

    def __init__(self, predictions: Tensor, targets: Tensor, grown: torch.Size) -> None:
        super().__init__()
        self._predictions, self._targets = [predictions], [targets]
        self._grown = grown
        self.is_found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch, and look at its result."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        tensors = [item for item in (*args, *kwargs.values()) if isinstance(item, Tensor)]
        of_predictions = _holds_any(self._predictions, tensors)
        of_targets = _holds_any(self._targets, tensors)
        shape = result.shape if _is_plain(result) else None
        if of_predictions and of_targets:
            is_outer = func is torch.einsum  # which says what it does
            self.is_found |= (shape == self._grown and not is_outer) or func in _ELEMENTWISE
        elif of_predictions and shape == self._predictions[0].shape:
            self._predictions.append(result)
        elif of_targets and shape == self._targets[0].shape:
            self._targets.append(result)
        return result


def _holds_any(origins: list[Tensor], tensors: list[Tensor]) -> bool:
    return any(item is origin for item in tensors for origin in origins)
