"""One run on several ranks: the wrapped model, and the exchanges of the ranks.

The loop and the optimizer steps call a `ParallelRun` where the ranks exchange values. It reaches
the other ranks through a `World`, and wraps the model in DistributedDataParallel, or has torch
split its parameters (FSDP): then torch exchanges parameters in each forward pass.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fitloop._concurrency.control import Cancelled
from fitloop._data.carried_state import carried_states, set_carried_states
from fitloop._data.inspection import GIVEN_SAMPLER
from fitloop._data.sources import END
from fitloop._data.structure import map_tensors
from fitloop._engine.config import TrainerConfig
from fitloop._engine.sharding import gather_parameters, is_sharded, reshard
from fitloop._engine.wrapping import unwrap, wrapped
from fitloop._errors import ConfigurationError, RanksError, RanksWarning, warn_user
from fitloop._metrics.merging import merged
from fitloop._ranks.votes import SharedControl, Votes
from fitloop._ranks.world import World, digest
from fitloop._types import Phase


class ParallelRun:
    """A run on one rank, and its meetings with the others; for its step thread."""

    def __init__(self, config: TrainerConfig, world: World, control: SharedControl) -> None:
        self._config, self.world, self.control = config, world, control
        self.votes = Votes(world, control)
        self._limit: int | None = None
        """batches of the present pass that all ranks have; None if it is not known"""
        self._are_alike = True
        """whether all ranks have as many batches in the present pass"""
        self._compares_batch = self._has_compared = False
        self._release_parameters: Callable[[], object] = lambda: None

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.world.is_first

    # -- the model ---------------------------------------------------------------------------------

    def meet(self, call: str, facts: dict[str, Any]) -> None:
        """Compare the facts of a call on all ranks; raise `RanksError` if they differ."""
        config = self._config
        shapes = [(name, tuple(p.shape)) for name, p in config.model.named_parameters()]
        more = {"seed": config.seed, "accumulate": config.accumulate, "parameters": shapes}
        facts = {"call": call, **facts, **more}
        if not self.world.is_same(facts):  # an exchange of one size for any number of ranks
            self._refuse_differences(f"beginning {call}()", self.world.gather(facts))

    def wrap(self) -> None:
        """Wrap the model for a run that trains, or split its parameters.

        All ranks then have the weights of rank 0.
        """
        self.end()
        config = self._config
        config.wrapper = wrapped(config, self.world)
        self._share_buffers()

    def end(self) -> None:
        """Drop the wrapped model; otherwise its hooks would go on to reduce gradients.

        Leave this rank its part of the parameters.
        """
        self._release_parameters()
        wrapper, self._config.wrapper = self._config.wrapper, None
        unwrap(wrapper)

    def _share_buffers(self) -> None:
        for buffer in self._config.model.buffers():
            if buffer.numel():
                self.world.copy_from_first(buffer.data)

    @property
    def is_sharded(self) -> bool:
        """Whether each rank has only a part of the parameters."""
        return is_sharded(self._config.model)

    @property
    def cannot_meet(self) -> bool:
        """Whether this rank was cancelled alone: the others are elsewhere in the run."""
        return self.control.cancelled and not self.control.is_agreed

    def _checksum(self) -> list[int]:
        return [] if self.is_sharded else checksum(self._config.model)

    def answer(self, ask: Callable[[], bool]) -> bool:
        """Return the answer to a question, which rank 0 asks."""
        control = self.control
        control.question_is_withdrawn = False

        def wishes_end() -> bool:
            if control.cancelled:  # this rank has failed
                raise Cancelled
            return control.wished_cancel or control.wished_reason > 0

        def ask_here() -> bool:
            try:
                return ask()
            except Cancelled:
                if control.failure is not None:
                    raise
                control.cancel()  # the other ranks learn it in the next vote
                return False

        return self.world.answer(ask_here, control.withdraw_question, wishes_end)

    # -- gradients ---------------------------------------------------------------------------------

    def reduce_in_backward(self, *, reduces: bool) -> None:
        """Set whether the next backward pass exchanges gradients."""
        if isinstance(self._config.wrapper, DistributedDataParallel):
            self._config.wrapper.require_backward_grad_sync = reduces

    def reduces_in_backward(self) -> bool:
        """Return whether the last backward pass has exchanged gradients."""
        return bool(getattr(self._config.wrapper, "require_backward_grad_sync", True))

    def check_gradients(self) -> None:
        """Raise ConfigurationError if the last backward pass cannot have exchanged all gradients.

        The ranks would wait for a gradient that does not come.
        """
        wrapper: Any = self._config.wrapper
        if getattr(wrapper, "find_unused_parameters", True) or wrapper.static_graph:
            return
        for name, parameter in wrapper.fitloop_trained.items():
            if parameter.grad is None and parameter.requires_grad:
                raise ConfigurationError(
                    f"the loss of this batch does not depend on the parameter {name!r}, and "
                    "parallel='ddp' exchanges the gradients of all parameters in each batch; give "
                    "parallel=lambda model: DistributedDataParallel(model, "
                    "find_unused_parameters=True), or freeze the parameter"
                )

    def average(self, parameters: Iterable[Any]) -> None:
        """Replace gradients by their means over all ranks."""
        for parameter in parameters:
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                self.world.add(parameter.grad)
                parameter.grad /= self.world.size

    def mean_weights(self, weights: Sequence[Any]) -> list[Any]:
        """Return the means of weights over all ranks, since gradients are means over all ranks.

        On the CPU they are numbers, else tensors on the device, which are not waited for.
        """
        device = self._config.device
        values = [
            weight.to(device, torch.float64).reshape(())
            if isinstance(weight, Tensor)
            else torch.tensor(float(weight), dtype=torch.float64, device=device)
            for weight in weights
        ]
        sums = torch.stack(values)
        self.world.add(sums)
        sums /= self.world.size
        return list(sums) if device.type != "cpu" else list(sums.tolist())

    def is_on_any(self, fact: bool) -> bool:
        """Return whether a fact holds on any rank."""
        return self.world.largest(fact) == [1]

    # -- a pass ------------------------------------------------------------------------------------

    def begin_pass(self, phase: Phase, loader: Any, batches: int | None) -> int | None:
        """Compare the ranks before a pass, and return its number of batches on this rank.

        Raises `RanksError` if they are not alike before a train phase.
        """
        self._compares_batch = (
            phase is Phase.TRAIN and not self._has_compared and not hasattr(loader, GIVEN_SAMPLER)
        )
        number, facts = batches or 0, self._facts(phase)
        one = digest(facts)
        most, least, has_unknown, largest, smallest = self.world.largest(
            number, -number, batches is None, one, -one
        )
        if largest != -smallest:
            self._refuse_differences("beginning a train phase", self.world.gather(facts))
        self._limit = None if has_unknown else -least
        self._are_alike = most == -least and not has_unknown
        config = self._config
        if phase is not Phase.TRAIN:
            self._share_buffers()  # those of an average are computed by each rank
            if self.is_sharded and not self._are_alike:
                # Some ranks have more forward passes than others.
                self._release_parameters = gather_parameters(config.model)
            return batches
        if self._trains_others:
            self.wrap()
        return self._limit

    @property
    def _trains_others(self) -> bool:
        """Whether parameters were frozen or unfrozen since the model was wrapped."""
        model = self._config.model
        trained_before = _trained_by(self._config.wrapper, model)
        return not self.is_sharded and set(_trained(model)) != set(trained_before)

    def _facts(self, phase: Phase) -> dict[str, Any]:
        """Return what all ranks must have in common when a phase begins."""
        if phase is not Phase.TRAIN:
            return {}
        groups = [group for each in self._config.optimizers for group in each.param_groups]
        return {
            "trained parameters": _trained(self._config.model),
            "learning rates": [float(group["lr"]) for group in groups],
            # A model that is wrapped anew gets the weights of rank 0.
            "weights": [] if self._trains_others else self._checksum(),
        }

    def share_order(self, loader: Any, rng: Any) -> None:
        """Give the random numbers of rank 0 to a loader that is shared out, before a pass."""
        if hasattr(loader, GIVEN_SAMPLER):
            state, carried = self.world.broadcast((rng.state(), carried_states(loader)))
            if not self.is_first:
                rng.set_state(state)
                set_carried_states(loader, carried)

    def fetch(self, state: Any, fetch: Callable[[], Any]) -> Callable[[], Any]:
        """Return a function that reads a batch as long as all ranks have one, in a train phase."""
        if not state.is_train:
            return fetch
        fetch = self._ended_together(state, fetch)
        return partial(self._compared, fetch) if self._compares_batch else fetch

    def _ended_together(self, state: Any, fetch: Callable[[], Any]) -> Callable[[], Any]:
        if self._are_alike:
            return fetch
        limit, world = self._limit, self.world

        def fetch_some() -> Any:
            return END if state.batch_num >= limit else fetch()

        def fetch_together() -> Any:
            batch = fetch()
            has_ended = torch.tensor([int(batch is END)], device="cpu")
            world.post(has_ended).wait()
            return END if has_ended.item() else batch

        return fetch_together if limit is None else fetch_some

    def _compared(self, fetch: Callable[[], Any]) -> Any:
        """Read a batch; warn if the first one of a run is the same on two ranks."""
        batch = fetch()
        if self._has_compared:
            return batch
        self._has_compared = True
        ranks: dict[Any, int] = {}
        for rank, bits in enumerate(self.world.gather(None if batch is END else _bits(batch))):
            other = ranks.setdefault(bits, rank)
            if bits and other != rank and self.is_first:
                warn_user(
                    f"the first train batches of rank {other} and of rank {rank} are the same: a "
                    "loader that is no DataLoader of samples is not shared out, and every rank "
                    "reads all that it is given. Give each its part, such as "
                    "batches[world.rank::world.size]",
                    RanksWarning,
                )
                break
        return batch

    def boundary(self, state: Any) -> Callable[[], object]:
        """Return a function to call after each batch: it votes while all ranks have a batch.

        With ``accumulate=`` it votes where a window ends. Gradients that wait would have to be
        exchanged for a snapshot there, and their sum would be rounded in another order.
        """
        votes, limit = self.votes, self._limit
        if state.is_train:
            accumulate = self._config.accumulate
            if self.is_sharded:
                return partial(self._boundary_of_shards, state)
            if accumulate == 1:
                return votes.boundary
            return lambda: None if state.batch_num % accumulate else votes.boundary()

        def vote() -> None:
            if limit is not None and state.batch_num <= limit:
                votes.boundary()

        return vote

    def _boundary_of_shards(self, state: Any) -> None:
        # A forward pass without a backward pass may have left whole parameters.
        reshard(self._config.model)
        if not state.batch_num % self._config.accumulate:
            self.votes.boundary()

    def end_pass(self, writer: Any, *, complete: bool) -> bool:
        """Merge the values of all ranks on each; return whether the pass was complete on all.

        Raises `RanksError` if their weights are not alike after a train phase.
        """
        state, config = writer.state, self._config
        export = writer.export()
        tensors = export["values"]["tensors"]
        export["values"]["tensors"] = {
            name: [value.cpu() for value in values] for name, values in tensors.items()
        }
        if state.is_train:
            self._share_buffers()
        facts = {"weights": self._checksum()} if state.is_train else {}
        reshard(config.model)
        self._release_parameters()
        gathered = self.world.gather((complete, facts, export))
        self._refuse_differences(
            f"after the train phase of epoch {state.epoch_num}", [each for _, each, _ in gathered]
        )
        together = merged([each for _, _, each in gathered])
        together["values"]["tensors"] = {
            name: [value.to(config.device) for value in values]
            for name, values in together["values"]["tensors"].items()
        }
        writer.restore(together)
        return all(is_complete for is_complete, _, _ in gathered)

    def _refuse_differences(self, moment: str, gathered: Sequence[dict[str, Any]]) -> None:
        """Raise `RanksError` if a fact differs between the ranks, whose facts are given."""
        for name, value in gathered[0].items():
            for rank, other in enumerate(gathered):
                if other[name] != value:
                    values = f": {value!r:.60} and {other[name]!r:.60}" if name != "weights" else ""
                    raise RanksError(
                        f"{moment}, {name} of rank 0 and of rank {rank} differ{values}. All ranks "
                        "must do the same: a callback that changes the training needs the "
                        "attribute every_rank = True, and a step must call state.model, not "
                        "trainer.model"
                    )


def checksum(model: nn.Module) -> list[int]:
    """Return a sum of the bits of the parameters, by dtype; equal weights have equal sums."""
    sums: dict[torch.dtype, Any] = {}
    with torch.no_grad():
        for parameter in model.parameters():
            kind = _INTEGERS.get(parameter.element_size())
            bits = parameter.detach().contiguous()
            bits = bits.view(kind) if kind is not None and not bits.is_complex() else bits.abs()
            total = bits.sum(dtype=None if kind is None else torch.int64)
            sums[parameter.dtype] = sums.get(parameter.dtype, 0) + total
    return [value.item() for value in sums.values()]


def _bits(batch: Any) -> tuple[Any, ...]:
    """Return a checksum of each tensor of a batch that has elements."""
    sums: list[Any] = []

    def add(item: Any) -> Any:
        if isinstance(item, Tensor) and item.layout is torch.strided and item.numel():
            values = item.detach().cpu().contiguous().flatten()
            sums.append((tuple(item.shape), zlib.crc32(bytes(values.view(torch.uint8).numpy()))))
        return item

    map_tensors(batch, add)
    return tuple(sums)


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _trained(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _trained_by(wrapper: Any, model: nn.Module) -> list[str]:
    """Return the parameters that were trained when the model was wrapped."""
    return list(getattr(wrapper, "fitloop_trained", _trained(model)))
