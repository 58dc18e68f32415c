"""SigLIP's sigmoid loss by `pairwise_softplus`."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from action_kernels.autocast import outside_autocast
from action_kernels.distributed import processes_of
from action_kernels.losses.reduction import REDUCTIONS, reduce
from action_kernels.losses.scale import logit_scale
from action_kernels.ops import checks, scalars
from action_kernels.ops.pairwise_lse import accumulation_dtype
from action_kernels.ops.prepare_rows import prepare_rows
from action_kernels.ops.softplus_across import softplus_across
from action_kernels.pixels import key_rows


@outside_autocast
def siglip_loss(
    image: Tensor,
    text: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    bias: float | Tensor = -10.0,
    normalize: bool = True,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Sigmoid loss of image-text pairs (Zhai et al. 2023, SigLIP), in O((n + m) · d) memory.

    ``Σ_j −log σ(z_ij (s_ij + b))`` per image, with s_ij = image_i · text_j / τ, z_ii = 1 and else
    z_ij = −1: every pair is a binary decision of its own. Texts beyond the n-th are negatives of all
    images.

    Args:
        image: (n, d), float16 to float64.
        text: (m, d), m ≥ n; text i belongs to image i. Gradients go to both.
        temperature: τ > 0, a number or a 0-d tensor, which gets a gradient if it asks for one; SigLIP's
            t is 1 / τ, learned as its logarithm and 10 at first: ``(-log_t).exp()``.
        bias: b, a number or a 0-d tensor, which gets a gradient if it asks for one.
        normalize: L2-normalise both.
        reduction: ``"mean"`` over the images (each a sum over all texts, as published), ``"sum"``, or
            ``"none"`` (n,).
        group: processes whose images and texts are one batch: see `action_kernels.distributed`.
            Temperature and bias are taken to be the same on all of them.

    Returns:
        float32 (float64 for float64 inputs), a scalar unless ``reduction="none"``; ≥ 0.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Examples:
        >>> import torch
        >>> from action_kernels import siglip_loss
        >>> log_t, bias = torch.nn.Parameter(torch.tensor(10.0).log()), torch.nn.Parameter(torch.tensor(-10.0))
        >>> loss = siglip_loss(torch.eye(4), torch.eye(4), temperature=(-log_t).exp(), bias=bias)
        >>> loss.backward()
        >>> round(loss.item(), 4)  # log 2 of the pair itself, log(1 + e^(−10)) of each of the three others
        0.6933
    """
    checks.check_choice("reduction", reduction, REDUCTIONS)
    checks.check_matrix("image", image)
    checks.check_matrix("text", text, image.shape[1])
    checks.check_same_dtype(image=image, text=text)
    n, m = image.shape[0], text.shape[0]
    if m < n:
        raise ValueError(f"text must hold one row an image, at least {n}, got {m}")
    processes = processes_of(group)
    scale = logit_scale("temperature", temperature, image)
    offset = _logit_bias(bias, image)
    images = prepare_rows(image, normalize=normalize)
    checks.check_finite("image", images)
    texts = key_rows("text", text, images, normalize=normalize)
    others = softplus_across(images, texts, offset=offset, scale=scale, group=processes)
    products = (images.to(offset.dtype) * texts[:n].to(offset.dtype)).sum(1)
    own = -torch.nn.functional.logsigmoid(products * scale + offset)
    return reduce(own + others, reduction, (n,), group=processes)


def _logit_bias(bias: float | Tensor, like: Tensor) -> Tensor:
    """A 0-d tensor on the device of `like`, in the dtype of its sums."""
    dtype = accumulation_dtype(like.dtype)
    if isinstance(bias, Tensor):
        checks.check_floating("bias", bias)
        if bias.numel() != 1:
            raise ValueError(
                f"bias must be a number or a 0-d tensor, got shape {checks.shape_of(bias)}"
            )
        checks.check_finite("bias", bias)
        return bias.reshape(()).to(like.device, dtype)
    number = scalars.finite("bias", bias, "a number or a 0-d tensor")
    if abs(number) > torch.finfo(dtype).max:
        raise ValueError(f"bias must be a {dtype} number, got {number}")
    return torch.full((), number, dtype=dtype, device=like.device)
