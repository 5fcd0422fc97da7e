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
    keywords: dict[str, Any] = {}
    while isinstance(loss_function, partial):
        if loss_function.args:
            return None
        keywords = {**loss_function.keywords, **keywords}
        loss_function = loss_function.func
    if isinstance(loss_function, nn.Module):
        if type(loss_function).forward not in _FORWARDS:
            return None
        return int(getattr(loss_function, "ignore_index", _IGNORED))
    if loss_function in _FUNCTIONS:
        return int(keywords.get("ignore_index", _IGNORED))
    return None
