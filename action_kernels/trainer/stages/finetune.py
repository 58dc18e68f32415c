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
from ..networks import Embeddings, EmbeddingsInTurn, Pyramid
from ..shares import Share
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
            positives=self.config.positives,
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
        share = self.setup.share(batch)
        pseudo, teacher_embeddings = self.teacher_view(batch)
        mixed_of_all = mix_images(pseudo.each(share.unlabelled.joined), config.mix)
        pseudo = mixed_of_all.each(share.unlabelled.of)
        if config.strong_augmentation:
            strong = draw_strong_augmentation(share.unlabelled.total).each(share.unlabelled.of)
            pseudo = pseudo.with_images(strong.apply(pseudo.images))
        with self.setup.autocast, self.setup.own_draws(iteration):
            labelled, mixed = self.student(batch.images), self.student(pseudo.images)

        losses = {
            "supervised": supervised_loss(
                labelled[0], batch.labels, group=share.world.group, factor=share.labelled.factor
            ),
            "pseudo_label": share.unlabelled.factor
            * pseudo_label_loss(
                mixed[0],
                pseudo.labels,
                pseudo.confidence,
                config.strong_threshold,
                config.pseudo_label_weighting,
            ),
        }
        if config.saacl_weight or config.anco_weight:
            tau = self.temperature(iteration)
            with self.setup.autocast:
                losses |= self.contrastive_losses(
                    labelled, mixed, batch.labels, mixed_of_all, teacher_embeddings, tau, share
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
            share, embeddings = self.setup.share(batch), self.teacher.embeddings(pyramid)
            return pseudo, share.embeddings(embeddings, batch.labels.shape[1:])

    def contrastive_losses(
        self,
        labelled: tuple[Tensor, Pyramid],
        mixed: tuple[Tensor, Pyramid],
        labels: Tensor,
        pseudo: PseudoLabelled,
        teacher_embeddings: Embeddings | None,
        temperature: float,
        share: Share,
    ) -> Losses:
        """SAACL and AnCo, those with a weight. One evaluation of the head serves the pixels of both.

        Pixels are drawn from the images of all processes (`pseudo` holds all of them), and each computes the losses
        of all that were drawn: they are fewer than those of one image.
        """
        config, (logits, pyramid) = self.config, labelled
        losses: Losses = {}
        labels = share.labelled.joined(labels)
        saacl_index = anco_index = labels.new_empty(0, config.queries_per_class)
        if config.saacl_weight:
            saacl_index, counts = self.draw_pixels(None, labels)
        if config.anco_weight:
            all_labels = torch.cat([labels, pseudo.reliable(config.weak_threshold)])
            all_logits = share.joined(torch.cat([logits, mixed[0]]).detach())
            anco_index, _ = self.draw_pixels(all_logits, all_labels, config.strong_threshold)
        embeddings = self.student.embeddings(pyramid)
        if config.anco_weight:
            # The labelled images come first, so that SAACL's pixels keep their numbers.
            of_mixed, pixels = self.student.embeddings(mixed[1]), labels.shape[1:].numel()
            embeddings = EmbeddingsInTurn(embeddings, of_mixed, len(logits), pixels)
        embeddings = share.embeddings(embeddings, labels.shape[1:])
        # In autocast's dtype, so that SAACL's products with the queue are of half precision too.
        rows = embeddings.at(torch.cat([saacl_index, anco_index]))
        saacl_rows, anco_rows = rows.split([len(saacl_index), len(anco_index)])
        if teacher_embeddings is not None:
            with torch.no_grad():
                keys = teacher_embeddings.at(saacl_index)
            losses["saacl"] = self.saacl_loss(saacl_rows, keys, counts, temperature)
        if config.anco_weight:
            losses["anco"] = self.anco_loss(
                anco_rows.float(), anco_index, embeddings, all_labels, temperature
            )
        return losses

    def draw_pixels(
        self, logits: Tensor | None, labels: Tensor, threshold: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Pixels (K, q) of every class, only hard ones if there is a threshold, and the counts of candidates."""
        return sample_pixels(
            logits,
            labels,
            self.config.queries_per_class,
            num_classes=self.setup.num_classes,
            threshold=threshold,
        )

    def saacl_loss(self, rows: Tensor, keys: Tensor, counts: Tensor, temperature: float) -> Tensor:
        """SAACL (eq. 5) in queue form on labelled pixels (K, q, d), the same number of every class present."""
        classes = torch.arange(len(counts), device=rows.device).where(counts > 0, -1)
        return self.saacl(
            rows.flatten(0, 1),
            classes[:, None].expand(rows.shape[:2]).flatten(),
            paired_keys=keys.flatten(0, 1),
            temperature=temperature,
        )

    def anco_loss(
        self,
        rows: Tensor,
        index: Tensor,
        embeddings: Embeddings,
        labels: Tensor,
        temperature: float,
    ) -> Tensor:
        """Anatomical contrast on all pixels whose label or pseudo-label is reliable enough (others: −1).

        Queries are hard pixels (K, q, d); the positive key is the class's mean embedding; negatives are shared by a
        class's queries, their classes drawn at the temperature of the loss.
        """
        with torch.no_grad():
            prototypes, _ = embeddings.prototypes(labels)
            negatives = draw_negatives(
                prototypes, labels, self.config.negatives_per_class, temperature=temperature
            )
            bank = embeddings.at(negatives.flatten()).float()
            bank_rows = torch.arange(bank.shape[0], device=bank.device).view_as(negatives)
        return anatomical_contrast_loss(
            rows,
            prototypes,
            bank,
            bank_rows.where(negatives >= 0, -1),
            temperature=temperature,
            mask=index >= 0,
        )
