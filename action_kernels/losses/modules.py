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
from action_kernels.losses.saacl import check_saacl_options, saacl_loss
from action_kernels.losses.scale import check_temperature
from action_kernels.losses.siglip import siglip_loss
from action_kernels.losses.supcon import supcon_loss
from action_kernels.ops import checks


class _Loss(nn.Module):
    """Keeps options by their names; tensors among them move with the module, parameters learn."""

    function: ClassVar[Callable[..., Tensor]]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self._names = tuple(options)
        for name, value in options.items():
            _check_option(name, value)
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


def _check_option(name: str, value: Any) -> None:
    if name.endswith("temperature"):
        check_temperature(name, value)
    elif name == "reduction":
        checks.check_choice(name, value, REDUCTIONS)
    elif name == "mean_over":
        checks.check_choice(name, value, MEAN_OVER)


class SupConLoss(_Loss):
    """`supcon_loss` as a module: ``SupConLoss(temperature=0.1)(features, labels)``."""

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
    """`multi_positive_nt_xent_loss` as a module, with the options of `SupConLoss`."""

    function = multi_positive_nt_xent_loss


class InfoNCELoss(_Loss):
    """`info_nce_loss` as a module: ``InfoNCELoss(temperature=0.1)(queries, keys, bank=queue)``."""

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
    """`nt_xent_loss` as a module: ``NTXentLoss(temperature=0.1)(first, second)``."""

    function = nt_xent_loss


class CLIPLoss(_Loss):
    """`clip_loss` as a module: ``CLIPLoss()(image, text, temperature=1 / logit_scale)``."""

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
    """`siglip_loss` as a module: ``SigLIPLoss()(image, text, temperature=…, bias=…)``."""

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
        check_saacl_options(positives, center_weight)
        super().__init__(
            temperature=temperature, center_weight=center_weight, positives=positives,
            ignore_index=ignore_index, normalize=normalize, weight=weight, reduction=reduction,
        )  # fmt: skip


class AnatomicalContrastLoss(_Loss):
    """`anatomical_contrast_loss` as a module: ``…()(queries, prototypes, bank, negative_index)``."""

    function = anatomical_contrast_loss

    def __init__(self, temperature: float | Tensor = 0.5, *, weight: Tensor | None = None) -> None:
        super().__init__(temperature=temperature, weight=weight)


class RelationalLoss(_Loss):
    """`relational_loss` as a module: ``RelationalLoss(0.1, 0.04)(student, teacher, memory)``."""

    function = relational_loss

    def __init__(
        self, student_temperature: float | Tensor, teacher_temperature: float | Tensor
    ) -> None:
        super().__init__(
            student_temperature=student_temperature, teacher_temperature=teacher_temperature
        )
