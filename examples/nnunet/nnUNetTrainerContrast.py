"""nnU-Net v2 with contrast between the pixels of its last decoder stage.

    export nnUNet_extTrainer=examples/nnunet
    nnUNetv2_train DATASET 2d 0 -tr nnUNetTrainerContrast

(or put this file beside nnU-Net's own trainers). Labels, not regions: a region has no single class.
"""

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from action_kernels import FeatureTap, gather_pixels, sample_pixels, supcon_loss


class nnUNetTrainerContrast(nnUNetTrainer):
    contrast_weight, pixels_a_class = 0.1, 256

    def _build_loss(self):
        segmentation_loss = super()._build_loss()
        network = self.network.module if self.is_ddp else self.network
        tap = FeatureTap(network.decoder.stages[-1])
        classes = self.label_manager.num_segmentation_heads  # the ignore label is none of them

        def loss(output, target):
            total = segmentation_loss(output, target)
            features = tap.take()
            if features is None:  # validation
                return total
            logits, labels = (
                (output[0], target[0]) if isinstance(output, list) else (output, target)
            )
            index, _ = sample_pixels(
                logits,
                labels[:, 0].long(),
                self.pixels_a_class,
                num_classes=classes,
                threshold=0.97,
            )
            rows, classes_of_rows = gather_pixels(features, index)
            return total + self.contrast_weight * supcon_loss(
                rows, classes_of_rows, num_classes=classes
            )

        return loss
