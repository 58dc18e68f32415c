"""Every op under what PyTorch does to functions: right, or refused in a sentence; never a wrong number."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from action_kernels import (
    anatomical_contrast_loss,
    clip_loss,
    indexed_lse,
    info_nce_loss,
    labelled_lse,
    multi_positive_nt_xent_loss,
    nt_xent_loss,
    pairwise_lse,
    pairwise_softplus,
    prepare_rows,
    relational_loss,
    saacl_loss,
    sample_pixels,
    sampled_features,
    siglip_loss,
    supcon_loss,
)

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
LABELS = (0, 0, 1, 1, 2)


def labels() -> Tensor:
    return torch.tensor(LABELS)


def softplus(rows: Tensor) -> Tensor:
    offsets = torch.zeros(5, dtype=torch.float32)
    return pairwise_softplus(rows, labels=labels(), offsets=offsets, scale=3.0, relation="same")


# Each op as a function of what it differentiates.
OPS = {
    "pairwise_lse": (lambda a: pairwise_lse(a, scale=3.0), (5, 3)),
    "pairwise_lse with keys": (lambda a: pairwise_lse(a[:2], a[2:], scale=3.0), (5, 3)),
    "pairwise_lse by its scale": (
        lambda a: pairwise_lse(torch.ones(5, 3) / 2, scale=a.square().sum()),
        (2,),
    ),
    "indexed_lse": (
        lambda a: indexed_lse(a, torch.ones(5, 3), torch.tensor([[0, 1, -1]]), scale=3.0),
        (5, 3),
    ),
    "prepare_rows": (prepare_rows, (5, 3)),
    "prepare_rows of a map": (prepare_rows, (2, 3, 4, 4)),
    "sampled_features": (
        lambda a: sampled_features(a, torch.tensor([0, 9, -1]), (8, 8)),
        (2, 3, 4, 4),
    ),
    "labelled_lse": (
        lambda a: labelled_lse(a, labels=labels(), scale=3.0, relation="different"),
        (5, 3),
    ),
    "pairwise_softplus": (softplus, (5, 3)),
}
# And each loss, of which the ops are parts.
LOSSES = {
    "supcon_loss": (lambda a: supcon_loss(a, labels()), (5, 3)),
    "supcon_loss with keys": (
        lambda a: supcon_loss(a[:2], labels()[:2], keys=a[2:], key_labels=labels()[1:4]),
        (5, 3),
    ),
    "supcon_loss, many classes": (lambda a: supcon_loss(a, labels(), num_classes=99), (5, 3)),
    "multi_positive_nt_xent_loss": (lambda a: multi_positive_nt_xent_loss(a, labels()), (5, 3)),
    "saacl_loss": (lambda a: saacl_loss(a, labels(), torch.eye(3)), (5, 3)),
    "saacl_loss of centers": (
        lambda a: saacl_loss(torch.ones(5, 3) / 2, labels(), a, reduction="none"),
        (3, 3),
    ),
    "saacl_loss with a queue": (
        lambda a: saacl_loss(
            a, labels(), torch.eye(3), keys=torch.ones(5, 3), key_labels=labels(), paired_keys=a / 2
        ),
        (5, 3),
    ),
    "info_nce_loss": (lambda a: info_nce_loss(a, a.flip(1), bank=torch.eye(3)), (5, 3)),
    "nt_xent_loss": (lambda a: nt_xent_loss(a, a.flip(1)), (5, 3)),
    "clip_loss": (lambda a: clip_loss(a, a.flip(1)), (5, 3)),
    "siglip_loss": (lambda a: siglip_loss(a, a.flip(1), bias=-1.0), (5, 3)),
    "relational_loss": (
        lambda a: relational_loss(
            a, a.flip(1), torch.eye(3), student_temperature=0.5, teacher_temperature=0.2
        ),
        (5, 3),
    ),
    "anatomical_contrast_loss": (
        lambda a: anatomical_contrast_loss(
            a, torch.eye(3)[:2], torch.ones(5, 3) / 2, torch.arange(4).view(2, 2)
        ),
        (2, 4, 3),
    ),
}
FUNCTIONS = {**OPS, **LOSSES}
LINEAR = ("sampled_features",)  # its second derivatives are 0
each_op = pytest.mark.parametrize("name", OPS)
each = pytest.mark.parametrize("name", FUNCTIONS)


def case(name: str):
    """A scalar function, where it is taken, and its value and gradient there by plain autograd."""
    op, shape = FUNCTIONS[name]
    point = torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.1

    def weighted(x: Tensor) -> Tensor:
        values = op(x)
        return (values * torch.linspace(0.5, 2, values.numel()).view(values.shape)).sum()

    leaf = point.clone().requires_grad_()
    value = weighted(leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    assert gradient.any()
    return weighted, point, value.detach(), gradient


@each
def test_reverse_mode(name):
    function, point, _, gradient = case(name)
    torch.testing.assert_close(grad(function)(point), gradient)
    torch.testing.assert_close(jacrev(function)(point), gradient)
    two = torch.stack((point, point * 1.1))
    of_each = torch.stack([grad(function)(x) for x in two])
    torch.testing.assert_close(vmap(grad(function))(two), of_each)


@each
def test_gradients_taken_after_the_transform_or_many_at_once(name):
    """Of `vjp` the pullback runs when the transform has ended, and batched gradients are no functorch."""
    op, _ = FUNCTIONS[name]
    function, point, _, gradient = case(name)
    _, pullback = vjp(function, point)
    torch.testing.assert_close(pullback(torch.ones(()))[0], gradient)
    leaf = point.clone().requires_grad_()
    (many,) = torch.autograd.grad(
        function(leaf), leaf, torch.tensor([1.0, -2.0]), is_grads_batched=True
    )
    torch.testing.assert_close(many, torch.stack((gradient, -2 * gradient)))
    by_row = torch.autograd.functional.jacobian(op, point)
    at_once = torch.autograd.functional.jacobian(op, point, vectorize=True)
    assert by_row.any()
    torch.testing.assert_close(at_once, by_row)


@each
def test_vmap(name):
    function, point, value, _ = case(name)
    two = torch.stack((point, point * 1.1))
    values = vmap(function)(two)
    torch.testing.assert_close(values, torch.stack((value, function(two[1]))))


@each_op
def test_forward_mode_is_refused(name):
    function, point, *_ = case(name)
    refused = pytest.raises(NotImplementedError, match="has no forward-mode derivative")
    with refused:
        jvp(function, (point,), (point,))
    with refused:
        jacfwd(function)(point)
    with forward_ad.dual_level():
        for primal in (point, point.clone().requires_grad_()):
            with refused:
                function(forward_ad.make_dual(primal, point))


@each_op
def test_second_derivatives_are_refused(name):
    function, point, *_ = case(name)

    def again(x: Tensor) -> Tensor:
        return grad(function)(x).square().sum()

    if name in LINEAR:
        assert not hessian(function)(point).any()
        assert not grad(again)(point).any()
        return
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        hessian(function)(point)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        grad(again)(point)
    leaf = point.clone().requires_grad_()
    (first,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        first.sum().backward()


@each_op
def test_no_grad_outside_functorch_stays(name):
    """`grad` differentiates whatever the mode around it, and leaves nothing to an outer graph."""
    function, point, _, gradient = case(name)
    with torch.no_grad():
        torch.testing.assert_close(grad(function)(point), gradient)
        assert not function(point.clone().requires_grad_()).requires_grad


@each_op
def test_fake_tensors(name):
    op, shape = OPS[name]
    with FakeTensorMode():
        x = torch.rand(shape, requires_grad=True)
        result = op(x)
        result.sum().backward()
        assert x.grad.shape == x.shape
    real = op(torch.rand(shape))
    assert (result.shape, result.dtype) == (real.shape, real.dtype)


@each_op
@pytest.mark.parametrize("tracing_mode", ["real", "symbolic"])
def test_make_fx(name, tracing_mode):
    function, point, value, gradient = case(name)
    traced = make_fx(lambda x: (function(x), grad(function)(x)), tracing_mode=tracing_mode)(point)
    names = {str(node.target) for node in traced.graph.nodes}
    assert any(target.startswith("action_kernels.") for target in names), names
    for result, expected in zip(traced(point), (value, gradient), strict=True):
        torch.testing.assert_close(result, expected)


def test_sample_pixels_has_no_derivative_to_lose():
    """Whole numbers: what samples inside a differentiated function is a constant to it."""
    pixels = torch.tensor([[[0, 1], [1, 0]]])

    def chosen(logits: Tensor) -> Tensor:
        index, _ = sample_pixels(
            logits, pixels, 3, num_classes=2, threshold=1.0,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        return logits.flatten(2).transpose(1, 2).flatten(0, 1)[index.clamp(min=0)].sum()

    logits = torch.randn(1, 2, 2, 2)
    leaf = logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(chosen(leaf), leaf)
    assert expected.sum() == 12
    assert torch.equal(grad(chosen)(logits), expected)
    assert jvp(chosen, (logits,), (torch.ones_like(logits),))[1] == 12
    with FakeTensorMode():
        index, counts = sample_pixels(
            None, torch.zeros(1, 2, 2, dtype=torch.int64), 3, num_classes=2
        )
    assert (index.shape, counts.shape) == ((2, 3), (2,))
    traced = make_fx(lambda x: sample_pixels(None, x, 3, num_classes=2)[1])(pixels)
    assert torch.equal(traced(pixels), torch.tensor([2, 2]))
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda x: sample_pixels(None, x, 3, num_classes=2)[0])(torch.stack((pixels, pixels)))


@each_op
def test_inputs_are_not_changed_and_rows_of_any_kind_are_taken(name):
    function, point, value, gradient = case(name)
    strided = torch.stack((point, point), -1)[..., 1].requires_grad_()
    before = strided.detach().clone()
    result = function(strided)
    torch.testing.assert_close(torch.autograd.grad(result, strided)[0], gradient)
    torch.testing.assert_close(result.detach(), value)
    assert torch.equal(strided, before)


@each_op
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_jit_trace_records_the_op(name):
    """Not the numbers that it gave when traced."""
    op, shape = OPS[name]
    point = torch.rand(shape, generator=torch.Generator().manual_seed(2)) + 0.1
    traced = torch.jit.trace(op, point.requires_grad_(), check_trace=False)
    torch.testing.assert_close(traced(point * 1.3), op(point * 1.3))
    leaf = (point.detach() * 1.3).requires_grad_()
    gradients = [torch.autograd.grad(f(leaf).sum(), leaf)[0] for f in (traced, op)]
    torch.testing.assert_close(*gradients)


@each_op
def test_modes_and_the_profiler_see_the_op(name):
    op, shape = OPS[name]
    x = torch.rand(shape) + 0.1
    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), kwargs=None):
            seen.append(str(function))
            return function(*arguments, **(kwargs or {}))

    with Watch():
        op(x)
    assert any("action_kernels." in function for function in seen)
    with torch.profiler.profile() as profile:
        op(x)
    assert any("action_kernels::" in event.key for event in profile.key_averages())
