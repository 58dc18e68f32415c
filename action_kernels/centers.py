"""Class centres on the unit sphere, running class means, and the allocation of centres to classes."""

from __future__ import annotations

import functools
import itertools
import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from action_kernels.autocast import without_autocast
from action_kernels.distributed import processes_of
from action_kernels.labels import label_values
from action_kernels.ops import checks, scalars
from action_kernels.ops.all_reduce_sum import all_reduce_sum
from action_kernels.ops.prepare_rows import MINIMUM_NORM, prepare_rows
from action_kernels.pixels import labelled_rows, pixel_shape

ENUMERATED_CLASSES = 8  # up to here all permutations are compared on the device: 8! × 8 sums
OBJECTIVES = ("distance", "cosine")
SMOOTH, SHARP = (
    0.1,
    1e-3,
)  # temperatures from which, and down to which, centres of lower ones are sought


def class_centers(
    num_classes: int,
    dim: int,
    *,
    temperature: float = 0.1,
    steps: int = 2000,
    generator: torch.Generator | None = None,
) -> Tensor:
    """K unit vectors in R^d as far apart as they can be (ACTION++, eq. 3).

    The minimiser of ``Σ_c log Σ_c' exp(ψ_c · ψ_c' / τ)``. For ``dim ≥ num_classes − 1`` it is the
    regular simplex, ψ_c · ψ_c' = −1/(K−1), built in closed form (in the first K−1 coordinates); below,
    it is found by gradient descent.

    Args:
        num_classes: K ≥ 1.
        dim: d ≥ 1.
        temperature, steps: of the gradient descent. Below 1e-3, where the nearest neighbour decides alone, the
            temperature changes nothing.
        generator: of its start; None starts from a fixed seed.

    Returns:
        (K, d) float32.

    Examples:
        >>> from action_kernels import class_centers
        >>> centers = class_centers(num_classes=3, dim=16)
        >>> (centers @ centers.T).round(decimals=3)  # −1/2 between any two of three
        tensor([[ 1.0000, -0.5000, -0.5000],
                [-0.5000,  1.0000, -0.5000],
                [-0.5000, -0.5000,  1.0000]])
    """
    num_classes, dim = scalars.count("num_classes", num_classes, 1), scalars.count("dim", dim, 1)
    temperature = scalars.temperature("temperature", temperature)
    steps = scalars.count("steps", steps, 1)
    generator = scalars.generator(generator)
    if num_classes == 1:
        return torch.eye(1, dim)
    if dim >= num_classes - 1:
        return _simplex(num_classes, dim).float()
    return _spread_out(num_classes, dim, temperature, steps, generator).float()


def _simplex(num_classes: int, dim: int) -> Tensor:
    """Rows: the unit basis of R^K less its mean, in an orthonormal basis of that hyperplane."""
    centers = torch.zeros(num_classes, dim, dtype=torch.float64)
    for i in range(1, num_classes):  # column i − 1: the i-th Helmert contrast
        length = math.sqrt(i * (i + 1))
        centers[:i, i - 1] = 1 / length
        centers[i, i - 1] = -i / length
    return centers * math.sqrt(num_classes / (num_classes - 1))


@torch.enable_grad()
def _spread_out(
    num_classes: int, dim: int, temperature: float, steps: int, generator: torch.Generator | None
) -> Tensor:
    generator = generator or torch.Generator().manual_seed(0)
    start = torch.randn(num_classes, dim, dtype=torch.float64, generator=generator)
    free = start.requires_grad_()
    optimizer = torch.optim.Adam([free], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    target = max(temperature, SHARP)
    for step in range(steps):
        optimizer.zero_grad()
        # At a low temperature a centre feels its nearest neighbour alone and none finds its way around: cool down to it.
        cooling = max(target, SMOOTH * (target / SMOOTH) ** min(1.0, 1.5 * step / steps))
        center_energy(torch.nn.functional.normalize(free), cooling).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return torch.nn.functional.normalize(free.detach())


def center_energy(centers: Tensor, temperature: float = 0.1) -> Tensor:
    """``Σ_c log Σ_c' exp(ψ_c · ψ_c' / τ)`` of unit rows (K, d): what the centres minimise (eq. 3)."""
    return (centers @ centers.T / temperature).logsumexp(1).sum()


def allocate_centers(
    centers: Tensor, class_means: Tensor, *, objective: str = "distance"
) -> Tensor:
    """The centre of each class: ``π* = argmin_π Σ_c ‖ψ_π(c) − φ̄_c‖`` (ACTION++, eq. 4).

    Up to eight classes all permutations are compared on the device, without waiting for it; above,
    `scipy.optimize.linear_sum_assignment` solves the assignment on the CPU. Classes whose mean is
    zero (not seen yet) take what is left.

    Args:
        centers: (K, d) unit rows.
        class_means: (K, d) running mean directions.
        objective: ``"distance"``, or ``"cosine"`` to maximise Σ_c ψ_π(c) · φ̄_c as the published
            implementation does.

    Returns:
        (K,) int64 π, a permutation: ``centers[π]`` has the centre of class c in row c.

    Examples:
        >>> from action_kernels import allocate_centers, class_centers
        >>> centers = class_centers(num_classes=3, dim=2)
        >>> class_means = centers[[2, 0, 1]]  # where the classes happen to be
        >>> allocate_centers(centers, class_means)
        tensor([2, 0, 1])
    """
    checks.check_matrix("centers", centers)
    checks.check_matrix("class_means", class_means)
    checks.check_shape("class_means", class_means, centers.shape)
    if centers.shape[0] == 0:
        raise ValueError(f"centers must hold a row for every class, got {checks.shape_of(centers)}")
    checks.check_same_device(centers=centers, class_means=class_means)
    checks.check_choice("objective", objective, OBJECTIVES)
    checks.check_finite("centers", centers)
    checks.check_finite("class_means", class_means)
    cost = _allocation_cost(centers.detach().double(), class_means.detach().double(), objective)
    allocation: Tensor = torch.ops.action_kernels.cheapest_assignment(cost)
    return allocation


@torch.library.custom_op("action_kernels::cheapest_assignment", mutates_args=())
def _cheapest_assignment(cost: Tensor) -> Tensor:
    """(K,) int64: the permutation π with the least Σ_c cost[c, π_c]. An op, so that it compiles as one."""
    if cost.shape[0] <= ENUMERATED_CLASSES:
        return _cheapest_permutation(cost)
    return _linear_sum_assignment(cost)


@_cheapest_assignment.register_fake
def _(cost: Tensor) -> Tensor:
    return cost.new_empty(cost.shape[0], dtype=torch.int64)


def _allocation_cost(centers: Tensor, class_means: Tensor, objective: str) -> Tensor:
    """(K, K): cost of giving class c (row) the centre c' (column)."""
    # Squares of float64 numbers can be none; no assignment changes where all are divided by one number.
    largest = torch.stack((centers.abs().max(), class_means.abs().max())).max().clamp(min=1)
    centers, class_means = centers / largest, class_means / largest
    products = class_means @ centers.T
    if objective == "cosine":
        return -products
    squares = class_means.square().sum(1, keepdim=True) + centers.square().sum(1) - 2 * products
    return squares.clamp(min=0).sqrt()


def _cheapest_permutation(cost: Tensor) -> Tensor:
    num_classes = cost.shape[0]
    permutations = _permutations(num_classes, cost.device)
    classes = torch.arange(num_classes, device=cost.device)
    best = cost[classes, permutations].sum(1).argmin(0, keepdim=True)
    return permutations.index_select(0, best)[0]  # permutations[best] would wait for the device


@functools.lru_cache(maxsize=16)
def _permutations(num_classes: int, device: torch.device) -> Tensor:
    """(K!, K), kept on the device: 2.5 MB for eight classes."""
    return torch.tensor(list(itertools.permutations(range(num_classes))), device=device)


def _linear_sum_assignment(cost: Tensor) -> Tensor:
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError(
            f"allocating {cost.shape[0]} centers (more than {ENUMERATED_CLASSES}) needs scipy: "
            "pip install scipy"
        ) from error
    _, columns = linear_sum_assignment(cost.cpu().numpy())
    return torch.as_tensor(columns, dtype=torch.int64, device=cost.device)


class RunningClassMeans(nn.Module):
    """The running mean direction of each class on the unit sphere (ACTION++, eq. 4).

    ``φ̄_c ← normalise(momentum · φ̄_c + (1 − momentum) · φ̄_c(B))``; a class absent from the batch keeps
    its mean, a class seen for the first time takes the batch's.

    Buffers: `means` (K, d), zero until a class is seen. With a `group` of processes their batches are
    one, and the means are the same on all of them.

    Examples:
        >>> import torch
        >>> from action_kernels import RunningClassMeans
        >>> running = RunningClassMeans(num_classes=2, dim=2)
        >>> running.update(torch.tensor([[2.0, 0.0], [3.0, 0.0]]), torch.tensor([1, 1]))
        >>> running.means  # class 0 was not seen yet
        tensor([[0., 0.],
                [1., 0.]])
    """

    means: Tensor

    def __init__(
        self,
        num_classes: int,
        dim: int,
        momentum: float = 0.9,
        *,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        momentum = scalars.not_negative("momentum", momentum)
        if momentum >= 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        num_classes = scalars.count("num_classes", num_classes, 1)
        dim = scalars.count("dim", dim, 1)
        self.momentum, self._group = momentum, processes_of(group)
        self.register_buffer("means", torch.zeros(num_classes, dim))

    @torch.no_grad()
    def update(
        self,
        features: Tensor,
        labels: Tensor,
        *,
        mask: Tensor | None = None,
        ignore_index: int = -1,
        normalize: bool = True,
    ) -> None:
        """Take in a batch: `features` (n, d) or (B, d, *spatial), `labels` (n,) or (B, *spatial).

        A class with a NaN among its features keeps its mean, where NaN is not an error.

        Raises:
            TypeError, ValueError: naming the argument that does not fit. The means are then as they were.
        """
        self.means.copy_(
            self.updated(
                features, labels, mask=mask, ignore_index=ignore_index, normalize=normalize
            )
        )

    @torch.no_grad()
    def updated(
        self,
        features: Tensor,
        labels: Tensor,
        *,
        mask: Tensor | None = None,
        ignore_index: int = -1,
        normalize: bool = True,
    ) -> Tensor:
        """The means (K, d) that `update` would store."""
        dim = self.means.shape[1]
        pixel_shape("features", features)
        if features.shape[1] != dim:
            raise ValueError(f"features must have dim {dim}, got shape {checks.shape_of(features)}")
        checks.check_same_device(features=features, means=self.means)
        with without_autocast(features.device.type):
            return self._blended_with(features, labels, mask, ignore_index, normalize)

    def _blended_with(
        self,
        features: Tensor,
        labels: Tensor,
        mask: Tensor | None,
        ignore_index: int,
        normalize: bool,
    ) -> Tensor:
        num_classes, pixels = self.means.shape[0], pixel_shape("features", features)
        values = label_values("labels", labels, pixels, ignore_index=ignore_index, mask=mask)
        batch = labelled_rows(
            "features", features.detach(), values.in_classes(num_classes), normalize=normalize
        )
        sums = all_reduce_sum(batch.sums(num_classes), self._group)
        batch_means = prepare_rows(sums, dtype=self.means.dtype)  # 0: absent
        blended = self.momentum * self.means + (1 - self.momentum) * batch_means
        present = batch_means.norm(dim=1, keepdim=True) > MINIMUM_NORM  # False for NaN
        return torch.where(present, prepare_rows(blended), self.means)
