"""SupCon, InfoNCE and NT-Xent against their formulas and against pytorch-metric-learning."""

from __future__ import annotations

import eager
import pytest
import torch
from support import relative_error
from torch.nn.functional import cross_entropy, normalize

from action_kernels import (
    AnatomicalContrastLoss,
    CLIPLoss,
    InfoNCELoss,
    MultiPositiveNTXentLoss,
    NTXentLoss,
    RelationalLoss,
    SAACLLoss,
    SigLIPLoss,
    SupConLoss,
    anatomical_contrast_loss,
    class_centers,
    clip_loss,
    info_nce_loss,
    multi_positive_nt_xent_loss,
    nt_xent_loss,
    relational_loss,
    saacl_loss,
    siglip_loss,
    supcon_loss,
)

N, D, TEMPERATURE = 24, 7, 0.2


def rows(seed: int, n: int = N) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, dtype=torch.float64, generator=generator).requires_grad_()


def assert_same(ours, theirs, *inputs):
    """Equal values, and equal gradients to every input."""
    assert relative_error(ours, theirs) < 1e-12
    mine = torch.autograd.grad(ours.sum(), inputs)
    for gradient, expected in zip(mine, torch.autograd.grad(theirs.sum(), inputs), strict=True):
        assert relative_error(gradient, expected) < 1e-10


@pytest.mark.parametrize("weight", [1e-300, 1e300])
def test_weights_that_are_no_float32_numbers_are_refused(weight):
    rows, labels = torch.eye(6, 8), torch.arange(6) % 3
    weights = torch.full((6,), weight, dtype=torch.float64)
    for wrong in ({"weight": weights[:3]}, {"sample_weight": weights}):
        (name,) = wrong
        with pytest.raises(
            ValueError, match=rf"^{name} must be finite and ≥ 0, as torch.float32 too"
        ):
            supcon_loss(rows, labels, **wrong)
        expected = supcon_loss(rows.double(), labels)
        torch.testing.assert_close(supcon_loss(rows.double(), labels, **wrong), expected)


@pytest.mark.parametrize("temperature", [1e-19, 1e-24, 1e-30])
def test_a_gradient_of_a_tiny_temperature_is_no_nan(temperature):
    """1/τ² is no float32 number there, while the loss and its gradient are exactly 0 (every row is alone) or finite."""
    rows = torch.eye(6, 8)
    tau = torch.tensor(temperature, requires_grad=True)
    loss = supcon_loss(rows, torch.arange(6), temperature=tau)
    (gradient,) = torch.autograd.grad(loss, tau)
    assert (loss.item(), gradient.item()) == (0, 0)
    tau = torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
    loss = supcon_loss(torch.randn(6, 4), torch.arange(6) % 2, temperature=tau)
    (gradient,) = torch.autograd.grad(loss, tau)  # the loss is in proportion to 1/τ here
    torch.testing.assert_close(gradient, -loss.double() / tau.detach(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("labels", [torch.arange(N) % 4, torch.arange(N) // 2, torch.arange(N) % 5])
def test_supcon_is_its_formula(labels):
    features = rows(0)
    ours = supcon_loss(features, labels, temperature=TEMPERATURE, reduction="none")
    assert_same(ours, eager.supcon(features, labels, temperature=TEMPERATURE), features)


def test_supcon_takes_any_integers_and_leaves_the_ignored_out():
    features, labels = rows(0), torch.arange(N) % 3 * 1000 - 7
    labels[5:9] = -1
    ours = supcon_loss(features, labels, temperature=TEMPERATURE, reduction="none")
    kept = labels != -1
    assert (ours[~kept] == 0).all()
    expected = eager.supcon(features[kept], labels[kept], temperature=TEMPERATURE)
    assert_same(ours[kept], expected, features)
    mean = supcon_loss(features, labels, temperature=TEMPERATURE)
    assert relative_error(mean, expected.mean()) < 1e-12


def test_an_anchor_without_a_positive_has_no_loss():
    features, labels = rows(0), torch.arange(N)
    labels[1] = 0
    ours = supcon_loss(features, labels, temperature=TEMPERATURE, reduction="none")
    assert (ours[2:] == 0).all()
    assert (ours[:2] > 0).all()


def test_supcon_against_pytorch_metric_learning():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    features, labels = rows(0), torch.arange(N) % 4
    theirs = losses.SupConLoss(temperature=TEMPERATURE)(features, labels)
    assert_same(supcon_loss(features, labels, temperature=TEMPERATURE), theirs, features)


def test_nt_xent_against_pytorch_metric_learning():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    first, second, labels = rows(0), rows(1), torch.arange(N).repeat(2)
    views = torch.cat((first, second))
    theirs = losses.NTXentLoss(temperature=TEMPERATURE)(views, labels)
    assert_same(nt_xent_loss(first, second, temperature=TEMPERATURE), theirs, first, second)


def test_info_nce_against_pytorch_metric_learning():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    queries, keys = rows(0), rows(1, N + 9)
    theirs = losses.NTXentLoss(temperature=TEMPERATURE)(
        queries, torch.arange(N), ref_emb=keys, ref_labels=torch.arange(N + 9)
    )
    assert_same(info_nce_loss(queries, keys, temperature=TEMPERATURE), theirs, queries, keys)


@pytest.mark.parametrize("extra", [0, 9])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_info_nce_is_its_formula(extra, reduction):
    queries, keys = rows(0), rows(1, N + extra)
    ours = info_nce_loss(queries, keys, temperature=TEMPERATURE, reduction=reduction)
    logits = normalize(queries) @ normalize(keys).T / TEMPERATURE
    expected = cross_entropy(logits, torch.arange(N), reduction=reduction)
    assert_same(ours, expected, queries, keys)


@pytest.mark.parametrize("unit", [True, False])
def test_nt_xent_is_its_formula(unit):
    first, second = rows(0), rows(1)
    ours = nt_xent_loss(first, second, temperature=TEMPERATURE, normalize=unit, reduction="none")
    views = torch.cat((first, second))
    views = normalize(views) if unit else views
    logits = (views @ views.T / TEMPERATURE).masked_fill(torch.eye(2 * N) > 0, -torch.inf)
    expected = cross_entropy(logits, torch.arange(2 * N).roll(N), reduction="none")
    assert_same(ours, expected, first, second)


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_clip_is_open_clips_formula(scale):
    """With a logit scale that learns as its logarithm: the same value, and gradients to all three."""
    image, text = rows(0), rows(1)
    log_scale = torch.tensor(scale, dtype=torch.float64).log().requires_grad_()
    ours = clip_loss(image, text, temperature=(-log_scale).exp())
    logits = log_scale.exp() * normalize(image) @ normalize(text).T
    labels = torch.arange(N)
    theirs = (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2
    assert_same(ours, theirs, image, text, log_scale)


@pytest.mark.parametrize("learns", [supcon_loss, multi_positive_nt_xent_loss])
def test_supervised_losses_compile_whole_without_num_classes(learns):
    compiled = torch.compile(learns, fullgraph=True)
    labels = torch.arange(N) % 4 * 1000 - 7
    for temperature in (0.2, 0.5):  # in one graph
        ours, theirs = (rows(0).detach().float().requires_grad_() for _ in range(2))
        tau = torch.tensor(temperature)
        loss, expected = (
            compiled(ours, labels, temperature=tau),
            learns(theirs, labels, temperature=tau),
        )
        torch.testing.assert_close(loss, expected)
        loss.backward()
        expected.backward()
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_loss_of_one_pair_is_zero(dtype):
    """Where the only key is the positive, rounding has no say: 0, and no gradient."""
    pair = torch.randn(2, D, dtype=dtype, requires_grad=True)
    first, second = pair[:1], pair[1:]
    one, other = torch.tensor([3]), torch.tensor([3])
    for loss in (
        supcon_loss(pair, torch.tensor([5, 5])),
        supcon_loss(first, one, keys=second, key_labels=other),
        multi_positive_nt_xent_loss(pair, torch.tensor([5, 5])),
        info_nce_loss(first, second),
        nt_xent_loss(first, second),
        clip_loss(first, second),
        info_nce_loss(first, second, bank=pair[:0]),
    ):
        assert loss == 0
        (gradient,) = torch.autograd.grad(loss, pair)
        assert not gradient.any()


MODULES = {
    "supcon": (SupConLoss(0.2), supcon_loss, (rows(0), torch.arange(N) % 3), {"temperature": 0.2}),
    "multi positive": (
        MultiPositiveNTXentLoss(mean_over="pairs"),
        multi_positive_nt_xent_loss, (rows(0), torch.arange(N) % 3), {"mean_over": "pairs"},
    ),
    "info nce": (InfoNCELoss(reduction="sum"), info_nce_loss, (rows(0), rows(1)), {"reduction": "sum"}),
    "nt xent": (NTXentLoss(0.3), nt_xent_loss, (rows(0), rows(1)), {"temperature": 0.3}),
    "clip": (CLIPLoss(), clip_loss, (rows(0), rows(1)), {}),
    "siglip": (SigLIPLoss(0.1, 3.0), siglip_loss, (rows(0), rows(1)), {"bias": 3.0}),
    "saacl": (
        SAACLLoss(center_weight=0.7), saacl_loss,
        (rows(0), torch.arange(N) % 3, class_centers(3, D)), {"center_weight": 0.7},
    ),
    "anatomical": (
        AnatomicalContrastLoss(0.3), anatomical_contrast_loss,
        (rows(0).view(3, -1, D), rows(1, 3), rows(2), torch.arange(12).view(3, 4)), {"temperature": 0.3},
    ),
    "relational": (
        RelationalLoss(0.3, 0.2), relational_loss, (rows(0), rows(1), rows(2, 5)),
        {"student_temperature": 0.3, "teacher_temperature": 0.2},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_the_functions(name):
    module, function, tensors, options = MODULES[name]
    assert torch.equal(module(*tensors), function(*tensors, **options))


def test_a_module_learns_its_temperature():
    module = SupConLoss(torch.nn.Parameter(torch.tensor(0.5)))
    module(rows(0), torch.arange(N) % 3).backward()
    assert module.temperature.grad != 0
    assert list(module.state_dict()) == ["temperature"]
    with pytest.raises(ValueError, match="temperature must be finite and > 0"):
        SupConLoss(temperature=0)


def test_float32_is_as_exact_as_pytorch():
    features, labels = rows(0).detach().float(), torch.arange(N) % 4
    exact = eager.supcon(features.double(), labels, temperature=TEMPERATURE).mean()
    theirs = relative_error(eager.supcon(features, labels, temperature=TEMPERATURE).mean(), exact)
    ours = relative_error(supcon_loss(features, labels, temperature=TEMPERATURE), exact)
    assert ours <= 3 * theirs + 2e-7


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda a: supcon_loss(a, torch.full((N,), 0.5)),
            "labels must hold whole numbers, found 0.5",
        ),
        (lambda a: supcon_loss(a, torch.arange(3)), "labels must have shape"),
        (lambda a: supcon_loss(a, torch.arange(N), temperature=0), "temperature must be"),
        (lambda a: supcon_loss(a, torch.arange(N), reduction="max"), "reduction must be one of"),
        (lambda a: info_nce_loss(a, a[:3]), "keys must hold one row a query, at least 24, got 3"),
        (lambda a: info_nce_loss(a, a[:, :2]), "keys must have dim 7"),
        (lambda a: info_nce_loss(a / 0, a), "queries holds .* NaN or infinite"),
        (lambda a: nt_xent_loss(a, a[:3]), r"second must have shape \(24, 7\)"),
        (lambda a: nt_xent_loss(a, a.float()), "second is torch.float32 but first is"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(rows(0).detach())
