"""The scale of logits, 1 / temperature: a number, or a tensor that may change and learn.

Ops take it as a number times a 0-d tensor that may be None: numbers are known when an op is traced,
tensors when it runs. While compiling a number becomes a tensor, so that a schedule of them runs in one
graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from action_kernels.ops import checks, scalars

LARGEST = torch.finfo(torch.float32).max

Scale = tuple[float, Tensor | None]


def take_scale(scale: float | Tensor, rows: Tensor) -> Scale:
    """The scale that an op on `rows` was called with, in two parts.

    Raises:
        TypeError, ValueError: it is neither a number nor a 0-d floating tensor on the CPU or the rows'
            device, or not in (0, 3.4e38]. A tensor's value is looked at where `checks.values_readable`.
    """
    if isinstance(scale, Tensor):
        _check_tensor(scale, rows)
        return 1.0, scale
    scale = _number(scale)
    if torch.compiler.is_compiling():
        dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
        return 1.0, torch.ones((), dtype=dtype, device=rows.device) * scale
    return float(scale), None


def _number(scale: object) -> float:
    scale = scalars.number("scale", scale, "a number or a 0-d tensor")
    if not 0 < scale <= LARGEST:
        raise ValueError(
            f"scale (1 / temperature) must be finite and > 0, at most {LARGEST:.3g}, got {scale}"
        )
    return scale


def _check_tensor(scale: Tensor, rows: Tensor) -> None:
    checks.check_floating("scale", scale)
    if scale.dim() != 0:
        raise ValueError(f"scale must be a 0-d tensor, got shape {checks.shape_of(scale)}")
    if scale.device.type != "cpu" and scale.device != rows.device:
        raise ValueError(
            f"scale is on {scale.device} but the rows on {rows.device}; move it to them or to the CPU"
        )
    if checks.values_readable(scale):
        _number(float(scale.detach()))


def where_it_runs(number: float, tensor: Tensor | None) -> Scale:
    """The same scale for a kernel: a tensor on the CPU is read (nothing waits), another one stays."""
    if tensor is None or tensor.device.type != "cpu":
        return number, tensor
    return number * float(tensor), None


def product(number: float, tensor: Tensor | None) -> float | Tensor:
    """The scale as one factor, in the dtype of sums."""
    return number if tensor is None else tensor.double().mul(number)


def gradient_of_scale(
    rows: Tensor, gradient: Tensor, mask: Tensor | None, number: float, tensor: Tensor
) -> Tensor:
    """``Σ_i x_i · ∂f/∂x_i / scale``, in the form of `tensor`, with ∂f/∂x in the dtype of sums.

    Of an f that depends on scale and rows by scale · x_i alone that is ``∂f/∂scale`` (Euler). Rows that
    the mask leaves out may hold anything.
    """
    products = rows.to(gradient.dtype) * gradient
    if mask is not None:
        products = products.where(mask[:, None], 0)
    total = products.sum(dtype=torch.float64) / (tensor.detach().double() * number)
    return (total * number).to(dtype=tensor.dtype, device=tensor.device)
