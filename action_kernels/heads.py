"""The representation head of ACTION++, computed only where it is used."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight, conv3d_weight

from action_kernels.autocast import without_autocast
from action_kernels.ops import checks, sampled_features

_CONVOLUTIONS = {2: nn.Conv2d, 3: nn.Conv3d}
_INTERPOLATION = {2: "bilinear", 3: "trilinear"}


class SampledHead(nn.Module):
    """3×3(×3) convolution without bias, then 1×1(×1) convolution, on an upsampled feature pyramid.

    The levels of the pyramid are upsampled to the finest (linear, ``align_corners=True``) and
    concatenated. All of this is linear, so the representation of a few pixels, and the mean over all
    pixels of a class, need no dense map: ``head(pyramid, index)`` and ``head.prototypes(pyramid,
    labels, …)`` equal what ``head.dense(pyramid)`` holds, to rounding, at a fraction of its cost.
    Gradients go to features and weights. One state dict serves all three.

    A pyramid is a sequence, coarse to fine, of maps (B, channels[l], *size_l) of one dtype; the last
    one's size is that of the output, and no axis of another level is longer.

    Args:
        channels: of the levels, coarse to fine, e.g. ``(256, 128, 64, 32, 16)``.
        dim: of the representation, and of the hidden layer between the two convolutions.
        spatial_dims: 2 or 3.
    """

    def __init__(self, channels: Sequence[int], dim: int, spatial_dims: int) -> None:
        super().__init__()
        if spatial_dims not in _CONVOLUTIONS:
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}")
        if not channels or any(c < 1 for c in channels):
            raise ValueError(f"channels must be positive, one a level, got {tuple(channels)}")
        if dim < 1:
            raise ValueError(f"dim must be positive, got {dim}")
        self.channels = tuple(channels)
        self.dim = dim
        self.spatial_dims = spatial_dims
        convolution = _CONVOLUTIONS[spatial_dims]
        self.neighbourhood = convolution(sum(channels), dim, kernel_size=3, padding=1, bias=False)
        self.projection = convolution(dim, dim, kernel_size=1)

    def forward(self, pyramid: Sequence[Tensor], index: Tensor) -> Tensor:
        """The representation at the pixels `index` alone.

        Args:
            pyramid: see the class.
            index: int64 of any shape, flat pixels in (B, *size) order of the finest level; a negative
                one marks an absent pixel and gives a zero row without gradient.

        Returns:
            (*index.shape, dim).

        Raises:
            TypeError, ValueError: the pyramid or the index does not fit (a pixel beyond the map is
            seen on the CPU only, and elsewhere counts as absent).
        """
        self._check(pyramid)
        checks.check_tensor("index", index)
        size = pyramid[-1].shape[2:]
        flat = index.flatten()
        hidden = torch.stack(
            [
                F.linear(
                    sampled_features(level, flat, size).flatten(1),
                    weight.transpose(1, 2).flatten(1),
                )
                for level, weight in zip(pyramid, self._level_weights(), strict=True)
            ]
        ).sum(0)
        rows = F.linear(hidden, self.projection.weight.flatten(1), self.projection.bias)
        present = (flat >= 0) & (flat < pyramid[-1].shape[0] * size.numel())
        return rows.where(present[:, None], 0).view(*index.shape, self.dim)

    def prototypes(
        self,
        pyramid: Sequence[Tensor],
        labels: Tensor,
        *,
        num_classes: int,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mean representation of every class over all of its pixels.

        By linearity this is the head applied to sums of upsampled features over shifted class masks;
        and such a sum is one of the features themselves, weighted by the adjoint of the upsampling
        applied to the mask. Summed in the weights' dtype, without autocast.

        Args:
            pyramid: see the class.
            labels: (B, *size), integers; a pixel whose label is not in 0 … num_classes − 1 belongs to
                no class.
            num_classes: K.
            mask: (B, *size) bool, True for the pixels that take part.

        Returns:
            Means (K, dim) in the weights' dtype, zero for a class without pixels, and pixel counts
            (K,) int64.

        Raises:
            TypeError, ValueError: the pyramid, labels or mask do not fit.
        """
        self._check(pyramid)
        shape = (pyramid[-1].shape[0], *pyramid[-1].shape[2:])
        checks.check_integer("labels", labels)
        checks.check_shape("labels", labels, shape)
        checks.check_mask("mask", mask, shape)
        checks.check_same_device(pyramid=pyramid[0], labels=labels, mask=mask)
        dtype = self.projection.weight.dtype
        with without_autocast(labels.device.type):
            members = _class_masks(labels, num_classes, mask)
            counts = members.flatten(2).sum((0, 2), dtype=torch.int64)
            members = members.to(dtype)
            sums = torch.stack(
                [
                    _shifted_class_sums(level.to(dtype), members).flatten(1) @ weight.flatten(1).T
                    for level, weight in zip(pyramid, self._level_weights(), strict=True)
                ]
            ).sum(0)
            means = sums / counts.clamp(min=1)[:, None].to(dtype)
            rows = F.linear(means, self.projection.weight.flatten(1), self.projection.bias)
            return rows.where((counts > 0)[:, None], 0), counts

    def dense(self, pyramid: Sequence[Tensor]) -> Tensor:
        """The whole map (B, dim, *size): the plain, expensive way."""
        self._check(pyramid)
        size = pyramid[-1].shape[2:]
        mode = _INTERPOLATION[self.spatial_dims]
        upsampled = [
            level
            if level.shape[2:] == size
            else F.interpolate(level, size=size, mode=mode, align_corners=True)
            for level in pyramid
        ]
        return self.projection(self.neighbourhood(torch.cat(upsampled, 1)))

    def _level_weights(self) -> tuple[Tensor, ...]:
        """The 3×3(×3) convolution's weight, (dim, C_l, taps) for each level."""
        return self.neighbourhood.weight.flatten(2).split(self.channels, 1)

    def _check(self, pyramid: Sequence[Tensor]) -> None:
        if len(pyramid) != len(self.channels):
            raise ValueError(
                f"pyramid must have {len(self.channels)} levels, coarse to fine, got {len(pyramid)}"
            )
        finest = pyramid[-1]
        for position, (level, channels) in enumerate(zip(pyramid, self.channels, strict=True)):
            name = f"pyramid[{position}]"
            checks.check_floating(name, level)
            if level.dim() != self.spatial_dims + 2 or level.shape[1] != channels:
                raise ValueError(
                    f"{name} must have shape (batch, {channels}, *size) with {self.spatial_dims} "
                    f"axes in size, got {checks.shape_of(level)}"
                )
            fits = all(a <= b for a, b in zip(level.shape[2:], finest.shape[2:], strict=True))
            if level.shape[0] != finest.shape[0] or not fits:
                raise ValueError(
                    f"{name} of shape {checks.shape_of(level)} does not go with the finest level "
                    f"{checks.shape_of(finest)}: the batch must be the same, no axis longer"
                )


def _class_masks(labels: Tensor, num_classes: int, mask: Tensor | None) -> Tensor:
    """(B, K, *size) bool: which pixels belong to each class."""
    classes = torch.arange(num_classes, device=labels.device)
    members = labels[:, None] == classes.view(-1, *[1] * (labels.dim() - 1))
    return members if mask is None else members & mask[:, None]


def _shifted_class_sums(features: Tensor, members: Tensor) -> Tensor:
    """Σ_p members_k(p) · upsampled(p + tap), for every class, channel and tap: (K, C, taps).

    On the finest level this is the weight gradient of a 3×3(×3) convolution whose output gradient
    are the masks; on a coarse one the masks go through the adjoint of the upsampling, axis by axis.
    """
    batch, channels = features.shape[:2]
    size = members.shape[2:]
    if features.shape[2:] == size:
        weight_shape = (members.shape[1], channels, *[3] * len(size))
        gradient = conv2d_weight if len(size) == 2 else conv3d_weight
        return gradient(features, weight_shape, members, padding=1).flatten(2)
    weights = members  # (B, K, *fine) → axis by axis → (B, K, tap, coarse, tap, coarse, …)
    for axis, (coarse, fine) in enumerate(zip(features.shape[2:], size, strict=True)):
        taps = _axis_taps(coarse, fine, features)
        position = 2 + 2 * axis
        weights = torch.tensordot(weights, taps, dims=([position], [1]))  # moved to the end
        weights = weights.movedim((-2, -1), (position, position + 1))
    taps_first = [*range(2, weights.dim(), 2), *range(3, weights.dim(), 2)]
    weights = weights.permute(0, 1, *taps_first).reshape(
        batch, members.shape[1], 3 ** len(size), -1
    )
    return torch.einsum("bkts,bcs->kct", weights, features.flatten(2))


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
    padded = F.pad(hat, (0, 0, 1, 1))
    return torch.stack([padded[tap : tap + fine] for tap in range(3)])
