"""`saacl_loss` and `SAACL`: the formula, the published implementation's vectors, odd batches, state."""

from __future__ import annotations

import copy

import eager
import pytest
import torch
from support import load_vectors, relative_error, unit_rows

import action_kernels
from action_kernels import SAACL, class_centers, saacl_loss
from action_kernels.ops import checks

K, D = 4, 6


@pytest.fixture(autouse=True)
def reference():
    with action_kernels.use_backend("reference"):
        yield


def batch(n: int = 23, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features that are not unit, labels of all classes, centres."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, D, dtype=torch.float64, generator=generator)
    labels = torch.randint(K, (n,), generator=generator)
    return features, labels, class_centers(K, D).double()


def queue(m: int = 31, seed: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(m, D, dtype=torch.float64, generator=generator)
    return {"keys": keys, "key_labels": torch.randint(-1, K, (m,), generator=generator)}


@pytest.mark.parametrize("positives", ["mean", "sum", "balanced"])
@pytest.mark.parametrize("form", ["batch", "queue", "queue and pairs"])
def test_is_the_formula(positives, form):
    features, labels, centers = batch()
    options = {} if form == "batch" else queue()
    if form == "queue and pairs":
        options["paired_keys"] = batch(seed=9)[0]
    ours, theirs = features.clone().requires_grad_(), features.clone().requires_grad_()
    kwargs = {"temperature": 0.3, "center_weight": 0.7, "positives": positives, **options}
    expected = eager.saacl(theirs, labels, centers, **kwargs)
    each = saacl_loss(ours, labels, centers, reduction="none", **kwargs)
    assert relative_error(each, expected) < 1e-12
    mean = saacl_loss(ours, labels, centers, **kwargs)
    assert relative_error(mean, expected.mean()) < 1e-12
    total = saacl_loss(ours, labels, centers, reduction="sum", **kwargs)
    assert relative_error(total, expected.sum()) < 1e-12
    mean.backward()
    expected.mean().backward()
    assert relative_error(ours.grad, theirs.grad) < 1e-11


@pytest.mark.parametrize("name", ["saacl_queue_0", "saacl_queue_1"])
def test_reproduces_the_published_implementation(reference_folder, name):
    vectors = load_vectors(reference_folder / f"{name}.npz")
    anchors = vectors["anchors"].clone().requires_grad_()
    loss = saacl_loss(
        anchors, vectors["labels"], vectors["targets"][vectors["assignment"]],
        temperature=vectors["temperature"].item(), center_weight=vectors["target_weight"].item(),
        keys=vectors["queue"], key_labels=vectors["queue_labels"],
        paired_keys=vectors["paired_keys"], normalize=False,
    )  # fmt: skip
    loss.backward()
    assert relative_error(loss, vectors["loss"]) < 1e-9
    assert relative_error(anchors.grad, vectors["grad_anchors"]) < 1e-9


def test_maps_are_rows_in_pixel_order():
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(2, D, 3, 4, dtype=torch.float64, generator=generator)
    labels = torch.randint(-1, K, (2, 3, 4), generator=generator)
    centers = class_centers(K, D).double()
    of_map = saacl_loss(features, labels, centers, reduction="none")
    rows = features.permute(0, 2, 3, 1).reshape(-1, D)
    of_rows = saacl_loss(rows, labels.flatten(), centers, reduction="none")
    assert of_map.shape == labels.shape
    torch.testing.assert_close(of_map.flatten(), of_rows)


def test_pixels_left_out_change_nothing():
    features, labels, centers = batch(30)
    keep = torch.arange(30) % 3 != 0
    ignored = labels.where(keep, -1)
    dirty = features.where(keep[:, None], torch.nan)
    expected = saacl_loss(features[keep], labels[keep], centers)
    by_label = dirty.clone().requires_grad_()
    by_mask = dirty.clone().requires_grad_()
    for ours, arguments in (
        (by_label, {"labels": ignored}),
        (by_mask, {"labels": labels, "mask": keep}),
    ):
        loss = saacl_loss(ours, centers=centers, **arguments)
        torch.testing.assert_close(loss, expected)
        loss.backward()
        assert (ours.grad[~keep] == 0).all()
        assert (ours.grad[keep].norm(dim=1) > 0).all()
    other = saacl_loss(features, labels.where(keep, 255), centers, ignore_index=255)
    torch.testing.assert_close(other, expected)


def odd_batches() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    features, labels, _ = batch(8)
    return {
        "one class": (features, torch.full((8,), 2)),
        "no positive": (features[:4], torch.arange(4)),
        "one pixel": (features[:1], labels[:1]),
        "everything ignored": (features, torch.full((8,), -1)),
        "no pixel": (features[:0], labels[:0]),
        "fewer classes than K": (features, labels.clamp(max=1)),
        "zero rows": (features * 0, labels),
    }


@pytest.mark.parametrize("name", odd_batches())
@pytest.mark.parametrize("positives", ["mean", "sum", "balanced"])
@pytest.mark.parametrize("form", ["batch", "queue"])
def test_odd_batches_are_finite(name, positives, form):
    features, labels = odd_batches()[name]
    features = features.clone().requires_grad_()
    options = queue() if form == "queue" else {}
    loss = saacl_loss(
        features, labels, class_centers(K, D).double(), positives=positives, **options
    )
    loss.backward()
    assert loss.isfinite()
    assert features.grad.isfinite().all()
    if name in ("everything ignored", "no pixel") or (name, form) == ("one pixel", "batch"):
        assert loss == 0
        assert (features.grad == 0).all()
    else:
        assert loss > 0


def test_a_single_class_with_one_center():
    features, _, _ = batch(5)
    loss = saacl_loss(features, torch.zeros(5, dtype=torch.int64), class_centers(1, D).double())
    assert loss.isfinite()


def test_many_classes_take_the_other_road():
    """Above 64 classes class sums are not a product with a one-hot matrix."""
    generator = torch.Generator().manual_seed(4)
    features = torch.randn(200, D, dtype=torch.float64, generator=generator)
    labels = torch.randint(80, (200,), generator=generator)
    centers = unit_rows(80, D)
    mask = torch.rand(200, generator=generator) > 0.2
    ours, theirs = features.clone().requires_grad_(), features.clone().requires_grad_()
    loss = saacl_loss(ours, labels, centers, mask=mask)
    expected = eager.saacl(theirs[mask], labels[mask], centers).mean()
    assert relative_error(loss, expected) < 1e-12
    loss.backward()
    expected.backward()
    assert relative_error(ours.grad, theirs.grad) < 1e-11


def test_gradients_flow_to_whoever_asks():
    features, labels, centers = batch(7)
    keys = queue(6)
    given = [
        tensor.clone().requires_grad_()
        for tensor in (features, centers, keys["keys"], batch(7, seed=7)[0])
    ]

    def loss(features, centers, keys_, paired):
        return saacl_loss(
            features, labels, centers, temperature=0.5,
            keys=keys_, key_labels=keys["key_labels"], paired_keys=paired,
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["batch", "queue"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_lower_precision_is_as_exact_as_pytorch(backend, dtype, form):
    action_kernels.use_backend(backend)
    features, labels, centers = batch(200)
    options = queue(300) if form == "queue" else {}
    low = options_in(dtype, options)
    ours, theirs = (features.to(dtype).requires_grad_() for _ in range(2))
    loss = saacl_loss(ours, labels, centers.float(), **low)
    loss.backward()
    peer = eager.saacl(theirs, labels, centers.to(dtype), **low).float().mean()
    peer.backward()
    truth = features.to(dtype).double().requires_grad_()
    with action_kernels.use_backend("reference"):
        exact = saacl_loss(truth, labels, centers, **options_in(torch.float64, low))
    exact.backward()
    assert loss.dtype == torch.float32
    assert ours.grad.dtype == dtype
    floor = torch.finfo(dtype).eps  # eager may hit the exact value by chance
    assert relative_error(loss, exact) < 3 * relative_error(peer, exact) + floor
    assert relative_error(ours.grad, truth.grad) < 3 * relative_error(theirs.grad, truth.grad)


def options_in(dtype, options):
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in options.items()}


def test_autocast_leaves_the_sums_alone():
    features, labels, centers = batch(64)
    outside = saacl_loss(features.float(), labels, centers.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = saacl_loss(features.float(), labels, centers.float())
    assert torch.equal(inside, outside)


def test_compiles_whole():
    features, labels, centers = (tensor for tensor in batch(40))
    features = features.float().requires_grad_()
    compiled = torch.compile(saacl_loss, fullgraph=True)
    loss = compiled(features, labels, centers.float())
    loss.backward()
    expected = saacl_loss(features.detach(), labels, centers.float())
    assert relative_error(loss.detach(), expected) < 1e-5
    assert features.grad.norm() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": torch.ones(5)}, r"features must have shape \(n, dim\) or"),
        ({"features": torch.ones(5, D, dtype=torch.int32)}, "features must be float16"),
        (
            {"features": torch.full((5, D), torch.nan)},
            "features holds 30 NaN or infinite values of 30",
        ),
        (
            {"labels": torch.zeros(4, dtype=torch.int64)},
            r"labels must have shape \(5,\), got \(4,\)",
        ),
        ({"labels": torch.full((5,), 0.5)}, "labels must hold whole numbers, found 0.5"),
        ({"labels": torch.zeros(5) + 0j}, "labels must hold integers, got torch.complex64"),
        (
            {"labels": torch.tensor([0, 1, 2, 3, 4])},
            r"labels must be 0 … 3 or -1 \(ignored\), found 4",
        ),
        ({"labels": torch.tensor([0, 1, -2, 3, 0])}, "found -2"),
        ({"labels": torch.zeros(5, dtype=torch.int64, device="meta")}, "labels is on meta"),
        ({"centers": torch.ones(K, D + 1)}, r"centers must have dim 6, got shape \(4, 7\)"),
        ({"temperature": 0.0}, "temperature must be finite and > 0, got 0.0"),
        ({"temperature": -1.0}, "temperature must be finite and > 0"),
        ({"center_weight": -0.1}, "center_weight must be finite and ≥ 0, got -0.1"),
        ({"positives": "all"}, "positives must be one of 'mean', 'sum', 'balanced', got 'all'"),
        ({"reduction": "max"}, "reduction must be one of"),
        ({"mask": torch.ones(5)}, "mask must be a bool tensor"),
        ({"key_labels": torch.zeros(3, dtype=torch.int64)}, "key_labels needs keys"),
        ({"paired_keys": torch.ones(5, D)}, "paired_keys needs keys"),
        ({"keys": torch.ones(3, D)}, "key_labels must be given with keys"),
        ({"keys": torch.ones(3, D + 1)}, "keys must have the features' dim 6"),
        (
            {"keys": torch.ones(3, D), "key_labels": torch.tensor([0, 9, 0])},
            r"key_labels must be 0 … 3 or -1 \(ignored\), found 9",
        ),
        (
            {
                "keys": torch.ones(3, D),
                "key_labels": torch.zeros(3, dtype=torch.int64),
                "paired_keys": torch.ones(4, D),
            },
            r"paired_keys must have shape \(5, 6\)",
        ),
    ],
)
def test_errors_name_the_argument(arguments, message):
    call = {
        "features": torch.randn(5, D),
        "labels": torch.zeros(5, dtype=torch.int64),
        "centers": class_centers(K, D),
        **arguments,
    }
    with pytest.raises((TypeError, ValueError), match=message):
        saacl_loss(**call)


class TestModule:
    def test_is_the_function_on_its_state(self):
        features, labels, _ = (tensor for tensor in batch(12))
        module = SAACL(K, D, queue_size=20, temperature=0.2)
        before = {"features": module.queue.features, "labels": module.queue.labels}
        paired = torch.randn(12, D)
        loss = module(features.float(), labels, paired)
        expected = saacl_loss(
            features.float(), labels, module.allocated_centers(), temperature=0.2,
            keys=before["features"], key_labels=before["labels"], paired_keys=paired,
        )  # fmt: skip
        torch.testing.assert_close(loss, expected)
        newest = torch.nn.functional.normalize(paired)
        torch.testing.assert_close(module.queue.features[-12:], newest)
        assert module.queue.labels[-12:].tolist() == labels.tolist()

    def test_allocates_centers_by_the_class_means(self):
        module = SAACL(K, D, queue_size=0)
        wanted = torch.tensor([2, 0, 3, 1])
        labels = torch.arange(K).repeat(5)
        module(module.centers[wanted][labels] + 0.01 * torch.randn(20, D), labels)
        assert module.allocation.tolist() == wanted.tolist()
        torch.testing.assert_close(
            module.class_means.means, module.centers[wanted], atol=0.05, rtol=0
        )

    def test_two_calls_before_one_backward(self):
        """The queue moves between the calls; what the first has saved must stay as it was."""
        module = SAACL(K, D, queue_size=16)
        x = torch.randn(12, D, requires_grad=True)
        labels = torch.arange(12) % K
        total = sum(module(x, labels, torch.randn(12, D)) for _ in range(4))
        total.backward()
        assert x.grad.isfinite().all()
        assert x.grad.norm() > 0

    def test_pixels_left_out_do_not_enter_the_queue(self):
        module = SAACL(K, D, queue_size=10, ignore_index=255)
        labels = torch.tensor([0, 255, 1, 2])
        module(torch.randn(4, D), labels, mask=torch.tensor([True, True, True, False]))
        assert module.queue.labels.tolist() == [255] * 8 + [0, 1]

    def test_evaluation_leaves_the_state_alone(self):
        module = SAACL(K, D, queue_size=10).eval()
        before = copy.deepcopy(module.state_dict())
        module(torch.randn(4, D), torch.arange(4))
        after = module.state_dict()
        assert all(
            torch.equal(before[name], after[name])
            for name in before
            if isinstance(before[name], torch.Tensor)
        )

    def test_state_dict_round_trips_exactly(self):
        def step(module, seed):
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(9, D, generator=generator, requires_grad=True)
            loss = module(x, torch.arange(9) % K, torch.randn(9, D, generator=generator))
            loss.backward()
            return loss, x.grad

        first, second = SAACL(K, D, queue_size=25), SAACL(K, D, queue_size=25)
        for seed in range(5):
            step(first, seed)
        second.load_state_dict(first.state_dict())
        for seed in range(5, 9):
            for mine, other in zip(step(first, seed), step(second, seed), strict=True):
                assert torch.equal(mine, other)

    def test_compiles_whole_with_its_queue(self):
        eager_module = SAACL(K, D, queue_size=30)
        module = copy.deepcopy(eager_module)
        compiled = torch.compile(module, fullgraph=True)
        for step in range(4):  # the ring closes in the third
            features, labels, _ = batch(12, seed=step)
            labels = labels.where(torch.arange(12) % 4 > 0, -1)
            paired = torch.randn(12, D)
            results = []
            for run in (eager_module, compiled):
                x = features.float().requires_grad_()
                loss = run(x, labels, paired)
                loss.backward()
                results.append((loss.detach(), x.grad))
            torch.testing.assert_close(results[1], results[0])
        for name, buffer in eager_module.state_dict().items():
            torch.testing.assert_close(module.state_dict()[name], buffer)

    @pytest.mark.parametrize(
        "arguments",
        [
            {"labels": torch.tensor([0, 1, 2, 9])},
            {"temperature": -1.0},
            {"reduction": "max"},
            {"paired_keys": torch.full((4, D), torch.nan)},
            {"paired_keys": torch.ones(3, D)},
            {"sample_weight": -torch.ones(4)},
            {"mask": torch.ones(3) > 0},
        ],
    )
    def test_a_call_that_raises_changes_nothing(self, arguments):
        module = SAACL(K, D, queue_size=10)
        module(torch.randn(8, D), torch.arange(8) % K)
        before = copy.deepcopy(module.state_dict())
        call = {"features": torch.randn(4, D), "labels": torch.arange(4), **arguments}
        with pytest.raises((TypeError, ValueError)):
            module(**call)
        for name, buffer in module.state_dict().items():
            assert torch.equal(buffer, before[name]), name

    def test_paired_keys_without_a_queue_are_refused(self):
        with pytest.raises(ValueError, match="paired_keys needs a queue, and queue_size is 0"):
            SAACL(K, D, queue_size=0)(torch.randn(4, D), torch.arange(4), torch.randn(4, D))

    def test_safetensors_hold_its_state(self, tmp_path):
        safetensors = pytest.importorskip("safetensors.torch")
        first, second = SAACL(K, D, queue_size=10), SAACL(K, D, queue_size=10)
        for _ in range(3):
            first(torch.randn(4, D), torch.arange(4))
        safetensors.save_file(first.state_dict(), tmp_path / "state.safetensors")
        second.load_state_dict(safetensors.load_file(tmp_path / "state.safetensors"))
        assert torch.equal(first.queue.features, second.queue.features)
        assert torch.equal(first.allocation, second.allocation)

    def test_nan_stays_nan_where_values_are_not_looked_at(self, monkeypatch):
        """And is gone with the next batch: neither means nor queue keep it."""
        module = SAACL(K, D, queue_size=10)
        module(torch.randn(8, D), torch.arange(8) % K)
        monkeypatch.setattr(checks, "values_readable", lambda *_: False)
        broken = torch.randn(4, D)
        broken[1, 2] = torch.nan
        assert module(broken, torch.arange(4)).isnan()
        assert module(torch.randn(4, D), torch.arange(4)).isfinite()

    def test_learns_its_classes(self):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(60, D, generator=generator).requires_grad_()
        labels = torch.arange(60) % K
        module = SAACL(K, D, queue_size=0, center_weight=1.0, positives="balanced")
        optimizer = torch.optim.SGD([x], lr=20.0)
        losses = []
        for _ in range(60):
            optimizer.zero_grad()
            loss = module(x, labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0]
        nearest = (torch.nn.functional.normalize(x) @ module.allocated_centers().T).argmax(1)
        assert (nearest == labels).float().mean() > 0.95
