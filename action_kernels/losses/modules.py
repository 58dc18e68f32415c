"""Every loss as a module: the options are given once, the tensors to each call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from action_kernels.losses.anatomical_contrast import anatomical_contrast_loss
from action_kernels.losses.info_nce import clip_loss, info_nce_loss, nt_xent_loss
from action_kernels.losses.multi_positive_nt_xent import multi_positive_nt_xent_loss
from action_kernels.losses.reduction import MEAN_OVER, REDUCTIONS
from action_kernels.losses.relational import relational_loss
from action_kernels.losses.saacl import POSITIVES, saacl_loss
from action_kernels.losses.scale import checked_temperature
from action_kernels.losses.siglip import siglip_loss
from action_kernels.losses.supcon import supcon_loss
from action_kernels.ops import checks, scalars

CHOICES = {"reduction": REDUCTIONS, "mean_over": MEAN_OVER, "positives": POSITIVES}


class _Loss(nn.Module):
    """Keeps options by their names; tensors among them move with the module, parameters learn."""

    function: ClassVar[Callable[..., Tensor]]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self._names = tuple(options)
        for name, value in options.items():
            value = _checked_option(name, value)
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value, persistent=False)
            else:
                setattr(self, name, value)

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._names}

    def forward(self, *tensors: Tensor, **arguments: Any) -> Tensor:
        """The loss of `tensors`; keyword arguments are those of the function, and go before the options."""
        return type(self).function(*tensors, **{**self._options(), **arguments})

    def extra_repr(self) -> str:
        shown = ((name, getattr(self, name)) for name in self._names)
        return ", ".join(
            f"{name}={'tensor' if isinstance(value, Tensor) else repr(value)}"
            for name, value in shown
        )


def _checked_option(name: str, value: Any) -> Any:
    """The option's value as the function takes it; an error here, not at the first call."""
    if name.endswith("temperature"):
        return checked_temperature(name, value)
    if name == "normalize":
        return scalars.flag(name, value)
    if name == "center_weight":
        return scalars.not_negative(name, value)
    if name == "ignore_index" and value is not None:
        return scalars.whole(name, value)
    if name == "num_classes" and value is not None:
        return scalars.count(name, value, 1)
    if name in CHOICES:
        checks.check_choice(name, value, CHOICES[name])
    return value


class SupConLoss(_Loss):
    """`supcon_loss` as a module: ``SupConLoss(temperature=0.1)(features, labels)``.

    Examples:
        >>> import torch
        >>> from action_kernels import SupConLoss
        >>> criterion = SupConLoss(temperature=0.5, num_classes=4)
        >>> round(criterion(torch.eye(4).repeat(2, 1), torch.arange(4).repeat(2)).item(), 4)
        0.5944
    """

    function: ClassVar[Callable[..., Tensor]] = supcon_loss

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        num_classes: int | None = None,
        ignore_index: int = -1,
        normalize: bool = True,
        weight: Tensor | None = None,
        mean_over: str = "anchors",
        reduction: str = "mean",
    ) -> None:
        super().__init__(
            temperature=temperature, num_classes=num_classes, ignore_index=ignore_index,
            normalize=normalize, weight=weight, mean_over=mean_over, reduction=reduction,
        )  # fmt: skip


class MultiPositiveNTXentLoss(SupConLoss):
    """`multi_positive_nt_xent_loss` as a module, with the options of `SupConLoss`.

    Examples:
        >>> import torch
        >>> from action_kernels import MultiPositiveNTXentLoss
        >>> criterion = MultiPositiveNTXentLoss(temperature=0.5, num_classes=4)
        >>> round(criterion(torch.eye(4).repeat(3, 1), torch.arange(4).repeat(3)).item(), 4)
        0.7966
    """

    function = multi_positive_nt_xent_loss


class InfoNCELoss(_Loss):
    """`info_nce_loss` as a module: ``InfoNCELoss(temperature=0.1)(queries, keys, bank=queue)``.

    Examples:
        >>> import torch
        >>> from action_kernels import InfoNCELoss
        >>> round(InfoNCELoss(temperature=0.5)(torch.eye(4), torch.eye(4)).item(), 4)
        0.3408
    """

    function: ClassVar[Callable[..., Tensor]] = info_nce_loss

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        normalize: bool = True,
        reduction: str = "mean",
    ) -> None:
        super().__init__(temperature=temperature, normalize=normalize, reduction=reduction)


class NTXentLoss(InfoNCELoss):
    """`nt_xent_loss` as a module: ``NTXentLoss(temperature=0.1)(first, second)``.

    Examples:
        >>> import torch
        >>> from action_kernels import NTXentLoss
        >>> round(NTXentLoss(temperature=0.5)(torch.eye(4), torch.eye(4)).item(), 4)
        0.5944
    """

    function = nt_xent_loss


class CLIPLoss(_Loss):
    """`clip_loss` as a module: ``CLIPLoss()(image, text, temperature=1 / logit_scale)``.

    Examples:
        >>> import torch
        >>> from action_kernels import CLIPLoss
        >>> temperature = torch.nn.Parameter(torch.tensor(0.5))  # learns with the module that holds it
        >>> criterion = CLIPLoss(temperature)
        >>> criterion(torch.eye(4), torch.eye(4)).backward()
        >>> bool(temperature.grad > 0)
        True
    """

    function = clip_loss

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        *,
        normalize: bool = True,
        reduction: str = "mean",
    ) -> None:
        super().__init__(temperature=temperature, normalize=normalize, reduction=reduction)


class SigLIPLoss(_Loss):
    """`siglip_loss` as a module: ``SigLIPLoss()(image, text, temperature=…, bias=…)``.

    Examples:
        >>> import torch
        >>> from action_kernels import SigLIPLoss
        >>> round(SigLIPLoss(temperature=0.1, bias=-10.0)(torch.eye(4), torch.eye(4)).item(), 4)
        0.6933
    """

    function = siglip_loss

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        bias: float | Tensor = -10.0,
        *,
        normalize: bool = True,
        reduction: str = "mean",
    ) -> None:
        super().__init__(
            temperature=temperature, bias=bias, normalize=normalize, reduction=reduction
        )


class SAACLLoss(_Loss):
    """`saacl_loss` as a module without state: ``SAACLLoss()(features, labels, centers)``.

    `SAACL` keeps centres, class means and a queue of its own.

    Examples:
        >>> import torch
        >>> from action_kernels import SAACLLoss, class_centers
        >>> criterion, centers = SAACLLoss(temperature=0.2, center_weight=0.2), class_centers(4, 16)
        >>> features = torch.randn(64, 16, requires_grad=True)
        >>> criterion(features, torch.randint(0, 4, (64,)), centers).backward()
    """

    function = saacl_loss

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        center_weight: float = 0.2,
        *,
        positives: str = "mean",
        ignore_index: int = -1,
        normalize: bool = True,
        weight: Tensor | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(
            temperature=temperature, center_weight=center_weight, positives=positives,
            ignore_index=ignore_index, normalize=normalize, weight=weight, reduction=reduction,
        )  # fmt: skip


class AnatomicalContrastLoss(_Loss):
    """`anatomical_contrast_loss` as a module: ``…()(queries, prototypes, bank, negative_index)``.

    Examples:
        >>> import torch
        >>> from action_kernels import AnatomicalContrastLoss
        >>> queries, bank = torch.randn(3, 8, 16, requires_grad=True), torch.randn(100, 16)
        >>> negatives = torch.randint(0, 100, (3, 32))  # shared by the queries of a class
        >>> AnatomicalContrastLoss(temperature=0.5)(queries, torch.randn(3, 16), bank, negatives).backward()
    """

    function = anatomical_contrast_loss

    def __init__(self, temperature: float | Tensor = 0.5, *, weight: Tensor | None = None) -> None:
        super().__init__(temperature=temperature, weight=weight)


class RelationalLoss(_Loss):
    """`relational_loss` as a module: ``RelationalLoss(0.1, 0.04)(student, teacher, memory)``.

    Examples:
        >>> import torch
        >>> from action_kernels import RelationalLoss
        >>> criterion = RelationalLoss(student_temperature=0.1, teacher_temperature=0.04)
        >>> student = torch.randn(8, 16, requires_grad=True)
        >>> criterion(student, torch.randn(8, 16), torch.randn(36, 16)).backward()
    """

    function = relational_loss

    def __init__(
        self, student_temperature: float | Tensor, teacher_temperature: float | Tensor
    ) -> None:
        super().__init__(
            student_temperature=student_temperature, teacher_temperature=teacher_temperature
        )
