"""The table of the nine stage functions, and the default ones."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fitloop._data.batch_sizes import describe
from fitloop._engine.class_losses import class_weights
from fitloop._engine.config import STAGE_NAMES, TrainerConfig
from fitloop._engine.loop_state import SEQUENCES, LoopState
from fitloop._engine.metric_objects import update_metrics
from fitloop._errors import ConfigurationError, FitLoopError, MetricError, add_note_safely
from fitloop._metrics.means import CORRECT, Columns, Means, without_skipped
from fitloop._public import public
from fitloop._ranks.world import is_of_connection
from fitloop._types import Phase, Stage


@public
def default_batch_step(state: LoopState) -> dict[str, Any]:
    """Compute predictions and loss; in the train phase, step every optimizer.

    Expects batches of ``(inputs, targets)``, as a list, a tuple, or a mapping with these two keys.
    It calls ``model(inputs)`` and ``loss_function(predictions, targets)``. Any other mapping, and
    every mapping if ``loss_function`` is None, gives the model its arguments: ``model(**batch)``.
    The loss is then ``loss_function(output, batch)``, or that of the output: ``output.loss``,
    ``output["loss"]``, the first item of a tuple, or the output itself, if it is one number.

    Returns ``running_loss``, the loss times the batch size, or the loss itself if the loss function
    has ``reduction="sum"``. If the loss function is a class of torch for class scores
    (CrossEntropyLoss, NLLLoss, MultiMarginLoss) or its function, and the targets are classes,
    returns also ``running_corr``, the number of targets that are the largest output along
    dimension 1. Targets that the loss ignores do not count: ``running_count`` is the number of the
    others. It is left out if each sample has one target and none is ignored. If ``loss_function``
    is None, both are returned only if the output has ``logits`` of the shape (samples, classes) and
    the batch has ``labels`` of the shape (samples); -100 does not count.

    Updates the objects of ``metrics=`` with predictions and targets.

    With ``clip_grad`` returns also ``grad_norm``, if the batch makes an optimizer step.

    At the first batch of a phase it looks whether the loss suits the outputs of the model. In the
    first epoch it gives a LossWarning for probabilities that CrossEntropyLoss or BCEWithLogitsLoss
    would make probabilities again, and for scores that NLLLoss or KLDivLoss take for
    log-probabilities.

    Raises ConfigurationError for other batches, and if the loss would compare each output with the
    targets of other samples. Other errors have a note with the batch.
    """
    batch = state.batch
    try:
        size = state.batch_size
        if type(batch) not in SEQUENCES:
            predictions, targets, loss = _forward(state)
        else:
            inputs, targets = batch
            predictions = state.model(inputs)
            loss = state._loss(predictions, targets)  # the loss function, and a check at first
        on_cpu = loss.is_cpu  # reading a value from a device would wait for it
        value = loss.item() if on_cpu else loss.detach().reshape(())
        all_count = (
            state._counts_quickly
            and targets.ndim == 1
            and predictions.ndim == 2
            and size
            and targets.min().item() >= 0
        )
        if state.is_train:
            if state._is_plain:  # without a call
                if not on_cpu or value - value:  # 0 if it is finite
                    state._look_at_loss(loss)
                loss.backward()
                for optimizer in state.optimizers:
                    optimizer.step()
            else:
                weight = None
                if state._is_weighted:
                    weight = _mean_over(state, predictions, targets, all_count=bool(all_count))
                state._optimize(loss, weight, None, state.batch_num, value if on_cpu else None)
    except Exception as error:
        _explain(error, state)
        raise
    if all_count:
        values = {
            "running_loss": value * size,
            "running_corr": (predictions.argmax(dim=1) == targets).sum().item(),
        }
    else:
        total = value if state._has_loss_sum else value * size
        values = {"running_loss": total, **_count_correct(state, predictions, targets)}
        if state.metrics:
            update_metrics(state.metrics, predictions, targets, f"{state.phase}_step")
    if not state._is_plain and state._has_new_norm:
        values["grad_norm"] = state.grad_norm
    return values


def _mean_over(state: LoopState, predictions: Any, targets: Any, *, all_count: bool) -> Any:
    """Return the sum that the loss of a batch was divided by, and 1 instead of 0.

    This is the number of targets that count, or the sum of their class weights. If it is not known,
    it is the number of samples.
    """
    weights = class_weights(state.loss_function)
    if all_count and weights is None:
        return len(targets)
    ignored = state._ignored_class
    if ignored is None or targets is None or targets.is_floating_point() or predictions.ndim < 2:
        return state.batch_size or 1
    counted = targets != ignored
    if weights is None:
        return counted.sum().clamp(min=1)
    total = (weights[targets.where(counted, 0)] * counted).sum()
    return total.where(total > 0, 1)


def _count_correct(state: LoopState, predictions: Any, targets: Any) -> dict[str, Any]:
    """Return the number of correct targets, and the number of targets that the loss counts."""
    ignored = state._ignored_class
    if ignored is None:
        return {}
    if targets is None or targets.is_floating_point() or predictions.ndim < 2:
        return {}  # no classes, but probabilities for example, or one sample
    counted = targets != ignored
    correct = (predictions.argmax(dim=1) == targets) & counted
    return {"running_corr": correct.sum(), "running_count": counted.sum()}


def _forward(state: LoopState) -> tuple[Any, Any, Any]:
    """Return predictions, targets and loss of a batch that is no plain list or tuple.

    Predictions and targets are None if they are not known to be class scores and classes.
    """
    batch, loss_function = state.batch, state.loss_function
    if not _holds_arguments(state):
        inputs, targets = _pair(batch)
        predictions = state.model(inputs)
        return predictions, targets, state._loss(predictions, targets)
    output = state.model(**batch)
    if loss_function is not None:
        return None, None, loss_function(output, batch)
    scores, labels = _item(output, "logits", 1), batch.get("labels")
    return *_classes(scores, labels), _loss_of(output)


def _holds_arguments(state: LoopState) -> bool:
    """Return whether the batch is a mapping of the arguments of the model."""
    batch = state.batch
    return isinstance(batch, Mapping) and (
        state.loss_function is None or batch.keys() != {"inputs", "targets"}
    )


def _item(output: Any, name: str, position: int) -> Any:
    """Return an item of a model's output; None if it has none of this name or position."""
    if isinstance(output, Mapping):
        return output.get(name)
    if hasattr(output, name):
        return getattr(output, name)
    is_long = isinstance(output, (list, tuple)) and len(output) > position
    return output[position] if is_long else None


def _loss_of(output: Any) -> Any:
    loss: Any = output if isinstance(output, Tensor) else _item(output, "loss", 0)
    # A tensor of one element, without a name, may also be the prediction for one sample.
    is_named = isinstance(output, Mapping) or hasattr(output, "loss")
    is_number = isinstance(loss, Tensor) and loss.is_floating_point() and loss.numel() == 1
    if is_number and (is_named or loss.ndim == 0):
        return loss
    raise ConfigurationError(
        f"loss_function is None, and the output of the model, {describe(output)}, a "
        f"{type(output).__name__}, has no loss; expected one number as output.loss, "
        "output['loss'], the first item of a tuple, or the output itself. Models that compute "
        "their loss often need the labels in the batch. Otherwise give loss_function="
    )


def _classes(scores: Any, labels: Any) -> tuple[Any, Any]:
    """Return scores and labels if these are a class for each sample, else None twice.

    Other shapes do not tell which label belongs to which score: language models shift them.
    """
    if not isinstance(scores, Tensor) or not isinstance(labels, Tensor):
        return None, None
    fits = scores.ndim == 2 and scores.shape[1] > 1 and labels.shape == scores.shape[:1]
    return (scores, labels) if fits and labels.dtype is torch.int64 else (None, None)


def _pair(batch: Any) -> Any:
    """Return inputs and targets of an unusual batch; raise ValueError if it is no pair."""
    if isinstance(batch, Mapping) and batch.keys() == {"inputs", "targets"}:
        return batch["inputs"], batch["targets"]
    if isinstance(batch, (list, tuple)):
        return batch
    raise ValueError


def _explain(error: Exception, state: LoopState) -> None:
    """Raise a ConfigurationError if the batch does not fit, or else add a note to the error."""
    batch, name, loss = state.batch, f"{state.phase}_step", state.loss_function
    takes = (
        "takes (inputs, targets), as a list, a tuple, or a mapping with these two keys, or a "
        "mapping with the arguments of the model"
    )
    if loss is None:
        takes = "without a loss_function takes a mapping with the arguments of the model"
    if not _fits(state):
        raise ConfigurationError(
            f"the batch is {describe(batch)}, a {type(batch).__name__}; the default {name} "
            f"{takes}. For other batches write {name}="
        ) from (error if loss is None else None)
    if isinstance(error, FitLoopError) or is_of_connection(error):
        return
    calls = "model(inputs) and loss_function(predictions, targets)"
    if _holds_arguments(state):
        calls = "model(**batch)" + ("" if loss is None else " and loss_function(output, batch)")
    if not any(parameter.requires_grad for parameter in state.model.parameters()):
        calls += " (no parameter of the model requires gradients: unfreeze those to train)"
    add_note_safely(
        error,
        f"in the default {name}, which calls {calls}, and takes one number as the loss. The batch "
        f"{'' if _holds_arguments(state) else '(inputs, targets) '}is {describe(batch)}. For other "
        f"batches, models or losses write {name}=",
    )


def _fits(state: LoopState) -> bool:
    """Return whether the default step can call the model with the batch."""
    try:
        if _holds_arguments(state):
            inspect.signature(state.model.forward).bind(**state.batch)
        else:
            _inputs, _targets = _pair(state.batch)
            return state.loss_function is not None
    except (TypeError, ValueError):
        return False
    return True


@public
def default_epoch_end(state: LoopState) -> dict[str, float]:
    """Return means over the samples of the epoch.

    The sum of ``running_loss``, divided by the samples, is ``loss``: the mean of the losses of the
    batches, weighted by batch size. Where targets are ignored or classes have weights, this is not
    exactly the mean over all targets that count, since the loss of a batch is a mean over fewer of
    them. The sum of ``running_corr``, divided by the samples or by the sum of ``running_count``, is
    ``accuracy``. Any other number of the batch steps gives its mean, weighted by batch size. Each
    is a mean over the batches that returned the value. A tensor of one element is a number.

    With ``nonfinite="skip"``, batches of a train phase whose ``running_loss`` is not finite are in
    none of these means.

    Raises MetricError for an accuracy above 1, and ConfigurationError if the size of a batch is not
    known.
    """
    columns: Columns = state._values.columns()
    if not columns:
        return {}
    if state.is_train and state.nonfinite == "skip":
        columns = without_skipped(columns)
    means = Means()
    means.add(columns, state.batch_sizes)
    metrics = means.result()
    if metrics.get("accuracy", 0.0) > 1 and CORRECT in columns:
        raise MetricError(
            f"accuracy is {metrics['accuracy']:.4g}, above 1: the sum of running_corr is "
            f"{means.sums['accuracy']:g}, and the batches have {means.weights['accuracy']:g} "
            "samples. Return the number of correct samples as running_corr, and give "
            "batch_size_of= or set state.batch_size in "
            f"{state.phase}_step if the number of samples is wrong"
        )
    return metrics


_DEFAULTS: dict[Stage, Callable[[LoopState], Any]] = {
    Stage.BATCH_STEP: default_batch_step,
    Stage.EPOCH_END: default_epoch_end,
}


def stage_functions(config: TrainerConfig) -> dict[tuple[Phase, Stage], Any]:
    """Return the stage functions of a trainer, or their defaults; None where there is neither."""
    return {
        (phase, stage): getattr(config, name) or _DEFAULTS.get(stage)
        for (phase, stage), name in STAGE_NAMES.items()
    }
