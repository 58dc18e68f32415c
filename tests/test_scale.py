"""`scale` as a number and as a tensor: values, its gradient, and graphs that do not depend on it."""

from __future__ import annotations

import eager
import pytest
import torch
from support import multiplies_bfloat16, relative_error, unit_rows
from torch import Tensor
from torch._dynamo.eval_frame import _debug_get_cache_entry_list

import action_kernels
from action_kernels import indexed_lse, pairwise_lse, sampled_features
from action_kernels.ops import prepare_rows

SCALES = [1.0, 14.3, 100.0]
TORCH_2_6 = torch.__version__.startswith("2.6.")


def upstream(n: int) -> Tensor:
    return torch.linspace(-1, 3, n, dtype=torch.float64)


def scene(form: str, dtype: torch.dtype, masked: bool):
    """Rows, of which those left out are NaN, their masks, and the rows with zeros there."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"self": [(70, 33)], "keys": [(40, 33), (90, 33)]}[form]
    rows = [unit_rows(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
    masks = [torch.rand(len(r), generator=generator) > 0.3 if masked else None for r in rows]
    clean = [r if m is None else r.where(m[:, None], 0) for r, m in zip(rows, masks, strict=True)]
    rows = [
        r if m is None else r.where(m[:, None], torch.nan) for r, m in zip(rows, masks, strict=True)
    ]
    names = dict(zip(("mask", "key_mask"), masks, strict=False))
    return rows, clean, names


def gradients_of(function, rows, scale, **options):
    rows = [r.clone().requires_grad_() for r in rows]
    scale = scale.clone().requires_grad_()
    lse = function(*rows, scale=scale, **options)
    lse.backward(upstream(len(lse)).to(lse.dtype))
    return [lse.detach(), scale.grad, *(r.grad for r in rows)]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("form", ["self", "keys"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_values_and_gradients_of_a_tensor(dtype, backend, form, masked, scale):
    rows, clean, masks = scene(form, dtype, masked)
    exact = gradients_of(
        eager.pairwise_lse, [r.double() for r in clean], torch.tensor(scale).double(), **masks
    )
    with action_kernels.use_backend(backend):
        found = gradients_of(pairwise_lse, rows, torch.tensor(scale), **masks)
        again = gradients_of(pairwise_lse, rows, torch.tensor(scale, dtype=torch.float64), **masks)
    assert found[1].dtype == torch.float32
    assert again[1].dtype == torch.float64
    bfloat16_products = dtype == torch.bfloat16 and multiplies_bfloat16()
    for position, (ours, right) in enumerate(zip(found, exact, strict=True)):
        rounding = {torch.bfloat16: 3e-3, torch.float16: 5e-4}.get(dtype, 1e-6)
        # a logit rounded to a neighbouring float32 changes its power by 2⁻²³ · |logit|
        of_logits = 2**-23 * scale
        tolerance = [1e-6, 1e-6 + (dtype.itemsize == 2) * of_logits, *[rounding + of_logits] * 2][
            position
        ]
        if position > 1 and bfloat16_products:
            tolerance = 5e-3
        assert relative_error(ours, right) < tolerance, position


@pytest.mark.parametrize("form", ["self", "keys"])
def test_the_scale_alone_may_ask_for_a_gradient(instruction_set, form):
    rows, _, _ = scene(form, torch.bfloat16, masked=False)
    scale = torch.tensor(14.3, requires_grad=True)
    lse = pairwise_lse(*rows, scale=scale)
    (gradient,) = torch.autograd.grad(lse, scale, upstream(len(lse)).float())
    exact = gradients_of(
        eager.pairwise_lse, [r.double() for r in rows], torch.tensor(14.3).double()
    )
    assert relative_error(gradient, exact[1]) < 1e-6
    assert gradient.shape == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("queries_ask", [False, True])
def test_indexed_lse(dtype, queries_ask):
    queries, bank = unit_rows(12, 9, dtype=dtype), unit_rows(20, 9, dtype=dtype, seed=1)
    index = torch.randint(-1, 20, (4, 7), generator=torch.Generator().manual_seed(0))
    index[0] = -1
    queries[:3] = torch.nan  # the queries of a run without bank rows may hold anything
    queries.requires_grad_(queries_ask)
    scale = torch.tensor(14.3, requires_grad=True)
    lse = indexed_lse(queries, bank, index, scale=scale)
    lse[3:].double().mul(upstream(9)).sum().backward()
    q, s = queries.detach()[3:].double().requires_grad_(), torch.tensor(14.3).double()
    s.requires_grad_()
    gathered = bank.double()[index[1:].clamp(min=0)].repeat_interleave(3, 0)
    scores = torch.einsum("nd,nkd->nk", q, gathered) * s
    missing = (index[1:] < 0).repeat_interleave(3, 0)
    scores.masked_fill(missing, -torch.inf).logsumexp(1).mul(upstream(9)).sum().backward()
    assert relative_error(scale.grad, s.grad) < 1e-6
    if queries_ask:
        assert relative_error(queries.grad[3:], q.grad) < {torch.bfloat16: 3e-3}.get(dtype, 1e-6)
    number = indexed_lse(queries, bank, index, scale=14.3)
    torch.testing.assert_close(lse, number, rtol=1e-6, atol=1e-6)


def test_gradcheck():
    anchors = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[0, 3, -1]])
    assert torch.autograd.gradcheck(lambda a, s: pairwise_lse(a, scale=s), (anchors, scale))
    assert torch.autograd.gradcheck(
        lambda a, k, s: pairwise_lse(a, k, scale=s), (anchors, keys, scale)
    )
    assert torch.autograd.gradcheck(
        lambda a, s: indexed_lse(a, keys.detach(), index, scale=s), (anchors, scale)
    )


def test_opcheck():
    rows, scale = unit_rows(9, 4).requires_grad_(), torch.tensor(2.0, requires_grad=True)
    ops = torch.ops.action_kernels
    torch.library.opcheck(ops.pairwise_lse, (rows, None, 1.0, None, None, False, scale))
    arguments = (rows, unit_rows(5, 4), torch.tensor([[0, 3, -1]]), 1.0, scale, True)
    torch.library.opcheck(ops.indexed_lse, arguments)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.tensor([1.0]), r"scale must be a 0-d tensor, got shape \(1,\)"),
        (torch.tensor(1), "scale must be float16, bfloat16, float32 or float64, got torch.int64"),
        (torch.tensor(1.0, device="meta"), "scale is on meta but the rows on cpu"),
        (torch.tensor(torch.nan), "scale .* finite and > 0.* got nan"),
        (torch.tensor(torch.inf), "got inf"),
        (torch.tensor(-2.0), "got -2.0"),
        (torch.tensor(1e39, dtype=torch.float64), "at most 3.4"),
        (1e39, "at most 3.4"),
        (True, "scale must be a number or a 0-d tensor, got bool"),
    ],
)
def test_what_is_no_scale_is_refused(scale, message):
    rows = unit_rows(4, 3, dtype=torch.float32)
    with pytest.raises((TypeError, ValueError), match=message):
        pairwise_lse(rows, scale=scale)
    with pytest.raises((TypeError, ValueError), match=message):
        indexed_lse(rows, rows, torch.zeros(1, 1, dtype=torch.int64), scale=scale)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_scale_that_could_not_be_looked_at_gives_nan(backend):
    """As when a graph is compiled: no number, but no finite loss either."""
    rows = unit_rows(4, 3, dtype=torch.float32).requires_grad_()
    nan = torch.tensor(torch.nan)
    with action_kernels.use_backend(backend):
        lse = torch.ops.action_kernels.pairwise_lse(rows, None, 1.0, None, None, False, nan)
        (gradient,) = torch.autograd.grad(lse.sum(), rows)
    assert lse.isnan().all()
    assert gradient.isnan().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_indexed_scale_that_could_not_be_looked_at_gives_nan(value):
    rows, index = unit_rows(6, 4, dtype=torch.float32), torch.arange(6).view(2, 3)
    lse, mean = torch.ops.action_kernels.indexed_lse(
        rows, rows, index, 1.0, torch.tensor(value), True
    )
    assert not lse.isfinite().any()
    assert mean.isnan().all()


# --------------------------------------------------------------------------------------- torch.compile


def count_graphs(function, calls, *, dynamic=None, backend="aot_eager") -> int:
    """Compiled graphs of `function` over all `calls`, whose results must be those of eager mode."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)
    for arguments in calls:
        values = compiled(*arguments), function(*arguments)
        gradients = [torch.autograd.grad(value.sum(), arguments[0])[0] for value in values]
        torch.testing.assert_close(*values, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)
    return len(_debug_get_cache_entry_list(function.__code__))


def pairwise(rows: Tensor, scale: float | Tensor) -> Tensor:
    return pairwise_lse(rows, scale=scale, normalized=True)


def indexed(rows: Tensor, scale: float | Tensor) -> Tensor:
    return indexed_lse(rows, rows.detach(), torch.tensor([[0, 2, 3]]), scale=scale)


@pytest.mark.parametrize("function", [pairwise, indexed])
def test_a_schedule_of_temperatures_runs_in_one_graph(function):
    rows = unit_rows(20, 8, dtype=torch.float32).requires_grad_()
    numbers = [(rows, 1 / t) for t in (0.1, 0.13, 0.2, 0.5, 0.9)]
    # The first number is taken for a constant; told that it changes, there is one graph from the start.
    assert count_graphs(function, numbers) == 2
    # torch 2.6 believes that of a number only when it has seen it change.
    assert count_graphs(function, numbers, dynamic=True) == (2 if TORCH_2_6 else 1)
    tensors = [(rows, torch.tensor(scale)) for _, scale in numbers]
    assert count_graphs(function, tensors) == 1
    assert count_graphs(function, tensors, dynamic=True) == 1


def test_a_schedule_runs_in_one_graph_of_inductor():
    rows = unit_rows(20, 8, dtype=torch.float32).requires_grad_()
    calls = [(rows, 1 / t) for t in (0.1, 0.13, 0.2, 0.5)]
    assert count_graphs(pairwise, calls, backend="inductor") == 2


def test_a_compiled_learnable_scale_has_its_gradient():
    rows = unit_rows(20, 8, dtype=torch.float32)
    scale = torch.tensor(5.0, requires_grad=True)
    compiled = torch.compile(
        lambda r, s: pairwise_lse(r, scale=s).sum(), fullgraph=True, backend="aot_eager"
    )
    (gradient,) = torch.autograd.grad(compiled(rows, scale), scale)
    (expected,) = torch.autograd.grad(pairwise_lse(rows, scale=scale).sum(), scale)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=0)


def of_maps(features: Tensor) -> Tensor:
    index = torch.tensor([3, -1, 7])
    size = [2 * side for side in features.shape[2:]]
    rows = prepare_rows(features).sum()
    return rows + sampled_features(features, index, size).sum()


@pytest.mark.parametrize("dynamic", [None, True])
def test_maps_of_any_size_share_a_graph(dynamic):
    sizes = [(2, 4, h, w) for h, w in ((5, 6), (7, 4), (8, 9), (11, 3), (6, 10), (9, 5))]
    calls = [(torch.randn(size, requires_grad=True),) for size in sizes]
    assert count_graphs(of_maps, calls, dynamic=dynamic) == (1 if dynamic else 2)
