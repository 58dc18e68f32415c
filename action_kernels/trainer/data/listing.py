"""The files under a folder, found once: links followed but never in a circle, what the system left behind skipped."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import TrainerError
from .problems import Problems, reason

IMAGE_SUFFIXES = (".nii", ".nii.gz", ".nii.bz2", ".nrrd", ".h5")
FOREIGN_SUFFIXES = (".mha", ".mhd", ".nhdr", ".dcm", ".img", ".hdr", ".mgz", ".mgh", ".mnc")


def image_suffix(path: Path) -> str:
    """``.nii.gz`` of ``a.nii.gz`` and of ``A.NII.GZ``; empty where the name is not that of an image."""
    name = path.name.lower()
    return next((s for s in sorted(IMAGE_SUFFIXES, key=len, reverse=True) if name.endswith(s)), "")


def image_stem(path: Path) -> str:
    """The name without its image suffix."""
    suffix = image_suffix(path)
    return path.name[: -len(suffix)] if suffix else path.name


@dataclass(frozen=True)
class Listing:
    """The image files under `root` in the order of their paths, other files, and what could not be looked at."""

    root: Path
    images: tuple[Path, ...]
    others: tuple[Path, ...]
    problems: tuple[str, ...]

    def named(self, *suffixes: str) -> list[Path]:
        """The image files with one of `suffixes`."""
        return [path for path in self.images if image_suffix(path) in suffixes]

    def under(self, *folders: str) -> list[Path]:
        """The image files directly in the subfolder named."""
        return [path for path in self.images if path.parent == self.root.joinpath(*folders)]


def list_folder(data: str, option: str = "--data") -> Listing:
    """Everything under the folder `data`, which `option` of the command line named.

    Raises:
        TrainerError: when there is no such folder.
    """
    if not data.strip():
        raise TrainerError(f"{option}: nothing was given; give the folder of the data")
    root = Path(data).expanduser()
    if not root.is_dir():
        if root.exists():
            raise TrainerError(f"{option}: {root} is a file; give the folder that holds the images")
        raise TrainerError(
            f"{option}: there is no folder {root}; give the folder of the data, or 'phantom' to need none"
        )
    problems, files, folders = Problems(), [], []  # type: ignore[var-annotated]
    seen: set[tuple[int, int]] = set()

    def unreadable(error: OSError) -> None:
        problems.add(f"{error.filename} cannot be listed ({reason(error)}); mend its permissions")

    for folder, below, names in os.walk(root, followlinks=True, onerror=unreadable):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:  # a link back to where we have been
            below.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        below[:] = sorted(name for name in below if not _left_behind(name))
        folders += [Path(folder, name) for name in below]
        files += [Path(folder, name) for name in names if not _left_behind(name)]
    images = sorted(path for path in files if image_suffix(path))
    for path in images:
        if not path.is_file():
            problems.add(f"{path} is {_what(path)}; put the image there, or remove it")
    holding = {parent for path in images for parent in path.parents}
    for path in folders:  # unpackers leave folders named like the file that they hold
        if image_suffix(path) and path not in holding:
            problems.add(
                f"{path} is a folder named like an image; put the image there, or remove it"
            )
    return Listing(
        root,
        tuple(path for path in images if path.is_file()),
        tuple(sorted(path for path in files if not image_suffix(path))),
        tuple(problems.sentences),
    )


def _left_behind(name: str) -> bool:
    """Hidden files, those of macOS among them (``._a.nii.gz``, ``.DS_Store``, ``__MACOSX``)."""
    return name.startswith(".") or name == "__MACOSX"


def _what(path: Path) -> str:
    try:
        os.stat(path)
    except OSError as error:
        return f"a link to nothing ({reason(error)})" if path.is_symlink() else reason(error)
    return "no regular file"
