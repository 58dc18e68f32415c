"""Trains examples/nnunet/nnUNetTrainerContrast.py on generated data, with labels that are partly ignored.

    python nnunet_trainer.py FOLDER

FOLDER gets nnU-Net's three folders; the losses, and the classes that they saw, are printed as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision_operators  # noqa: F401 - nnU-Net imports torchvision

DATASET, CASES, CLASSES, SHAPE, EPOCHS = "Dataset001_Discs", 6, 3, (3, 40, 40), 2
STEPS, TRAINER = 8, "nnUNetTrainerContrast"
IGNORED = CLASSES  # nnU-Net's ignore label is the highest
PROCESSES = "nnUNet_n_proc_DA"
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


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
        label[:, :, :6] = IGNORED
        image = 100 * (label % IGNORED) + generator.normal(0, 20, SHAPE)
        for array, path in (
            (image.astype(np.float32), f"imagesTr/disc_{case:03}_0000.nii.gz"),
            (label, f"labelsTr/disc_{case:03}.nii.gz"),
        ):
            nibabel.save(nibabel.Nifti1Image(array.T, np.diag([1.0, 1.0, 5.0, 1.0])), folder / path)
    about = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "one": 1, "two": 2, "ignore": IGNORED},
        "numTraining": CASES,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(about))


def main(folder: Path) -> None:
    folders = {
        name: folder / name for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
    }
    for path in folders.values():
        path.mkdir()
    folders["nnUNet_extTrainer"] = EXAMPLES / "nnunet"
    os.environ.update({name: str(path) for name, path in folders.items()})
    os.environ[PROCESSES] = "1"  # planning takes it as its number of threads
    write_cases(folder / "nnUNet_raw" / DATASET)

    from nnunetv2.experiment_planning import plan_and_preprocess_api as steps

    steps.extract_fingerprints([1], num_processes=1)
    steps.plan_experiments([1])
    prepared = folder / "nnUNet_preprocessed" / DATASET
    plans = json.loads((prepared / "nnUNetPlans.json").read_text())
    plans["configurations"]["2d"].update(batch_size=2, patch_size=[32, 32])
    (prepared / "nnUNetPlans.json").write_text(json.dumps(plans))
    steps.preprocess([1], configurations=["2d"], num_processes=[1])

    os.environ[PROCESSES] = "0"  # augmentation in this process
    torch.manual_seed(0)
    from nnunetv2.run.run_training import get_trainer_from_args

    trainer = get_trainer_from_args("1", "2d", 0, TRAINER, device=torch.device("cpu"))
    trainer.num_epochs = EPOCHS
    trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = STEPS, 1
    trainer.initialize()
    seen = record(trainer)
    trainer.run_training()
    print("RESULTS " + json.dumps(seen | {"steps": EPOCHS * STEPS, "validations": EPOCHS}))


def record(trainer: Any) -> dict[str, list[Any]]:
    """The values of the contrast, the classes of its pixels, and the whole loss, as training goes on."""
    seen: dict[str, list[Any]] = {"contrast": [], "classes": [], "total": []}
    example = type(trainer)._build_loss.__globals__
    contrast, total = example["supcon_loss"], trainer.loss

    def recorded_contrast(rows, classes, **options):
        value = contrast(rows, classes, **options)
        seen["contrast"].append(value.item())
        seen["classes"].extend(set(classes.tolist()) - set(seen["classes"]))
        return value

    def recorded_total(output, target):
        value = total(output, target)
        seen["total"].append(value.item())
        return value

    example["supcon_loss"], trainer.loss = recorded_contrast, recorded_total
    return seen


if __name__ == "__main__":
    main(Path(sys.argv[1]))
