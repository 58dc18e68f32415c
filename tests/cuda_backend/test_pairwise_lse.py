"""`pairwise_lse` in CUDA C++ against float64: wgmma and mma.sync, over what could break them.

Tiles are of 64 or 128 keys and pass through rings of up to four: more than 512 keys use every stage twice.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable

import comparing
import eager
import pytest
import torch
from support import unit_rows
from torch import Tensor

from action_kernels.ops import pairwise_lse

SELF_SHAPES = [
    (1, 128),  # no key at all
    (2, 64),  # one key
    (129, 20),  # one above a tile; padded columns that no copy of 16 bytes divides
    (530, 128),  # more tiles than stages, an odd number of blocks, the last tile in part
    (513, 200),  # an even number of blocks: opposite ones meet once
    (300, 256),
]
CROSS_SHAPES = [
    (1, 1, 64),
    (257, 33, 128),  # more anchors than keys
    (3, 700, 128),  # few anchors: the loop over keys is split
    (150, 530, 256),  # more tiles than stages
    (64, 128, 64),  # whole tiles
]
HALF = [torch.bfloat16, torch.float16]
BOTH_SHIFTS = pytest.mark.parametrize("normalized", [True, False], ids=["fixed", "online"])


@pytest.fixture(params=[90, 80], ids=["wgmma", "mma.sync"], autouse=True)
def tensor_cores(
    request: pytest.FixtureRequest, device: torch.device, configure: Callable[..., None]
) -> int:
    """The emulation as a GPU of each kind; a GPU is of one kind."""
    if device.type == "cuda" and request.param == 80:
        pytest.skip("a GPU has one kind of tensor cores")
    configure(0, request.param)
    return int(request.param)


def compare(
    device: torch.device,
    rows: list[Tensor],
    *,
    scale: float,
    normalized: bool,
    mask: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> None:
    """Values and gradients of the batch form (one tensor in `rows`) or with keys (two)."""
    upstream = torch.rand(len(rows[0])) + 0.5
    masks = {"mask": mask, "key_mask": key_mask}
    clean = [
        tensor if chosen is None else tensor.where(chosen[:, None], 0)
        for tensor, chosen in zip(rows, (mask, key_mask), strict=False)
    ]

    def plain(*inputs: Tensor) -> Tensor:
        return eager.pairwise_lse(*inputs, scale=scale, **masks)

    def ours(*inputs: Tensor) -> Tensor:
        moved = {name: None if m is None else m.to(device) for name, m in masks.items()}
        return pairwise_lse(*inputs, scale=scale, normalized=normalized, **moved)

    exact = comparing.gradients(plain, [tensor.double() for tensor in clean], upstream)
    largest_norm = max(float(tensor.double().norm(dim=1).max()) for tensor in clean)
    comparing.assert_as_exact_as_pytorch(
        comparing.gradients(ours, [tensor.to(device) for tensor in rows], upstream.to(device)),
        [torch.nan_to_num(tensor, neginf=-torch.inf) for tensor in exact],
        comparing.gradients(plain, clean, upstream),
        rows[0].dtype,
        largest_logit=scale * largest_norm**2,
    )


@BOTH_SHIFTS
@pytest.mark.parametrize(("n", "d"), SELF_SHAPES)
def test_batch_form(
    device: torch.device,
    n: int,
    d: int,
    normalized: bool,
    configure: Callable[..., None],
    tensor_cores: int,
) -> None:
    for number, dtype in enumerate(HALF):
        configure(number, tensor_cores)
        compare(device, [unit_rows(n, d, dtype=dtype)], scale=10.0, normalized=normalized)


@BOTH_SHIFTS
@pytest.mark.parametrize(("n", "m", "d"), CROSS_SHAPES)
def test_keys_apart(
    device: torch.device,
    n: int,
    m: int,
    d: int,
    normalized: bool,
    configure: Callable[..., None],
    tensor_cores: int,
) -> None:
    for number, dtype in enumerate(HALF):
        configure(number, tensor_cores)
        rows = [unit_rows(n, d, dtype=dtype), unit_rows(m, d, dtype=dtype, seed=1)]
        compare(device, rows, scale=10.0, normalized=normalized)


@BOTH_SHIFTS
@pytest.mark.parametrize("scale", [0.1, 43.0, 44.0, 200.0])
def test_temperatures(device: torch.device, scale: float, normalized: bool) -> None:
    """From 10 to 0.005; the fixed shift ends between 43 and 44."""
    compare(device, [unit_rows(70, 64, dtype=torch.bfloat16)], scale=scale, normalized=normalized)


@BOTH_SHIFTS
@pytest.mark.parametrize("scale", [10.0, 43.0, 200.0])
@pytest.mark.parametrize("similarity", ["peaky", "flat", "antipodal"])
def test_similarities(
    device: torch.device, similarity: str, scale: float, normalized: bool
) -> None:
    """One key far ahead, all equal, or all opposite: the extremes of the exponents."""
    rows = unit_rows(34, 64, dtype=torch.float16)
    if similarity == "flat":
        rows = rows[:1].expand(34, 64)
    elif similarity == "peaky":
        rows = rows[torch.arange(34) // 2]
    else:
        rows = torch.cat((rows[:1], -rows[:1].expand(33, 64)))
    compare(device, [rows.contiguous()], scale=scale, normalized=normalized)


@pytest.mark.parametrize(("n", "dtype"), [(300, torch.bfloat16), (9, torch.float16)])
def test_a_scale_that_learns(device: torch.device, n: int, dtype: torch.dtype) -> None:
    """A tensor on the rows' device: read by the kernels, and with a gradient from float32 sums."""
    rows = unit_rows(n, 48, dtype=dtype)
    gradients = []
    for inputs, scale in ((rows.to(device), 7.0), (rows.double(), 7.0)):
        leaves = [
            inputs.detach().clone().requires_grad_(),
            torch.tensor(scale, dtype=torch.float64, device=inputs.device, requires_grad=True),
        ]
        function = pairwise_lse if inputs.dtype == dtype else eager.pairwise_lse
        function(leaves[0], scale=leaves[1]).sum().backward()
        gradients.append([leaf.grad.double().cpu() for leaf in leaves if leaf.grad is not None])
    torch.testing.assert_close(gradients[0][1], gradients[1][1], rtol=1e-2, atol=0)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(gradients[0][0], gradients[1][0], rtol=4 * eps, atol=8 * eps)


def test_rows_of_any_norm(device: torch.device) -> None:
    """Without the promise of unit norm logits may be hundreds: the maximum is found."""
    norms = torch.linspace(0.01, 20, 135)[:, None]
    rows = (unit_rows(135, 64) * norms).to(torch.bfloat16)
    compare(device, [rows], scale=1.0, normalized=False)


@BOTH_SHIFTS
@pytest.mark.parametrize("taking_part", ["some", "one", "none", "a block less", "all"])
def test_masked_rows_may_hold_nan(device: torch.device, taking_part: str, normalized: bool) -> None:
    n = 300
    mask = {
        "some": torch.rand(n) < 0.5,
        "one": torch.arange(n) == 20,
        "none": torch.zeros(n, dtype=torch.bool),
        "a block less": (torch.arange(n) < 20) | (torch.arange(n) >= 276),
        "all": torch.ones(n, dtype=torch.bool),
    }[taking_part]
    rows = unit_rows(n, 64, dtype=torch.float16)
    rows[~mask] = torch.nan
    compare(device, [rows], scale=10.0, normalized=normalized, mask=mask)


@BOTH_SHIFTS
@pytest.mark.parametrize("scale", [0.1, 10.0, 200.0])
@pytest.mark.parametrize("any_key", [True, False])
def test_masked_keys(device: torch.device, any_key: bool, normalized: bool, scale: float) -> None:
    mask = torch.rand(20) < 0.7
    key_mask = torch.rand(145) < 0.5 if any_key else torch.zeros(145, dtype=torch.bool)
    rows = [
        unit_rows(20, 48, dtype=torch.bfloat16),
        unit_rows(145, 48, dtype=torch.bfloat16, seed=1),
    ]
    rows[0][~mask] = torch.nan
    rows[1][~key_mask] = torch.nan
    compare(device, rows, scale=scale, normalized=normalized, mask=mask, key_mask=key_mask)


def test_no_rows_and_no_keys(device: torch.device) -> None:
    nothing = torch.zeros(0, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    rows = unit_rows(5, 64, dtype=torch.bfloat16).to(device).requires_grad_()
    assert pairwise_lse(nothing, scale=1.0).shape == (0,)
    assert pairwise_lse(nothing, rows, scale=1.0).shape == (0,)
    lse = pairwise_lse(rows, nothing, scale=1.0)
    assert lse.tolist() == [-torch.inf] * 5
    lse.where(lse.isfinite(), 0).sum().backward()
    assert rows.grad is not None
    assert not rows.grad.any()


@pytest.mark.parametrize(("dim", "dtype"), [(300, torch.bfloat16), (16, torch.float32)])
def test_what_the_kernels_do_not_take_is_left_to_the_next_backend(
    device: torch.device, dim: int, dtype: torch.dtype
) -> None:
    compare(device, [unit_rows(9, dim, dtype=dtype)], scale=10.0, normalized=True)


def test_strided_and_misaligned_rows(device: torch.device) -> None:
    """What must be copied first: a transposed input, rows that begin between multiples of 16 bytes."""
    rows = unit_rows(20, 64, dtype=torch.bfloat16).to(device)
    misaligned = torch.cat((rows.new_zeros(1), rows.flatten()))[1:].view(20, 64)
    assert misaligned.data_ptr() % 16
    variants = [rows, rows.T.contiguous().T, misaligned]
    leaves = [tensor.detach().requires_grad_() for tensor in variants]
    for leaf in leaves:
        pairwise_lse(leaf, scale=5.0, normalized=True).sum().backward()
    for leaf in leaves[1:]:
        torch.testing.assert_close(leaf.grad, leaves[0].grad)


def test_strides_past_two_to_the_31(device: torch.device) -> None:
    """Rows that lie 2²⁶ elements apart; memory that nobody touched takes no room."""
    if device.type == "cuda":
        pytest.skip("the memory would be real")
    stride, n = 1 << 26, 40
    pages = mmap.mmap(-1, 2 * (stride * (n - 1) + 64))
    memory = torch.frombuffer(pages, dtype=torch.bfloat16)
    rows = memory.as_strided((n, 64), (stride, 1))
    assert stride * (n - 1) > 2**31
    rows.copy_(unit_rows(n, 64, dtype=torch.bfloat16))
    expected = pairwise_lse(rows.contiguous(), scale=5.0, normalized=True)
    torch.testing.assert_close(pairwise_lse(rows, scale=5.0, normalized=True), expected)


@BOTH_SHIFTS
def test_deterministic_algorithms(device: torch.device, normalized: bool) -> None:
    """Row-owned sums: right, and the same to the last bit when called again."""
    rows = unit_rows(150, 64, dtype=torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    try:
        compare(device, [rows], scale=10.0, normalized=normalized)
        first = pairwise_lse(rows.to(device), scale=10.0, normalized=normalized)
        again = pairwise_lse(rows.to(device), scale=10.0, normalized=normalized)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first, again)


def test_half_precision_gradients_of_tiny_weights(device: torch.device) -> None:
    """Upstream gradients of 1e-9 vanish in float16; scaled to the largest they do not."""
    rows = unit_rows(40, 64, dtype=torch.float16).to(device).requires_grad_()
    (tiny,) = torch.autograd.grad(pairwise_lse(rows, scale=10.0).sum() * 2.0**-10, rows)
    (plain,) = torch.autograd.grad(pairwise_lse(rows, scale=10.0).sum(), rows)
    # The weights of both are the same numbers times a power of 2, until the result is stored.
    torch.testing.assert_close(tiny * 2.0**10, plain, rtol=2e-2, atol=2.0**-14)
