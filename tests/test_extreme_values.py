"""Rows that are huge, subnormal or no numbers: right results, or NaN, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from support import relative_error, unit_rows
from torch import Tensor

import action_kernels
from action_kernels import indexed_lse, labelled_lse, pairwise_lse, pairwise_softplus, prepare_rows
from action_kernels.backends import cpu

ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float64: 1e-14}


SUPPORTED = () if cpu.unavailable("cpu") else cpu.supported_instruction_sets()


@pytest.fixture(params=["reference", *SUPPORTED])
def backend(request):
    """The reference, and the CPU's kernels on each instruction set that this processor has."""
    if request.param == "reference":
        with action_kernels.use_backend("reference"):
            yield
        return
    with action_kernels.use_backend("cpu"):
        cpu.use_instruction_set(request.param)
        yield
        cpu.use_instruction_set("auto")


@pytest.fixture
def flushed():
    """Subnormal floats are taken for 0, as for speed on CPUs."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    yield
    torch.set_flush_denormal(False)


def shaped(rows: Tensor, form: str) -> Tensor:
    """(16, d) rows as they are, or as the pixels of a map."""
    return rows if form == "rows" else rows.view(2, 2, 4, -1).permute(0, 3, 1, 2).contiguous()


@pytest.mark.parametrize("form", ["rows", "map"])
@pytest.mark.parametrize(
    ("dtype", "exponents"),
    [
        (torch.float32, (-35, 62, 70, 110, 126)),
        (torch.bfloat16, (-35, 62, 70, 110, 126)),
        (torch.float16, (-8, 12)),
        (torch.float64, (-35, 500, 700, 1020)),
    ],
)
def test_a_norm_of_any_size_is_divided_by(backend, dtype, exponents, form):
    rows = unit_rows(16, 37).to(dtype)
    unit = (rows.double() / rows.double().norm(dim=1, keepdim=True)).requires_grad_()
    upstream = torch.randn(16, 37, dtype=dtype, generator=torch.Generator().manual_seed(1))
    for exponent in exponents:
        leaf = shaped(torch.ldexp(rows, torch.tensor(exponent)), form).requires_grad_()
        found = prepare_rows(leaf)
        assert relative_error(found, unit) < ROUNDING[dtype]
        (gradient,) = torch.autograd.grad(found, leaf, upstream)
        x = rows.double().requires_grad_()
        (expected,) = torch.autograd.grad(torch.nn.functional.normalize(x), x, upstream.double())
        assert gradient.isfinite().all()
        scaled = torch.ldexp(gradient.double(), torch.tensor(exponent, dtype=torch.float64))
        if abs(exponent) < 100 or dtype == torch.float64:  # else the gradient itself is subnormal
            assert relative_error(scaled, shaped(expected, form)) < 3 * ROUNDING[dtype]


def test_a_norm_beyond_the_largest_number(backend):
    """‖x‖ = 8 · 3e38 is no float32, but x / ‖x‖ is."""
    rows = torch.full((3, 64), 3e38)
    assert relative_error(prepare_rows(rows), torch.full((3, 64), 1 / 8)) < 1e-6


def test_too_small_norms_are_zero(backend):
    rows = torch.full((2, 4), 1e-13).requires_grad_()
    prepared = prepare_rows(rows)
    assert not prepared.any()
    assert not torch.autograd.grad(prepared.sum(), rows)[0].any()


@pytest.mark.parametrize("form", ["rows", "map"])
def test_subnormal_halves_are_not_flushed(instruction_set, flushed, form):
    rows = torch.randn(16, 19, generator=torch.Generator().manual_seed(0)) * 1e-5
    rows = rows.half()
    assert (rows.abs() < 6e-5).sum() > 200  # subnormal float16
    values = rows.view(torch.int16).to(torch.int32)
    magnitude = (values & 0x7FFF).double()
    assert (values & 0x7FFF).max() < 0x0800
    exact = torch.where(
        magnitude < 1024, magnitude * 2.0**-24, (magnitude - 1024 + 1024) * 2.0**-24
    )
    exact = exact * torch.where(values < 0, -1.0, 1.0)
    unit = exact / exact.norm(dim=1, keepdim=True)
    with action_kernels.use_backend("cpu"):
        assert relative_error(prepare_rows(shaped(rows, form)), unit) < 1e-3
        lse = pairwise_lse(rows, scale=1e9)
        lse32 = pairwise_lse(exact.float(), scale=1e9)
    assert relative_error(lse, lse32) < 1e-6


def test_every_half_is_converted_as_pytorch_does(instruction_set):
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    halves = halves[halves.isfinite()].view(-1, 32)
    with action_kernels.use_backend("cpu"):
        widened = prepare_rows(
            halves,
            normalize=False,
            dtype=torch.float32,
            mask=torch.ones(len(halves), dtype=torch.bool),
        )
        assert torch.equal(widened, halves.float())
        between = torch.nextafter(widened, torch.tensor(torch.inf)) * 1.0001
        narrowed = prepare_rows(
            between,
            normalize=False,
            dtype=torch.float16,
            mask=torch.ones(len(halves), dtype=torch.bool),
        )
    assert torch.equal(narrowed, between.half())


# ------------------------------------------------------------------------------------------------ NaN


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("form", ["rows", "map"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_without_a_norm_becomes_nan_alone(backend, dtype, form, bad):
    rows = unit_rows(16, 37, dtype=dtype)
    rows[5, 36] = bad
    leaf = shaped(rows, form).requires_grad_()
    found = prepare_rows(leaf)
    (gradient,) = torch.autograd.grad(found.sum(), leaf)
    if form == "map":
        gradient = gradient.permute(0, 2, 3, 1).reshape(16, 37)
    for result in (found, gradient):
        assert result[5].isnan().all()
        assert result[torch.arange(16) != 5].isfinite().all()


@pytest.mark.parametrize("scale", [10.0, 43.0, 200.0], ids=lambda s: f"scale {s}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("promised", [False, True])
@pytest.mark.parametrize("n", [3, 50, 400])
def test_one_nan_among_the_rows_makes_every_sum_nan(backend, n, promised, dtype, scale):
    for row in {0, n // 2, n - 1}:
        rows = unit_rows(n, 30, dtype=dtype)
        rows[row, row % 30] = torch.nan
        leaf = rows.clone().requires_grad_()
        lse = pairwise_lse(leaf, scale=scale, normalized=promised)
        assert lse.isnan().all()
        (gradient,) = torch.autograd.grad(lse.sum(), leaf)
        assert gradient.isnan().all()


@pytest.mark.parametrize("scale", [10.0, 200.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_among_anchors_stays_there_and_among_keys_does_not(backend, dtype, scale):
    anchors, keys = unit_rows(60, 30, dtype=dtype), unit_rows(70, 30, dtype=dtype, seed=1)
    anchors[7, 3] = torch.nan
    lse = pairwise_lse(anchors, keys, scale=scale)
    assert lse.isnan().tolist() == [i == 7 for i in range(60)]
    leaf = anchors.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(pairwise_lse(leaf, keys, scale=scale).sum(), leaf)
    assert gradient.isnan().any(1).tolist() == [i == 7 for i in range(60)]
    keys[69, 29] = torch.nan
    assert pairwise_lse(anchors, keys, scale=scale).isnan().all()
    mask = torch.arange(60) != 7
    key_mask = torch.arange(70) != 69
    assert pairwise_lse(anchors, keys, scale=scale, mask=mask, key_mask=key_mask).isfinite().all()


@pytest.mark.parametrize("everything", [False, True])
def test_nan_in_the_other_ops(backend, everything):
    rows, labels = unit_rows(20, 9, dtype=torch.float32), torch.arange(20) % 3
    rows[slice(None) if everything else 4] = torch.nan
    leaf = rows.clone().requires_grad_()
    index = torch.arange(20).view(4, 5)
    indexed = indexed_lse(leaf, rows, index, scale=3.0)
    # queries 0 … 4 read bank rows 0 … 4, of which row 4 is NaN
    assert indexed.isnan().tolist() == [everything or i < 5 for i in range(20)]
    (gradient,) = torch.autograd.grad(indexed.sum(), leaf)
    assert gradient.isnan().any(1).tolist() == [everything or i < 5 for i in range(20)]
    for relation in ("same", "different"):
        related = (labels == labels[4]) == (relation == "same")
        related[4] = True
        expected = [everything or bool(x) for x in related]
        lse = labelled_lse(leaf, labels=labels, scale=3.0, relation=relation)
        assert lse.isnan().tolist() == expected
        sums = pairwise_softplus(
            leaf, labels=labels, offsets=torch.zeros(20), scale=3.0, relation=relation
        )
        assert sums.isnan().tolist() == expected
        for values in (lse, sums):
            (gradient,) = torch.autograd.grad(values.sum(), leaf)
            assert gradient[4].isnan().all()
