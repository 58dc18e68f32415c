"""One file as an array: NIfTI, NRRD and HDF5, with everything in a header that would mislead refused.

Files are read whole and told apart by their first bytes, so that a name that promises another compression does no
harm, and a truncated or altered file is found by its length or its checksum.
"""

from __future__ import annotations

import bz2
import gzip
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import nibabel
import nrrd
import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.arrayproxy import ArrayProxy

from .listing import image_suffix
from .problems import DataError, reading, some

MAX_THREADS = min(4, os.cpu_count() or 1)  # that read files: decompression leaves Python's lock
MAX_VOXELS = 2**31  # beyond any scanner; a damaged header may ask for more
_GZIP, _BZIP2 = b"\x1f\x8b", b"BZh"
_LONGEST_HEADER = 540
_TO_MILLIMETRES = {"meter": 1e3, "mm": 1.0, "micron": 1e-3, "unknown": 1.0}


@dataclass(frozen=True, eq=False)
class Raw:
    """An array as it is on disk, with its scaling applied.

    `affine` (4, 4) leads from the first three indices to millimetres, right-anterior-superior, and is None where the
    file has none; `header` is that of a NIfTI file; `units_known` is false where neither unit nor spacing says more
    than "1".
    """

    path: Path
    array: np.ndarray
    affine: np.ndarray | None = None
    header: Any = None
    units_known: bool = True


def read_image(path: Path) -> Raw:
    """A NIfTI or NRRD file.

    Raises:
        DataError: in one sentence that names the file, whatever is wrong with it.
    """
    if image_suffix(path) == ".nrrd":
        with reading(path, "NRRD"):
            return _checked(_read_nrrd(path))
    with reading(path, "NIfTI"):
        return _checked(_read_nifti(path))


def peek(path: Path) -> Raw:
    """The header of a NIfTI or NRRD file: an array of the right shape that holds nothing, and the affine.

    Raises:
        DataError: in one sentence that names the file.
    """
    if image_suffix(path) == ".nrrd":
        with reading(path, "NRRD"), open(path, "rb") as file:
            header = nrrd.read_header(file)
            shape = [int(size) for size in header.get("sizes", ())]
            _check_size(path, shape)
            return _checked(Raw(path, _hollow(shape), _nrrd_affine(header)))
    with reading(path, "NIfTI"):
        _not_empty(path)
        with _opened(path) as file:
            header = _nifti_header(path, file.read(_LONGEST_HEADER))
        _check_size(path, header.get_data_shape())
        affine, known = _nifti_affine(header)
        return _checked(Raw(path, _hollow(header.get_data_shape()), affine, header, known))


def _hollow(shape: Sequence[int]) -> np.ndarray:
    return np.broadcast_to(np.zeros((), np.uint8), tuple(shape))


def read_h5(path: Path, key: str, *, reverse: bool = False) -> Raw:
    """A dataset of an HDF5 file; `reverse` turns its axes round (slices, rows, columns → columns, rows, slices)."""
    with reading(path, "HDF5"):
        _not_empty(path)
        with h5py.File(path, "r") as file:
            if key not in file:
                raise DataError(f"{path} has no dataset {key!r} (it holds {some(list(file))})")
            dataset = file[key]
            if not isinstance(dataset, h5py.Dataset) or dataset.shape is None:
                raise DataError(
                    f"{path}: {key!r} is no array; an image or a label is expected there"
                )
            _check_size(path, dataset.shape)
            array = _plain(path, dataset[()])
        return _checked(Raw(path, array.transpose() if reverse else array))


def h5_keys(path: Path) -> set[str]:
    """The names in an HDF5 file, without reading any of the arrays."""
    with reading(path, "HDF5"):
        _not_empty(path)
        with h5py.File(path, "r") as file:
            return set(file)


def spacing_of(affine: np.ndarray) -> tuple[float, float, float]:
    """Millimetres between voxels along the first three axes of a file."""
    a, b, c = (float(size) for size in voxel_sizes(affine))
    return a, b, c


# NIfTI


def _read_nifti(path: Path) -> Raw:
    content = _decompressed(path)
    header = _nifti_header(path, content)
    shape, dtype = header.get_data_shape(), header.get_data_dtype()
    _check_size(path, shape)
    offset = header.get_data_offset()
    needed = offset + int(np.prod(shape)) * dtype.itemsize
    if len(content) < needed:
        raise DataError(f"{path} is cut short: {len(content)} of {needed} bytes; copy it again")
    array = _plain(path, np.asarray(ArrayProxy(io.BytesIO(content), header)))
    affine, known = _nifti_affine(header)
    return Raw(path, array, affine, header, known)


def _nifti_affine(header: Any) -> tuple[np.ndarray, bool]:
    """From indices to millimetres, and whether the header says anything of units or spacing."""
    space, _ = header.get_xyzt_units()
    affine = np.diag([*[_TO_MILLIMETRES[space]] * 3, 1.0]) @ header.get_best_affine()
    return affine, space != "unknown" or not np.array_equal(affine, np.eye(4))


def _nifti_header(path: Path, content: bytes) -> Any:
    for kind, size, magic in (
        (nibabel.Nifti1Header, 348, b"n+1"),
        (nibabel.Nifti2Header, 540, b"n+2"),
    ):
        sizes = [size.to_bytes(4, order) for order in ("little", "big")]
        if content[:4] not in sizes:
            continue
        if len(content) < size:
            raise DataError(
                f"{path} is cut short: {len(content)} bytes hold no header; copy it again"
            )
        start = 344 if size == 348 else 4
        if content[start : start + 3] != magic:
            raise DataError(
                f"{path} is the header of an Analyze or two-file NIfTI image; save it as one .nii.gz file"
            )
        # check=False: nibabel would mend what it finds and go on; here it is refused.
        header = kind(content[:size], check=False)
        _check_nifti_header(path, header, size + 4)
        return header
    raise DataError(f"{path} is no NIfTI file: {_looks_like(content)}")


def _check_nifti_header(path: Path, header: Any, least_offset: int) -> None:
    dims = [int(d) for d in header["dim"]]
    if not 1 <= dims[0] <= 7 or min(dims[1 : dims[0] + 1]) < 0:
        raise DataError(
            f"{path}: its header has impossible dimensions {dims}; save the image again"
        )
    try:
        header.get_data_dtype()
    except KeyError:  # nibabel looks the code up
        raise DataError(
            f"{path}: data type {int(header['datatype'])} is none of NIfTI's; save it again"
        ) from None
    offset = float(header["vox_offset"])
    if not offset.is_integer() or offset < least_offset:
        raise DataError(
            f"{path}: its header says that the data starts at byte {offset:g}; save it again"
        )
    sizes = header["pixdim"][1:4]
    if int(header["sform_code"]) == 0 and not (sizes > 0).all():
        raise DataError(
            f"{path}: its header has a voxel spacing of {' × '.join(f'{s:g}' for s in sizes)} mm; correct it"
        )
    if header["pixdim"][0] == 0:  # the standard's "1"
        header["pixdim"][0] = 1
    for name in ("scl_slope", "scl_inter"):
        if np.isinf(header[name]):
            raise DataError(f"{path}: {name} in its header is infinite; save the image again")


def _opened(path: Path) -> Any:
    """The file, decompressed as it is read."""
    with open(path, "rb") as file:
        start = file.read(3)
    opener: Any = gzip.open if start[:2] == _GZIP else bz2.open if start == _BZIP2 else open
    return opener(path, "rb")


def _decompressed(path: Path) -> bytes:
    _not_empty(path)
    content = path.read_bytes()
    if content[:2] == _GZIP:
        return gzip.decompress(
            content
        )  # checks length and CRC, which reading just the voxels would not
    return bz2.decompress(content) if content[:3] == _BZIP2 else content


def _looks_like(content: bytes) -> str:
    start = content[:200].lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page; download the file itself"
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS; fetch the file itself with 'git lfs pull'"
    if content[128:132] == b"DICM":
        return "it is a DICOM file; convert the series to NIfTI"
    return "its first bytes are not those of a header; copy it again"


# NRRD


def _read_nrrd(path: Path) -> Raw:
    _not_empty(path)
    with open(path, "rb") as file:
        header = nrrd.read_header(file)
        _check_size(path, [int(size) for size in header.get("sizes", ())])
        array = _plain(path, nrrd.read_data(header, file, str(path)))
    return Raw(path, array, _nrrd_affine(header))


def _nrrd_affine(header: Any) -> np.ndarray | None:
    affine = np.eye(4)
    directions, spacings = header.get("space directions"), header.get("spacings")
    if directions is not None:
        rows = np.array([row for row in directions if row is not None], float)
        rows = rows[np.isfinite(rows).all(1)]
        if rows.shape != (3, 3):
            return None
        affine[:3, :3] = rows.T
        affine[:3, 3] = header.get("space origin", np.zeros(3))
        return _to_ras(str(header.get("space", "")).lower()) @ affine
    if spacings is not None and np.isfinite(spacings[:3]).all() and len(spacings) >= 3:
        affine[[0, 1, 2], [0, 1, 2]] = spacings[:3]
        return affine
    return None


def _to_ras(space: str) -> np.ndarray:
    left = space.startswith(("left", "l")) and not space.startswith("3d")
    posterior = "posterior" in space or space[1:2] == "p"
    return np.diag([-1.0 if left else 1.0, -1.0 if posterior else 1.0, 1.0, 1.0])


# What holds for every format


def _not_empty(path: Path) -> None:
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty (0 bytes); copy it again")


def _check_size(path: Path, shape: Sequence[int]) -> None:
    voxels = int(np.prod([int(n) for n in shape], dtype=object)) if len(shape) else 0
    if not 0 < voxels <= MAX_VOXELS:
        size = " × ".join(str(int(n)) for n in shape) or "no axis"
        raise DataError(
            f"{path}: its header says {size} voxels; 1 to {MAX_VOXELS} are accepted, save the image again"
        )


def _plain(path: Path, array: np.ndarray) -> np.ndarray:
    """`array`, when it holds real numbers."""
    array = np.asarray(array)
    if array.dtype.fields:
        raise DataError(
            f"{path} holds colours ({some(list(array.dtype.fields))}); save one intensity a voxel"
        )
    if array.dtype.kind == "c":
        raise DataError(f"{path} holds complex numbers; save the magnitude")
    if array.dtype.kind not in "biuf":
        raise DataError(f"{path} holds {array.dtype}; numbers are expected")
    return array


def _checked(raw: Raw) -> Raw:
    """With three axes at most: further ones of a single entry are dropped, others refused."""
    array = raw.array
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    while array.ndim > 3 and array.shape[0] == 1 and raw.header is None:
        array = array[0]
    if array.ndim not in (2, 3):
        size = " × ".join(map(str, raw.array.shape)) or "a single number"
        raise DataError(
            f"{raw.path} has {raw.array.ndim} axes ({size}); one 3D volume a file is accepted (a file a frame, a file a channel)"
        )
    if raw.affine is not None:
        _check_affine(raw.path, raw.affine)
    return replace(raw, array=array)


def _check_affine(path: Path, affine: np.ndarray) -> None:
    sizes = voxel_sizes(affine)
    if not np.isfinite(affine).all() or not (sizes > 1e-6).all() or not (sizes < 1e4).all():
        raise DataError(
            f"{path}: its header has a voxel spacing of {' × '.join(f'{s:g}' for s in sizes)} mm; correct it"
        )
    if abs(np.linalg.det(affine[:3, :3] / sizes)) < 1e-3:
        raise DataError(f"{path}: two axes of its header's affine are parallel; correct it")
