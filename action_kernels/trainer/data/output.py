"""Labels written on the grid of the image they belong to."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from ..files import replace_file
from .volume import Grid


def write_labels(labels: np.ndarray, grid: Grid, path: Path) -> None:
    """Labels (*axes) of a volume as ``.nii.gz``, whole or not at all, replacing what was there.

    Shape, axes, units, qform and sform are those of the image; an image without a NIfTI header gives its affine.
    """
    data = np.ascontiguousarray(grid.to_file(labels.astype(np.uint8)))
    # no time stamp: the same labels give the same file
    content = gzip.compress(_image(data, grid).to_bytes(), 5, mtime=0)
    replace_file(path, lambda temporary: temporary.write_bytes(content))


def _image(data: np.ndarray, grid: Grid) -> Any:
    if grid.header is None:
        return nibabel.Nifti1Image(data, grid.affine)
    header = grid.header.copy()
    header.set_data_dtype(np.uint8)
    header.set_slope_inter(1, 0)
    header["cal_min"], header["cal_max"] = 0, 0
    kind = nibabel.Nifti2Image if isinstance(header, nibabel.Nifti2Header) else nibabel.Nifti1Image
    image = kind(data, None, header)  # no affine: qform, sform and their codes stay as they are
    image.header.set_slope_inter(1, 0)
    return image
