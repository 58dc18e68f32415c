"""The ops `labelled_lse` and `pairwise_softplus` on the reference backend: values, gradients, contract."""

from __future__ import annotations

from dataclasses import replace

import eager
import pytest
import torch
from labelled import PATTERNS, Scene
from support import relative_error, unit_rows

import action_kernels
from action_kernels.ops import labelled_lse, pairwise_softplus, registry

RELATIONS = ("same", "different")
SHAPES = [(1, None, 1), (2, 3, 1), (17, None, 5), (33, 65, 9)]


@pytest.fixture(autouse=True)
def reference():
    with action_kernels.use_backend("reference"):
        yield


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize(("n", "m", "d"), SHAPES)
@pytest.mark.parametrize("scale", [0.1, 14.3, 300.0])
def test_against_the_full_matrix(n, m, d, pattern, relation, scale):
    scene = Scene.make(n, m, d, pattern, relation, scale)
    for found, expected in (
        (scene.lse(), scene.lse(eager.labelled_lse)),
        (scene.softplus(), scene.softplus(eager.pairwise_softplus)),
    ):
        for ours, theirs in zip(found, expected, strict=True):
            theirs = torch.nan_to_num(theirs, neginf=-torch.inf)  # of rows with no pair
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_chunks_change_nothing(monkeypatch):
    from action_kernels.backends.reference import rows

    scene = Scene.make(37, None, 8, "few, some left out", "same")
    whole = [*scene.lse(), *scene.softplus()]
    monkeypatch.setattr(rows, "CHUNK_ELEMENTS", 40)
    for ours, expected in zip([*scene.lse(), *scene.softplus()], whole, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-13, atol=1e-13)


def test_gradcheck():
    for m in (None, 6):
        for relation in RELATIONS:
            scene = Scene.make(9, m, 4, "few, some left out", relation, scale=2.0)
            rows = [scene.anchors] if m is None else [scene.anchors, scene.keys]
            scale = torch.tensor(2.0, dtype=torch.float64)
            leaves = [t.clone().requires_grad_() for t in (*rows, scale, scene.offsets / 6)]

            def softplus(*inputs, scene=scene):
                *given, scale, offsets = inputs
                options = scene.options | {"scale": scale}
                return pairwise_softplus(*given, offsets=offsets, **options)

            def lse(*inputs, scene=scene):
                *given, scale = inputs
                values = labelled_lse(*given, **scene.options | {"scale": scale})
                return values[values.isfinite()]

            assert torch.autograd.gradcheck(softplus, leaves)
            assert torch.autograd.gradcheck(lse, leaves[:-1])


def test_opcheck():
    for m in (None, 6):
        scene = Scene.make(9, m, 4, "few, some left out", "same")
        anchors = scene.anchors.requires_grad_()
        keys = None if m is None else scene.keys.requires_grad_()
        scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        rows = (anchors, keys, scene.labels, scene.key_labels, "same", 1.5, scale)
        ops = torch.ops.action_kernels
        torch.library.opcheck(ops.labelled_lse, (*rows, False))
        torch.library.opcheck(ops.pairwise_softplus, (*rows, scene.offsets.requires_grad_()))


def test_compiles_whole():
    scene = Scene.make(20, None, 4, "few, some left out", "different").to(torch.float32)

    def loss(anchors, offsets):
        lse = labelled_lse(anchors, **scene.options)
        values = pairwise_softplus(anchors, offsets=offsets + lse, **scene.options)
        return values.sum()

    inputs = [t.clone().requires_grad_() for t in (scene.anchors, scene.offsets)]
    torch.compile(loss, fullgraph=True)(*inputs).backward()
    expected = [t.clone().requires_grad_() for t in (scene.anchors, scene.offsets)]
    loss(*expected).backward()
    for ours, theirs in zip(inputs, expected, strict=True):
        assert theirs.grad.norm() > 0
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_second_derivatives_are_refused():
    scene = Scene.make(5, None, 3, "two classes", "same")
    anchors = scene.anchors.requires_grad_()
    for name, value in (
        ("labelled_lse", labelled_lse(anchors, **scene.options)),
        ("pairwise_softplus", pairwise_softplus(anchors, offsets=scene.offsets, **scene.options)),
    ):
        (gradient,) = torch.autograd.grad(value.sum(), anchors, create_graph=True)
        with pytest.raises(RuntimeError, match=f"{name} has no second derivative"):
            gradient.sum().backward()


def test_forward_mode_is_refused():
    scene = Scene.make(5, None, 3, "two classes", "same")
    for call in (
        lambda x: labelled_lse(x, **scene.options),
        lambda x: pairwise_softplus(x, offsets=scene.offsets, **scene.options),
    ):
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            torch.func.jvp(call, (scene.anchors,), (torch.ones_like(scene.anchors),))


def test_only_requested_gradients_are_computed():
    asked = []
    with registry.isolated():
        kernel = registry.resolve("pairwise_softplus_backward", torch.zeros(1))

        @registry.register("pairwise_softplus_backward", backend="reference")
        def spy(*arguments):
            asked.append(arguments[-4:-1])
            return kernel(*arguments)

        registry._resolved.clear()
        scene = Scene.make(4, 5, 3, "two classes", "same")
        for wanted in range(3):
            tensors = [t.clone() for t in (scene.anchors, scene.keys, scene.offsets)]
            tensors[wanted].requires_grad_()
            anchors, keys, offsets = tensors
            pairwise_softplus(anchors, keys, offsets=offsets, **scene.options).sum().backward()
    assert asked == [(True, False, False), (False, True, False), (False, False, True)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"anchors": torch.zeros(3)}, r"anchors must have shape \(rows, dim\), got \(3,\)"),
        ({"keys": torch.zeros(4, 3)}, r"keys must have dim 2, got shape \(4, 3\)"),
        ({"keys": torch.zeros(4, 2)}, "keys need key_labels"),
        ({"key_labels": torch.zeros(4, dtype=torch.int64)}, "key_labels needs keys"),
        ({"labels": torch.zeros(3)}, "labels must be an int64 tensor, got torch.float32"),
        ({"labels": torch.zeros(3, dtype=torch.int32)}, "labels must be an int64 tensor"),
        (
            {"labels": torch.zeros(4, dtype=torch.int64)},
            r"labels must have shape \(3,\), got \(4,\)",
        ),
        ({"labels": [0, 1, 2]}, "labels must be a torch.Tensor, got list"),
        ({"relation": "other"}, "relation must be one of 'same', 'different', got 'other'"),
        ({"scale": -1.0}, r"scale \(1 / temperature\) must be finite and > 0.*got -1.0"),
        ({"scale": torch.ones(2)}, r"scale must be a 0-d tensor, got shape \(2,\)"),
        ({"offsets": torch.zeros(4)}, r"offsets must have shape \(3,\), got \(4,\)"),
        ({"offsets": torch.zeros(3).double()}, "offsets must be torch.float32 for torch.float32"),
        ({"offsets": torch.zeros(3, device="meta")}, "offsets is on meta but anchors on cpu"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    call = {
        "anchors": torch.zeros(3, 2),
        "labels": torch.zeros(3, dtype=torch.int64),
        "scale": 1.0,
        "relation": "same",
        **arguments,
    }
    offsets = call.pop("offsets", torch.zeros(3))
    with pytest.raises((TypeError, ValueError), match=message):
        pairwise_softplus(call.pop("anchors"), call.pop("keys", None), offsets=offsets, **call)


# ------------------------------------------------------------------------------- on every backend


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    if registry.unavailable(request.param, "cpu"):
        pytest.skip(f"{request.param} cannot be used here")
    with action_kernels.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_that_learns(backend, dtype):
    """Its gradient in float32 from rows of half precision too, whatever else is asked for."""
    for m in (None, 70):
        for relation in RELATIONS:
            scene = Scene.make(60, m, 8, "few, some left out", relation).to(dtype)
            found, expected = [], []
            for each, results in ((scene, found), (scene.to(torch.float64), expected)):
                scale = torch.tensor(14.3, dtype=each.offsets.dtype, requires_grad=True)
                options = each.options | {"scale": scale}
                rows = [each.anchors] if m is None else [each.anchors, each.keys]
                upstream = torch.linspace(-1, 2, 60, dtype=each.offsets.dtype)
                lse = labelled_lse(*rows, **options)
                values = pairwise_softplus(*rows, offsets=each.offsets, **options)
                for value in (lse.where(lse.isfinite(), 0), values):
                    results += torch.autograd.grad(value, scale, upstream)
            for ours, theirs in zip(found, expected, strict=True):
                assert relative_error(ours, theirs) < 2e-5


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("m", [None, 50])
def test_rows_left_out_may_hold_anything(backend, relation, m):
    scene = Scene.make(60, m, 8, "few, some left out", relation).to(torch.float32)
    dirty = replace(
        scene,
        anchors=scene.anchors.where((scene.labels >= 0)[:, None], torch.nan),
        offsets=scene.offsets.where(scene.labels >= 0, torch.nan),
        keys=None if m is None else scene.keys.where((scene.key_labels >= 0)[:, None], torch.inf),
    )
    for clean, found in ((scene.lse(), dirty.lse()), (scene.softplus(), dirty.softplus())):
        assert (found[0][scene.labels < 0] == 0).all()
        for ours, expected in zip(found, clean, strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("relation", RELATIONS)
def test_nan_reaches_every_anchor_that_is_paired_with_it(backend, relation):
    """And no other: which is how a diverged network shows."""
    scene = Scene.make(90, None, 8, "few, some left out", relation).to(torch.float32)
    bad = int((scene.labels == 2).nonzero()[3])
    anchors = scene.anchors.clone()
    anchors[bad, 5] = torch.nan
    expected = eager.counting_pairs(scene.labels, relation=relation)[:, bad]
    expected[bad] = True
    for values in (
        labelled_lse(anchors, **scene.options),
        pairwise_softplus(anchors, offsets=scene.offsets, **scene.options),
    ):
        assert torch.equal(values.isnan(), expected)
    offsets = scene.offsets.clone()
    offsets[bad] = torch.nan
    values = pairwise_softplus(scene.anchors, offsets=offsets, **scene.options)
    assert values.isnan().nonzero().tolist() == [[bad]]


def test_a_nan_row_gets_no_finite_gradient(backend):
    scene = Scene.make(30, None, 8, "two classes", "same").to(torch.float32)
    for op in (
        lambda x: labelled_lse(x, **scene.options),
        lambda x: pairwise_softplus(x, offsets=scene.offsets, **scene.options),
    ):
        anchors = scene.anchors.clone()
        anchors[4] = torch.nan
        op(anchors.requires_grad_()).sum().backward()
        assert anchors.grad[4].isnan().all()


@pytest.mark.parametrize(
    "offset", [-torch.inf, -1e30, -200.0, -60.0, 0.0, 60.0, 1e4, 1e30, torch.inf]
)
def test_extreme_offsets(backend, offset):
    """Where softplus is a straight line or nothing; −inf is the log-sum-exp of no negative."""
    scene = Scene.make(40, None, 8, "few, some left out", "same")
    scene = replace(scene, offsets=torch.full((40,), offset, dtype=torch.float64))
    ours, exact = scene.to(torch.float32).softplus(), scene.softplus(eager.pairwise_softplus)
    # x itself is known to 2⁻²⁴ |x|, an error of e^x relative to it
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=2e-5, atol=1e-36)
    if offset != torch.inf:  # whose loss has none
        for found, expected in zip(ours[1:], exact[1:], strict=True):
            assert (found - expected).norm() <= 1e-4 * expected.norm() + 1e-36


def test_small_terms_keep_their_digits(backend):
    """e^x for x of −20 to −80, of which 1 + e^x would leave little or nothing."""
    scene = Scene.make(200, 300, 16, "all distinct", "different", scale=1.0)
    for offset in (-20.0, -40.0, -80.0):
        few = replace(scene, offsets=torch.full((200,), offset, dtype=torch.float64))
        ours, exact = few.to(torch.float32).softplus(), few.softplus(eager.pairwise_softplus)
        for found, expected in zip(ours, exact, strict=True):
            assert relative_error(found, expected) < 1e-5  # x is known to 2⁻²⁴ |x|


def test_no_rows_and_no_keys(backend):
    empty, labels = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    rows, own = unit_rows(3, 4, dtype=torch.float32).requires_grad_(), torch.arange(3)
    for relation in RELATIONS:
        options = {"scale": 1.0, "relation": relation}
        assert labelled_lse(empty, labels=labels, **options).shape == (0,)
        assert pairwise_softplus(empty, labels=labels, offsets=empty[:, 0], **options).shape == (0,)
        lse = labelled_lse(rows, empty, labels=own, key_labels=labels, **options)
        assert lse.tolist() == [-torch.inf] * 3
        values = pairwise_softplus(
            rows, empty, labels=own, key_labels=labels, offsets=torch.zeros(3), **options
        )
        assert values.tolist() == [0.0] * 3
        rows.grad = None
        (lse + values).sum().backward()
        assert not rows.grad.any()


def test_strided_rows_and_an_expanded_gradient(backend):
    scene = Scene.make(40, None, 12, "few, some left out", "same").to(torch.float32)
    wide = torch.zeros(40, 24)
    wide[:, 3:15] = scene.anchors
    strided = replace(scene, anchors=wide[:, 3:15], labels=scene.labels.repeat_interleave(2)[::2])
    offsets = scene.offsets[:1].expand(40)
    found = replace(strided, offsets=offsets).softplus()
    for ours, expected in zip(
        found, replace(scene, offsets=offsets.clone()).softplus(), strict=True
    ):
        assert torch.equal(ours, expected)
    leaf = scene.anchors.clone().requires_grad_()
    labelled_lse(leaf, **scene.options).sum().backward()  # one number, expanded
    assert leaf.grad.norm() > 0


def test_same_and_different_together_are_all_pairs(backend):
    """Whatever the classes: the sums of the two relations are those of one class of all, and none."""
    rows = unit_rows(120, 16, dtype=torch.float32)
    labels = torch.randint(0, 7, (120,))
    parts = torch.stack(
        [labelled_lse(rows, labels=labels, scale=5.0, relation=relation) for relation in RELATIONS]
    )
    whole = action_kernels.pairwise_lse(rows, scale=5.0)
    torch.testing.assert_close(parts.logsumexp(0), whole, rtol=1e-6, atol=1e-6)


def test_the_order_of_rows_changes_nothing_but_rounding(backend):
    scene = Scene.make(150, None, 16, "few, some left out", "different").to(torch.float32)
    order = torch.randperm(150)
    moved = replace(
        scene,
        anchors=scene.anchors[order],
        labels=scene.labels[order],
        offsets=scene.offsets[order],
    )
    lse = labelled_lse(scene.anchors, **scene.options)
    torch.testing.assert_close(labelled_lse(moved.anchors, **moved.options), lse[order])
    values = pairwise_softplus(scene.anchors, offsets=scene.offsets, **scene.options)
    found = pairwise_softplus(moved.anchors, offsets=moved.offsets, **moved.options)
    torch.testing.assert_close(found, values[order])
