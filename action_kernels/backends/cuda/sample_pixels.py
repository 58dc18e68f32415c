"""`sample_pixels`: the draws of every other backend, nothing for the host to wait for."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from action_kernels.backends.cuda.library import DTYPES, HEADER, call
from action_kernels.ops.registry import register
from action_kernels.ops.sample_pixels import Draw

BLOCK = HEADER.constants["AK_CUDA_SAMPLING_BLOCK"]
SCORES = {**DTYPES, torch.float64: HEADER.constants["AK_CUDA_FLOAT64"]}
LABELS = {
    getattr(torch, name.lower()): HEADER.constants[f"AK_CUDA_{name}"]
    for name in ("INT64", "INT32", "INT16", "INT8", "UINT8")
}


@register("sample_pixels", backend="cuda")
def sample_pixels(draw: Draw) -> tuple[Tensor, Tensor]:
    labels = draw.labels.contiguous()
    mask = None if draw.mask is None else draw.mask.contiguous()
    scores = draw.scores
    if scores is not None:
        scores = scores.flatten(2) if scores.dim() > 2 else scores[..., None]
    batch, total, device = labels.shape[0], labels.numel(), labels.device
    blocks = -(-total // BLOCK)
    classes = torch.empty(total, dtype=torch.int32, device=device)
    counts = torch.zeros((draw.num_classes, blocks), dtype=torch.int32, device=device)
    totals = torch.empty(draw.num_classes, dtype=torch.int64, device=device)
    index = torch.empty((draw.num_classes, draw.num_samples), dtype=torch.int64, device=device)
    asked = HEADER.structs["ak_cuda_draw"](
        scores=None if scores is None else scores.data_ptr(),
        labels=labels.data_ptr(),
        mask=None if mask is None else mask.data_ptr(),
        seed=draw.seed.data_ptr(),
        batch=batch,
        pixels=total // batch if batch else 0,
        classes=draw.num_classes,
        samples=draw.num_samples,
        threshold=draw.threshold,
        scores_dtype=0 if scores is None else SCORES[scores.dtype],
        labels_dtype=LABELS[labels.dtype],
        from_logits=draw.from_logits,
    )
    if scores is not None:
        asked.image_stride, asked.class_stride, asked.pixel_stride = scores.stride()
    call(
        "sample_pixels", "ak_cuda_sample_pixels", labels, ctypes.byref(asked), classes, counts,
        totals, index,
    )  # fmt: skip
    return index, totals
