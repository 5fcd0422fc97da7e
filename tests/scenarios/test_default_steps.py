"""The default stage functions: what they compute, and what they refuse."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from support.checked_trainer import QUIET, CheckedTrainer
from support.event_loops import one_event_loop
from support.models import (
    BATCHES,
    CLASSES,
    FEATURES,
    arguments,
    batches,
    bits,
    blobs,
    mlp,
    sync_trainer,
    trainer,
)
from torch import Tensor, nn
from torch.optim import LBFGS, SGD
from torch.utils.data import DataLoader, TensorDataset

from fitloop import (
    Checkpoint,
    ConfigurationError,
    FitLoop,
    FitLoopError,
    LoopState,
    LossWarning,
    MetricError,
    StageSignatureError,
    SyncFitLoop,
    default_batch_step,
)

anyio_backend = one_event_loop

pytestmark = pytest.mark.anyio


class Outputs(NamedTuple):
    logits: Tensor
    aux: Tensor


class Wrapped(nn.Module):
    """A model whose outputs are put into something."""

    def __init__(self, wrap: Callable[[Tensor], Any], outputs: int = CLASSES) -> None:
        super().__init__()
        self.inner, self.wrap = mlp(outputs=outputs), wrap

    def forward(self, inputs: Tensor) -> Any:
        return self.wrap(self.inner(inputs))


def with_targets(change: Callable[[Tensor], Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(inputs, change(targets)) for inputs, targets in batches()]


class OwnLoss(nn.Module):
    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets)


class Focal(nn.CrossEntropyLoss):
    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().forward(outputs * 2, targets)


@pytest.mark.parametrize(
    ("loss", "outputs", "targets", "wrap"),
    [
        pytest.param(
            lambda p, t: F.cross_entropy(p, t.squeeze(1)),
            3,
            lambda t: t[:, None],
            None,
            id="(N, 1)",
        ),
        pytest.param(
            lambda p, t: F.binary_cross_entropy_with_logits(p, t.float()[:, None]),
            1,
            lambda t: (t > 0).long(),
            None,
            id="one logit",
        ),
        pytest.param(
            lambda p, t: F.binary_cross_entropy_with_logits(p, t.float()),
            1,
            lambda t: (t > 0).long(),
            nn.Flatten(0),
            id="flat logits",
        ),
        pytest.param(
            lambda p, t: F.binary_cross_entropy_with_logits(p, t.float()),
            3,
            lambda t: F.one_hot(t, 3),
            None,
            id="one hot",
        ),
        pytest.param(
            lambda p, t: F.gaussian_nll_loss(p[:, 0], t.float(), p[:, 1].exp()),
            2,
            lambda t: t + 5,
            None,
            id="counts",
        ),
        pytest.param(
            lambda p, t: F.binary_cross_entropy_with_logits(p[:, 0], t.float()),
            1,
            lambda t: t > 0,
            None,
            id="bool",
        ),
        pytest.param(
            nn.CrossEntropyLoss(), 3, lambda t: F.one_hot(t, 3).float(), None, id="probabilities"
        ),
        pytest.param(
            lambda p, t: F.cross_entropy(p["logits"], t),
            3,
            lambda t: t,
            lambda y: {"logits": y},
            id="dict",
        ),
        pytest.param(
            lambda p, t: F.cross_entropy(p.logits, t),
            3,
            lambda t: t,
            lambda y: Outputs(y, y),
            id="namedtuple",
        ),
        pytest.param(OwnLoss(), 3, lambda t: t, None, id="loss of one's own"),
        pytest.param(Focal(), 3, lambda t: t, None, id="subclass of a loss"),
    ],
)
async def test_accuracy_when_loss_does_not_tell_classes_then_the_loss_is_the_criteria(
    loss: Any, outputs: int, targets: Any, wrap: Any
) -> None:
    data = with_targets(targets)
    model = Wrapped(wrap or (lambda y: y), outputs)
    fitted = trainer(model=model, loss_function=loss, train_dl=data, valid_dl=data, test_dl=data)
    result = await fitted.fit(3, **QUIET)
    assert set(result.metrics["train"]) == set(result.metrics["valid"]) == {"loss"}
    assert set(await fitted.test(verbose=False)) == {"loss"}
    assert result.best_score == min(result.metrics["valid"]["loss"])
    assert fitted.criteria == "loss"


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(),
        nn.NLLLoss(),
        nn.MultiMarginLoss(),
        F.cross_entropy,
        partial(F.cross_entropy, label_smoothing=0.1),
        partial(partial(F.cross_entropy, ignore_index=1), label_smoothing=0.1),
        nn.CrossEntropyLoss(ignore_index=1),
        nn.CrossEntropyLoss(ignore_index=-1),
    ],
    ids=range(8),
)
async def test_accuracy_when_targets_are_classes_then_is_over_those_that_the_loss_counts(
    loss: Any,
) -> None:
    ignored = getattr(loss, "ignore_index", None)
    if isinstance(loss, partial):
        ignored = loss.keywords.get("ignore_index")
    data = batches()
    if ignored == -1:
        data = with_targets(lambda t: torch.where(t == 1, -1, t))
    model = ending_in(nn.LogSoftmax(1)) if isinstance(loss, nn.NLLLoss) else mlp()
    fitted = trainer(model=model, loss_function=loss, train_dl=data, valid_dl=data)
    result = await fitted.fit(1, load_best=False, **QUIET)
    inputs, targets = (torch.cat(column) for column in zip(*data, strict=True))
    counts = torch.ones(len(targets), dtype=torch.bool) if ignored is None else targets != ignored
    right = fitted.model(inputs).argmax(dim=1) == targets
    assert result.metrics["valid"]["accuracy"][0] == pytest.approx(right[counts].double().mean())


@pytest.mark.parametrize(
    "loss_function",
    [nn.CrossEntropyLoss(reduction="sum"), partial(F.cross_entropy, reduction="sum")],
    ids=["class", "function"],
)
async def test_loss_when_it_is_a_sum_then_the_metric_is_still_the_mean_over_samples(
    loss_function: Any,
) -> None:
    one = trainer(loss_function=loss_function, valid_dl=batches())
    await one.fit(1, load_best=False, **QUIET)
    inputs, targets = blobs()
    with torch.no_grad():
        expected = F.cross_entropy(one.model.eval()(inputs), targets).item()
    assert one.M.valid["loss"][-1] == pytest.approx(expected, rel=1e-4)


async def test_accuracy_when_words_are_padded_then_is_over_the_words_that_count() -> None:
    generator = torch.Generator().manual_seed(0)
    data = []
    for size, words in ((8, 5), (8, 3), (2, 4)):
        tokens = torch.randint(0, 6, (size, words), generator=generator)
        targets = torch.randint(0, 6, (size, words), generator=generator)
        targets[torch.rand(size, words, generator=generator) < 0.5] = -100
        data.append((tokens, targets))

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(6, 6)

        def forward(self, tokens: Tensor) -> Tensor:
            scores: Tensor = self.table(tokens)
            return scores.transpose(1, 2)

    fitted = trainer(model=Tagger(), train_dl=data, valid_dl=data)
    result = await fitted.fit(1, load_best=False, **QUIET)
    pairs = [(fitted.model(tokens).argmax(1), targets) for tokens, targets in data]
    right = sum(int((p == t).sum()) for p, t in pairs)
    counted = sum(int((t != -100).sum()) for _p, t in pairs)
    assert result.metrics["valid"]["accuracy"].tolist() == [right / counted]


@pytest.mark.parametrize("scale", [1.0, 2.0])
async def test_accuracy_when_above_1_then_error_says_which_numbers_do_not_fit(scale: float) -> None:
    def step(state: LoopState) -> dict[str, float]:
        state.batch_size = len(state.batch[1])
        return {"running_corr": scale * len(state.batch[1])}

    fitted = trainer(train_step=step, valid_dl=None)
    if scale == 1:
        result = await fitted.fit(1, **QUIET)
        assert result.metrics["train"]["accuracy"].tolist() == [1.0]
        return
    with pytest.raises(MetricError, match=r"accuracy is 2, above 1.*52, and the batches have 26"):
        await fitted.fit(1, **QUIET)


INPUTS, TARGETS = blobs()


def dataloader(*tensors: Tensor) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*tensors), batch_size=8)


@pytest.mark.parametrize(
    "batch",
    [
        pytest.param((INPUTS, TARGETS, TARGETS), id="three"),
        pytest.param([INPUTS], id="one"),
        pytest.param({"image": INPUTS, "label": TARGETS}, id="dict"),
        pytest.param(torch.randn(2, FEATURES), id="tensor of two"),
        pytest.param("ab", id="text"),
        pytest.param(None, id="none"),
    ],
)
@pytest.mark.parametrize("phase", ["train", "valid", "test"])
async def test_default_step_when_batch_is_no_pair_then_error_says_what_it_takes(
    batch: Any, phase: str
) -> None:
    fitted = trainer(**{f"{phase}_dl": [batch]})
    run = fitted.test(verbose=False) if phase == "test" else fitted.fit(1, **QUIET)
    with pytest.raises(ConfigurationError) as caught:
        await run
    expected = f"the default {phase}_step takes (inputs, targets), as a list, a tuple, or a mapping"
    assert expected in str(caught.value)
    assert str(caught.value).endswith(f"For other batches write {phase}_step=")


async def test_default_step_when_batch_is_a_mapping_of_both_then_it_trains() -> None:
    checked = CheckedTrainer(train_dl=[{"targets": t, "inputs": x} for x, t in batches()])
    await checked.fit(epochs=1)
    assert checked.check_whole_batches() == BATCHES


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"train_dl": [("text", TARGETS)]}, id="inputs"),
        pytest.param({"model": Wrapped(lambda y: {"logits": y})}, id="outputs"),
        pytest.param({"loss_function": nn.CrossEntropyLoss(reduction="none")}, id="loss"),
        pytest.param({"loss_function": lambda p, t: (p.sum(), t)}, id="tuple"),
        pytest.param({"loss_function": lambda p: p.sum()}, id="arguments"),
    ],
)
async def test_default_step_when_it_cannot_work_then_error_has_a_note_with_the_batch(
    changes: dict[str, Any],
) -> None:
    fitted = trainer(**changes)
    before = [parameter.clone() for parameter in fitted.model.parameters()]
    with pytest.raises(Exception) as caught:  # noqa: PT011 - of torch, Python or the model
        await fitted.fit(1, **QUIET)
    note = next(note for note in caught.value.__notes__ if "in the default train_step" in note)
    assert "int64 (8,)" in note or "int64 (26,)" in note
    after = fitted.model.parameters()
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


async def test_default_step_when_size_of_batch_is_not_known_then_nothing_was_trained() -> None:
    data = [(inputs, targets.repeat(2)) for inputs, targets in batches()]
    checked = CheckedTrainer(train_dl=data, loss_function=lambda p, t: p.sum())
    with pytest.raises(ConfigurationError, match=r"train batch 1 is not known: its tensors do not"):
        await checked.fit(epochs=1)
    assert checked.check_whole_batches() == 0


@pytest.mark.parametrize("name", ["train_dl", "valid_dl", "test_dl"])
@pytest.mark.parametrize(
    ("loader", "expected"),
    [
        (
            TensorDataset(INPUTS, TARGETS),
            "TensorDataset, a dataset, which gives samples; expected batches",
        ),
        ([dataloader(INPUTS, TARGETS)] * 2, "list of 2 items, and no loader"),
        ({"a": dataloader(INPUTS, TARGETS)}, "dict of 1 items, and no loader"),
    ],
    ids=["dataset", "loaders", "dict"],
)
def test_constructor_when_loader_gives_no_batches_then_error(
    name: str, loader: Any, expected: str
) -> None:
    with pytest.raises(ConfigurationError, match=f"{name} is a {expected}"):
        trainer(**{name: loader})


def test_constructor_when_loss_is_a_class_then_error() -> None:
    with pytest.raises(StageSignatureError, match="0-d tensor, an instance of the class"):
        trainer(loss_function=nn.CrossEntropyLoss)


class Squeezing(nn.MSELoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input.squeeze(1), target)


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize(
    ("loss", "shape", "is_right"),
    [
        (nn.MSELoss(), (4, 1), True),
        (nn.MSELoss(), (4,), False),
        (nn.functional.l1_loss, (4,), False),
        (Squeezing(), (4,), True),
    ],
    ids=["same shape", "module", "function", "own"],
)
async def test_regression_when_targets_are_broadcast_then_says_both_shapes(
    loss: Any, shape: tuple[int, ...], is_right: bool
) -> None:
    model = nn.Linear(3, 1)
    data = [(torch.ones(4, 3), torch.ones(shape))] * 2
    fitted = trainer(
        model=model,
        optimizer=SGD(model.parameters()),
        loss_function=loss,
        train_dl=data,
        valid_dl=data,
    )
    if is_right:
        await fitted.fit(1, **QUIET)
        return
    pattern = (
        r"returns float32 \(4, 1\) for targets float32 \(4,\), and .* give both the same shape"
    )
    for call in (fitted.run_sanity_check, fitted.fit):
        with pytest.raises(ConfigurationError, match=pattern):
            await call(1)


class Pinball(nn.Module):
    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        rest = targets.float() - outputs
        return torch.max(0.7 * rest, -0.3 * rest).mean()


def focal(outputs: Tensor, targets: Tensor) -> Tensor:
    p = outputs.sigmoid()
    return -(targets * p.log() + (1 - targets) * (1 - p).log()).mean()


def dice(outputs: Tensor, targets: Tensor) -> Tensor:
    masks = torch.sigmoid(outputs)
    return 1 - 2 * (masks * targets).sum() / (masks.sum() + targets.sum())


def ranking(outputs: Tensor, targets: Tensor) -> Tensor:
    """Compare all samples of a batch with each other, on purpose."""
    signs = torch.sign(targets[:, None] - targets)
    return F.relu(1 - signs * (outputs - outputs.squeeze(1))).mean()


def energy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Compare two distributions: all outputs with all targets, on purpose."""
    return (outputs - targets.unsqueeze(0)).abs().mean() - (outputs - outputs.T).abs().mean() / 2


def shapes_trainer(loss: Any, shape: tuple[int, ...], target_shape: tuple[int, ...]) -> FitLoop:
    generator = torch.Generator().manual_seed(0)
    model = nn.Conv2d(2, 1, 1) if len(shape) == 4 else nn.Linear(2, 1)
    channels = (*shape[:1], 2, *shape[2:])
    data = [
        (
            torch.randn(channels, generator=generator),
            (torch.rand(target_shape, generator=generator) > 0.5).float(),
        )
        for _ in range(2)
    ]
    options = {"model": model, "optimizer": SGD(model.parameters(), lr=0.1), "test_dl": None}
    return trainer(**options, loss_function=loss, train_dl=data, valid_dl=data)


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize(
    ("loss", "shape", "target_shape"),
    [
        pytest.param(lambda p, t: ((p - t) ** 2).mean(), (4, 1), (4,), id="square"),
        pytest.param(lambda p, t: ((t - p) ** 2).mean(), (4, 1), (4,), id="square, turned"),
        pytest.param(Pinball(), (4, 1), (4,), id="module"),
        pytest.param(focal, (4, 1), (4,), id="focal"),
        pytest.param(lambda p, t: F.mse_loss(p, t).sqrt(), (4, 1), (4,), id="function of torch"),
        pytest.param(partial(F.mse_loss, reduction="sum"), (4, 1), (4,), id="partial"),
        pytest.param(nn.PoissonNLLLoss(), (4, 1), (4,), id="Poisson"),
        pytest.param(nn.HingeEmbeddingLoss(), (4, 1), (4,), id="hinge"),
        pytest.param(dice, (3, 1, 5, 5), (3, 5, 5), id="masks"),
    ],
)
async def test_loss_when_it_compares_each_output_with_all_targets_then_nothing_was_trained(
    loss: Any, shape: tuple[int, ...], target_shape: tuple[int, ...]
) -> None:
    fitted = shapes_trainer(loss, shape, target_shape)
    before = bits(fitted.model)
    with pytest.raises(ConfigurationError) as caught:
        await fitted.fit(1, **QUIET)
    assert f"float32 {shape} for targets float32 {target_shape}, and " in str(caught.value)
    assert "would compare each prediction with all targets; give both the same" in str(caught.value)
    assert bits(fitted.model) == before


@pytest.mark.parametrize(
    ("loss", "shape", "target_shape"),
    [
        pytest.param(lambda p, t: ((p.squeeze(1) - t) ** 2).mean(), (4, 1), (4,), id="squeezed"),
        pytest.param(lambda p, t: ((p - t.view_as(p)) ** 2).mean(), (4, 1), (4,), id="view"),
        pytest.param(
            lambda p, t: dice(p.flatten(), t.flatten()), (3, 1, 5, 5), (3, 5, 5), id="mask"
        ),
        pytest.param(ranking, (4, 1), (4,), id="ranking"),
        pytest.param(energy, (4, 1), (4,), id="distributions"),
        pytest.param(lambda p, t: (p.mean() - t.mean()) ** 2, (4, 1), (4,), id="means"),
        pytest.param(lambda p, t: ((p - t) ** 2).mean(), (1, 1), (1,), id="one sample"),
        pytest.param(dice, (3, 1, 5, 5), (3, 1, 5, 5), id="same shape"),
    ],
)
async def test_loss_when_it_gives_both_one_shape_then_bits_are_those_of_a_loop(
    loss: Any, shape: tuple[int, ...], target_shape: tuple[int, ...]
) -> None:
    fitted = shapes_trainer(loss, shape, target_shape)
    by_hand = shapes_trainer(loss, shape, target_shape)
    by_hand.model.load_state_dict(fitted.model.state_dict())
    await fitted.fit(2, load_best=False, **QUIET)
    for _ in range(2):
        for inputs, targets in by_hand.train_dl:
            by_hand.optimizer.zero_grad()
            loss(by_hand.model(inputs), targets).backward()
            by_hand.optimizer.step()
    assert bits(fitted.model) == bits(by_hand.model)


def ending_in(*last: nn.Module, outputs: int = CLASSES) -> nn.Sequential:
    return nn.Sequential(mlp(outputs=outputs), *last)


BINARY = [(inputs, (targets > 0).float()) for inputs, targets in batches()]
SHARES = with_targets(lambda t: F.one_hot(t, CLASSES).float())


@pytest.mark.parametrize(
    ("loss", "model", "data", "text"),
    [
        pytest.param(
            nn.CrossEntropyLoss(),
            ending_in(nn.Softmax(1)),
            batches(),
            r"CrossEntropyLoss .* applies softmax itself, .* leave the softmax out of the model",
            id="softmax",
        ),
        pytest.param(
            partial(F.cross_entropy, label_smoothing=0.1),
            ending_in(nn.Softmax(1)),
            SHARES,
            "leave the softmax out of the model",
            id="softmax, function",
        ),
        pytest.param(
            nn.BCEWithLogitsLoss(),
            ending_in(nn.Sigmoid(), nn.Flatten(0), outputs=1),
            BINARY,
            "BCEWithLogitsLoss .* applies sigmoid itself, .* or use BCELoss",
            id="sigmoid",
        ),
        pytest.param(
            nn.NLLLoss(),
            mlp(),
            batches(),
            r"NLLLoss takes log-probabilities, .* model returns \d.* log_softmax\(scores, dim=1\)",
            id="scores",
        ),
        pytest.param(
            F.nll_loss, ending_in(nn.Softmax(1)), batches(), "log_softmax", id="not of logarithms"
        ),
        pytest.param(
            nn.CrossEntropyLoss(),
            mlp(outputs=1),
            [(inputs, targets[:, None]) for inputs, targets in BINARY],
            r"returns only one score, float32 \(8, 1\): loss and gradients are always 0; .* use",
            id="one class",
        ),
        pytest.param(
            nn.CrossEntropyLoss(),
            ending_in(nn.Flatten(0), outputs=1),
            BINARY,
            r"takes float32 \(8,\) for the scores of 8 classes of one sample; .* use BCEWithLogits",
            id="one sample",
        ),
        pytest.param(
            nn.KLDivLoss(reduction="batchmean"), mlp(), SHARES, "KLDivLoss takes log-", id="KL"
        ),
    ],
)
async def test_outputs_when_the_loss_takes_others_then_a_warning_says_which(
    loss: Any, model: nn.Module, data: Any, text: str
) -> None:
    given = {"model": model, "loss_function": loss, "train_dl": data, "valid_dl": None}
    fitted = trainer(**given, optimizer=SGD(model.parameters(), lr=0.01))
    with pytest.warns(LossWarning, match=text) as caught:
        await fitted.fit(2, **QUIET)
    assert len(caught) == 1


async def test_outputs_when_only_those_of_eval_mode_are_probabilities_then_a_warning() -> None:
    class Classifying(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, inputs: Tensor) -> Tensor:
            scores: Tensor = self.inner(inputs)
            return scores if self.training else scores.softmax(1)

    with pytest.warns(LossWarning, match="leave the softmax out"):
        await trainer(model=Classifying()).fit(1, **QUIET)


@pytest.mark.parametrize(
    ("loss", "model", "data"),
    [
        pytest.param(nn.CrossEntropyLoss(), ending_in(nn.Sigmoid()), batches(), id="gates"),
        pytest.param(nn.CrossEntropyLoss(), ending_in(nn.LogSoftmax(1)), batches(), id="log"),
        pytest.param(nn.NLLLoss(), ending_in(nn.LogSoftmax(1)), batches(), id="NLL"),
        pytest.param(
            nn.BCELoss(), ending_in(nn.Sigmoid(), nn.Flatten(0), outputs=1), BINARY, id="p"
        ),
        pytest.param(
            nn.BCEWithLogitsLoss(), ending_in(nn.Flatten(0), outputs=1), BINARY, id="logits"
        ),
        pytest.param(nn.MSELoss(), ending_in(nn.Softmax(1)), SHARES, id="Brier"),
    ],
)
async def test_outputs_when_the_loss_takes_them_then_no_warning(
    loss: Any, model: nn.Module, data: Any
) -> None:
    options = {"model": model, "optimizer": SGD(model.parameters(), lr=0.01), "train_dl": data}
    await trainer(**options, valid_dl=data, loss_function=loss).fit(1, **QUIET)


@pytest.mark.parametrize(
    ("loss", "model", "data", "text"),
    [
        pytest.param(
            nn.BCEWithLogitsLoss(),
            ending_in(nn.Flatten(0), outputs=1),
            with_targets(lambda t: (t > 0).long()),
            r"a floating dtype, and the batch has int64 \(8,\); give targets.float\(\)",
            id="integers",
        ),
        pytest.param(
            F.binary_cross_entropy,
            ending_in(nn.Sigmoid(), nn.Flatten(0), outputs=1),
            with_targets(lambda t: t > 0),
            r"binary_cross_entropy takes targets of a floating dtype, .* bool \(8,\); give",
            id="bool",
        ),
        pytest.param(
            nn.CrossEntropyLoss(),
            mlp(),
            with_targets(lambda t: t.float()),
            r"takes classes as integers, and the batch has float32 \(8,\); give targets.long\(\)",
            id="classes",
        ),
    ],
)
async def test_targets_when_the_loss_takes_another_dtype_then_error_says_which(
    loss: Any, model: nn.Module, data: Any, text: str
) -> None:
    options = {"model": model, "optimizer": SGD(model.parameters(), lr=0.01), "train_dl": data}
    with pytest.raises(ConfigurationError, match=text):
        await trainer(**options, valid_dl=None, loss_function=loss).fit(1, **QUIET)


async def test_model_when_all_of_it_is_frozen_then_the_error_says_so() -> None:
    model = mlp().requires_grad_(False)
    with pytest.raises(RuntimeError, match="does not require grad") as caught:
        await trainer(model=model).fit(1, **QUIET)
    assert "no parameter of the model requires gradients: unfreeze" in caught.value.__notes__[0]


@pytest.mark.parametrize("copy_of", [copy.copy, copy.deepcopy, pickle.dumps])
@pytest.mark.parametrize("kind", [FitLoop, SyncFitLoop])
def test_trainer_when_copied_then_error_says_what_to_copy(kind: Any, copy_of: Any) -> None:
    with pytest.raises(TypeError, match=r"cannot be copied or pickled, .*deepcopy\(\(model, opt"):
        copy_of(kind(**arguments()))


async def test_outputs_when_BCELoss_gets_scores_then_error_says_what_to_use() -> None:  # noqa: N802
    model = ending_in(nn.Flatten(0), outputs=1)
    options = {"model": model, "optimizer": SGD(model.parameters(), lr=0.01), "train_dl": BINARY}
    with pytest.raises(ConfigurationError, match=r"returns -\d.* to .*; .* use BCEWithLogitsLoss"):
        await trainer(**options, valid_dl=None, loss_function=nn.BCELoss()).fit(1, **QUIET)


async def test_optimizer_when_it_needs_a_closure_then_default_step_is_refused() -> None:
    model = mlp()
    optimizer = LBFGS(model.parameters())
    with pytest.raises(ConfigurationError, match=r"LBFGS.step\(\) needs a closure"):
        trainer(model=model, optimizer=[SGD(model.parameters()), optimizer])

    def step(state: LoopState) -> None:
        inputs, targets = state.batch

        def closure() -> Any:
            optimizer.zero_grad()
            loss = state.loss_function(state.model(inputs), targets)
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]

    fitted = trainer(model=model, optimizer=optimizer, train_step=step)
    assert (await fitted.fit(1, **QUIET)).epochs == 1


# -- sizes of batches ----------------------------------------------------------------------------

TIME_FIRST = [(torch.randn(5, n, FEATURES), torch.arange(n) % CLASSES) for n in (8, 8, 4)]


def time_step(state: LoopState) -> dict[str, Any]:
    inputs, targets = state.batch
    outputs = state.model(inputs).mean(0)
    loss = state.loss_function(outputs, targets).detach()
    state.batch_size = len(targets)
    return {"running_loss": loss * len(targets), "mean": loss}


async def test_batch_size_when_the_step_sets_it_then_events_and_means_are_of_samples() -> None:
    ended: list[Any] = []
    fitted = trainer(
        train_dl=TIME_FIRST, valid_dl=TIME_FIRST, train_step=time_step, valid_step=time_step
    )
    result = await fitted.fit(1, callbacks=[ended.append], **QUIET)
    samples = [event.samples for event in ended if event.kind == "phase_ended"]
    assert samples == [20, 20]
    metrics = result.metrics["valid"]
    assert metrics["loss"].tolist() == pytest.approx(metrics["mean"].tolist())


async def test_batch_size_when_nobody_needs_it_then_batches_may_be_anything() -> None:
    ended: list[Any] = []
    fitted = trainer(
        train_dl=TIME_FIRST, valid_dl=TIME_FIRST, train_step=lambda s: None, valid_step=lambda s: {}
    )
    await fitted.fit(1, callbacks=[ended.append], **QUIET)
    assert [e.samples for e in ended if e.kind == "phase_ended"] == [None, None]


@pytest.mark.parametrize("batches_read", [1, 3])
async def test_batch_size_when_means_need_it_then_error_comes_after_the_first_batch(
    batches_read: int,
) -> None:
    seen: list[int] = []

    def step(state: LoopState) -> dict[str, float]:
        seen.append(state.batch_num)
        return {"x": 1.0}

    fitted = trainer(train_dl=TIME_FIRST[:batches_read], train_step=step)
    with pytest.raises(FitLoopError, match=r"train batch 1 is not known.*Give batch_size_of="):
        await fitted.fit(1, **QUIET)
    assert seen == [1]


async def test_batch_size_of_when_it_gives_no_number_then_error() -> None:
    async def size(batch: Any) -> int:
        return len(batch[1])

    with pytest.raises(ConfigurationError, match=r"batch_size_of is .*async def function"):
        trainer(batch_size_of=size)
    fitted = trainer(batch_size_of=lambda batch: None)
    with pytest.raises(ConfigurationError, match="batch_size_of returned None; expected a number"):
        await fitted.fit(1, **QUIET)


# -- mappings with the arguments of the model ----------------------------------------------------


def as_attributes(loss: Tensor, logits: Tensor) -> Any:
    return SimpleNamespace(loss=loss, logits=logits)


def as_mapping(loss: Tensor, logits: Tensor) -> Any:
    return {"loss": loss, "logits": logits}


def as_tuple(loss: Tensor, logits: Tensor) -> Any:
    return loss, logits


class Classifier(nn.Module):
    """A model that computes its loss from the labels in its arguments."""

    def __init__(self, output: Callable[[Tensor, Tensor], Any] = as_attributes) -> None:
        super().__init__()
        self.inner, self.output = mlp(), output

    def forward(self, values: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.inner(values)
        if labels is None:
            return {"logits": logits}
        return self.output(F.cross_entropy(logits, labels), logits)


def mappings(count: int = 26, seed: int = 1) -> list[dict[str, Tensor]]:
    return [{"values": inputs, "labels": targets} for inputs, targets in batches(count, seed)]


def mapping_trainer(output: Any = as_attributes, **changes: Any) -> FitLoop:
    given = {"model": Classifier(output), "loss_function": None, "test_dl": None}
    loaders = {"train_dl": mappings(), "valid_dl": mappings(14, seed=2)}
    return trainer(**{**given, **loaders, **changes})


@pytest.mark.parametrize("output", [as_attributes, as_mapping, as_tuple], ids=lambda f: f.__name__)
async def test_mapping_when_model_returns_its_loss_then_bits_and_metrics_are_of_a_plain_loss(
    output: Any,
) -> None:
    plain = trainer(test_dl=None)
    expected = await plain.fit(2, **QUIET)
    fitted = mapping_trainer(output)
    result = await fitted.fit(2, **QUIET)
    assert list(bits(fitted.model).values()) == list(bits(plain.model).values())
    for phase in ("train", "valid"):
        assert {name: list(each) for name, each in result.metrics[phase].items()} == {
            name: list(each) for name, each in expected.metrics[phase].items()
        }
    assert fitted.loss_function is None


async def test_mapping_when_labels_are_ignored_then_they_do_not_count_in_the_accuracy() -> None:
    data = [{"values": inputs, "labels": targets.clone()} for inputs, targets in batches()]
    for batch in data:
        batch["labels"][::2] = -100
    fitted = mapping_trainer(train_dl=data, valid_dl=data)
    result = await fitted.fit(1, load_best=False, **QUIET)
    values, labels = (torch.cat([batch[name] for batch in data]) for name in ("values", "labels"))
    scores = fitted.model(values)["logits"]
    right = (scores.argmax(1) == labels)[labels != -100]
    assert result.metrics["valid"]["accuracy"].tolist() == [right.double().mean()]


@pytest.mark.parametrize(
    "output",
    [
        pytest.param(lambda loss, logits: loss, id="loss alone"),
        pytest.param(lambda loss, logits: {"loss": loss.reshape(1)}, id="one element"),
        pytest.param(lambda loss, logits: {"loss": loss, "logits": logits[:, :1]}, id="one class"),
        pytest.param(lambda loss, logits: (loss, logits[:, None]), id="one word each"),
    ],
)
async def test_mapping_when_scores_and_labels_do_not_fit_then_there_is_no_accuracy(
    output: Any,
) -> None:
    fitted = mapping_trainer(output)
    result = await fitted.fit(1, **QUIET)
    assert set(result.metrics["valid"]) == {"loss"}


async def test_mapping_when_there_is_a_loss_function_then_it_takes_output_and_batch() -> None:
    def loss(output: Any, batch: Any) -> Tensor:
        return F.cross_entropy(output.logits, batch["labels"])

    fitted, plain = mapping_trainer(loss_function=loss), trainer(test_dl=None)
    await fitted.fit(1, load_best=False, **QUIET)
    await plain.fit(1, load_best=False, **QUIET)
    assert list(bits(fitted.model).values()) == list(bits(plain.model).values())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param(
            {"train_dl": batches()},
            r"without a loss_function takes a mapping with the arguments of the model\. For other "
            "batches write train_step=",
            id="pair",
        ),
        pytest.param(
            {"train_dl": [{"pixels": INPUTS, "labels": TARGETS}]},
            "the batch is {'pixels': float32",
            id="unknown name",
        ),
        pytest.param(
            {"train_dl": [{"values": INPUTS}]},
            r"output of the model, {'logits': float32 \(26, 3\)}, a dict, has no loss; .* need the "
            "labels in the batch",
            id="no labels",
        ),
        pytest.param(
            {"model": Classifier(lambda loss, logits: logits[:1, :1])}, "has no loss", id="scores"
        ),
    ],
)
async def test_mapping_when_it_cannot_work_then_error_says_what_the_default_step_takes(
    changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigurationError, match=expected):
        await mapping_trainer(**changes).fit(1, **QUIET)


async def test_loss_function_when_none_and_steps_need_none_then_a_run_and_a_resume_work(
    tmp_path: Path,
) -> None:
    def step(state: LoopState) -> dict[str, Tensor]:
        assert state.loss_function is None
        loss = F.cross_entropy(state.model(state.batch[0]), state.batch[1])
        if state.is_train:
            loss.backward()
            state.optimizer.step()
        return {"running_loss": loss.detach() * state.batch_size}

    given = {"loss_function": None, "train_step": step, "valid_step": step, "test_dl": None}
    fitted = trainer(**given, save_path=tmp_path)
    await fitted.run_sanity_check()
    await fitted.fit(1, checkpoint=Checkpoint(), **QUIET)
    await fitted.save()
    other = trainer(**given, save_path=tmp_path)
    await other.load()
    assert bits(other.model) == bits(fitted.model)
    await fitted.reset()


def test_loss_function_when_a_step_sets_another_one_then_the_default_step_uses_it() -> None:
    used: list[str] = []

    def first(predictions: Any, targets: Any) -> Any:
        used.append("first")
        return nn.functional.cross_entropy(predictions, targets)

    def second(predictions: Any, targets: Any) -> Any:
        used.append("second")
        return nn.functional.cross_entropy(predictions, targets)

    def step(state: LoopState) -> Any:
        if state.batch_num == 3:
            state.loss_function = second
        return default_batch_step(state)

    sync_trainer(loss_function=first, train_step=step, valid_dl=None).fit(1, steps=4, **QUIET)
    assert used == ["first", "first", "second", "second"]


@pytest.mark.parametrize(
    "loss",
    [nn.CrossEntropyLoss(ignore_index=1), nn.CrossEntropyLoss(reduction="sum"), nn.MSELoss()],
    ids=["ignores a class", "sum", "no classes"],
)
def test_metrics_when_a_stage_sets_another_loss_function_then_are_of_that_one(loss: Any) -> None:
    def set_loss(state: LoopState) -> None:
        state.loss_function = loss

    targets = torch.eye(3)[[0, 1, 2, 1]] if isinstance(loss, nn.MSELoss) else [0, 1, 2, 1]
    data = [(torch.ones(4, FEATURES) * number, torch.as_tensor(targets)) for number in range(3)]
    options: dict[str, Any] = {"train_dl": data, "valid_dl": None}
    given = sync_trainer(loss_function=loss, **options).fit(1, **QUIET)
    later = sync_trainer(train_epoch_start=set_loss, **options).fit(1, **QUIET)
    assert later.metrics["train"].keys() == given.metrics["train"].keys()
    for name, values in given.metrics["train"].items():
        assert later.metrics["train"][name].tolist() == values.tolist()
