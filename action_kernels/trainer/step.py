"""One fine-tuning step of ACTION++ (arXiv 2304.02689): the whole method on one page.

L = supervised + pseudo-label + w_saacl · SAACL (labelled pixels) + w_anco · AnCo (all pixels)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from action_kernels import (
    SAACL,
    AnatomicalTemperature,
    anatomical_contrast_loss,
    draw_negatives,
    sample_pixels,
)

from .configuration import Configuration
from .data import ACDC
from .mixing import PseudoLabelled, mix_slices
from .networks import (
    Embeddings,
    Pyramid,
    SegmentationModel,
    build_network,
    make_teacher,
    update_teacher,
)
from .objectives import pseudo_label_loss, supervised_loss

NUM_CLASSES = ACDC.num_classes
Losses = dict[str, Tensor]


@dataclass
class TrainingState:
    """Everything that a step changes, and `iteration`, the number of steps done."""

    config: Configuration
    device: torch.device
    student: SegmentationModel
    teacher: SegmentationModel
    saacl: SAACL
    optimizer: torch.optim.SGD
    scaler: torch.amp.GradScaler
    temperature: AnatomicalTemperature
    iteration: int = 0

    @property
    def autocast(self) -> torch.autocast:
        dtype = torch.float16 if self.config.amp == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.config.amp != "off")


def new_state(config: Configuration, device: torch.device) -> TrainingState:
    """Networks, losses and optimiser at iteration 0, seeded by the configuration."""
    torch.manual_seed(config.seed)
    student = new_model(config).to(device)
    return TrainingState(
        config,
        device,
        student,
        make_teacher(student),
        SAACL(
            NUM_CLASSES,
            config.embedding_dim,
            queue_size=config.queue_size,
            center_weight=config.center_weight,
        ).to(device),
        torch.optim.SGD(
            student.parameters(),
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        ),
        torch.amp.GradScaler(device.type, enabled=config.amp == "fp16"),
        AnatomicalTemperature(
            config.max_iterations,
            low=config.temperature_low,
            high=config.temperature_high,
            schedule=config.temperature_schedule,
            period=config.temperature_period,
            seed=config.seed,
        ),
    )


def new_model(config: Configuration) -> SegmentationModel:
    """The network of the configuration with its representation head, randomly initialised."""
    network = build_network(
        "basic-unet",
        spatial_dims=2,
        in_channels=1,
        num_classes=NUM_CLASSES,
        widths=config.widths,
        norm=config.norm,
        dropout=config.dropout,
    )
    return SegmentationModel(network, 2, NUM_CLASSES, config.embedding_dim, config.head)


def training_step(state: TrainingState, images: Tensor, labels: Tensor) -> Losses:
    """One step on images (B, 1, H, W), labelled slices first, and labels (B, H, W).

    Returns:
        The losses, detached, without their weights: ``supervised``, ``pseudo_label``, ``saacl``, ``anco`` (those in
        use) and the weighted ``total``.
    """
    config = state.config
    count = config.labelled_batch
    images, labels = images.to(state.device), labels[:count].to(state.device)
    set_learning_rate(state)

    with torch.no_grad(), state.autocast:
        pseudo, teacher_labelled = teacher_view(state, images)
    pseudo = mix_slices(pseudo, config.mix)
    with state.autocast:
        logits, pyramid = state.student(torch.cat([images[:count], pseudo.images]))

    losses = {
        "supervised": supervised_loss(logits[:count], labels),
        "pseudo_label": pseudo_label_loss(
            logits[count:], pseudo.labels, pseudo.confidence, config.strong_threshold
        ),
        **contrastive_losses(state, pyramid, teacher_labelled, logits, labels, pseudo),
    }
    weights = {
        "supervised": 1.0,
        "pseudo_label": config.unsupervised_weight,
        "saacl": config.saacl_weight,
        "anco": config.anco_weight,
    }
    total = sum(
        (weights[name] * loss for name, loss in losses.items()),
        torch.zeros((), device=state.device),
    )
    state.optimizer.zero_grad(set_to_none=True)
    state.scaler.scale(total).backward()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    update_teacher(state.teacher, state.student, config.teacher_momentum, state.iteration)
    state.iteration += 1
    return {name: loss.detach() for name, loss in {**losses, "total": total}.items()}


def set_learning_rate(state: TrainingState) -> None:
    """Polynomial decay to 0 over `max_iterations`."""
    config = state.config
    remaining = 1 - state.iteration / config.max_iterations
    for group in state.optimizer.param_groups:
        group["lr"] = config.learning_rate * remaining**config.learning_rate_power


def teacher_view(state: TrainingState, images: Tensor) -> tuple[PseudoLabelled, Embeddings | None]:
    """Pseudo-labels of the unlabelled slices, and embeddings of the labelled ones where SAACL needs them."""
    count = state.config.labelled_batch
    if not state.config.saacl_weight:
        logits, embeddings = state.teacher(images[count:])[0], None
    else:
        logits, pyramid = state.teacher(images)
        logits, embeddings = (
            logits[count:],
            state.teacher.embeddings(tuple(level[:count] for level in pyramid)),
        )
    confidence, pseudo_labels = logits.float().softmax(1).max(1)
    return PseudoLabelled(images[count:], pseudo_labels, confidence), embeddings


def contrastive_losses(
    state: TrainingState,
    pyramid: Pyramid,
    teacher_labelled: Embeddings | None,
    logits: Tensor,
    labels: Tensor,
    pseudo: PseudoLabelled,
) -> Losses:
    """SAACL and AnCo, those in use, at the temperature of the iteration (ATS, eq. 6)."""
    config = state.config
    losses: Losses = {}
    if not (config.saacl_weight or config.anco_weight):
        return losses
    tau = state.temperature(state.iteration)
    with state.autocast:
        embeddings = state.student.embeddings(pyramid)
        if teacher_labelled is not None:
            labelled_logits = logits[: config.labelled_batch]
            losses["saacl"] = saacl_term(
                state, embeddings, teacher_labelled, labelled_logits, labels, tau
            )
        if config.anco_weight:
            losses["anco"] = anco_term(config, embeddings, logits, labels, pseudo, tau)
    return losses


def saacl_term(
    state: TrainingState,
    embeddings: Embeddings,
    teacher_embeddings: Embeddings,
    logits: Tensor,
    labels: Tensor,
    temperature: float,
) -> Tensor:
    """SAACL (eq. 5) in queue form on labelled pixels, the same number of every class present."""
    index, counts = sample_pixels(
        logits.detach(), labels, state.config.queries_per_class, num_classes=NUM_CLASSES
    )
    classes = torch.arange(NUM_CLASSES, device=labels.device).where(counts > 0, -1)
    with torch.no_grad():
        teacher_features = teacher_embeddings.at(index.flatten())
    return state.saacl(
        embeddings.at(index.flatten()),
        classes[:, None].expand_as(index).flatten(),
        paired_keys=teacher_features,
        temperature=temperature,
    )


def anco_term(
    config: Configuration,
    embeddings: Embeddings,
    logits: Tensor,
    labels: Tensor,
    pseudo: PseudoLabelled,
    temperature: float,
) -> Tensor:
    """Anatomical contrast on all pixels whose label or pseudo-label is reliable enough.

    Queries are hard pixels; the positive key is the class's mean embedding; negatives are shared by a class's queries.
    """
    reliable = pseudo.labels.where(pseudo.confidence >= config.weak_threshold, -1)
    labels = torch.cat([labels, reliable])
    index, _ = sample_pixels(
        logits.detach(),
        labels,
        config.queries_per_class,
        num_classes=NUM_CLASSES,
        threshold=config.strong_threshold,
    )
    with torch.no_grad():
        prototypes, _ = embeddings.prototypes(labels)
        negatives = draw_negatives(
            prototypes, labels, config.negatives_per_class, temperature=config.relation_temperature
        )
        bank = embeddings.at(negatives.flatten())
        rows = torch.arange(bank.shape[0], device=bank.device).view_as(negatives)
    return anatomical_contrast_loss(
        embeddings.at(index),
        prototypes,
        bank,
        rows.where(negatives >= 0, -1),
        temperature=temperature,
        mask=index >= 0,
    )
