"""`class_sums` by shifted class masks: sums of a map weighted by the adjoint of the upsampling, applied to the masks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.grad import conv2d_input, conv2d_weight, conv3d_input, conv3d_weight

from action_kernels.ops.pairwise_lse import accumulation_dtype
from action_kernels.ops.registry import register


@register("class_sums", backend="reference")
def class_sums(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    dtype = accumulation_dtype(features.dtype)
    features, members = features.detach().to(dtype), _class_masks(labels, num_classes).to(dtype)
    channels, axes = features.shape[1], features.dim() - 2
    if features.shape[2:] == labels.shape[1:]:
        # The weight gradient of a 3×3(×3) convolution whose output gradient are the masks.
        weight_shape = (num_classes, channels, *[3] * axes)
        gradient = conv2d_weight if axes == 2 else conv3d_weight
        return gradient(features, weight_shape, members, padding=1).flatten(2).contiguous()
    weights = _cell_weights(members, features.shape[2:])
    return torch.einsum("bkts,bcs->kct", weights, features.flatten(2)).contiguous()


@register("class_sums_backward", backend="reference")
def class_sums_backward(grad_sums: Tensor, labels: Tensor, features: Tensor) -> Tensor:
    members = _class_masks(labels, grad_sums.shape[0]).to(grad_sums.dtype)
    axes = features.dim() - 2
    if features.shape[2:] == labels.shape[1:]:
        weight = grad_sums.unflatten(2, [3] * axes)
        input_gradient = conv2d_input if axes == 2 else conv3d_input
        gradient = input_gradient(features.shape, weight, members, padding=1)
    else:
        weights = _cell_weights(members, features.shape[2:])
        gradient = torch.einsum("bkts,kct->bcs", weights, grad_sums).view(features.shape)
    return gradient.to(features.dtype).contiguous()


def _class_masks(labels: Tensor, num_classes: int) -> Tensor:
    """(B, K, *size) bool: which pixels belong to each class."""
    classes = torch.arange(num_classes, device=labels.device)
    return labels[:, None] == classes.view(-1, *[1] * (labels.dim() - 1))


def _cell_weights(members: Tensor, coarse_size: torch.Size) -> Tensor:
    """(B, K, taps, cells): the masks through the adjoint of the upsampling, axis by axis, for every tap."""
    size = members.shape[2:]
    weights = members  # (B, K, *fine) → axis by axis → (B, K, tap, coarse, tap, coarse, …)
    for axis, (coarse, fine) in enumerate(zip(coarse_size, size, strict=True)):
        taps = _axis_taps(coarse, fine, members)
        position = 2 + 2 * axis
        weights = torch.tensordot(weights, taps, dims=([position], [1]))  # moved to the end
        weights = weights.movedim((-2, -1), (position, position + 1))
    taps_first = [*range(2, weights.dim(), 2), *range(3, weights.dim(), 2)]
    shape = (*members.shape[:2], 3 ** len(size), coarse_size.numel())
    return weights.permute(0, 1, *taps_first).reshape(shape)


def _axis_taps(coarse: int, fine: int, like: Tensor) -> Tensor:
    """(3, fine, coarse): weight of coarse row w in what tap t − 1 of fine pixel p reads.

    Linear interpolation with aligned corners; zero where the tap is beyond the border.
    """
    pixels = torch.arange(fine, device=like.device)
    rows = torch.arange(coarse, device=like.device)
    # Row w's hat function at fine pixel p: 1 − |p (coarse − 1)/(fine − 1) − w|, in whole numbers.
    steps = max(fine - 1, 1)
    distance = (pixels[:, None] * (coarse - 1) - rows * steps).abs()
    hat = (steps - distance).clamp(min=0).to(like.dtype) / steps
    padded = functional.pad(hat, (0, 0, 1, 1))
    return torch.stack([padded[tap : tap + fine] for tap in range(3)])
