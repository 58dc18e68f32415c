"""Declaring an op to PyTorch, each from one description: the signature of the function that runs it.

The schema, the fake kernel's arguments and the dispatcher's kernels follow from that signature. Where
several ops take the same arguments these are a NamedTuple, written once: a parameter of that type
stands for its fields.

`torch.library.custom_op` would do the same in more than twice the time: 53 µs instead of 23 for an
empty forward and backward pass, as much as a small batch takes to compute.
"""

from __future__ import annotations

import functools
import inspect
import operator
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

NAMESPACE = "action_kernels"
_library = torch.library.Library(NAMESPACE, "DEF")  # it lives as long as the process

Function = Callable[..., Any]


class Op:
    """The op ``torch.ops.action_kernels.<name>``, which `run` computes on every device.

    Calling it dispatches: to autograd, to a fake kernel, to `run`; for plain tensors in eager mode that
    is done here, past PyTorch's dispatcher, which takes longer than a small batch. `run` gets plain
    tensors (`plain`) and must allocate what it returns.
    """

    def __init__(self, name: str, run: Function) -> None:
        self.name = name
        self.run = run
        self._function: type[torch.autograd.Function] | None = None
        self._groups = _groups(run)
        _library.define(name + _schema(run), tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, _outside_dynamo(self._kernel), "CompositeExplicitAutograd")
        self.overload = getattr(getattr(torch.ops, NAMESPACE), name).default

    def __call__(self, *arguments: Any) -> Any:
        flat = _flat(arguments)
        if torch.compiler.is_compiling() or not is_eager(*flat):
            return self.overload(*flat)
        refuse_forward_mode(self.name, flat)
        if self._function and torch.is_grad_enabled() and _any_requires_grad(*flat):
            return super(torch.autograd.Function, self._function).apply(*flat)  # type: ignore[misc]
        return self.run(*self._grouped(flat))

    def below_autograd(self, *arguments: Any) -> Any:
        """The op without its derivative: what the forward pass of its autograd function calls.

        PyTorch has turned gradients off there. Under functorch that would be for the outer levels too,
        which are still to see the op: a derivative of a derivative would be lost without a word.
        """
        flat = _flat(arguments)
        if is_eager(*flat):
            return self.run(*self._grouped(flat))
        if not torch._C._are_functorch_transforms_active():
            return self._below_autograd(*flat)
        with torch.enable_grad():
            return self._below_autograd(*flat)

    def _below_autograd(self, *arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload(*_flat(arguments))

    def fake(self, function: Function) -> Function:
        """Decorator: `function` has `run`'s parameters and returns empty tensors of the right form."""

        def fake_kernel(*flat: Any) -> Any:
            return function(*self._grouped(flat))

        torch.library.register_fake(f"{NAMESPACE}::{self.name}", fake_kernel, lib=_library)
        return function

    def differentiable(self, function: type[torch.autograd.Function]) -> type:
        """Decorator: `function.apply` takes the op's flat arguments where a gradient is wanted."""

        # The engine calls it from no compiled frame, but perhaps below one.
        setattr(function, "backward", staticmethod(_outside_dynamo(function.backward)))  # noqa: B010
        single_level = _single_level(function)

        def autograd_kernel(*flat: Any) -> Any:
            refuse_forward_mode(self.name, flat)
            if not (torch.is_grad_enabled() and _any_requires_grad(*flat)):
                return self._below_autograd(*flat)
            if not torch._C._are_functorch_transforms_active():
                return function.apply(*flat)
            with enable_single_level_autograd_function():
                return single_level.apply(*flat)  # type: ignore[attr-defined]

        _library.impl(self.name, _outside_dynamo(autograd_kernel), "Autograd")
        self._function = function
        return function

    def constant(self) -> None:
        """Of whole numbers: no derivative is wanted, whatever the arguments."""
        _library.impl(self.name, _outside_dynamo(self._below_autograd), "Autograd")

    def without_second_derivative(self, of: str) -> None:
        """This op is the backward pass of the op `of`, and differentiating it is an error, not wrong."""
        below_autograd = self.below_autograd

        class Refusal(torch.autograd.Function):
            @staticmethod
            def forward(_ctx: Any, *flat: Any) -> Any:
                return below_autograd(*flat)

            @staticmethod
            def backward(_ctx: Any, *_gradients: Any) -> Any:
                raise RuntimeError(
                    f"{of} has no second derivative: call backward() or autograd.grad() with "
                    "create_graph=False, or compute that term with plain PyTorch"
                )

        self.differentiable(Refusal)

    def _kernel(self, *flat: Any) -> Any:
        return self.run(*self._grouped(tuple(map(plain, flat))))

    def _grouped(self, flat: Sequence[Any]) -> Iterator[Any]:
        start = 0
        for group in self._groups:
            if group is None:
                yield flat[start]
                start += 1
            else:
                end = start + len(group._fields)  # type: ignore[attr-defined]
                yield group(*flat[start:end])
                start = end


def op(name: str) -> Callable[[Function], Op]:
    """Decorator: the function becomes the op `name`."""
    return functools.partial(Op, name)


def is_eager(*arguments: Any) -> bool:
    """Plain tensors with nobody looking on (a tracer, a mode, functorch, the profiler): a kernel may be
    called past the dispatcher."""
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or torch._C._autograd._profiler_enabled()
    ):
        return False
    for value in arguments:
        kind = type(value)
        if kind not in _EAGER and isinstance(value, Tensor):
            return False
        if kind in _PLAIN and torch._C._dispatch_keys(value).raw_repr() & ~_MEMORY_KEYS:
            return False
    return True


def _memory_keys() -> int:
    """Dispatch keys of tensors whose numbers lie in memory as they are: those of others say that the numbers are
    negated, zero or nowhere (meta), or that the tensor wraps another (vmap, a transform that has ended)."""
    names = (
        "CPU",
        "CUDA",
        "AutogradCPU",
        "AutogradCUDA",
        "AutocastCPU",
        "AutocastCUDA",
        "ADInplaceOrView",
    )
    keys = (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)) for name in names)
    return functools.reduce(operator.or_, (key.raw_repr() for key in keys))


_MEMORY_KEYS = _memory_keys()


def _one_requires_grad(*arguments: Any) -> bool:
    return any(isinstance(value, Tensor) and value.requires_grad for value in arguments)


_any_requires_grad = getattr(torch._C, "_any_requires_grad", _one_requires_grad)  # not in torch 2.6
_PLAIN = (Tensor, torch.nn.Parameter)
_EAGER = frozenset((*_PLAIN, type(None), float, int, bool, torch.dtype))


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply`, in eager mode without its search for default values, which takes 30 µs."""
    if torch.compiler.is_compiling() or not is_eager(*arguments):
        return function.apply(*arguments)
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]


def refuse_forward_mode(name: str, arguments: Sequence[Any]) -> None:
    """Raise where an argument carries a tangent, which the op would drop without a word."""
    if forward_ad._current_level < 0:
        return
    for value in arguments:
        if isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            raise NotImplementedError(
                f"{name} has no forward-mode derivative (torch.func.jvp, jacfwd, forward_ad): use "
                "backward(), torch.func.grad or jacrev, or compute that term with plain PyTorch"
            )


def plain(value: Any) -> Any:
    """A tensor of a subclass that lives in `__torch_function__` alone (MONAI's MetaTensor) without it.

    The same values and the same place in the autograd graph; every other value as it is.
    """
    if not isinstance(value, Tensor) or type(value) in _PLAIN or torch.compiler.is_compiling():
        return value
    if type(value).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl:
        return value
    return value.as_subclass(Tensor)


def _flat(arguments: tuple[Any, ...]) -> list[Any]:
    """NamedTuples replaced by their fields. No generator: torch.compile traces this."""
    flat: list[Any] = []
    for argument in arguments:
        if isinstance(argument, tuple) and hasattr(argument, "_fields"):
            flat.extend([plain(value) for value in argument])
        else:
            flat.append(plain(argument))
    return flat


def _parameters(run: Function) -> Iterator[tuple[str, Any]]:
    """Names and types of `run`'s parameters; the last is the result, named "return"."""
    hints = typing.get_type_hints(run)
    for name in (*inspect.signature(run).parameters, "return"):
        yield name, hints[name]


def _groups(run: Function) -> list[type | None]:
    types = [kind for name, kind in _parameters(run) if name != "return"]
    return [kind if hasattr(kind, "_fields") else None for kind in types]


def _schema(run: Function) -> str:
    flat: dict[str, Any] = {}
    for name, kind in _parameters(run):
        fields = typing.get_type_hints(kind) if hasattr(kind, "_fields") else {name: kind}
        if twice := flat.keys() & fields.keys():
            raise TypeError(f"{run.__qualname__} has several arguments named {', '.join(twice)}")
        flat.update(fields)
    result = flat.pop("return")

    flat = {name: _known_to_torch(kind) for name, kind in flat.items()}

    def prototype() -> None: ...

    prototype.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind)
            for name, kind in flat.items()
        ],
        return_annotation=result,
    )
    return torch.library.infer_schema(prototype, mutates_args=())


def _known_to_torch(kind: Any) -> Any:
    """A sequence by its name in `typing`, the only one that torch 2.6 knows."""
    if typing.get_origin(kind) is Sequence:
        return typing.Sequence[typing.get_args(kind)]  # type: ignore[misc]
    return kind


def _single_level(function: type[torch.autograd.Function]) -> type[_SingleLevelFunction]:
    """`function` for where functorch (torch.func.grad, vmap, …) calls the autograd kernel: its interpreter
    has chosen the level, and `torch.autograd.Function` would want to be asked for every level anew."""
    methods = {name: staticmethod(getattr(function, name)) for name in ("forward", "backward")}
    return type(function.__name__, (_SingleLevelFunction,), methods)


def _outside_dynamo(function: Function) -> Function:
    """`function` as it is: frames below a compiled one are not compiled as well.

    Without importing torch._dynamo, which takes seconds, where nothing is ever compiled.
    """
    disabled: list[Function] = []

    def call(*arguments: Any) -> Any:
        if disabled:
            return disabled[0](*arguments)
        disable = getattr(sys.modules.get("torch._dynamo"), "disable", None)
        if disable is None:
            return function(*arguments)
        disabled.append(disable(function))
        return disabled[0](*arguments)

    return call
