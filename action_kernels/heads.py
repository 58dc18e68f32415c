"""The representation head of ACTION++, computed only where it is used."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from action_kernels.autocast import autocast_is_on, without_autocast
from action_kernels.distributed import processes_of
from action_kernels.ops import checks, class_sums, sampled_features, scalars
from action_kernels.ops.all_reduce_sum import all_reduce_sum
from action_kernels.ops.pairwise_lse import accumulation_dtype

_CONVOLUTIONS = {2: nn.Conv2d, 3: nn.Conv3d}
_INTERPOLATION = {2: "bilinear", 3: "trilinear"}
ROWS_AT_A_TIME = 256


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

    Examples:
        >>> import torch
        >>> from action_kernels import SampledHead
        >>> head = SampledHead(channels=(16, 8), dim=4, spatial_dims=2)
        >>> pyramid = [torch.randn(1, 16, 8, 8), torch.randn(1, 8, 16, 16)]  # coarse to fine
        >>> pixels = torch.tensor([0, 37, 255])
        >>> rows = head(pyramid, pixels)
        >>> dense = head.dense(pyramid)[0].flatten(1).T
        >>> torch.allclose(rows, dense[pixels], atol=1e-5)
        True
    """

    def __init__(self, channels: Sequence[int], dim: int, spatial_dims: int) -> None:
        super().__init__()
        spatial_dims = scalars.whole("spatial_dims", spatial_dims)
        if spatial_dims not in _CONVOLUTIONS:
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}")
        channels, dim = scalars.counts("channels", channels, 1), scalars.count("dim", dim, 1)
        if not channels:
            raise ValueError("channels must have a number for every level, got ()")
        self.channels = channels
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
        self._check_dtypes(pyramid)
        checks.check_tensor("index", index)
        flat = index.flatten()
        if checks.values_readable(flat):
            rows = self._rows_of_present(pyramid, flat)
        else:
            present = (flat >= 0) & (flat < pyramid[-1].shape[0] * pyramid[-1].shape[2:].numel())
            rows = self._rows(pyramid, flat).where(present[:, None], 0)
        return rows.view(*index.shape, self.dim)

    def _rows_of_present(self, pyramid: Sequence[Tensor], flat: Tensor) -> Tensor:
        """As `_rows`, but absent pixels cost next to nothing: their zeros are put in at the end."""
        (present,) = (flat >= 0).nonzero(as_tuple=True)
        if len(present) == len(flat):
            return self._rows(pyramid, flat)
        # Few different numbers of rows: products of bfloat16 are compiled anew for each, which takes longer than they.
        padding = -len(present) % ROWS_AT_A_TIME
        rows = self._rows(pyramid, F.pad(flat[present], (0, padding), value=-1))[: len(present)]
        return rows.new_zeros(len(flat), self.dim).index_copy(0, present, rows)

    def _rows(self, pyramid: Sequence[Tensor], flat: Tensor) -> Tensor:
        """(M, dim) at `flat` (M,)."""
        size = pyramid[-1].shape[2:]
        hidden = torch.stack(
            [
                F.linear(
                    sampled_features(level, flat, size).flatten(1),
                    weight.transpose(1, 2).flatten(1),
                )
                for level, weight in zip(pyramid, self._level_weights(), strict=True)
            ]
        ).sum(0)
        return F.linear(hidden, self.projection.weight.flatten(1), self.projection.bias)

    def prototypes(
        self,
        pyramid: Sequence[Tensor],
        labels: Tensor,
        *,
        num_classes: int,
        mask: Tensor | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mean representation of every class over all of its pixels.

        By linearity this is the head applied to sums of upsampled features over shifted class masks;
        and such a sum is one of the features themselves, weighted by the adjoint of the upsampling
        applied to the mask. Summed in float32 (float64 where either is), without autocast.

        Args:
            pyramid: see the class.
            labels: (B, *size), integers; a pixel whose label is not in 0 … num_classes − 1 belongs to
                no class.
            num_classes: K.
            mask: (B, *size) bool, True for the pixels that take part.
            group: processes whose images are one batch: class sums and counts are added up over all of
                them, and means and counts are the same in each. Their gradients are right under DDP
                for losses that keep to the contract of `action_kernels.distributed`.

        Returns:
            Means (K, dim) in the weights' dtype, zero for a class without pixels, and pixel counts
            (K,) int64.

        Raises:
            TypeError, ValueError: the pyramid, labels or mask do not fit.
        """
        self._check(pyramid)
        num_classes = scalars.count("num_classes", num_classes, 1)
        shape = (pyramid[-1].shape[0], *pyramid[-1].shape[2:])
        checks.check_integer("labels", labels, or_bool=True)
        checks.check_shape("labels", labels, shape)
        checks.check_mask("mask", mask, shape)
        checks.check_same_device(pyramid=pyramid[0], labels=labels, mask=mask)
        dtype, processes = self.projection.weight.dtype, processes_of(group)
        wide = accumulation_dtype(
            dtype
        )  # a class may have more pixels, or a larger sum, than float16 has numbers
        with without_autocast(labels.device.type):
            chosen = labels.long() if mask is None else labels.long().where(mask, -1)
            classes = torch.arange(num_classes, device=labels.device)
            counts = (chosen.flatten() == classes[:, None]).sum(1)
            sums = torch.stack(
                [
                    class_sums(level.to(_with(level, dtype)), chosen, num_classes)
                    .flatten(1)
                    .to(wide)
                    @ weight.flatten(1).to(wide).T
                    for level, weight in zip(pyramid, self._level_weights(), strict=True)
                ]
            ).sum(0)
            counts, sums = all_reduce_sum(counts, processes), all_reduce_sum(sums, processes)
            means = (sums / counts.clamp(min=1)[:, None].to(wide)).to(dtype)
            rows = F.linear(means, self.projection.weight.flatten(1), self.projection.bias)
            return rows.where((counts > 0)[:, None], 0), counts

    def dense(self, pyramid: Sequence[Tensor]) -> Tensor:
        """The whole map (B, dim, *size): the plain, expensive way."""
        self._check(pyramid)
        self._check_dtypes(pyramid)
        size = pyramid[-1].shape[2:]
        mode = _INTERPOLATION[self.spatial_dims]
        upsampled = [
            level
            if level.shape[2:] == size
            else F.interpolate(level, size=size, mode=mode, align_corners=True)
            for level in pyramid
        ]
        return self.projection(self.neighbourhood(torch.cat(upsampled, 1)))

    def _check_dtypes(self, pyramid: Sequence[Tensor]) -> None:
        """Autocast brings maps and weights into one dtype; without it they must have one."""
        weight = self.projection.weight
        if not autocast_is_on(weight.device.type):
            for position, level in enumerate(pyramid):
                checks.check_same_dtype(weights=weight, **{f"pyramid[{position}]": level})

    def _level_weights(self) -> tuple[Tensor, ...]:
        """The 3×3(×3) convolution's weight, (dim, C_l, taps) for each level."""
        return self.neighbourhood.weight.flatten(2).split(self.channels, 1)

    def _check(self, pyramid: Sequence[Tensor]) -> None:
        if not isinstance(pyramid, (list, tuple)):
            raise TypeError(
                f"pyramid must be a list of maps, coarse to fine, got {type(pyramid).__name__}"
            )
        if len(pyramid) != len(self.channels):
            raise ValueError(
                f"pyramid must have {len(self.channels)} levels, coarse to fine, got {len(pyramid)}"
            )
        finest = pyramid[-1]
        for position, (level, channels) in enumerate(zip(pyramid, self.channels, strict=True)):
            name = f"pyramid[{position}]"
            checks.check_floating(name, level)
            checks.check_same_device(weights=self.projection.weight, **{name: level})
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


def _with(level: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a level is summed up: its own, or float64 if the weights have it."""
    return dtype if dtype == torch.float64 else level.dtype
