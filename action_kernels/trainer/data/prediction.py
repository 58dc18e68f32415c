"""Images in, label maps out: files are segmented on their native grids, read and written by other processes."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import TrainerError
from .acdc import is_cine, slice_of
from .dataset import Plan
from .files import Raw, read_h5, read_image
from .la import H5_NAME, IMAGE_NAME, OTHER_NAMES
from .listing import IMAGE_SUFFIXES, Listing, image_stem, image_suffix, list_folder
from .nnunet import channel_of, files_by_case
from .output import write_labels
from .pairs import IMAGE_WORDS, place_of
from .problems import Problems, some
from .reading import Source, read_volume
from .volume import Volume

_NAMED_BY_FOLDER = (*IMAGE_WORDS, H5_NAME, IMAGE_NAME)


@dataclass(frozen=True)
class Input:
    """An image to segment: its name, and its files, one a channel."""

    name: str
    files: tuple[Path, ...]


Progress = Callable[[list[Input]], Iterable[Input]]


def predict_files(
    segment: Callable[[Volume], np.ndarray],
    plan: Plan,
    source: Path,
    output: Path,
    *,
    overwrite: bool = False,
    workers: int = 2,
    progress: Progress = iter,
) -> list[Path]:
    """Segment a file, or every image of a folder, into ``<output>/<case>.nii.gz``.

    Args:
        segment: labels (*axes) of a volume.
        plan: how the images are read; that of the training data.
        source: a file or a folder; labels among the images are left alone.
        output: the folder for the label maps, made where it is missing.
        overwrite: replace label maps that are there already (images never are).
        workers: processes that read and write; 0: this one does.
        progress: wraps the images that are about to be segmented, as ``tqdm`` does.

    Returns:
        What was written, in the order of the names.

    Raises:
        DataError: after all other images are done, with a sentence for each that could not be read.
        TrainerError: before anything is done, when nothing would be segmented or something would be overwritten.
    """
    inputs, problems = find_inputs(source, plan)
    if not inputs:
        problems.raise_any()
        raise TrainerError(
            f"-i: {source} holds no images; {', '.join(IMAGE_SUFFIXES)} files are accepted"
        )
    targets = _free_targets(inputs, output, overwrite)
    output.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    writing: deque[Future[None]] = deque()
    with _executor(min(workers, len(inputs))) as pool:
        for one, reader in zip(
            progress(inputs), _read_ahead(pool, inputs, plan, workers), strict=True
        ):
            with problems.collecting():
                volume = reader.result()
                writing.append(
                    pool.submit(write_labels, segment(volume), volume.grid, targets[one.name])
                )
                written.append(targets[one.name])
            while len(writing) > workers:
                writing.popleft().result()
        for future in writing:
            future.result()
    problems.raise_any()
    return written


def read_input(one: Input, plan: Plan) -> Volume:
    """The image of an input as a network trained by `plan` expects it.

    Raises:
        DataError: naming the file.
    """
    channels = tuple(partial(_read, path, plan) for path in one.files)
    return read_volume(Source(channels, None), plan.task, plan.rules)


def _read(path: Path, plan: Plan) -> Raw:
    if image_suffix(path) == ".h5":
        return read_h5(path, "image", reverse=plan.rules.reverse_h5)
    return read_image(path)


# What there is to segment


def find_inputs(source: Path, plan: Plan) -> tuple[list[Input], Problems]:
    """The images of a folder by name, or the one given, and what is wrong with the others.

    Raises:
        TrainerError: when there is no such file or folder.
    """
    problems = Problems()
    source = source.expanduser()
    if source.is_dir():
        listing = list_folder(str(source), "-i")
        problems.add(*listing.problems)
        paths = _images_of(listing)
    elif source.is_file():
        if not image_suffix(source):
            raise TrainerError(
                f"-i: {source} is no image; {', '.join(IMAGE_SUFFIXES)} are accepted"
            )
        paths, source = [source], source.parent
    else:
        raise TrainerError(f"-i: there is no {source}; give an image, or a folder of images")
    channels = plan.task.channels
    if channels > 1:
        found = files_by_case(paths, channels, f"the run's task has {channels}", problems)
        inputs = [Input(name, tuple(files)) for name, files in found.items()]
    else:
        one_channel = all(channel_of(path) == 0 for path in paths)
        inputs = [Input(_name(path, source, one_channel), (path,)) for path in paths]
    return _without_doubles(inputs, problems), problems


def _images_of(listing: Listing) -> list[Path]:
    """The files that are images: no labels, no cine, no slices of volumes that are there too."""
    paths = [
        path
        for path in listing.images
        if not place_of(path.relative_to(listing.root)).is_label
        and image_stem(path).lower() not in OTHER_NAMES
        and not is_cine(path)
    ]
    volumes = {image_stem(path) for path in paths}
    return [path for path in paths if slice_of(path) not in volumes]


def _name(path: Path, root: Path, one_channel: bool) -> str:
    stem = image_stem(path)
    if stem.lower() in _NAMED_BY_FOLDER:
        return path.resolve().parent.name
    if one_channel:
        return stem[: -len("_0000")]
    return place_of(path.relative_to(root)).case


def _without_doubles(inputs: list[Input], problems: Problems) -> list[Input]:
    found: dict[str, Input] = {}
    for one in inputs:
        if one.name in found:
            first = found[one.name].files[0]
            problems.add(f"{one.files[0]} and {first} are both {one.name}; rename one of them")
        found.setdefault(one.name, one)
    return [found[name] for name in sorted(found)]


def _free_targets(inputs: list[Input], output: Path, overwrite: bool) -> dict[str, Path]:
    """Where each label map goes.

    Raises:
        TrainerError: when a file is there already.
    """
    output = output.expanduser()
    if output.exists() and not output.is_dir():
        raise TrainerError(f"-o: {output} is a file; give a folder")
    targets = {one.name: output / f"{one.name}.nii.gz" for one in inputs}
    images = {file.resolve() for one in inputs for file in one.files}
    there = [path for path in targets.values() if path.exists()]
    over = [path for path in there if path.resolve() in images]
    if over:
        raise TrainerError(f"-o: {some(over)} are the images themselves; give another folder")
    if there and not overwrite:
        raise TrainerError(
            f"-o: {some(there)} exist already; give another folder, or --overwrite to replace them"
        )
    return targets


# Processes


class _Here(Executor):
    """Does what it is asked at once."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - raised again by whoever asks for the result
            future.set_exception(error)
        return future


@contextmanager
def _executor(workers: int) -> Iterator[Executor]:
    if workers < 1:
        yield _Here()
        return
    # as torch's loaders: forked where that exists, so that a script needs no guard of its main module; the children
    # use neither torch nor a GPU
    forks = "fork" in multiprocessing.get_all_start_methods()
    try:
        with ProcessPoolExecutor(
            workers, multiprocessing.get_context("fork" if forks else "spawn")
        ) as pool:
            yield pool
    except BrokenProcessPool:
        raise TrainerError(
            "a process that reads or writes images was ended, perhaps for want of memory; --workers 0 does without them"
        ) from None


def _read_ahead(
    pool: Executor, inputs: list[Input], plan: Plan, ahead: int
) -> Iterator[Future[Volume]]:
    """A future for each input, `ahead` of them asked for before they are needed."""
    waiting: deque[Future[Volume]] = deque()
    for one in inputs:
        waiting.append(pool.submit(read_input, one, plan))
        if len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting
