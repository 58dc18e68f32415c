"""The Triton kernels of the other ops against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable

import comparing
import pytest
import torch
from support import unit_rows
from torch import Tensor

import action_kernels
from action_kernels.ops import indexed_lse, prepare_rows, sample_pixels, sampled_features

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def compare(
    device: torch.device, function: Callable[[Tensor], Tensor], value: Tensor, upstream: Tensor
) -> None:
    """Ours on Triton against the reference in float64 and in the dtype of `value`."""
    ours = comparing.gradients(function, [value.to(device)], upstream.to(device))
    with action_kernels.use_backend("reference"):
        exact = comparing.gradients(function, [value.double()], upstream)
        theirs = comparing.gradients(function, [value], upstream)
    comparing.assert_as_exact_as_pytorch(ours, exact, theirs, value.dtype)


FEATURES = {
    "rows": lambda: torch.randn(33, 48),  # one above a tile
    "a row": lambda: torch.randn(1, 1),
    "map": lambda: torch.randn(2, 20, 5, 7),  # 35 pixels: two tiles of an image, the second ragged
    "channels-last map": lambda: torch.randn(2, 20, 5, 7).contiguous(
        memory_format=torch.channels_last
    ),
    "volume": lambda: torch.randn(1, 130, 3, 4, 5),  # padded by almost half
    "a crop, which cannot be viewed as rows": lambda: torch.randn(2, 16, 8, 9)[..., 1:6],
}


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", FEATURES)
def test_prepare_rows(
    device: torch.device, features: str, dtype: torch.dtype, normalize: bool
) -> None:
    x = FEATURES[features]().to(dtype)
    count = x.shape[0] * x.shape[2:].numel()
    upstream = torch.randn(count, x.shape[1])
    mask = torch.rand(count) < 0.7
    mask[0] = True
    masks = {}

    def rows(value: Tensor) -> Tensor:
        own = masks.setdefault(value.device, mask.to(value.device))
        wide = torch.float64 if value.dtype == torch.float64 else torch.float32
        return prepare_rows(value, mask=own, normalize=normalize, dtype=wide)

    compare(device, rows, x, upstream)


def test_prepare_rows_of_extreme_norms(device: torch.device) -> None:
    """Rows left out may hold NaN; a norm below 1e-12 gives zeros; squares may pass float32's range."""
    x = torch.randn(6, 16) * torch.tensor([1.0, 1e-14, 0.0, 1e25, 1e-11, 1.0])[:, None]
    x[5] = torch.nan
    mask = torch.tensor([True] * 5 + [False])
    rows = prepare_rows(x.to(device), mask=mask.to(device)).cpu()
    expected = torch.nn.functional.normalize(x.double())
    expected[[1, 2, 5]] = 0
    torch.testing.assert_close(rows.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("queries", "runs", "negatives", "bank", "dim"),
    [
        (5, 5, 37, 50, 48),  # bank rows of every query's own
        (40, 2, 37, 50, 16),  # 20 queries share: more than a tile
        (32, 2, 16, 9, 130),  # whole tiles, padded columns
        (3, 1, 1, 1, 16),
    ],
)
def test_indexed_lse(
    device: torch.device,
    queries: int,
    runs: int,
    negatives: int,
    bank: int,
    dim: int,
    dtype: torch.dtype,
) -> None:
    q, b = unit_rows(queries, dim, dtype=dtype), unit_rows(bank, dim, dtype=dtype, seed=1)
    index = torch.randint(-1, bank, (runs, negatives))
    if runs > 1:
        index[0] = -1  # a run without negatives

    def lse(value: Tensor) -> Tensor:
        rows = b.to(value.device, value.dtype)
        return indexed_lse(value, rows, index.to(value.device), scale=20.0)

    compare(device, lse, q, torch.rand(queries) + 0.5)


def test_indexed_lse_of_nothing(device: torch.device) -> None:
    q, bank = torch.randn(4, 16, device=device), torch.randn(3, 16, device=device)
    no_negatives = torch.zeros(2, 0, dtype=torch.int64, device=device)
    assert indexed_lse(q, bank, no_negatives, scale=1.0).tolist() == [-torch.inf] * 4
    assert indexed_lse(q[:0], bank, no_negatives[:0], scale=1.0).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("from_logits", [True, False])
@pytest.mark.parametrize(
    ("num_classes", "shape", "threshold"),
    [
        (4, (2, 30, 31), None),
        (4, (2, 30, 31), 0.5),  # several blocks, the last ragged
        (3, (1, 5, 6, 7), 0.9),  # a volume
        (2, (1, 1), None),  # a single pixel, a class without any
        (3, (512,), 0.4),  # no spatial axes, exactly a block
    ],
)
def test_sample_pixels_draws_what_the_reference_draws(
    device: torch.device,
    num_classes: int,
    shape: tuple[int, ...],
    threshold: float | None,
    from_logits: bool,
    dtype: torch.dtype,
) -> None:
    scores = torch.randn(shape[0], num_classes, *shape[1:])
    scores = (scores if from_logits else scores.softmax(1)).to(dtype)
    labels = torch.randint(-1, num_classes, shape)
    mask = torch.rand(shape) < 0.8
    drawn = []
    for backend, place in (("triton", device), ("reference", torch.device("cpu"))):
        generator = torch.Generator().manual_seed(7)  # on the CPU: the same seed for both
        with action_kernels.use_backend(backend):
            drawn.append(
                sample_pixels(
                    scores.to(place),
                    labels.to(place),
                    13,
                    num_classes=num_classes,
                    threshold=threshold,
                    mask=mask.to(place),
                    generator=generator,
                    from_logits=from_logits,
                )
            )
    for ours, theirs in zip(*drawn, strict=True):
        assert torch.equal(ours.cpu(), theirs)


def test_sample_pixels_of_nothing(device: torch.device) -> None:
    empty = torch.zeros(0, 4, dtype=torch.int64, device=device)
    index, counts = sample_pixels(None, empty, 3, num_classes=2)
    assert index.tolist() == [[-1] * 3] * 2
    assert counts.tolist() == [0, 0]
    labels = torch.zeros(1, 4, dtype=torch.uint8, device=device)
    index, counts = sample_pixels(None, labels, 0, num_classes=2)
    assert index.shape == (2, 0)
    assert counts.tolist() == [4, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((2, 40, 5, 7), (9, 13)),  # more channels than a tile
        ((1, 3, 1, 1), (3, 3)),  # a single coarse cell
        ((1, 33, 6, 6), (6, 6)),  # no upsampling: the neighbourhood itself
        ((2, 5, 3, 4, 5), (6, 7, 8)),
    ],
)
def test_sampled_features(
    device: torch.device, shape: tuple[int, ...], size: tuple[int, ...], dtype: torch.dtype
) -> None:
    pixels = shape[0] * torch.Size(size).numel()
    index = torch.cat((torch.tensor([0, pixels - 1, -1]), torch.randint(0, pixels, (5,))))

    def neighbourhoods(value: Tensor) -> Tensor:
        return sampled_features(value, index.to(value.device), size)

    upstream = torch.randn(len(index), 3 ** len(size), shape[1]).to(dtype)
    compare(device, neighbourhoods, torch.randn(shape).to(dtype), upstream)


def test_sampled_features_of_nothing(device: torch.device) -> None:
    features = torch.randn(1, 4, 3, 3, device=device, requires_grad=True)
    index = torch.zeros(0, dtype=torch.int64, device=device)
    near = sampled_features(features, index, (5, 5))
    assert near.shape == (0, 9, 4)
    near.sum().backward()
    assert features.grad is not None
    assert not features.grad.any()
