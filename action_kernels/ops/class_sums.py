"""`class_sums`: what a 3×3(×3) convolution reads of an upsampled map, summed over the pixels of every class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from action_kernels.ops import checks, declare, registry
from action_kernels.ops.pairwise_lse import accumulation_dtype


def class_sums(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """``out[k, c, t] = Σ_{p: labels(p) = k} upsampled_c(p + t)``, t the taps of a 3×3(×3) kernel.

    The map is upsampled to the labels' size (linear in every axis, ``align_corners=True``) and padded by one zero
    pixel on every side, as in `sampled_features`; the upsampled map is never computed.

    Args:
        features: (B, C, *map_size), map_size of 2 or 3 axes, none longer than the labels'; float16, bfloat16,
            float32 or float64.
        labels: (B, *size) int64; a pixel whose label is not in 0 … num_classes − 1 counts nowhere.
        num_classes: K.

    Returns:
        (K, C, 3^axes) float32, or float64 for float64 features; taps in the order of a convolution's flattened
        kernel. Differentiable once, with respect to the features.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    checks.check_floating("features", features)
    axes = features.dim() - 2
    if axes not in (2, 3):
        raise ValueError(
            f"features must have shape (batch, channels, *size) with 2 or 3 axes in size, "
            f"got {checks.shape_of(features)}"
        )
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be an int64 tensor, got {labels.dtype}")
    size = labels.shape[1:]
    fits = len(size) == axes and labels.shape[0] == features.shape[0]
    if not fits or any(a < b for a, b in zip(size, features.shape[2:], strict=True)):
        raise ValueError(
            f"labels must have shape ({features.shape[0]}, *size) with no axis shorter than those of features "
            f"{checks.shape_of(features)}, got {checks.shape_of(labels)}"
        )
    if num_classes < 1:
        raise ValueError(f"num_classes must be positive, got {num_classes}")
    checks.check_same_device(features=features, labels=labels)
    sums: Tensor = _forward(features, labels, num_classes)
    return sums


@declare.op("class_sums")
def _forward(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    sums: Tensor = registry.resolve("class_sums", features)(features, labels, num_classes)
    return sums


@_forward.fake
def _(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    shape = (num_classes, features.shape[1], 3 ** (features.dim() - 2))
    dtype = accumulation_dtype(features.dtype)
    return torch.empty(shape, dtype=dtype, device=features.device)


@declare.op("class_sums_backward")
def _backward(grad_sums: Tensor, labels: Tensor, features: Tensor) -> Tensor:
    """The adjoint: a gradient of the features' shape and dtype (what they hold is not used), contiguous."""
    kernel = registry.resolve("class_sums_backward", features)
    gradient: Tensor = kernel(grad_sums, labels, features)
    return gradient


@_backward.fake
def _(grad_sums: Tensor, labels: Tensor, features: Tensor) -> Tensor:
    return torch.empty(features.shape, dtype=features.dtype, device=features.device)


@_forward.differentiable
class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        features, labels, _num_classes = arguments
        ctx.save_for_backward(features, labels)
        sums: Tensor = _forward.below_autograd(*arguments)
        return sums

    @staticmethod
    def backward(ctx: Any, grad_sums: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        features, labels = ctx.saved_tensors
        return _backward(grad_sums, labels, features), None, None


_backward.without_second_derivative(of="class_sums")
