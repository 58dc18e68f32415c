"""Every loss on random inputs: values and gradients are the formula's, and broken inputs never pass.

``ACTION_KERNELS_TEST_CASES`` draws that many cases instead of the usual number; a failure names its seed,
and ``ACTION_KERNELS_TEST_SEED`` starts there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from drawing import FLOATS, Draw
from formulas import (
    Formula,
    candidates_of,
    masked_lse,
    multi_positive_nt_xent,
    saacl,
    same_class,
    supcon,
)
from torch import Tensor

import action_kernels
from action_kernels import classwise, prepare_rows
from action_kernels.ops import checks

CASES = int(os.environ.get("ACTION_KERNELS_TEST_CASES", 5600))
FIRST_SEED = int(os.environ.get("ACTION_KERNELS_TEST_SEED", 0))
MINIMUM_NORM = 1e-12  # shorter rows count as zero
MULTIPLE = (
    16  # of the rounding of one product: sums of up to 24 of them, exponentials and logarithms
)


@dataclass
class Case:
    """A call, and the same by its formula."""

    function: Callable[..., Tensor]
    tensors: dict[str, Tensor]
    options: dict[str, object]
    formula: Callable[[Formula], Tensor]
    dtype: torch.dtype
    temperature: float
    normalize: bool = True
    parts: dict[str, Tensor | None] = field(default_factory=dict)  # rows of a tensor that take part
    raw: tuple[str, ...] = ()  # tensors taken as they are: no pixels, not normalised
    temperature_name: str = "temperature"

    def __call__(self) -> Tensor:
        return self.function(**self.tensors, **self.options)

    def describe(self) -> str:
        tensors = {
            name: (tuple(t.shape), t.stride(), str(t.dtype)) for name, t in self.tensors.items()
        }
        return (
            f"{self.function.__name__}({tensors}, {self.options}), temperature {self.temperature}"
        )


def as_rows(case: Case, tensor: Tensor) -> Tensor:
    """(n, d) of rows, of a map, or of the queries of every class."""
    if case.function is action_kernels.anatomical_contrast_loss:
        return tensor.flatten(0, -2)
    return tensor.movedim(1, -1).reshape(-1, tensor.shape[1])


def row_norms(x: Tensor) -> Tensor:
    """(n, 1) in float64, without overflow."""
    largest = x.abs().amax(1, keepdim=True)
    largest = largest.where(largest > 0, 1)
    return (x / largest).norm(dim=1, keepdim=True) * largest


def exact_rows(case: Case, name: str) -> Tensor:
    """The rows that the loss multiplies, in float64: prepared in its dtype, which `assert_prepared` judges."""
    given = case.tensors[name].detach()
    if name in case.raw:
        return given.double()
    part = case.parts.get(name)
    rows = as_rows(case, given) if given.dim() == 3 and name == "queries" else given
    rows = prepare_rows(rows, mask=part, normalize=case.normalize, dtype=case.dtype).double()
    assert_prepared(rows, given, part, case)
    return rows


def assert_prepared(rows: Tensor, given: Tensor, part: Tensor | None, case: Case) -> None:
    """Unit rows to the last place of the dtype."""
    x = as_rows(case, given).double()
    x = x if part is None else x.where(part[:, None], 0)
    if case.normalize:
        norms = row_norms(x)
        x = (x / norms).where(norms >= MINIMUM_NORM, 0)
    sums = torch.float64 if given.dtype == torch.float64 else torch.float32
    eps = max(torch.finfo(case.dtype).eps, torch.finfo(sums).eps)
    tolerance = 6 * eps * x.abs() + 4 * torch.finfo(case.dtype).smallest_normal
    assert (rows - x).abs().le(tolerance).all(), "prepare_rows"


def evaluate(case: Case, upstream: Tensor | None) -> tuple[Tensor, Formula]:
    """The formula's result, weighted by the upstream gradient, with the gradients of its leaves."""
    leaves = {
        name: exact_rows(case, name).requires_grad_()
        for name, tensor in case.tensors.items()
        if tensor.is_floating_point() and name in (*case.parts, *case.raw)
    }
    temperature = torch.tensor(case.temperature, dtype=torch.float64, requires_grad=True)
    leaves["temperature"] = temperature
    formula = Formula(leaves, 1 / temperature)
    result = case.formula(formula)
    total = result.sum() if upstream is None else (result * upstream.double()).sum()
    if total.requires_grad:
        total.backward()
    return total.detach(), formula


def check(case: Case, draw: Draw) -> None:
    result = case()
    expected_dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    assert result.dtype == expected_dtype
    upstream = draw.normal(*result.shape).to(result.dtype) if result.dim() else None
    ours = result if upstream is None else (result * upstream).sum()
    exact, formula = evaluate(case, upstream)
    eps = torch.finfo(expected_dtype).eps
    reach = formula.reach()
    allowed = MULTIPLE * eps * (reach + abs(float(exact))) + 1e-37
    assert abs(float(ours.detach()) - float(exact)) <= allowed, (
        f"value {float(ours.detach())}, exact {float(exact)}, allowed {allowed:.1e}"
    )
    asked = {
        name: tensor
        for name, tensor in [*case.tensors.items(), *case.options.items()]
        if isinstance(tensor, Tensor) and tensor.requires_grad
    }
    if not ours.requires_grad:
        assert not asked
        return
    gradients = torch.autograd.grad(ours, list(asked.values()), allow_unused=True)
    for (name, tensor), gradient in zip(asked.items(), gradients, strict=True):
        gradient = torch.zeros_like(tensor) if gradient is None else gradient
        assert gradient.dtype == tensor.dtype
        if name == case.temperature_name:
            check_temperature_gradient(case, tensor.dtype, float(gradient), formula, eps)
        else:
            check_rows_gradient(case, name, as_rows(case, gradient).double(), formula, eps)


def check_temperature_gradient(
    case: Case, dtype: torch.dtype, gradient: float, formula: Formula, eps: float
) -> None:
    exact = float(formula.leaves["temperature"].grad)
    relative = MULTIPLE * eps * (1 + formula.logit_size())
    if case.dtype in (torch.float16, torch.bfloat16):
        relative += torch.finfo(case.dtype).eps  # it may be formed from the anchors' gradient
    allowed = relative * formula.reach() / case.temperature
    allowed += torch.finfo(dtype).eps * abs(exact) + torch.finfo(dtype).tiny
    sums = torch.finfo(torch.float64 if case.dtype == torch.float64 else torch.float32)
    allowed += 24 * sums.smallest_normal * formula.logit_size() / case.temperature  # what vanishes
    if dtype == torch.float16 and abs(exact) > 3e4:
        return  # beyond float16
    assert abs(gradient - exact) <= allowed, (
        f"gradient of temperature {gradient}, exact {exact}, allowed {allowed:.1e}"
    )


def check_rows_gradient(
    case: Case, name: str, gradient: Tensor, formula: Formula, eps: float
) -> None:
    leaf = formula.leaves[name]
    exact = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    bound = formula.reach_of(name)
    if name not in case.raw and case.normalize:
        x = as_rows(case, case.tensors[name].detach()).double()
        part = case.parts[name]
        x = x if part is None else x.where(part[:, None], 0)
        norms = row_norms(x)
        factor = (1 / norms).where(norms >= MINIMUM_NORM, 0)
        unit = x * factor
        exact = (exact - unit * (unit * exact).sum(1, keepdim=True)) * factor
        bound = bound * factor[:, 0]
    else:
        factor = torch.ones(len(leaf), 1, dtype=torch.float64)
    dtype = case.tensors[name].dtype
    coarse = max(torch.finfo(dtype).eps, torch.finfo(case.dtype).eps, eps)
    relative = MULTIPLE * eps * (1 + formula.logit_size()) + 4 * coarse
    tiny = 4 * max(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps, 1e-43)
    if case.dtype == torch.float16:
        tiny = max(tiny, 2.0**-23)
    sums = torch.finfo(torch.float64 if case.dtype == torch.float64 else torch.float32)
    below = sums.smallest_normal * float(formula.scale.detach()) * formula.largest_row() * 24
    tiny = (tiny + below) * exact.shape[1] ** 0.5 * (1 + factor[:, 0])  # exponentials that vanish
    allowed = relative * bound + tiny
    if dtype == torch.float16 and (bound + exact.norm(dim=1) > 3e4).any():
        return  # beyond float16
    error = (gradient - exact).norm(dim=1)
    worst = int((error - allowed).argmax()) if len(error) else 0
    assert (error <= allowed).all(), (
        f"gradient of {name}, row {worst}: {gradient[worst].tolist()}, exact {exact[worst].tolist()}, "
        f"error {float(error[worst]):.1e}, allowed {float(allowed[worst]):.1e}"
    )


# --- what each loss is drawn from ---


def draw_options(draw: Draw) -> tuple[torch.dtype, int, bool, float, dict[str, object]]:
    dtype, normalize = draw.choice(FLOATS), draw.chance(0.8)
    temperature, argument = draw.temperature(dtype)
    options = {"temperature": argument, "reduction": draw.choice(("mean", "sum", "none"))}
    return dtype, draw.size(1, 9), normalize, temperature, options


def reduced(values: Tensor, reduction: object, weights: Tensor, part: Tensor) -> Tensor:
    """Σ w l / Σ w over `part`, Σ w l, or w l."""
    if reduction == "none":
        return values * weights
    total = (values * weights).sum()
    if reduction == "sum":
        return total
    norm = weights[part].sum()
    return total / norm if norm > 0 else total * 0


@dataclass
class Anchors:
    """Labelled features as drawn, and what is known of them."""

    tensors: dict[str, Tensor]
    options: dict[str, object]
    classes: list[int | None]
    part: Tensor
    weights: Tensor
    pixels: tuple[int, ...]


def draw_anchors(
    draw: Draw, dim: int, dtype: torch.dtype, normalize: bool, num_classes: int, any_numbers: bool
) -> Anchors:
    pixels = draw.pixels()
    count = torch.Size(pixels).numel()
    ignore_index = draw.choice(IGNORE_OF[any_numbers])
    labels, classes = draw.labels(count, num_classes, ignore_index, any_numbers=any_numbers)
    mask = draw.mask(pixels)
    if mask is not None:
        classes = [c if m else None for c, m in zip(classes, mask.flatten().tolist(), strict=True)]
    part = torch.tensor([c is not None for c in classes])
    features = draw.features(pixels, dim, dtype, unit=normalize, left_out=~part)
    shape = (pixels[0], 1, *pixels[1:]) if draw.chance(0.2) else pixels
    options: dict[str, object] = {"ignore_index": ignore_index, "normalize": normalize}
    weights = torch.ones(count, dtype=torch.float64)
    if mask is not None:
        options["mask"] = mask
    if draw.chance(0.25):
        own = draw.weights(*pixels)
        options["sample_weight"] = own
        weights = weights * own.flatten().double()
    if draw.chance(0.25) and not any_numbers:
        of_classes = draw.weights(num_classes)
        options["weight"] = of_classes
        weights = weights * torch.tensor(
            [0.0 if c is None else float(of_classes[c]) for c in classes], dtype=torch.float64
        )
    tensors = {"features": features, "labels": draw.strided(labels.view(shape))}
    return Anchors(tensors, options, classes, part, weights.where(part, 0), pixels)


IGNORE_OF = {
    True: (-1, -1, 0, 7, 255, 256, -100, 1000, 2**31, -(2**40)),
    False: (-1, -1, -1, 0, 1, 255, 256, -100, 2**31),
}


def draw_keys(
    draw: Draw,
    dim: int,
    dtype: torch.dtype,
    normalize: bool,
    num_classes: int,
    numbers: dict[int, int] | None,
    ignore_index: int,
):
    pixels = draw.pixels()
    count = torch.Size(pixels).numel()
    classes: list[int | None] = [draw.choice((*range(num_classes), None)) for _ in range(count)]
    values = [ignore_index if c is None else c if numbers is None else numbers[c] for c in classes]
    classes = [None if v == ignore_index else c for v, c in zip(values, classes, strict=True)]
    return pixels, torch.tensor(values).view(pixels), classes


def supervised_case(draw: Draw, name: str) -> Case:
    """supcon_loss or multi_positive_nt_xent_loss, among themselves or over keys."""
    dtype, dim, normalize, temperature, options = draw_options(draw)
    num_classes, any_numbers = draw.size(1, 6), draw.chance(0.5)
    anchors = draw_anchors(draw, dim, dtype, normalize, num_classes, any_numbers)
    options |= anchors.options
    if not any_numbers and ("weight" not in options or draw.chance(0.5)):
        options["num_classes"] = num_classes
    options["mean_over"] = mean_over = draw.choice(("anchors", "with_positives", "pairs"))
    tensors, parts = dict(anchors.tensors), {"features": anchors.part}
    key_classes, key_part, keys = anchors.classes, anchors.part, "features"
    if draw.chance(0.5):
        keys = "keys"
        numbers = None
        if any_numbers:
            flat = anchors.tensors["labels"].flatten().double().tolist()
            numbers = {
                c: int(v) for c, v in zip(anchors.classes, flat, strict=True) if c is not None
            }
            numbers |= {c: 5000 + c for c in range(num_classes) if c not in numbers}
        pixels, key_labels, key_classes = draw_keys(
            draw, dim, dtype, normalize, num_classes, numbers, options["ignore_index"]
        )
        key_mask = draw.mask(pixels)
        if key_mask is not None:
            options["key_mask"] = key_mask
            key_classes = [
                c if m else None
                for c, m in zip(key_classes, key_mask.flatten().tolist(), strict=True)
            ]
        key_part = torch.tensor([c is not None for c in key_classes])
        key_dtype = draw.choice(FLOATS) if draw.chance(0.2) and normalize else dtype
        tensors["keys"] = draw.features(pixels, dim, key_dtype, unit=normalize, left_out=~key_part)
        tensors["key_labels"] = key_labels
        parts["keys"] = key_part
    same = same_class(anchors.classes, key_classes)
    candidates = candidates_of(anchors.part, key_part, self_=keys == "features")
    loss = {"supcon_loss": supcon, "multi_positive_nt_xent_loss": multi_positive_nt_xent}[name]

    def formula(f: Formula) -> Tensor:
        s, dots = f.logits("features", keys), f.logits("features", keys)
        values = loss(s, dots, candidates, same)
        count = (candidates & same).sum(1)
        part, weights = anchors.part, anchors.weights
        if mean_over == "with_positives":
            part = part & (count > 0)
        if mean_over == "pairs" and options["reduction"] == "mean":
            weights = weights * count
        values = reduced(values, options["reduction"], weights, part)
        return values.view(anchors.tensors["labels"].shape) if values.dim() else values

    return Case(
        getattr(action_kernels, name),
        tensors,
        options,
        formula,
        dtype,
        temperature,
        normalize,
        parts,
    )


def saacl_case(draw: Draw) -> Case:
    dtype, dim, normalize, temperature, options = draw_options(draw)
    num_classes = draw.size(1, 6)
    anchors = draw_anchors(draw, dim, dtype, normalize, num_classes, any_numbers=False)
    options |= anchors.options
    options["positives"] = positives = draw.choice(("mean", "sum", "balanced"))
    options["center_weight"] = weight = draw.choice((0.0, 0.2, 1.0, 3.0))
    tensors, parts = dict(anchors.tensors), {"features": anchors.part}
    centers = torch.nn.functional.normalize(draw.normal(num_classes, dim))
    tensors["centers"] = draw.strided(
        centers.to(draw.choice((torch.float32, torch.float64)))
    ).requires_grad_(draw.chance(0.5))
    queue, paired = draw.chance(0.5), draw.chance(0.5)
    if queue:
        pixels, key_labels, key_classes = draw_keys(
            draw, dim, dtype, normalize, num_classes, None, options["ignore_index"]
        )
        tensors["keys"] = draw.features(pixels, dim, dtype, unit=normalize).requires_grad_(
            draw.chance(0.5)
        )
        tensors["key_labels"] = key_labels
        parts["keys"] = None
        if paired:
            tensors["paired_keys"] = draw.features(
                anchors.pixels, dim, dtype, unit=normalize, left_out=~anchors.part
            ).requires_grad_(draw.chance(0.5))
            parts["paired_keys"] = anchors.part
    own = torch.tensor([0 if c is None else c for c in anchors.classes])

    def formula(f: Formula) -> Tensor:
        center = f.logits("features", "centers").gather(1, own[:, None])[:, 0]
        if not queue:
            candidates = candidates_of(anchors.part, anchors.part, self_=True)
            positive = candidates & same_class(anchors.classes, anchors.classes)
            lse = masked_lse(f.logits("features", "features"), candidates)
            positive_sum = (f.logits("features", "features") * positive).sum(1)
            count = positive.sum(1)
        else:
            positive = same_class(anchors.classes, key_classes)
            columns = [f.logits("features", "keys"), f.logits("features", "centers")]
            positive_sum = (f.logits("features", "keys") * positive).sum(1)
            count = positive.sum(1)
            if paired:
                columns.append(f.pair_logits("features", "paired_keys")[:, None])
                positive_sum = positive_sum + f.pair_logits("features", "paired_keys")
                count = count + 1
            lse = torch.cat(columns, 1).logsumexp(1)
        values = saacl(lse, positive_sum, count, center, weight, positives).where(anchors.part, 0)
        values = reduced(values, options["reduction"], anchors.weights, anchors.part)
        return values.view(anchors.tensors["labels"].shape) if values.dim() else values

    return Case(
        action_kernels.saacl_loss,
        tensors,
        options,
        formula,
        dtype,
        temperature,
        normalize,
        parts,
        raw=("centers",),
    )


def info_nce_case(draw: Draw) -> Case:
    dtype, dim, normalize, temperature, options = draw_options(draw)
    options["normalize"] = normalize
    n, bank = draw.size(1, 16), draw.chance(0.5)
    m = n if bank else n + draw.choice((0, 0, 5))
    tensors = {
        "queries": draw.features((n,), dim, dtype, unit=normalize),
        "keys": draw.features((m,), dim, dtype, unit=normalize),
    }
    if bank:
        tensors["bank"] = draw.features(
            (draw.size(1, 20),), dim, dtype, unit=normalize
        ).requires_grad_(draw.chance(0.5))
    weights = torch.ones(n, dtype=torch.float64)
    if draw.chance(0.3):
        options["sample_weight"] = own = draw.weights(n)
        weights = own.double()

    def formula(f: Formula) -> Tensor:
        positive = f.pair_logits("queries", "keys")
        if bank:
            lse = torch.cat(
                (f.pair_logits("queries", "keys")[:, None], f.logits("queries", "bank")), 1
            ).logsumexp(1)
        else:
            lse = f.logits("queries", "keys").logsumexp(1)
        return reduced(
            lse - positive, options["reduction"], weights, torch.ones(n, dtype=torch.bool)
        )

    return Case(
        action_kernels.info_nce_loss,
        tensors,
        options,
        formula,
        dtype,
        temperature,
        normalize,
        dict.fromkeys(tensors),
    )


def nt_xent_case(draw: Draw) -> Case:
    dtype, dim, normalize, temperature, options = draw_options(draw)
    options["normalize"] = normalize
    n = draw.size(1, 12)
    tensors = {
        name: draw.features((n,), dim, dtype, unit=normalize) for name in ("first", "second")
    }
    itself = torch.eye(n, dtype=torch.bool)

    def formula(f: Formula) -> Tensor:
        values = []
        for own, other in (("first", "second"), ("second", "first")):
            same = f.logits(own, own).masked_fill(itself, -torch.inf)
            lse = torch.cat((same, f.logits(own, other)), 1).logsumexp(1)
            values.append(lse - f.pair_logits(own, other))
        ones = torch.ones(2 * n)
        return reduced(torch.cat(values), options["reduction"], ones.double(), ones > 0)

    return Case(
        action_kernels.nt_xent_loss,
        tensors,
        options,
        formula,
        dtype,
        temperature,
        normalize,
        dict.fromkeys(tensors),
    )


def clip_case(draw: Draw) -> Case:
    dtype, dim, normalize, temperature, options = draw_options(draw)
    options["normalize"] = normalize
    n = draw.size(1, 16)
    tensors = {name: draw.features((n,), dim, dtype, unit=normalize) for name in ("image", "text")}

    def formula(f: Formula) -> Tensor:
        rows = f.logits("image", "text").logsumexp(1) + f.logits("text", "image").logsumexp(1)
        ones = torch.ones(n)
        return reduced(
            rows / 2 - f.pair_logits("image", "text"), options["reduction"], ones.double(), ones > 0
        )

    return Case(
        action_kernels.clip_loss,
        tensors,
        options,
        formula,
        dtype,
        temperature,
        normalize,
        dict.fromkeys(tensors),
    )


def siglip_case(draw: Draw) -> Case:
    dtype, dim, normalize, temperature, options = draw_options(draw)
    options |= {"normalize": normalize, "bias": draw.choice((-10.0, 0.0, 3.0))}
    n = draw.size(1, 12)
    m = n + draw.choice((0, 0, 4))
    tensors = {
        "image": draw.features((n,), dim, dtype, unit=normalize),
        "text": draw.features((m,), dim, dtype, unit=normalize),
    }
    sign = torch.full((n, m), -1.0, dtype=torch.float64).fill_diagonal_(1)

    def formula(f: Formula) -> Tensor:
        z = sign * (f.logits("image", "text") + options["bias"])
        values = torch.logaddexp(-z, torch.zeros_like(z)).sum(1)
        ones = torch.ones(n)
        return reduced(values, options["reduction"], ones.double(), ones > 0)

    return Case(
        action_kernels.siglip_loss,
        tensors,
        options,
        formula,
        dtype,
        temperature,
        normalize,
        dict.fromkeys(tensors),
    )


def relational_case(draw: Draw) -> Case:
    dtype, dim, _, temperature, options = draw_options(draw)
    n, m = draw.size(0, 12), draw.size(1, 20)
    tensors = {
        name: draw.features((count,), dim, dtype)
        for name, count in (("student", n), ("teacher", n), ("memory", m))
    }
    for name in ("teacher", "memory"):
        tensors[name] = tensors[name].detach()
    if draw.chance(0.2) and n:
        tensors["teacher"] = tensors["student"].detach()
    of_teacher = temperature if draw.chance(0.3) else 10 ** draw.random.uniform(-3, 3)
    options = {"student_temperature": options["temperature"], "teacher_temperature": of_teacher}
    scale = torch.tensor(1 / of_teacher, dtype=torch.float64)

    def formula(f: Formula) -> Tensor:
        of_teacher = [f.logits("teacher", "memory", scale) for _ in range(3)]
        of_student = [f.logits("student", "memory") for _ in range(2)]
        weights = of_teacher[0].softmax(1)
        negative_entropy = (weights * of_teacher[1]).sum() - of_teacher[2].logsumexp(1).sum()
        cross = of_student[0].logsumexp(1).sum() - (weights * of_student[1]).sum()
        return (negative_entropy + cross) / max(n, 1)

    sums = torch.float64 if dtype == torch.float64 else torch.float32
    return Case(
        action_kernels.relational_loss,
        tensors,
        options,
        formula,
        sums,
        temperature,
        True,
        dict.fromkeys(tensors),
        temperature_name="student_temperature",
    )


def anatomical_case(draw: Draw) -> Case:
    dtype, dim, _, temperature, options = draw_options(draw)
    del options["reduction"]
    num_classes, q, k, m = draw.size(1, 4), draw.size(1, 5), draw.size(0, 7), draw.size(1, 15)
    mask = draw.mask((num_classes, q))
    counted = torch.ones(num_classes, q, dtype=torch.bool) if mask is None else mask
    queries = draw.features((num_classes, q), dim, dtype, left_out=~counted)  # (K, d, q)
    tensors = {
        "queries": queries.detach().movedim(1, -1).requires_grad_(),
        "prototypes": draw.features((num_classes,), dim, dtype, left_out=~counted.any(1)).detach(),
    }
    shape = (num_classes, k) if draw.chance(0.5) else (num_classes, q, k)
    index = torch.randint(-2, m, shape, generator=draw.generator)
    own = index[:, None].expand(num_classes, q, k) if index.dim() == 2 else index
    used = own[counted].unique()
    unused = torch.ones(m, dtype=torch.bool)
    unused[used[used >= 0]] = False
    tensors |= {
        "bank": draw.features((m,), dim, dtype, left_out=unused).detach(),
        "negative_index": index,
    }
    weights, of_classes = counted.double(), torch.ones(num_classes, dtype=torch.float64)
    if mask is not None:
        options["mask"] = mask
    if draw.chance(0.3):
        options["sample_weight"] = draw.weights(num_classes, q)
        weights = weights * options["sample_weight"].double()
    if draw.chance(0.3):
        options["weight"] = draw.weights(num_classes)
        of_classes = of_classes * options["weight"].double()
    of_query = torch.arange(num_classes).repeat_interleave(q)[:, None]
    flat = own.reshape(num_classes * q, k)

    def formula(f: Formula) -> Tensor:
        positive = f.logits("queries", "prototypes").gather(1, of_query)[:, 0]
        negatives = f.logits("queries", "bank").gather(1, flat.clamp(min=0))
        lse = masked_lse(negatives, flat >= 0) if k else torch.full_like(positive, -torch.inf)
        losses = torch.logaddexp(lse - positive, torch.zeros_like(lse)).view(num_classes, q)
        means = (losses * weights).sum(1) / weights.sum(1).where(weights.sum(1) > 0, 1)
        own_weight = of_classes.where(weights.sum(1) > 0, 0)
        return (means * own_weight).sum() / own_weight.sum().where(own_weight.sum() > 0, 1)

    sums = torch.float64 if dtype == torch.float64 else torch.float32
    parts = {"queries": counted.flatten(), "prototypes": counted.any(1), "bank": ~unused}
    return Case(
        action_kernels.anatomical_contrast_loss,
        tensors,
        options,
        formula,
        sums,
        temperature,
        True,
        parts,
    )


CASES_OF: dict[str, Callable[[Draw], Case]] = {
    "supcon": lambda draw: supervised_case(draw, "supcon_loss"),
    "multi positive": lambda draw: supervised_case(draw, "multi_positive_nt_xent_loss"),
    "saacl": saacl_case,
    "info nce": info_nce_case,
    "nt xent": nt_xent_case,
    "clip": clip_case,
    "siglip": siglip_case,
    "relational": relational_case,
    "anatomical": anatomical_case,
}


@pytest.mark.parametrize("name", CASES_OF)
def test_values_and_gradients_are_the_formulas(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(FIRST_SEED, FIRST_SEED + CASES // len(CASES_OF)):
        draw = Draw(seed)
        case = CASES_OF[name](draw)
        looks = draw.chance(0.8)
        with monkeypatch.context() as patch:
            if draw.chance(0.3):  # as with many classes, and many rows
                patch.setattr(classwise, "ONE_HOT_CLASSES", 1)
                patch.setattr(classwise, "CHUNK_ELEMENTS", 16)
            if not looks:  # as on a GPU and in a compiled graph
                patch.setattr(checks, "values_readable", lambda *_: False)
            try:
                check(case, draw)
            except Exception as error:
                raise AssertionError(
                    f"seed {seed}, looks {looks}: {case.describe()}: {error}"
                ) from error


# --- inputs that are broken ---


def used_rows(case: Case, name: str) -> list[int]:
    part = case.parts.get(name)
    count = as_rows(case, case.tensors[name]).shape[0]
    return list(range(count)) if part is None else part.nonzero().flatten().tolist()


def with_number(tensor: Tensor, row: int, value: float, case: Case) -> Tensor:
    """A copy with one number of one row replaced."""
    copy = tensor.detach().clone(memory_format=torch.contiguous_format)
    if tensor.dim() > 2 and case.function is not action_kernels.anatomical_contrast_loss:
        spatial = tensor.shape[2:].numel()
        copy.view(copy.shape[0], copy.shape[1], -1)[row // spatial, 0, row % spatial] = value
    else:
        copy.view(-1, copy.shape[-1])[row, 0] = value
    return copy.requires_grad_(tensor.requires_grad)


def break_values(case: Case, draw: Draw) -> str | None:
    """Put a number into what takes part that no loss can use; None: there is no place for it."""
    tensors, options = case.tensors, case.options
    kind = draw.choice(("features", "features", "temperature", "labels", "weights"))
    if kind == "features":
        name = draw.choice([n for n in tensors if n in (*case.parts, *case.raw)])
        rows = used_rows(case, name)
        if name == "centers":  # that of a class without an anchor is not used
            labels = case.tensors["labels"].flatten()
            rows = labels.long()[case.parts["features"]].tolist()  # torch 2.6 indexes no uint16
        if not rows:
            return None
        value = draw.choice((torch.nan, torch.inf, -torch.inf)) if case.normalize else torch.nan
        tensors[name] = with_number(tensors[name], draw.choice(rows), value, case)
        return f"{value} in {name}"
    if kind == "temperature":
        value = draw.choice((0.0, -0.1, torch.nan, torch.inf, -torch.inf, 1e-38, 1e35))
        options[case.temperature_name] = torch.tensor(value)
        return f"temperature {value}"
    if kind == "labels":
        name = draw.choice([n for n in tensors if n.endswith("labels")] or [None])
        if name is None or ("num_classes" not in options and "centers" not in tensors):
            return None
        rows = case.parts["features"] if name == "labels" else torch.ones(tensors[name].numel()) > 0
        if "key_mask" in options and name == "key_labels":
            rows = options["key_mask"].flatten()
        rows = rows.nonzero().flatten().tolist()
        wrong = draw.choice((100, -3, 0.5))
        if not rows or wrong == options["ignore_index"]:
            return None
        flat = tensors[name].flatten().double()
        flat[draw.choice(rows)] = wrong
        tensors[name] = flat.view(tensors[name].shape)
        return f"{wrong} in {name}"
    name = draw.choice([n for n in ("weight", "sample_weight") if n in options] or [None])
    if name is None:
        return None
    value = draw.choice((torch.nan, -1.0, torch.inf))
    places = torch.ones(options[name].numel()) > 0
    if name == "sample_weight":
        places = case.parts.get("features", case.parts.get("queries"))
        places = torch.ones(options[name].numel()) > 0 if places is None else places
    elif "features" in case.parts:  # a class that no anchor has is not looked for
        return None
    places = places.nonzero().flatten().tolist()
    if not places or case.function is action_kernels.anatomical_contrast_loss:
        return None
    weights = options[name].clone()
    weights.view(-1)[draw.choice(places)] = value
    options[name] = weights
    return f"{value} in {name}"


def break_form(case: Case, draw: Draw) -> str:
    """A shape, dtype, device or option that does not fit."""
    name = draw.choice(list(case.tensors))
    tensor = case.tensors[name]
    kind = draw.choice(("columns", "dtype", "device", "option", "dimensions"))
    if kind == "option":
        option = draw.choice(
            [
                o
                for o in ("reduction", "positives", "mean_over", "temperature", "mask")
                if o in case.options
            ]
            or [case.temperature_name]
        )
        case.options[option] = {"temperature": "warm", "mask": torch.ones(1, 2, 3, 4, 5) > 0}.get(
            option, "least" if option != case.temperature_name else None
        )
        return f"{option} {case.options[option]}"
    if kind == "dtype":
        case.tensors[name] = tensor.detach().to(torch.complex64)
    elif kind == "device" and len(case.tensors) > 1:
        case.tensors[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    elif kind == "dimensions":
        case.tensors[name] = tensor.detach()[None, None, None]
    elif tensor.dim() > 1 and tensor.is_floating_point():
        axis = 2 if name == "queries" and tensor.dim() == 3 else 1
        case.tensors[name] = torch.cat((tensor, tensor.narrow(axis, 0, 1)), axis).detach()
        if len([n for n in case.tensors if n in (*case.parts, *case.raw)]) == 1:
            case.tensors[name] = case.tensors[name].to(torch.complex64)  # alone, any dim fits
    else:
        case.tensors[name] = torch.cat((tensor, tensor, tensor)).detach()
    return f"{kind} of {name}"


def unlooked(case: Case) -> Tensor:
    """The result; NaN where a kernel that is handed the number refuses it."""
    try:
        return case()
    except RuntimeError as error:
        if "scale must be finite" not in str(error):
            raise
        return torch.tensor(torch.nan)


@pytest.mark.parametrize("name", CASES_OF)
def test_broken_inputs_raise_or_give_nan(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(FIRST_SEED, FIRST_SEED + CASES // (4 * len(CASES_OF))):
        draw = Draw(seed)
        case = CASES_OF[name](draw)
        whole = case().detach()
        before, options = dict(case.tensors), dict(case.options)
        fault = break_values(case, draw)
        if fault is not None:
            given = f"seed {seed}, {fault}: {case.describe()}"
            with pytest.raises((TypeError, ValueError)):
                pytest.fail(f"{given} gave {case()}")
            with monkeypatch.context() as patch:
                patch.setattr(checks, "values_readable", lambda *_: False)
                result = unlooked(case)
            # what is 0 by definition, whatever its rows hold, may stay so
            assert not result.isfinite().all() or not whole.any(), f"{given} gave {result}"
        case.tensors, case.options = before, options
        fault = break_form(case, draw)
        with pytest.raises((TypeError, ValueError)):
            pytest.fail(f"seed {seed}, {fault}: {case.describe()} gave {case()}")


@pytest.mark.parametrize("name", CASES_OF)
def test_nan_stays_nan_in_a_compiled_graph(name: str) -> None:
    """As above, with a graph's own idea of what may be looked at."""
    for seed in range(100):
        draw = Draw(seed)
        case = CASES_OF[name](draw)
        rows = used_rows(case, next(iter(case.parts)))
        if rows and case().any():
            break
    first = next(iter(case.parts))
    case.tensors[first] = with_number(case.tensors[first], rows[0], torch.nan, case)
    torch._dynamo.reset()  # all losses enter by one wrapper, whose graphs are counted together
    compiled = torch.compile(case.function, backend="eager", fullgraph=True)
    assert compiled(**case.tensors, **case.options).isnan().any()
