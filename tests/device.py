"""A device that pretends: computes on the CPU, refuses what a GPU refuses, counts what a GPU waits for.

    with pretend() as device:
        model.to(device.name)
        with device.counting() as counts:
            decode_batch(model, batch, options)
    assert counts.syncs == 32

Its tensors are of torch's spare device type, so that code that asks for a tensor's device sees no CPU. Within
the context, every operation on them is

- refused, if it mixes devices: only numbers (tensors without dimensions) may be on the CPU, as for a GPU;
- counted as a launch, unless it only makes a view. An operation that torch has as one kernel on GPUs counts
  once, also where the CPU takes several (`FUSED`);
- counted as a synchronization, if a GPU's host would wait in it: values that the host reads, boolean
  indexing, whatever has a size that depends on values, a copy to the host, and the wait for an event;
- counted as an upload, if it copies from the host without `non_blocking`: then the host waits, too.

A copy to the host with `non_blocking` arrives when the host has waited for an event that was recorded after
it. Until then the host reads nonsense, as it might on a GPU.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import (
    _DummyBackendModule,  # pyright: ignore[reportPrivateUsage]
    _setup_privateuseone_for_python_backend,  # pyright: ignore[reportPrivateUsage]
)

aten = torch.ops.aten

FUSED: set[Callable[..., Any]] = {functional.scaled_dot_product_attention, functional.rms_norm}
"""Functions that are one kernel on a GPU, and several operations of the CPU."""

_WAITS = {
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "equal",
}
"""Operations whose result, or its size, the host has to know. `_to_copy`, `copy_` and indexing are decided by
their arguments."""

_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "alias"}
"""Operations besides views that launch nothing."""

_SHAPES = {"squeeze_", "unsqueeze_", "transpose_", "t_", "resize_", "set_", "as_strided_", "swapaxes_"}
"""Operations that change a tensor's shape in place, which a `PretendTensor` cannot follow."""

_REPOSITORY = Path(__file__).resolve().parents[1]


class Event(NamedTuple):
    """What happened: its kind ("launch", "sync", "upload" or "download"), the operation, and the code's line.

    The line is known for synchronizations and uploads only.
    """

    kind: str
    operation: str
    line: str = ""


class Counts:
    """What happened while it counted, in order."""

    def __init__(self):
        self.events: list[Event] = []

    def of(self, kind: str) -> list[Event]:
        """The events of a kind."""
        return [event for event in self.events if event.kind == kind]

    @property
    def syncs(self) -> int:
        """How often the host waited to know something of the device."""
        return len(self.of("sync"))

    @property
    def uploads(self) -> int:
        """How often the host waited until the device had something."""
        return len(self.of("upload"))

    @property
    def launches(self) -> int:
        """How many kernels were launched, copies that do not wait included."""
        return len(self.of("launch")) + len(self.of("download"))

    def waits(self) -> str:
        """The synchronizations and uploads by line of code, for the message of a test that fails."""
        found = Counter((event.kind, event.operation, event.line) for event in self.events if event.line)
        return "\n".join(f"{count} x {' '.join(what)}" for what, count in found.most_common())


class PretendTensor(torch.Tensor):
    """A tensor on the pretended device; `host_value` holds its numbers."""

    host_value: Tensor

    @staticmethod
    def __new__(cls, value: Tensor) -> PretendTensor:
        with torch.inference_mode(
            False
        ):  # in inference mode, a view of a parameter must be no inference tensor
            return torch.Tensor._make_wrapper_subclass(
                cls, value.shape, value.stride(), value.storage_offset(), dtype=value.dtype, device=_NAME
            )

    def __init__(self, value: Tensor):
        self.host_value = value

    def __repr__(self, **_: Any) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"PretendTensor({self.host_value})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run_now(func, *args, **(kwargs or {}))


class PretendedDevice:
    """The device while it pretends; see the module."""

    name = "pretend"

    def __init__(self):
        self.listeners: list[Counts] = []
        self.fused = 0  # depth of functions that count once
        self.on_their_way: list[tuple[Tensor, Tensor]] = []  # copies to the host: where to, and what

    @contextmanager
    def counting(self) -> Iterator[Counts]:
        """Count what happens within the context."""
        counts = Counts()
        self.listeners.append(counts)
        try:
            yield counts
        finally:
            self.listeners.remove(counts)

    def report(self, kind: str, operation: str) -> None:
        """Tell those who count."""
        if not self.listeners or (kind == "launch" and self.fused):
            return
        event = Event(kind, operation, _line() if kind in ("sync", "upload") else "")
        for counts in self.listeners:
            counts.events.append(event)

    def wait(self, what: str) -> None:
        """Wait until all that was launched is done."""
        self.report("sync", what)
        for target, value in self.on_their_way:
            target.copy_(value)
        self.on_their_way = []

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """An operation, some of whose arguments or whose result is on the device."""
        facts = _facts_of(func)
        if facts.is_composite:
            with _Dispatch(self):  # made of other operations, which are what counts
                return func.decompose(*args, **kwargs)
        name = facts.name
        if name in _SHAPES:
            raise NotImplementedError(f"{func}: a pretended tensor keeps its shape")
        given = [each for each in _leaves((*args, *kwargs.values())) if isinstance(each, Tensor)]
        ours = [each for each in given if isinstance(each, PretendTensor)]
        if name in ("copy_", "_to_copy") or (not ours and name == "_pin_memory"):
            return self._copy(func, name, args, kwargs)
        self._refuse_mixed(name, given, ours)
        wanted = kwargs.get("device")
        here = bool(ours) if wanted is None else torch.device(wanted).type == _NAME
        on_host = {key: _host_value(value) for key, value in _on_host(kwargs).items()}
        result = func(*_host_value(args), **on_host)
        if ours or here:
            self._count(facts, args)
        if name in ("_local_scalar_dense", "item", "is_nonzero", "equal"):
            return result
        return _returned(facts, args, kwargs, result) if here else result

    def _copy(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        """A copy, perhaps to or from the host."""
        source = args[1] if name == "copy_" else args[0]
        blocking = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
        values = _host_value(args)
        if name == "copy_":
            target = args[0]
            to_device, from_device = (isinstance(each, PretendTensor) for each in (target, source))
            if from_device and not to_device and not blocking:
                self.report("download", name)
                self.on_their_way.append((target, values[1].clone()))
                target.view(torch.uint8).fill_(0xA5)
                return target
            func(*values, **kwargs)
            result = target
        else:
            wanted = kwargs.get("device")
            from_device = isinstance(source, PretendTensor)
            to_device = from_device if wanted is None else torch.device(wanted).type == _NAME
            value = func(*values, **_on_host(kwargs))
            if from_device and not to_device and not blocking:
                self.report("download", name)
                self.on_their_way.append((value, value.clone()))
                value.view(-1).view(torch.uint8).fill_(0xA5)
                return value
            result = PretendTensor(value) if to_device else value
        if from_device and not to_device:
            self.wait(name)
        elif to_device and not from_device and blocking and source.dim():
            self.report("upload", name)
        elif to_device:
            self.report("launch", name)
        return result

    def _refuse_mixed(self, name: str, given: list[Tensor], ours: list[PretendTensor]) -> None:
        """Raise as a GPU does for tensors of two devices."""
        if not ours or len(given) == len(ours):
            return
        others = [each for each in given if not isinstance(each, PretendTensor)]
        indexed = name.startswith("index") and isinstance(given[0], PretendTensor)
        if indexed:
            for index in others:
                if index.dim() and not index.is_floating_point():
                    self.report("upload", f"{name} by a tensor of the host")
                elif index.dim():
                    raise RuntimeError(f"aten::{name}: values of {tuple(index.shape)} are on cpu")
            return
        if not isinstance(given[0], PretendTensor) or any(each.dim() for each in others):
            shapes = ", ".join(f"{each.device.type} {tuple(each.shape)}" for each in given)
            raise RuntimeError(f"aten::{name}: expected all tensors to be on the same device: {shapes}")

    def _count(self, facts: _Facts, args: Any) -> None:
        name = facts.name
        if facts.is_free:
            return
        if name in _WAITS or (name == "repeat_interleave" and len(args) < 3):
            self.wait(name)
        elif name in ("index", "index_put_", "index_put", "_index_put_impl_"):
            masks = [index for index in args[1] if index is not None and index.dtype == torch.bool]
            fills = name != "index" and args[2].numel() == 1 and len(masks) == len(args[1])
            for _ in [] if fills else masks:
                self.wait(f"{name} by a mask")
        self.report("launch", name)


class _Dispatch(TorchDispatchMode):
    """Sees the operations that have no tensor of the device among their arguments, and may make one."""

    def __init__(self, device: PretendedDevice):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        wanted = kwargs.get("device")
        if any(isinstance(leaf, PretendTensor) for leaf in _leaves((*args, *kwargs.values()))) or (
            wanted is not None and torch.device(wanted).type == _NAME
        ):
            return self.device.run(func, args, kwargs)
        return func(*args, **kwargs)


class _Functions(TorchFunctionMode):
    """Counts fused functions once."""

    def __init__(self, device: PretendedDevice):
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.tolist and isinstance(args[0], PretendTensor):
            return args[0].cpu().tolist()
        if func not in FUSED or not isinstance(args[0], PretendTensor):
            return func(*args, **kwargs)
        self.device.report("launch", func.__name__)
        self.device.fused += 1
        try:
            return func(*args, **kwargs)
        finally:
            self.device.fused -= 1


class _DeviceModule(_DummyBackendModule):
    """What `torch.get_device_module` gives; `Event` and the types of autocast are what is asked for."""

    class Event:
        """Marks a point in what was launched."""

        def record(self) -> None:
            """Mark what was launched so far."""

        def synchronize(self) -> None:
            """Wait for it."""
            assert _now is not None
            _now.wait("event")

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """The types that autocast may be given. Within it, numbers keep their types all the same."""
        return [torch.bfloat16, torch.float16, torch.float32]

    def is_available(self) -> bool:
        """False, so that nobody chooses the device by itself."""
        return False


_NAME = PretendedDevice.name
_now: PretendedDevice | None = None
_library = torch.library.Library("aten", "IMPL")
_UNSEEN = ("empty.memory_format", "empty_strided", "fill_.Scalar", "copy_", "_copy_from")
"""What `torch.tensor` and assignments call out of sight of a dispatch mode."""
_registered = False


@contextmanager
def pretend() -> Iterator[PretendedDevice]:
    """Pretend within the context. The device's tensors cannot be used outside of it."""
    global _now, _registered
    assert _now is None, "one device at a time"
    if not _registered:
        _setup_privateuseone_for_python_backend(_NAME, _DeviceModule())
        for operation in _UNSEEN:
            name, _, overload = operation.partition(".")
            function = getattr(getattr(aten, name), overload or "default")
            _library.impl(operation, partial(_run_now, function), "PrivateUse1")
        _registered = True
    _now = PretendedDevice()
    try:
        with ExitStack() as stack:
            stack.enter_context(_Dispatch(_now))
            stack.enter_context(_Functions(_now))
            stack.enter_context(
                torch.autograd.set_multithreading_enabled(False)
            )  # it has no threads of its own
            yield _now
    finally:
        _now = None


def _run_now(func: Any, *args: Any, **kwargs: Any) -> Any:
    if _now is None:
        raise RuntimeError(f"{func}: use a pretended tensor within `pretend()`")
    return _now.run(func, args, kwargs)


def _leaves(values: Any) -> Iterator[Any]:
    """What an operation is given, also within lists."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from _leaves(value)
        else:
            yield value


def _host_value(value: Any) -> Any:
    if isinstance(value, PretendTensor):
        return value.host_value
    return type(value)(map(_host_value, value)) if type(value) in (list, tuple) else value


def _on_host(kwargs: dict[str, Any]) -> dict[str, Any]:
    wanted = kwargs.get("device")
    if wanted is None or torch.device(wanted).type != _NAME:
        return kwargs
    return kwargs | {"device": torch.device("cpu")}


class _Facts(NamedTuple):
    """What an operation's schema says: asked for once, since a decode has thousands of operations."""

    name: str
    is_composite: bool
    """It is made of other operations."""
    is_free: bool
    """It launches nothing, as a view of what it was given."""
    is_in_place: bool
    """All that it returns was given to it."""
    written: list[tuple[int, str]]
    """The arguments that it writes into: the place and the name of each."""


@cache
def _facts_of(func: Any) -> _Facts:
    schema = func._schema
    name = schema.name.removeprefix("aten::")
    aliases = [value.alias_info for value in schema.returns]
    return _Facts(
        name,
        torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"),
        name in _FREE or any(alias is not None and not alias.is_write for alias in aliases),
        bool(aliases) and all(alias is not None and alias.is_write for alias in aliases),
        [
            (place, argument.name)
            for place, argument in enumerate(schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ],
    )


def _returned(facts: _Facts, args: Any, kwargs: dict[str, Any], result: Any) -> Any:
    """The result, its tensors on the device; what an operation writes into is returned as it was given."""
    outputs = list(result) if isinstance(result, tuple | list) else [result]
    if facts.is_in_place:
        outputs = [args[place] if place < len(args) else kwargs.get(name) for place, name in facts.written]
    else:
        outputs = [PretendTensor(each) if isinstance(each, Tensor) else each for each in outputs]
    return type(result)(outputs) if isinstance(result, tuple | list) else outputs[0] if outputs else None


def _line() -> str:
    """The innermost line of the package that led here."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path != Path(__file__) and path.is_relative_to(_REPOSITORY) and ".venv" not in path.parts:
            return f"{path.relative_to(_REPOSITORY)}:{frame.lineno}"
    return "(outside)"
