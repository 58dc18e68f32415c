"""nnU-Net v2 with our loss: what its user would write, and a script that trains it on generated data.

    python nnunet_trainer.py FOLDER

FOLDER gets nnU-Net's three folders; the losses of the epochs are printed as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torchvision_operators  # noqa: F401 - nnU-Net imports torchvision

DATASET, CASES, CLASSES, SHAPE, EPOCHS = "Dataset001_Discs", 6, 3, (3, 40, 40), 2
PROCESSES = "nnUNet_n_proc_DA"


def trainer_class() -> type:
    """A function, since nnU-Net reads its folders from the environment when it is imported."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    from action_kernels import class_centers, saacl_loss

    class nnUNetTrainerSAACL(nnUNetTrainer):
        def initialize(self):
            super().initialize()
            self.network.decoder.stages[-1].register_forward_hook(self.keep_features)
            width = self.configuration_manager.network_arch_init_kwargs["features_per_stage"][0]
            self.centers = class_centers(len(self.dataset_json["labels"]), width)

        def keep_features(self, stage, inputs, output):
            self.features = output

        def _build_loss(self):
            dice_and_ce = super()._build_loss()
            self.losses = []

            def loss(output, target):
                contrast = saacl_loss(self.features, target[0], self.centers)
                total = dice_and_ce(output, target) + 0.1 * contrast
                self.losses.append((float(contrast), float(total)))
                return total

            return loss

    return nnUNetTrainerSAACL


def write_cases(folder: Path) -> None:
    """Two discs of a class each on noise, as NIfTI in nnU-Net's raw layout."""
    import nibabel

    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[: SHAPE[1], : SHAPE[2]]
    for case in range(CASES):
        label = np.zeros(SHAPE, dtype=np.uint8)
        for number in range(1, CLASSES):
            center = generator.integers(8, 32, 2)
            inside = (rows - center[0]) ** 2 + (columns - center[1]) ** 2 < 36
            label[:, inside] = number
        image = 100 * label + generator.normal(0, 20, SHAPE)
        for array, path in (
            (image.astype(np.float32), f"imagesTr/disc_{case:03}_0000.nii.gz"),
            (label, f"labelsTr/disc_{case:03}.nii.gz"),
        ):
            nibabel.save(nibabel.Nifti1Image(array.T, np.diag([1.0, 1.0, 5.0, 1.0])), folder / path)
    about = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "one": 1, "two": 2},
        "numTraining": CASES,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(about))


def main(folder: Path) -> None:
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (folder / name).mkdir()
        os.environ[name] = str(folder / name)
    os.environ[PROCESSES] = "1"  # planning takes it as its number of threads
    write_cases(folder / "nnUNet_raw" / DATASET)

    from nnunetv2.experiment_planning import plan_and_preprocess_api as steps

    steps.extract_fingerprints([1], num_processes=1)
    steps.plan_experiments([1])
    prepared = folder / "nnUNet_preprocessed" / DATASET
    plans = json.loads((prepared / "nnUNetPlans.json").read_text())
    plans["continue_training"] = False
    plans["configurations"]["2d"].update(batch_size=2, patch_size=[32, 32])
    (prepared / "nnUNetPlans.json").write_text(json.dumps(plans))
    steps.preprocess([1], configurations=["2d"], num_processes=[1])

    os.environ[PROCESSES] = "0"  # augmentation in this process
    torch.manual_seed(0)
    about = json.loads((prepared / "dataset.json").read_text())
    trainer = trainer_class()(plans, "2d", 0, about, device=torch.device("cpu"))
    trainer.num_epochs = EPOCHS
    trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 8, 1
    trainer.run_training()
    contrast, total = zip(*trainer.losses, strict=True)
    print("RESULTS " + json.dumps({"contrast": contrast, "total": total, "epochs": EPOCHS}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
