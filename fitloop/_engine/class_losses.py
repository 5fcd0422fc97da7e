"""The loss functions of torch that take class scores and classes."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.nn import functional

_FORWARDS = [kind.forward for kind in (nn.CrossEntropyLoss, nn.NLLLoss, nn.MultiMarginLoss)]
_FUNCTIONS = (functional.cross_entropy, functional.nll_loss, functional.multi_margin_loss)
_IGNORED = -100
"""the class that these losses ignore by default"""


def ignored_class(loss_function: Any) -> int | None:
    """Return the class that a loss function ignores; None if its targets may be no classes.

    With None, the model computes its loss, and ignores what torch ignores by default.

    Only the losses of torch tell that outputs are class scores, with the classes in dimension 1,
    and which targets do not count. The shapes of tensors do not.
    """
    if loss_function is None:
        return _IGNORED
    if torch_function(loss_function) not in (*_FORWARDS, *_FUNCTIONS):
        return None
    ignored = loss_setting(loss_function, "ignore_index")
    return _IGNORED if ignored is None else int(ignored)


def class_weights(loss_function: Any) -> Any:
    """Return the tensor of class weights whose sum a loss divides by; None if it has none."""
    weights = loss_setting(loss_function, "weight")
    if weights is None or torch_function(loss_function) not in (*_FORWARDS[:2], *_FUNCTIONS[:2]):
        return None  # MultiMarginLoss divides by the number of targets
    return weights


def loss_setting(loss_function: Any, name: str) -> Any:
    """Return a setting of a loss of torch, such as ``"reduction"``; None if it is not given."""
    while isinstance(loss_function, partial):
        if name in loss_function.keywords:
            return loss_function.keywords[name]
        loss_function = loss_function.func
    return getattr(loss_function, name, None)


def torch_function(loss_function: Any) -> Any:
    """Return the function that computes a loss: that of torch, or ``forward`` of a module's class.

    None if a ``partial`` gives it arguments.
    """
    while isinstance(loss_function, partial):
        if loss_function.args:
            return None
        loss_function = loss_function.func
    if isinstance(loss_function, nn.Module):
        return type(loss_function).forward
    return loss_function
