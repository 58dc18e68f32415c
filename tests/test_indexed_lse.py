"""The op `indexed_lse` on the reference backend: values, gradients, contract."""

from __future__ import annotations

import pytest
import torch
from support import relative_error, unit_rows

import action_kernels
from action_kernels import indexed_lse, pairwise_lse

SHAPES = [
    # n, runs, m, k, d
    (1, 1, 1, 1, 1),  # the smallest
    (6, 6, 5, 3, 4),  # bank rows of its own for every query
    (12, 3, 7, 33, 5),  # shared by four; a row comes up several times
    (8, 1, 64, 17, 9),  # shared by all
]


@pytest.fixture(autouse=True)
def reference():
    with action_kernels.use_backend("reference"):
        yield


def scene(n, runs, m, k, d):
    index = torch.randint(-1, m, (runs, k), generator=torch.Generator().manual_seed(2))
    index[:, 0] = index[:, 0].clamp(min=0)  # so that nothing is −inf here
    return unit_rows(n, d), unit_rows(m, d, seed=1), index


def gathered(queries, bank, index, scale):
    """The formula with every query's bank rows gathered."""
    index = index.repeat_interleave(len(queries) // len(index), 0)
    s = torch.einsum("nd,nkd->nk", queries, bank[index.clamp(min=0)]) * scale
    return s.masked_fill(index < 0, -torch.inf).logsumexp(1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [0.1, 2.0, 200.0])
def test_against_gathered_rows(shape, scale):
    queries, bank, index = scene(*shape)
    ours, theirs = queries.clone().requires_grad_(), queries.clone().requires_grad_()
    lse = indexed_lse(ours, bank, index, scale=scale)
    expected = gathered(theirs, bank, index, scale)
    torch.testing.assert_close(lse, expected, rtol=1e-12, atol=1e-12)
    weights = torch.linspace(-1, 2, len(queries), dtype=torch.float64)
    lse.mul(weights).sum().backward()
    expected.mul(weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-10)


def test_an_index_of_everything_is_the_pairwise_form():
    queries, bank = unit_rows(10, 6), unit_rows(13, 6, seed=1)
    everything = torch.arange(13)[None]
    torch.testing.assert_close(
        indexed_lse(queries, bank, everything, scale=4.0),
        pairwise_lse(queries, bank, scale=4.0),
        rtol=1e-13, atol=0,
    )  # fmt: skip


def test_chunks_change_nothing(monkeypatch):
    from action_kernels.backends.reference import rows

    queries, bank, index = scene(12, 3, 7, 33, 5)
    whole = indexed_lse(queries, bank, index, scale=5.0)
    monkeypatch.setattr(rows, "CHUNK_ELEMENTS", 40)
    parts = indexed_lse(queries, bank, index, scale=5.0)
    torch.testing.assert_close(parts, whole, rtol=1e-14, atol=0)


def test_rows_left_out_may_hold_anything():
    """Row 2 is spoken of by no index; row 0 is what a negative index might fetch by mistake."""
    queries, bank, index = scene(6, 6, 5, 3, 4)
    index = index.where((index != 0) & (index != 2), -1)
    index[:, 0] = 1
    clean = indexed_lse(queries, bank, index, scale=3.0)
    bank[[0, 2]] = torch.nan
    lse = indexed_lse(queries.requires_grad_(), bank, index, scale=3.0)
    lse.sum().backward()
    torch.testing.assert_close(lse, clean)
    assert queries.grad.isfinite().all()


def test_no_row_gives_the_logarithm_of_nothing():
    queries, bank = unit_rows(4, 3).requires_grad_(), unit_rows(5, 3, seed=1)
    index = torch.tensor([[-1, -1], [0, 3]])
    lse = indexed_lse(queries, bank, index, scale=2.0)
    assert lse.isinf().tolist() == [True, True, False, False]
    lse.sum().backward()
    assert (queries.grad[:2] == 0).all()
    assert (queries.grad[2:].norm(dim=1) > 0).all()
    none = torch.zeros(2, 0, dtype=torch.int64)
    assert indexed_lse(queries.detach(), bank, none, scale=2.0).tolist() == [-torch.inf] * 4
    empty = indexed_lse(torch.zeros(0, 3), torch.zeros(0, 3), none[:0], scale=1.0)
    assert empty.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype):
    queries, bank, index = scene(12, 3, 7, 33, 5)
    queries, bank = queries.to(dtype).requires_grad_(), bank.to(dtype)
    lse = indexed_lse(queries, bank, index, scale=10.0)
    assert lse.dtype == torch.float32
    assert relative_error(lse, gathered(queries.double(), bank.double(), index, 10.0)) < 1e-6
    lse.sum().backward()
    assert queries.grad.dtype == dtype


def test_gradcheck():
    _, bank, index = scene(6, 3, 5, 4, 4)
    queries = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q: indexed_lse(q, bank, index, scale=2.0), (queries,))


def test_opcheck():
    queries, bank, index = scene(6, 3, 5, 4, 4)
    op = torch.ops.action_kernels.indexed_lse
    torch.library.opcheck(op, (queries.clone().requires_grad_(), bank, index, 2.0, None, True))
    torch.library.opcheck(op, (queries, bank, index, 2.0, None, False))


def test_compiles_whole():
    queries, bank, index = scene(6, 3, 5, 4, 4)
    queries.requires_grad_()
    compiled = torch.compile(
        lambda q: indexed_lse(q, bank, index, scale=2.0).sum(), fullgraph=True, backend="aot_eager"
    )
    loss = compiled(queries)
    (gradient,) = torch.autograd.grad(loss, queries)
    expected = gathered(queries, bank, index, 2.0).sum()
    assert relative_error(loss, expected) < 1e-12
    assert relative_error(gradient, *torch.autograd.grad(expected, queries)) < 1e-11


def test_second_derivatives_are_refused():
    queries, bank, index = scene(6, 3, 5, 4, 4)
    queries.requires_grad_()
    lse = indexed_lse(queries, bank, index, scale=1.0)
    (gradient,) = torch.autograd.grad(lse.sum(), queries, create_graph=True)
    with pytest.raises(RuntimeError, match="indexed_lse has no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": torch.zeros(3)}, r"queries must have shape \(rows, dim\)"),
        ({"bank": torch.zeros(4, 3)}, r"bank must have dim 2, got shape \(4, 3\)"),
        ({"bank": torch.zeros(4, 2).double()}, "bank is torch.float64 but queries is"),
        ({"bank": torch.zeros(4, 2, requires_grad=True)}, r"pass bank.detach\(\)"),
        ({"index": torch.zeros(3, 5)}, "index must be an int64 tensor, got torch.float32"),
        ({"index": torch.full((3, 5), 4)}, "index must be below 4, found 4"),
        ({"index": torch.zeros(4, 5, dtype=torch.int64)}, "multiple of runs"),
        ({"index": torch.zeros(6, dtype=torch.int64)}, r"index must have shape \(runs, k\)"),
        ({"scale": -1.0}, "must be finite and > 0.*got -1.0"),
    ],
)
def test_errors_name_the_argument(change, message):
    call = {
        "queries": torch.zeros(6, 2),
        "bank": torch.zeros(4, 2),
        "index": torch.zeros(3, 5, dtype=torch.int64),
        "scale": 1.0,
    }
    with pytest.raises((TypeError, ValueError), match=message):
        indexed_lse(**{**call, **change})
