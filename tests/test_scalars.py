"""Numbers and switches as arguments: NumPy's count as Python's, and what is none is refused by its name."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

import action_kernels
from action_kernels import (
    SAACL,
    AnatomicalTemperature,
    MemoryQueue,
    RunningClassMeans,
    SampledHead,
    SupConLoss,
    allocate_centers,
    anatomical_contrast_loss,
    class_centers,
    class_relation,
    clip_loss,
    draw_negatives,
    indexed_lse,
    info_nce_loss,
    labelled_lse,
    multi_positive_nt_xent_loss,
    nt_xent_loss,
    pairwise_lse,
    pairwise_softplus,
    prepare_rows,
    relational_loss,
    resize_labels,
    saacl_loss,
    sample_pixels,
    sampled_features,
    siglip_loss,
    supcon_loss,
)

NOT_NUMBERS = ("1", True, [1.0], 1j)
NOT_WHOLE = ("1", True, 2.5, [1])
NOT_FLAGS = ("no", 2, [True])


def labelled(function, **more):
    """A call of a loss over labelled rows, with other values for its options."""

    def call(**options):
        rows, labels = torch.linspace(-1, 1, 96).sin().view(12, 8), torch.arange(12) % 3
        return function(rows, labels, **{**more, **options})

    return call


def paired(function, **more):
    def call(**options):
        rows = torch.linspace(-1, 1, 96).sin().view(12, 8)
        return function(rows, rows.flip(1), **{**more, **options})

    return call


def centers():
    return torch.eye(3, 8)


def anatomical(**options):
    rows = torch.linspace(-1, 1, 96).sin()
    return anatomical_contrast_loss(
        rows.view(3, 4, 8), torch.eye(3, 8), rows.view(12, 8), torch.arange(6).view(3, 2), **options
    )


def of_module(make, *arguments):
    """What a module of these options gives for the arguments, so that two of them can be compared."""

    def call(**options):
        return make(**options)(*arguments)

    return call


def sampled(**options):
    scores = torch.arange(54.0).sin().view(2, 3, 9)
    return sample_pixels(
        scores, torch.arange(18).view(2, 9) % 3,
        **{"num_samples": 4, "num_classes": 3, "generator": torch.Generator().manual_seed(0), **options},
    )  # fmt: skip


def negatives(**options):
    given = {"num_negatives": 3, "generator": torch.Generator().manual_seed(0), **options}
    return draw_negatives(torch.eye(3, 8), torch.arange(12).view(2, 6) % 3, **given)


def running_means(**options):
    running = RunningClassMeans(**{"num_classes": 3, "dim": 8, **options})
    running.update(torch.eye(3, 8), torch.arange(3))
    return running.means


def in_queue(**options):
    queue = MemoryQueue(**{"size": 3, "dim": 2, **options})
    return queue.enqueue(torch.ones(2, 2)), queue.labels


def head(**options):
    torch.manual_seed(0)
    given = SampledHead(**{"channels": (2,), "dim": 3, "spatial_dims": 2, **options})
    return given([torch.ones(1, 2, 3, 3)], torch.tensor([4]))


def rows():
    return torch.eye(4, 8)


LABELLED = dict.fromkeys(("ignore_index",), NOT_WHOLE) | {"normalize": NOT_FLAGS}
SAACL_OPTIONS = {"temperature": NOT_NUMBERS, "center_weight": NOT_NUMBERS, **LABELLED}
PAIRED = {"temperature": NOT_NUMBERS, "normalize": NOT_FLAGS}
# call, the values of its numbers and switches, and what those may not be
CASES = {
    "supcon_loss": (
        labelled(supcon_loss),
        {"temperature": 0.5, "num_classes": 3, "ignore_index": 2, "normalize": False},
        {"temperature": NOT_NUMBERS, "num_classes": NOT_WHOLE, **LABELLED},
    ),
    "multi_positive_nt_xent_loss": (
        labelled(multi_positive_nt_xent_loss),
        {"temperature": 0.5, "num_classes": 3, "ignore_index": 2, "normalize": False},
        {"temperature": NOT_NUMBERS, "num_classes": NOT_WHOLE, **LABELLED},
    ),
    "SupConLoss": (
        of_module(SupConLoss, rows(), torch.tensor([0, 0, 1, 1])),
        {"temperature": 0.5, "num_classes": 2, "ignore_index": 2, "normalize": False},
        {"temperature": NOT_NUMBERS, "num_classes": NOT_WHOLE, **LABELLED},
    ),
    "saacl_loss": (
        labelled(saacl_loss, centers=centers()),
        {"temperature": 0.5, "center_weight": 0.25, "ignore_index": 2, "normalize": False},
        SAACL_OPTIONS,
    ),
    "SAACL": (
        lambda **options: SAACL(**{"num_classes": 2, "dim": 8, **options})(
            rows(), torch.tensor([0, 0, 1, 1])
        ),
        {
            "num_classes": 3, "dim": 8, "queue_size": 5, "momentum": 0.5, "temperature": 0.5,
            "center_weight": 0.25, "ignore_index": 0, "adaptive": False,
        },
        {
            **dict.fromkeys(("num_classes", "dim", "queue_size", "ignore_index"), NOT_WHOLE),
            **dict.fromkeys(("momentum", "temperature", "center_weight"), NOT_NUMBERS),
            "adaptive": NOT_FLAGS,
        },
    ),
    "info_nce_loss": (paired(info_nce_loss), {"temperature": 0.5, "normalize": False}, PAIRED),
    "nt_xent_loss": (paired(nt_xent_loss), {"temperature": 0.5, "normalize": False}, PAIRED),
    "clip_loss": (paired(clip_loss), {"temperature": 0.5, "normalize": False}, PAIRED),
    "siglip_loss": (
        paired(siglip_loss),
        {"temperature": 0.5, "bias": -2.0, "normalize": False},
        {**PAIRED, "bias": NOT_NUMBERS},
    ),
    "anatomical_contrast_loss": (anatomical, {"temperature": 0.25}, {"temperature": NOT_NUMBERS}),
    "relational_loss": (
        paired(relational_loss, memory=rows(), student_temperature=0.1, teacher_temperature=0.1),
        {"student_temperature": 0.5, "teacher_temperature": 0.25},
        {"student_temperature": NOT_NUMBERS, "teacher_temperature": NOT_NUMBERS},
    ),
    "pairwise_lse": (
        lambda **options: pairwise_lse(rows(), **{"scale": 1.0, **options}),
        {"scale": 2.0, "normalized": True},
        {"scale": NOT_NUMBERS, "normalized": NOT_FLAGS},
    ),
    "labelled_lse": (
        lambda **options: labelled_lse(
            rows(), labels=torch.arange(4) % 2, relation="same", **{"scale": 1.0, **options}
        ),
        {"scale": 2.0, "normalized": True},
        {"scale": NOT_NUMBERS, "normalized": NOT_FLAGS},
    ),
    "pairwise_softplus": (
        lambda **options: pairwise_softplus(
            rows(), labels=torch.arange(4) % 2, offsets=torch.zeros(4), relation="same", **options
        ),
        {"scale": 2.0},
        {"scale": NOT_NUMBERS},
    ),
    "indexed_lse": (
        lambda **options: indexed_lse(
            rows(), rows(), torch.arange(8).view(4, 2) % 4, **options
        ),
        {"scale": 2.0},
        {"scale": NOT_NUMBERS},
    ),
    "prepare_rows": (
        lambda **options: prepare_rows(rows() * 2, **options),
        {"normalize": False},
        {"normalize": NOT_FLAGS},
    ),
    "sample_pixels": (
        sampled,
        {"num_samples": 5, "num_classes": 3, "threshold": 0.5, "from_logits": False},
        {
            "num_samples": NOT_WHOLE, "num_classes": NOT_WHOLE, "threshold": NOT_NUMBERS,
            "from_logits": NOT_FLAGS,
        },
    ),
    "draw_negatives": (
        negatives,
        {"num_negatives": 5, "num_queries": 2, "temperature": 0.25},
        {"num_negatives": NOT_WHOLE, "num_queries": NOT_WHOLE, "temperature": NOT_NUMBERS},
    ),
    "class_relation": (
        lambda **options: class_relation(torch.eye(3, 8), **options),
        {"temperature": 0.25},
        {"temperature": NOT_NUMBERS},
    ),
    "class_centers": (
        lambda **options: class_centers(**{"num_classes": 5, "dim": 2, "steps": 3, **options}),
        {"num_classes": 6, "dim": 3, "temperature": 0.5, "steps": 4},
        {**dict.fromkeys(("num_classes", "dim", "steps"), NOT_WHOLE), "temperature": NOT_NUMBERS},
    ),
    "RunningClassMeans": (
        running_means,
        {"num_classes": 4, "dim": 8, "momentum": 0.5},
        {"num_classes": NOT_WHOLE, "dim": NOT_WHOLE, "momentum": NOT_NUMBERS},
    ),
    "MemoryQueue": (
        in_queue,
        {"size": 4, "dim": 2, "no_class": -2},
        {"size": NOT_WHOLE, "dim": NOT_WHOLE, "no_class": NOT_WHOLE},
    ),
    "SampledHead": (
        head,
        {"channels": (2,), "dim": 4, "spatial_dims": 2},
        {"channels": (2, "2", (2.5,), (True,)), "dim": NOT_WHOLE, "spatial_dims": NOT_WHOLE},
    ),
    "AnatomicalTemperature": (
        lambda **options: torch.tensor(AnatomicalTemperature(**{"total_iterations": 8, **options})(3)),
        {"total_iterations": 10, "low": 0.25, "high": 2.0, "period": 0.5, "seed": 3},
        {
            **dict.fromkeys(("total_iterations", "low", "high", "period"), NOT_NUMBERS),
            "seed": NOT_WHOLE,
        },
    ),
    "resize_labels": (
        lambda size: resize_labels(torch.arange(16).view(1, 4, 4), size),
        {"size": (2, 2)},
        {"size": (2, "22", (2.5, 2), (True, 2))},
    ),
    "sampled_features": (
        lambda size: sampled_features(torch.ones(1, 1, 2, 2), torch.tensor([1]), size),
        {"size": (3, 3)},
        {"size": (3, "33", (3.5, 3), (True, 3))},
    ),
}  # fmt: skip
PAIRS = [(name, option) for name, (_, values, _) in CASES.items() for option in values]
REFUSED = [
    (name, option, wrong)
    for name, (_, _, refused) in CASES.items()
    for option, values in refused.items()
    for wrong in values
]
# takes no number; or is another one's twin, which these tests reach through it
EXEMPT = {
    "FeatureTap", "allocate_centers", "gather_pixels", "use_backend", "AnatomicalContrastLoss",
    "CLIPLoss", "InfoNCELoss", "MultiPositiveNTXentLoss", "NTXentLoss", "RelationalLoss",
    "SAACLLoss", "SigLIPLoss", "__version__",
}  # fmt: skip


def as_numpy(value):
    if isinstance(value, tuple):
        return tuple(map(as_numpy, value))
    kinds = {bool: np.bool_, int: np.int32, float: np.float32}
    return kinds[type(value)](value)


@pytest.mark.parametrize(("name", "option"), PAIRS)
def test_numbers_of_numpy_give_what_pythons_give(name, option):
    call, values, _ = CASES[name]
    of_numpy, of_python = (
        call(**{option: as_numpy(values[option])}),
        call(**{option: values[option]}),
    )
    torch.testing.assert_close(of_numpy, of_python, atol=0, rtol=0)


@pytest.mark.parametrize(("name", "option", "wrong"), REFUSED)
def test_what_is_no_number_is_refused_by_its_name(name, option, wrong):
    with pytest.raises(TypeError, match=rf"{option}(\[\d\])? must be "):
        CASES[name][0](**{option: wrong})


UNBOUNDED = [(name, "ignore_index") for name in CASES if name != "SAACL"]  # no label equals it
UNBOUNDED += [("AnatomicalTemperature", "seed")]


@pytest.mark.parametrize(("name", "option"), [pair for pair in PAIRS if pair not in UNBOUNDED])
def test_numbers_beyond_all_bounds(name, option):
    value = (10**400, 10**400) if isinstance(CASES[name][1][option], tuple) else 10**400
    with pytest.raises((TypeError, ValueError), match=rf"{option}(\[\d\])?( \(.*\))? must be "):
        CASES[name][0](**{option: value})


@pytest.mark.parametrize("name", ["supcon_loss", "saacl_loss"])
@pytest.mark.parametrize("number", [2**400, -(2**400), 2**64])
def test_a_label_that_cannot_be_is_ignored_nowhere(name, number):
    torch.testing.assert_close(CASES[name][0](ignore_index=number), CASES[name][0]())


def test_every_public_name_is_here():
    assert set(action_kernels.__all__) - EXEMPT == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_every_number_of_a_signature_is_here(name):
    parameters = inspect.signature(getattr(action_kernels, name)).parameters.values()
    kinds = (
        "int",
        "float",
        "bool",
        "float | Tensor",
        "int | None",
        "float | None",
        "Sequence[int]",
    )
    assert {p.name for p in parameters if p.annotation in kinds} == set(CASES[name][1])


@pytest.mark.parametrize(
    "generator", [lambda g: class_centers(3, 8, generator=g), lambda g: MemoryQueue(3, 8, generator=g),
                  lambda g: sampled(generator=g)]
)  # fmt: skip
def test_a_seed_is_no_generator(generator):
    with pytest.raises(TypeError, match=r"generator must be a torch\.Generator or None, got int"):
        generator(3)


def test_a_center_weight_that_would_not_learn_is_refused():
    with pytest.raises(TypeError, match="center_weight must be a number, got Tensor"):
        labelled(saacl_loss, centers=centers())(center_weight=torch.tensor(0.2, requires_grad=True))


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (torch.eye(4, 8).to_sparse(), r"of layout torch\.sparse_coo"),
        (torch.nested.nested_tensor([torch.ones(2, 8), torch.ones(3, 8)]), "a nested tensor"),
    ],
)
def test_tensors_that_are_not_dense(tensor, kind):
    message = f"features must be a dense tensor, got one that is {kind}"
    with pytest.raises(TypeError, match=message):
        supcon_loss(tensor, torch.arange(4))
    with pytest.raises(TypeError, match="class_means must be a dense"):
        allocate_centers(torch.eye(4, 8), tensor)


@pytest.mark.parametrize("dtype", ["float32", torch.int32, torch.complex64])
def test_rows_of_other_dtypes(dtype):
    with pytest.raises(TypeError, match="dtype must be float16, bfloat16, float32 or float64, got"):
        prepare_rows(torch.eye(4), dtype=dtype)
