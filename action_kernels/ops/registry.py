"""Which backend runs an op: backends register kernels here, ops resolve them here.

A backend is declared with the module that holds its kernels; the module is imported when a tensor on
one of its devices is first met, so that importing the library loads no compiled code and no driver.
Such a module offers ``unavailable(device_type) -> str | None``: why it cannot serve tensors on that
kind of device, or None. For the diagnosis it may offer ``misconfigured() -> str | None``, what its ops raise
because of an environment variable, and ``describe() -> Iterable[str]``, what it runs on.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch

from action_kernels.autocast import outside_autocast

Kernel = Callable[..., Any]
KernelT = TypeVar("KernelT", bound=Kernel)

ENVIRONMENT_VARIABLE = "ACTION_KERNELS_BACKEND"


@dataclass(frozen=True)
class Backend:
    """A set of kernels: its name, the module that registers them and the devices it can serve.

    One that is not `automatic` is used only where it is asked for.
    """

    name: str
    module: str
    devices: frozenset[str] | None  # None: every device
    automatic: bool = True

    def serves(self, device_type: str) -> bool:
        return self.devices is None or device_type in self.devices


@dataclass(frozen=True)
class _Registration:
    run: Kernel
    dtypes: frozenset[torch.dtype] | None  # None: every floating dtype


_backends: dict[str, Backend] = {}
_kernels: dict[tuple[str, str], _Registration] = {}
_forced: str | None = None
_resolved: dict[tuple[str, str, torch.dtype, str | None, str | None], Kernel] = {}
_reported: set[str] = set()


def declare(
    name: str, module: str, devices: frozenset[str] | None, *, automatic: bool = True
) -> None:
    """Add a backend; those declared first are preferred."""
    _backends[name] = Backend(name, module, devices, automatic)


def register(
    op: str, backend: str, dtypes: frozenset[torch.dtype] | None = None
) -> Callable[[KernelT], KernelT]:
    """Register the decorated function as the kernel of `op` in `backend`, for `dtypes` (None: all).

    It runs with autocast off: a kernel chooses its own precision, also in a backward pass under autocast.
    """

    def add(function: KernelT) -> KernelT:
        _kernels[op, backend] = _Registration(function, dtypes)
        return function

    return add


def resolve(op: str, tensor: torch.Tensor) -> Kernel:
    """The kernel that runs `op` on the device and dtype of `tensor`.

    A backend that was asked for (`use_backend`) but has no kernel for the op or dtype leaves it to
    the next one; one that cannot be used at all raises RuntimeError.
    """
    device_type = tensor.device.type
    # The environment as it stands: what it means is looked into once for each kernel.
    key = (op, device_type, tensor.dtype, _forced, os.environ.get(ENVIRONMENT_VARIABLE))
    kernel = _resolved.get(key)
    if kernel is None:
        kernel = _search(op, device_type, tensor.dtype, requested_backend())[1]
        _resolved[key] = kernel
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return outside_autocast(kernel)
    return kernel


def resolve_without(backend: str, op: str, tensor: torch.Tensor) -> Kernel:
    """The kernel that would run `op` if there were no such `backend`: for what its own does not take."""
    return _search(op, tensor.device.type, tensor.dtype, None, without=backend)[1]


def backend_of(op: str, device_type: str, dtype: torch.dtype) -> str:
    """Name of the backend that `resolve` would choose."""
    return _search(op, device_type, dtype, requested_backend())[0]


def passed_over(op: str, device_type: str, dtype: torch.dtype) -> tuple[str, ...]:
    """Backends preferred to `backend_of` that would run `op` here, were they available."""
    chosen = backend_of(op, device_type, dtype)
    order = _order(device_type, requested_backend())
    return tuple(name for name in order[: order.index(chosen)] if _may_have(op, name, dtype))


def misconfiguration() -> str | None:
    """What every op raises because of a backend asked for that is unknown or not to be had, or None."""
    try:
        name = requested_backend()
    except ValueError as error:
        return str(error)
    reason = None if name is None else _usable_on_some_device(name)
    if reason is None:
        return None
    return f"{ENVIRONMENT_VARIABLE} is {name!r}, which cannot be used here: {reason}"


def misconfigured(name: str) -> str | None:
    """What the ops of a backend raise because of an environment variable; None if they run, or are not used."""
    if _usable_on_some_device(name) is not None:
        return None
    module = importlib.import_module(_backends[name].module)
    problem: str | None = getattr(module, "misconfigured", lambda: None)()
    return problem


def requested_backend() -> str | None:
    """The backend asked for by `use_backend` or the environment, or None for the automatic choice."""
    if _forced is not None:
        return _forced
    given = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    name = given.strip().lower() or "auto"
    if name == "auto":
        return None
    if name not in _backends:
        _refuse_unknown(given, ENVIRONMENT_VARIABLE)
    return name


def unavailable(name: str, device_type: str) -> str | None:
    """Why backend `name` cannot serve tensors on `device_type`, or None if it can."""
    try:
        module = importlib.import_module(_backends[name].module)
    except Exception as error:  # noqa: BLE001 - a broken installation must not break the others
        explained = isinstance(error, OSError | RuntimeError)
        return str(error) if explained else f"{type(error).__name__}: {error}"
    reason: str | None = module.unavailable(device_type)
    return reason


def backends() -> tuple[Backend, ...]:
    """All declared backends, preferred first."""
    return tuple(_backends.values())


def operations() -> tuple[str, ...]:
    """Names of all kernels that the imported backends have registered, sorted."""
    return tuple(sorted({op for op, _ in _kernels}))


class use_backend:  # lower case: a function that also serves in a `with` statement
    """Choose the backend of every op in this process: ``"auto"``, ``"reference"``, ``"cpu"``, …

    Called as a function it lasts; in a ``with`` statement it is undone at the end. The choice holds
    for all threads, because autograd runs backward passes in threads of its own.

    Raises:
        ValueError: the name is unknown; the message lists the known backends.
        RuntimeError: the backend cannot be used here; the message says why and lists those that can.

    Examples:
        >>> import torch
        >>> from action_kernels import supcon_loss, use_backend
        >>> with use_backend("reference"):
        ...     loss = supcon_loss(torch.randn(8, 4), torch.arange(8) % 2)
    """

    def __init__(self, name: str) -> None:
        global _forced
        self._before = [
            _forced
        ]  # what each `with` statement that is open, or the first, goes back to
        if name != "auto":
            if name not in tuple(_backends):
                _refuse_unknown(name, "backend")
            _check_usable(name)
        self._chosen = None if name == "auto" else name
        _forced = self._chosen
        self._entered = False

    def __enter__(self) -> use_backend:
        global _forced
        if self._entered:  # not for the first time
            self._before.append(_forced)
            _forced = self._chosen
        self._entered = True
        return self

    def __exit__(self, *_: object) -> None:
        global _forced
        _forced = self._before.pop()


@contextmanager
def isolated() -> Iterator[None]:
    """Undo every registration made inside: for tests that declare backends of their own."""
    global _forced
    tables: tuple[dict[Any, Any], ...] = (_backends, _kernels, _resolved)
    saved, forced = [dict(table) for table in tables], _forced
    try:
        yield
    finally:
        for table, entries in zip(tables, saved, strict=True):
            table.clear()
            table.update(entries)
        _forced = forced


def _refuse_unknown(name: str, argument: str) -> NoReturn:
    raise ValueError(f"{argument} is {name!r}; known are: auto, {', '.join(_backends)}")


def _usable_on_some_device(name: str) -> str | None:
    """None if the backend serves at least one kind of device here, else the reason of the last."""
    devices = _backends[name].devices or frozenset({"cpu"})
    reason = None
    for device_type in sorted(devices | {"cpu"}):
        reason = unavailable(name, device_type)
        if reason is None:
            return None
    return reason


def _check_usable(name: str) -> None:
    reason = _usable_on_some_device(name)
    if reason is not None:
        usable = [other for other in _backends if _usable_on_some_device(other) is None]
        raise RuntimeError(
            f"backend {name!r} cannot be used here: {reason}. Available: {', '.join(usable)}"
        )


def _search(
    op: str,
    device_type: str,
    dtype: torch.dtype,
    requested: str | None,
    without: str | None = None,
) -> tuple[str, Kernel]:
    if requested is not None:
        reason = unavailable(requested, device_type)
        if reason is not None:
            by = "use_backend" if _forced is not None else ENVIRONMENT_VARIABLE
            raise RuntimeError(
                f"{op}: backend {requested!r}, asked for by {by}, cannot serve tensors on "
                f"{device_type!r}: {reason}"
            )
    for name in _order(device_type, requested):
        if name == without:
            continue
        reason = unavailable(name, device_type)
        if reason is not None:
            _report(name, reason)
            continue
        if _has(op, name, dtype):
            return name, _kernels[op, name].run
    raise NotImplementedError(f"{op}: no backend has a kernel for {dtype} on {device_type!r}")


def _order(device_type: str, requested: str | None) -> list[str]:
    """Names of the backends for a kind of device, in the order in which they are asked."""
    order = [b.name for b in _backends.values() if b.automatic and b.serves(device_type)]
    if requested is None:
        return order
    return [requested, *(name for name in order if name != requested)]


def _has(op: str, name: str, dtype: torch.dtype) -> bool:
    registration = _kernels.get((op, name))
    return registration is not None and (
        registration.dtypes is None or dtype in registration.dtypes
    )


def _may_have(op: str, name: str, dtype: torch.dtype) -> bool:
    """As `_has`; of a backend whose module cannot be imported: all but float64, which none takes over."""
    imported = any(backend == name for _, backend in _kernels)
    return _has(op, name, dtype) if imported else dtype != torch.float64


def _report(name: str, reason: str) -> None:
    """Say once that a backend which should serve this device does not."""
    if name not in _reported:
        _reported.add(name)
        warnings.warn(
            f"action_kernels: backend {name!r} is not used: {reason}", RuntimeWarning, stacklevel=4
        )
