"""The state that code of a run keeps on whichever thread it is executed.

torch keeps modes such as autocast, the default device and the grad mode for each thread. Context
variables belong to a task or thread too. A run has threads of its own, and its coroutines share
the event loop's thread with other code. So each thread and task that fitloop starts begins with the
state of the code that started it:

- `TaskState.of_caller` copies that state, `TaskState.call` begins a thread with it, and
  `TaskState.step` executes each step of a coroutine in it.
- `lend_state` lends the state of a thread to a coroutine for which the thread waits.

Some modes cannot be read or set: the profiler of torch. docs/threads.md lists all of them.
"""

from __future__ import annotations

import contextvars
import ctypes
import threading
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch.utils._device import DeviceContext

from fitloop._blocks import contextmanager
from fitloop._concurrency.coroutines import SteppedAwaitable
from fitloop._concurrency.event_loops import hide_running_loop

T = TypeVar("T")
_C: Any = torch._C
_AUTOGRAD: Any = torch._C._autograd
_SavedTensorHooks = tuple[tuple[Any, Any], ...]


class ThreadBoundMode:
    """A mark for torch function modes that belong to one thread, and are never taken over."""


class CudaState(NamedTuple):
    """The current device of a thread, and its current streams that are not the default ones."""

    device: int
    streams: tuple[Any, ...]


class TorchState(NamedTuple):
    """The modes of torch in one thread."""

    grad: bool
    multithreaded_backward: bool
    inference: bool
    num_threads: int
    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    """for each type of device: whether autocast is on, and its dtype"""
    autocast_cache: bool
    autocast_nesting: int
    """number of open ``with torch.autocast()`` blocks; torch empties its cache at the last one"""
    function_modes: tuple[Any, ...]
    dispatch_modes: tuple[Any, ...]
    default_device: Any
    """the mode that ``torch.set_default_device`` has set"""
    saved_tensor_hooks: _SavedTensorHooks
    no_hooks: str | None
    """the message of ``torch.autograd.graph.disable_saved_tensors_hooks``"""
    cuda: CudaState | None
    """None if CUDA is not initialized"""

    @classmethod
    def read(cls) -> TorchState:
        """Return the modes of this thread."""
        nesting = torch.autocast_increment_nesting() - 1
        torch.autocast_decrement_nesting()
        return cls(
            torch.is_grad_enabled(),
            _C._is_multithreading_enabled(),
            torch.is_inference_mode_enabled(),
            torch.get_num_threads(),
            tuple(
                (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
                for kind in _autocast_kinds()
            ),
            torch.is_autocast_cache_enabled(),
            nesting,
            function_modes(),
            tuple(map(_C._get_dispatch_stack_at, range(_C._len_torch_dispatch_stack()))),
            getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None),
            _saved_tensor_hooks(),
            _AUTOGRAD._saved_tensors_hooks_get_disabled_error_message(),
            _cuda_state(),
        )

    def for_new_thread(self) -> TorchState:
        """Return the modes with which a thread of a run begins.

        Inference mode is left out: the run sets the grad mode of each phase. The cache of autocast
        is left out: torch empties it at the end of the ``with`` block, so that a block around a
        whole training would go on to compute with the weights of the first step.
        """
        has_autocast = any(is_on for _kind, is_on, _dtype in self.autocast)
        return self._replace(
            inference=False,
            autocast_cache=self.autocast_cache and not has_autocast,
            autocast_nesting=0,
        )

    def install(self, present: TorchState) -> None:
        """Set the modes of this thread, which are ``present`` now; inference mode is left out."""
        if self == present:
            return
        if self.dispatch_modes != present.dispatch_modes:
            for _mode in present.dispatch_modes:
                _C._pop_torch_dispatch_stack(None)
            for mode in self.dispatch_modes:
                _C._push_on_torch_dispatch_stack(mode)
        if self.function_modes != present.function_modes:
            set_function_modes(self.function_modes, bound=_bound_mode())
        if self.default_device is not present.default_device:
            torch._GLOBAL_DEVICE_CONTEXT.device_context = self.default_device
        self._install_autocast(present)
        self._install_hooks(present)
        if self.num_threads != present.num_threads:
            torch.set_num_threads(self.num_threads)
        if self.cuda is not None and self.cuda != present.cuda:
            _set_cuda_state(self.cuda, present.cuda)
        _C._set_multithreading_enabled(self.multithreaded_backward)
        torch.set_grad_enabled(self.grad)

    def _install_autocast(self, present: TorchState) -> None:
        if self.autocast != present.autocast:
            for kind, is_on, dtype in self.autocast:
                torch.set_autocast_enabled(kind, is_on)
                torch.set_autocast_dtype(kind, dtype)
        torch.set_autocast_cache_enabled(self.autocast_cache)
        for _block in range(self.autocast_nesting - present.autocast_nesting):
            torch.autocast_increment_nesting()
        for _block in range(present.autocast_nesting - self.autocast_nesting):
            torch.autocast_decrement_nesting()

    def _install_hooks(self, present: TorchState) -> None:
        if self.saved_tensor_hooks != present.saved_tensor_hooks:
            for _hooks in present.saved_tensor_hooks:
                _AUTOGRAD._pop_saved_tensors_default_hooks()
        if present.no_hooks is not None and self.no_hooks != present.no_hooks:
            _AUTOGRAD._saved_tensors_hooks_enable()
        if self.saved_tensor_hooks != present.saved_tensor_hooks:
            for pack, unpack in self.saved_tensor_hooks:
                _AUTOGRAD._push_saved_tensors_default_hooks(pack, unpack)
        if self.no_hooks is not None and self.no_hooks != present.no_hooks:
            _AUTOGRAD._saved_tensors_hooks_disable(self.no_hooks)


@cache
def _autocast_kinds() -> tuple[str, ...]:
    accelerator = torch.accelerator.current_accelerator()
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)


def function_modes() -> tuple[Any, ...]:
    """Return the function modes of this thread without those that are bound to it."""
    modes = map(_C._get_function_stack_at, range(_C._len_torch_function_stack()))
    return tuple(mode for mode in modes if not isinstance(mode, ThreadBoundMode))


def set_function_modes(modes: tuple[Any, ...], bound: ThreadBoundMode | None = None) -> None:
    """Set the function modes of this thread, and the one that is bound to it.

    The bound one is below the others, so that it sees the operations of their code. Only the
    default device is below that: torch expects it at the bottom.
    """
    for _ in range(_C._len_torch_function_stack()):
        _C._pop_torch_function_stack()
    devices = tuple(mode for mode in modes[:1] if isinstance(mode, DeviceContext))
    for mode in (*devices, *(() if bound is None else (bound,)), *modes[len(devices) :]):
        _C._push_on_torch_function_stack(mode)


def _bound_mode() -> ThreadBoundMode | None:
    modes = map(_C._get_function_stack_at, range(_C._len_torch_function_stack()))
    return next((mode for mode in modes if isinstance(mode, ThreadBoundMode)), None)


def _saved_tensor_hooks() -> _SavedTensorHooks:
    """Return the pairs of hooks, the innermost last. torch only gives the innermost."""
    hooks: list[tuple[Any, Any]] = []
    while top := _AUTOGRAD._top_saved_tensors_default_hooks(True):
        hooks.insert(0, top)
        _AUTOGRAD._pop_saved_tensors_default_hooks()
    for pack, unpack in hooks:
        _AUTOGRAD._push_saved_tensors_default_hooks(pack, unpack)
    return tuple(hooks)


def _cuda_state() -> CudaState | None:
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return None
    streams = [torch.cuda.current_stream(index) for index in range(torch.cuda.device_count())]
    return CudaState(
        torch.cuda.current_device(), tuple(stream for stream in streams if stream.stream_id)
    )


def _set_cuda_state(state: CudaState, present: CudaState | None) -> None:
    for stream in () if present is None else present.streams:
        torch.cuda.set_stream(torch.cuda.default_stream(stream.device))
    for stream in state.streams:
        torch.cuda.set_stream(stream)
    torch.cuda.set_device(state.device)  # after the streams, which set the device too


class TaskState:
    """Context variables and modes of torch, for one thread or task at a time."""

    def __init__(self, context: contextvars.Context, modes: TorchState) -> None:
        self.context, self.modes = context, modes
        self._guard: Any = None
        """an open guard of torch that changes inference mode"""

    @classmethod
    def of_caller(cls) -> TaskState:
        """Return a copy of the state of the calling thread or task."""
        context = contextvars.copy_context()
        context.run(hide_running_loop)
        return cls(context, TorchState.read().for_new_thread())

    def call(self, function: Callable[[], T]) -> T:
        """Call ``function`` in this state; for the whole life of a new thread."""
        self.modes.install(TorchState.read())
        _thread.context = self.context
        return self.context.run(function)

    def step(self, method: Callable[[Any], Any], value: Any) -> Any:
        """Execute one step of a coroutine in this state, and keep the state that it leaves."""
        outer = TorchState.read()
        self._install(self.modes, outer)
        try:
            return self.context.run(method, value)
        finally:
            self.modes = TorchState.read()
            self._install(outer, self.modes)

    def _install(self, modes: TorchState, present: TorchState) -> None:
        if modes.inference != present.inference:
            guard, self._guard = self._guard, None
            if guard is not None:
                guard.__exit__(None, None, None)
            if torch.is_inference_mode_enabled() != modes.inference:
                self._guard = _C._InferenceMode(modes.inference)
                self._guard.__enter__()
            present = TorchState.read()  # the guard has changed other modes
        modes.install(present)

    async def run(self, function: Callable[[], Any]) -> Any:
        """Await the coroutine of ``function`` in this state."""
        return await SteppedAwaitable(self.context.run(function), self.step)


_thread = threading.local()


@contextmanager
def lend_state() -> Iterator[TaskState]:
    """Lend the state of this thread in a block; the thread has its changes afterwards.

    A context cannot be entered in two threads at a time, so this thread leaves it for the block.
    """
    context = getattr(_thread, "context", None)
    if context is None:  # a thread that was not begun with a state
        yield TaskState(contextvars.copy_context(), TorchState.read())
        return
    state = TaskState(context, TorchState.read())
    _python().PyContext_Exit(context)
    try:
        yield state
    finally:
        _python().PyContext_Enter(context)
        state.modes.install(TorchState.read())


@cache
def _python() -> Any:
    functions = ctypes.pythonapi
    for function in (functions.PyContext_Enter, functions.PyContext_Exit):
        function.argtypes, function.restype = [ctypes.py_object], ctypes.c_int
    return functions
