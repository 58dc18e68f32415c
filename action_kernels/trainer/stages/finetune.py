"""Fine-tuning, the last stage of ACTION++ (arXiv 2304.02689): the whole of it on one page.

L = supervised + w · pseudo-label + w_saacl · SAACL (labelled pixels) + w_anco · AnCo (all pixels)
"""

from __future__ import annotations

import torch
from torch import Tensor

from action_kernels import (
    SAACL,
    AnatomicalTemperature,
    anatomical_contrast_loss,
    draw_negatives,
    sample_pixels,
)

from ..data.sampling import Batch
from ..data.transforms import draw_strong_augmentation
from ..method.objectives import pseudo_label_loss, supervised_loss
from ..method.pseudo_labels import PseudoLabelled, mix_images, pseudo_label
from ..method.teacher import make_teacher, ramped_momentum, update_teacher
from ..networks import Embeddings
from .stage import Losses, Setup, detached


class Finetune:
    """Pseudo-labels of a moving-average teacher on mixed images, and contrast between the pixels of all images.

    The teacher sees the weak images; the student sees them mixed and strongly augmented, apart from the labelled ones,
    so that batch statistics of the two kinds do not mix. From trained weights the teacher follows at full momentum
    from the first step; from random ones its momentum is ramped up.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup, self.config = setup, setup.config.finetune
        self.unlabelled_batch = setup.config.data.unlabelled_batch
        self.student = setup.model()
        self.teacher = make_teacher(self.student)
        self.saacl = SAACL(
            setup.num_classes,
            setup.config.network.embedding_dim,
            queue_size=self.config.queue_size,
            center_weight=self.config.center_weight,
        ).to(setup.device)
        self.temperature = AnatomicalTemperature(
            setup.iterations,
            low=self.config.temperature_low,
            high=self.config.temperature_high,
            schedule=self.config.temperature_schedule,
            period=self.config.temperature_period,
            seed=setup.config.run.seed,
        )
        self.optimisation = setup.optimisation(self.student)
        self.modules = {
            "network": self.student.network,
            "head": self.student.head,
            "teacher": self.teacher.network,
            "teacher_head": self.teacher.head,
            "saacl": self.saacl,
            "optimisation": self.optimisation,
        }

    def initialise(self, weights: dict[str, dict[str, Tensor]]) -> None:
        for model in (self.student, self.teacher):
            model.network.load_state_dict(weights["network"])
            if "head" in weights:
                model.head.load_state_dict(weights["head"])

    def schedules(self, iteration: int) -> dict[str, float]:
        return {
            "learning_rate": self.optimisation.rate(iteration),
            "temperature": self.temperature(iteration),
        }

    def step(self, batch: Batch, iteration: int) -> Losses:
        config, batch = self.config, batch.to(self.setup.device)
        pseudo, teacher_embeddings = self.teacher_view(batch)
        pseudo = mix_images(pseudo, config.mix)
        if config.strong_augmentation:
            strong = draw_strong_augmentation(len(pseudo.images))
            pseudo = pseudo.with_images(strong.apply(pseudo.images))
        with self.setup.autocast:
            logits, pyramid = self.student(batch.images)
            mixed_logits, mixed_pyramid = self.student(pseudo.images)

        losses = {
            "supervised": supervised_loss(logits, batch.labels),
            "pseudo_label": pseudo_label_loss(
                mixed_logits,
                pseudo.labels,
                pseudo.confidence,
                config.strong_threshold,
                config.pseudo_label_weighting,
            ),
        }
        tau = self.temperature(iteration)
        with self.setup.autocast:
            if teacher_embeddings is not None:
                embeddings = self.student.embeddings(pyramid)
                losses["saacl"] = self.saacl_loss(
                    embeddings, teacher_embeddings, logits, batch.labels, tau
                )
            if config.anco_weight:
                levels = zip(pyramid, mixed_pyramid, strict=True)
                embeddings = self.student.embeddings(tuple(torch.cat(pair) for pair in levels))
                all_labels = torch.cat([batch.labels, pseudo.reliable(config.weak_threshold)])
                losses["anco"] = self.anco_loss(
                    embeddings, torch.cat([logits, mixed_logits]), all_labels, tau
                )

        total = self.weighted(losses)
        self.optimisation.descend(total, iteration)
        update_teacher(self.teacher, self.student, self.momentum(iteration))
        return detached(losses, total)

    def weighted(self, losses: Losses) -> Tensor:
        """The total loss."""
        weights = {
            "supervised": 1.0,
            "pseudo_label": self.config.unsupervised_weight,
            "saacl": self.config.saacl_weight,
            "anco": self.config.anco_weight,
        }
        return torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()

    def momentum(self, iteration: int) -> float:
        """Of the teacher."""
        momentum = self.setup.config.optimiser.teacher_momentum
        return momentum if self.setup.trained else ramped_momentum(momentum, iteration)

    @torch.no_grad()
    def teacher_view(self, batch: Batch) -> tuple[PseudoLabelled, Embeddings | None]:
        """Pseudo-labels of the unlabelled images, and embeddings of the labelled ones where SAACL needs them."""
        with self.setup.autocast:
            logits, _ = self.teacher(batch.unlabelled)
            pseudo = pseudo_label(batch.unlabelled, logits)
            if not self.config.saacl_weight:
                return pseudo, None
            _, pyramid = self.teacher(batch.images)
            return pseudo, self.teacher.embeddings(pyramid)

    def saacl_loss(
        self,
        embeddings: Embeddings,
        teacher_embeddings: Embeddings,
        logits: Tensor,
        labels: Tensor,
        temperature: float,
    ) -> Tensor:
        """SAACL (eq. 5) in queue form on labelled pixels, the same number of every class present."""
        index, counts = sample_pixels(
            logits.detach(),
            labels,
            self.config.queries_per_class,
            num_classes=self.setup.num_classes,
        )
        classes = torch.arange(len(counts), device=labels.device).where(counts > 0, -1)
        with torch.no_grad():
            teacher_features = teacher_embeddings.at(index.flatten())
        return self.saacl(
            embeddings.at(index.flatten()),
            classes[:, None].expand_as(index).flatten(),
            paired_keys=teacher_features,
            temperature=temperature,
        )

    def anco_loss(
        self, embeddings: Embeddings, logits: Tensor, labels: Tensor, temperature: float
    ) -> Tensor:
        """Anatomical contrast on all pixels whose label or pseudo-label is reliable enough (others: −1).

        Queries are hard pixels; the positive key is the class's mean embedding; negatives are shared by a class's
        queries, their classes drawn at the temperature of the loss.
        """
        config = self.config
        index, _ = sample_pixels(
            logits.detach(),
            labels,
            config.queries_per_class,
            num_classes=self.setup.num_classes,
            threshold=config.strong_threshold,
        )
        with torch.no_grad():
            prototypes, _ = embeddings.prototypes(labels)
            negatives = draw_negatives(
                prototypes, labels, config.negatives_per_class, temperature=temperature
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
