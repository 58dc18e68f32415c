"""`sample_pixels`: count → scan → rank, with fixed shapes and nothing for the host to wait for.

1. Per block of pixels: the class each pixel is a candidate for, and how many of each class there are.
2. Per class: the running count before each block.
3. Per draw: a random rank, the block that holds it by bisection, the pixel by a scan of that block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from action_kernels.backends.triton.device import as_bytes, launch
from action_kernels.backends.triton.tuning import SAMPLING, SCAN
from action_kernels.ops.registry import register
from action_kernels.ops.sample_pixels import Draw


@triton.jit
def _count_kernel(
    scores,
    labels,
    mask,
    classes_out,
    counts_out,  # (K, blocks)
    total,
    pixels,  # of one image
    blocks,
    image_stride,
    class_stride,
    pixel_stride,
    threshold,
    NUM_CLASSES: tl.constexpr,
    HARD: tl.constexpr,
    FROM_LOGITS: tl.constexpr,
    MASKED: tl.constexpr,
    DOUBLE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # type: ignore[no-untyped-def]
    block = tl.program_id(0)
    position = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = position < total
    label = tl.load(labels + position, mask=exists, other=-1).to(tl.int64)
    candidate = exists & (label >= 0) & (label < NUM_CLASSES)
    if MASKED:
        candidate &= tl.load(mask + position, mask=exists, other=0) != 0
    if HARD:
        image = position // pixels
        pixel = scores + image * image_stride + (position - image * pixels) * pixel_stride
        own = _as_sums(tl.load(pixel + label * class_stride, mask=candidate, other=0.0), DOUBLE)
        if FROM_LOGITS:
            largest = own
            for c in range(NUM_CLASSES):
                logit = tl.load(
                    pixel + tl.cast(c, tl.int64) * class_stride, mask=candidate, other=0.0
                )
                largest = tl.maximum(largest, _as_sums(logit, DOUBLE))
            sum_of_exponentials = tl.zeros_like(own)
            for c in range(NUM_CLASSES):
                logit = tl.load(
                    pixel + tl.cast(c, tl.int64) * class_stride, mask=candidate, other=0.0
                )
                sum_of_exponentials += tl.exp(_as_sums(logit, DOUBLE) - largest)
            own = tl.exp(own - largest) / sum_of_exponentials
        candidate &= own < threshold
    chosen = tl.where(candidate, label, NUM_CLASSES).to(tl.int32)
    tl.store(classes_out + position, chosen, mask=exists)
    for c in range(NUM_CLASSES):
        count = tl.sum((candidate & (chosen == c)).to(tl.int32), 0)
        tl.store(counts_out + tl.cast(c, tl.int64) * blocks + block, count)


@triton.jit
def _as_sums(value, DOUBLE: tl.constexpr):  # type: ignore[no-untyped-def]
    return value.to(tl.float64 if DOUBLE else tl.float32)


@triton.jit
def _scan_kernel(counts, before_out, totals_out, blocks, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64) * blocks
    before = tl.zeros((), tl.int32)
    for first in range(0, blocks, BLOCK):
        block = first + tl.arange(0, BLOCK)
        count = tl.load(counts + row + block, mask=block < blocks, other=0)
        tl.store(
            before_out + row + block, before + tl.cumsum(count, 0) - count, mask=block < blocks
        )
        before += tl.sum(count, 0)
    tl.store(totals_out + tl.program_id(0), before.to(tl.int64))


@triton.jit
def _draw_kernel(
    seed,
    classes,
    before,
    totals,
    index_out,
    num_samples,
    total,
    blocks,
    BISECTIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # type: ignore[no-untyped-def]
    draw = tl.program_id(0)
    class_ = draw // num_samples
    count = tl.load(totals + class_)
    word = tl.randint(tl.load(seed), draw.to(tl.uint32)).to(tl.uint32, bitcast=True)
    rank = ((word.to(tl.uint64) * count.to(tl.uint64)) >> 32).to(tl.int32)
    row = before + class_.to(tl.int64) * blocks
    low = tl.zeros((), tl.int32)  # the last block with no more than `rank` candidates before it
    high = blocks
    for _ in range(BISECTIONS):
        middle = (low + high) // 2
        # Once low + 1 == high, middle is low, which leaves both as they are.
        holds = tl.load(row + middle) <= rank
        low = tl.where(holds, middle, low)
        high = tl.where(holds, high, middle)
    position = low.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    chosen = tl.load(classes + position, mask=position < total, other=-1) == class_
    rank_in_block = tl.cumsum(chosen.to(tl.int32), 0) - 1
    hit = chosen & (rank_in_block == rank - tl.load(row + low))
    found = tl.sum(tl.where(hit, position, 0), 0)
    tl.store(index_out + draw, tl.where(count > 0, found, -1))


@register("sample_pixels", backend="triton")
def sample_pixels(draw: Draw) -> tuple[Tensor, Tensor]:
    scores, labels, num_classes = draw.scores, draw.labels, draw.num_classes
    total = labels.numel()
    blocks = triton.cdiv(total, SAMPLING.block)
    index = labels.new_empty((num_classes, draw.num_samples), dtype=torch.int64)
    if total == 0:
        return index.fill_(-1), labels.new_zeros(num_classes, dtype=torch.int64)
    totals = labels.new_empty(num_classes, dtype=torch.int64)
    classes = labels.new_empty(total, dtype=torch.int32)
    counts = labels.new_empty((2, num_classes, blocks), dtype=torch.int32)
    flat = None if scores is None else scores.flatten(2) if scores.dim() > 2 else scores[..., None]
    launch(
        _count_kernel,
        (blocks,),
        SAMPLING,
        flat,
        labels.contiguous(),
        as_bytes(draw.mask),
        classes,
        counts[0],
        total,
        total // labels.shape[0],
        blocks,
        *((0, 0, 0) if flat is None else flat.stride()),
        draw.threshold,
        NUM_CLASSES=num_classes,
        HARD=flat is not None,
        FROM_LOGITS=draw.from_logits,
        MASKED=draw.mask is not None,
        DOUBLE=flat is not None and flat.dtype == torch.float64,
        BLOCK=SAMPLING.block,
    )
    launch(
        _scan_kernel, (num_classes,), SCAN, counts[0], counts[1], totals, blocks, BLOCK=SCAN.block
    )
    if index.numel():
        launch(
            _draw_kernel,
            (index.numel(),),
            SAMPLING,
            draw.seed,
            classes,
            counts[1],
            totals,
            index,
            draw.num_samples,
            total,
            blocks,
            BISECTIONS=blocks.bit_length(),
            BLOCK=SAMPLING.block,
        )
    return index, totals
