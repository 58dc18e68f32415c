"""``action-kernels train``, ``evaluate``, ``predict``, ``verify`` and ``reproduce``."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .configuration import (
    CONFIGURATION_FILE,
    Configuration,
    add_arguments,
    argument,
    given_options,
    not_empty,
    options,
    path,
)
from .errors import FirstFailed, TrainerError
from .presets import PRESETS, preset
from .reproduction.arguments import add_arguments as add_reproduce_arguments

FOUND_WRONG = 1
WRONG = 2
INTERRUPTED = 130
INFERENCE = ("stride", "blend", "largest_component")
UNHEARD = 141  # what a shell gives a process that SIGPIPE ended


def add_commands(subparsers: Any) -> None:
    """Add the trainer's commands to an argparse subparsers object; each sets ``run`` to its function."""
    _add_train(subparsers)
    _add_evaluate(subparsers)
    _add_predict(subparsers)
    _add_verify(subparsers)
    _add_reproduce(subparsers)


def _add_train(subparsers: Any) -> None:
    train = subparsers.add_parser(
        "train",
        help="train ACTION++ on your data or on phantoms, and evaluate",
        description="Train ACTION++ (pre-training, then fine-tuning) or one stage of it, and evaluate the result.",
        epilog="example: action-kernels train --preset demo",
    )
    train.add_argument(
        "--preset", choices=sorted(PRESETS), help="where the configuration starts from"
    )
    train.add_argument(
        "--output", type=path, help="folder for everything the run leaves (default: runs/PRESET)"
    )
    train.add_argument(
        "--resume",
        action="store_true",
        help="go on from the output folder's latest checkpoint; with a larger --max-iterations also a finished run",
    )
    add_arguments(train)
    train.set_defaults(run=run_train)


def _add_evaluate(subparsers: Any) -> None:
    evaluate = subparsers.add_parser(
        "evaluate",
        help="evaluate a run on a list of cases",
        description="Evaluate a checkpoint of a run: metrics, predictions as NIfTI, a picture per case.",
        epilog="example: action-kernels evaluate runs/demo --list test",
    )
    evaluate.add_argument("folder", type=path, metavar="RUN", help="the output folder of 'train'")
    evaluate.add_argument(
        "--data", type=not_empty, help="where the data is now (default: where the run found it)"
    )
    evaluate.add_argument(
        "--list", choices=("test", "val"), default="test", help="which patients (default: test)"
    )
    evaluate.add_argument(
        "--checkpoint",
        choices=("last", "best"),
        default="last",
        help="the last one, as the paper does, or the best on the validation list (default: last)",
    )
    evaluate.add_argument(
        "--output", type=path, help="folder for the results (default: RUN/LIST, RUN/LIST-best)"
    )
    _add_device(evaluate)
    _add_inference(evaluate)
    evaluate.set_defaults(run=run_evaluate)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", type=not_empty, help="'auto', 'cpu', 'cuda' … (default: that of the run)"
    )


def _add_inference(parser: argparse.ArgumentParser) -> None:
    """How a network that was trained on crops sees whole images; where not given, as the run has it."""
    for option in options():
        if option.key in INFERENCE:
            parser.add_argument(option.name, dest=option.key, **argument(option))


def _add_predict(subparsers: Any) -> None:
    predict = subparsers.add_parser(
        "predict",
        help="segment your own images with a run's network",
        description="Segment an image, or every image of a folder, on its own grid; labels are not needed.",
        epilog="example: action-kernels predict -i scans -o segmentations --run runs/acdc-10",
    )
    predict.add_argument(
        "-i", "--input", type=path, required=True, help="an image (NIfTI, NRRD, HDF5), or a folder"
    )
    predict.add_argument(
        "-o", "--output", type=path, required=True, help="folder for the label maps (<case>.nii.gz)"
    )
    predict.add_argument(
        "--run", dest="folder", type=path, required=True, help="the output folder of 'train'"
    )
    predict.add_argument(
        "--checkpoint",
        choices=("last", "best"),
        default="last",
        help="the last one, or the best on the validation list (default: last)",
    )
    predict.add_argument(
        "--overwrite", action="store_true", help="replace label maps that are there already"
    )
    predict.add_argument(
        "--workers",
        type=int,
        choices=range(65),
        default=2,
        metavar="N",
        help="processes that read and write, 0 for none (default: 2)",
    )
    _add_device(predict)
    _add_inference(predict)
    predict.set_defaults(run=run_predict)


def _add_verify(subparsers: Any) -> None:
    verify = subparsers.add_parser(
        "verify",
        help="read all of a data folder and name every bad file",
        description="Read every image and label of a data folder, as training would, and name all that is wrong.",
        epilog="example: action-kernels verify ACDC; exit status 0: nothing is wrong, 1: something is",
    )
    verify.add_argument("data", type=not_empty, metavar="DATA", help="a folder of images")
    verify.add_argument(
        "--allow-missing",
        action="store_true",
        help="patients that the lists name need not be on disk",
    )
    verify.add_argument("--spatial-dims", type=int, choices=(2, 3), help="as of 'train'")
    verify.add_argument("--classes", nargs="+", metavar="NAME", help="as of 'train'")
    verify.set_defaults(run=run_verify)


def _add_reproduce(subparsers: Any) -> None:
    reproduce = subparsers.add_parser("reproduce", help="the paper's tables and figures")
    add_reproduce_arguments(reproduce)
    reproduce.set_defaults(run=run_reproduce)


def telling_errors(
    command: Callable[[argparse.Namespace], int],
) -> Callable[[argparse.Namespace], int]:
    """The one place where what ends a command becomes a sentence on stderr and an exit status.

    What the user can put right, what the system refuses (files, memory) and Ctrl-C; anything else is a fault of this
    program and keeps its traceback.
    """

    @functools.wraps(command)
    def wrapper(arguments: argparse.Namespace) -> int:
        try:
            return command(arguments)
        except FirstFailed:
            return WRONG
        except TrainerError as error:
            return told(str(error), WRONG)
        except ModuleNotFoundError as error:
            return told(
                f'{error.name} is not installed; the trainer needs: pip install "action_kernels[train]"',
                WRONG,
            )
        except BrokenPipeError:
            from .stopping import silence

            silence()
            return UNHEARD
        except KeyboardInterrupt:
            return told("interrupted", INTERRUPTED)
        except (OSError, MemoryError) as error:
            return told(system_error(error), WRONG)
        except RuntimeError as error:
            if is_out_of_memory(error):
                return told(out_of_memory(error), WRONG)
            if "DataLoader worker" in str(error):
                return told(f"{error}; fewer --num-workers need less memory", WRONG)
            raise

    return wrapper


def told(message: str, status: int) -> int:
    """Print a sentence on stderr, where anybody still listens, and return the status."""
    with contextlib.suppress(OSError):
        print(f"action-kernels: {message}", file=sys.stderr, flush=True)
    return status


def system_error(error: OSError | MemoryError) -> str:
    """What the system refused, with the file's name where it has one."""
    if isinstance(error, MemoryError):
        return out_of_memory(error)
    name = getattr(error, "filename", None)
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return f"{name}: {reason}" if name else str(reason)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch found no memory (its CPU allocator raises a plain RuntimeError)."""
    return type(error).__name__ == "OutOfMemoryError" or "not enough memory" in str(error)


def out_of_memory(error: BaseException) -> str:
    """What to do about it."""
    first = (str(error).splitlines() or [""])[0]
    return (
        f"out of memory; a smaller batch, --patch-size or --queue-size needs less. {first}".strip()
    )


@telling_errors
def run_train(arguments: argparse.Namespace) -> int:
    """The ``train`` command: 0 when finished, 2 for what the user can put right, 130 when interrupted."""
    folder = agreed_folder(arguments)
    config = chosen_configuration(arguments, folder)
    from .run import run_training  # after the arguments: torch takes seconds to import
    from .stopping import Interrupted
    from .world import joined_world

    try:
        run_training(config, folder, resume=arguments.resume)
    except Interrupted as stopped:
        if not joined_world().is_first:
            return INTERRUPTED
        return told(
            f"{stopped}; go on with: action-kernels train --resume --output {folder}", INTERRUPTED
        )
    return 0


@telling_errors
def run_evaluate(arguments: argparse.Namespace) -> int:
    """The ``evaluate`` command."""
    from .run import evaluate_run

    changes = {
        name: getattr(arguments, name) for name in ("data", "device") if getattr(arguments, name)
    } | inference_options(arguments)
    suffix = "" if arguments.checkpoint == "last" else "-best"
    output = arguments.output or arguments.folder / f"{arguments.list}{suffix}"
    evaluate_run(arguments.folder, arguments.list, output, kind=arguments.checkpoint, **changes)
    return 0


def inference_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those given."""
    return {key: value for key, value in vars(arguments).items() if key in INFERENCE}


@telling_errors
def run_predict(arguments: argparse.Namespace) -> int:
    """The ``predict`` command: 2 when an image could not be read, after the others are done."""
    from tqdm import tqdm

    from .data import DataError
    from .prediction import predict_run

    changes = {"device": arguments.device} if arguments.device else {}
    changes |= inference_options(arguments)
    try:
        written = predict_run(
            arguments.folder,
            arguments.input,
            arguments.output,
            kind=arguments.checkpoint,
            overwrite=arguments.overwrite,
            workers=arguments.workers,
            progress=lambda inputs: tqdm(inputs, unit="image", disable=None),
            **changes,
        )
    except DataError as error:
        for problem in error.problems:
            told(problem, WRONG)
        return WRONG
    print(f"{len(written)} label maps are in {arguments.output}")
    return 0


@telling_errors
def run_verify(arguments: argparse.Namespace) -> int:
    """The ``verify`` command: 0 when nothing is wrong, 1 when something is, 2 when there is no such folder."""
    from tqdm import tqdm

    from .data import Options
    from .data.verification import verify

    report = verify(
        arguments.data,
        Options(
            arguments.spatial_dims,
            arguments.classes and tuple(arguments.classes),
            arguments.allow_missing,
        ),
        lambda cases: tqdm(cases, unit="case", disable=None),
    )
    for problem in report.problems:
        print(f"wrong: {problem}")
    for note in report.notes:
        print(f"note: {note}")
    print(report.summary)
    count = len(report.problems)
    print(f"{count or 'nothing'} {'things are' if count > 1 else 'is'} wrong")
    return FOUND_WRONG if report.problems else 0


@telling_errors
def run_reproduce(arguments: argparse.Namespace) -> int:
    """The ``reproduce`` command: 0 when all is there, 2 when a run failed, 130 when interrupted."""
    from .reproduction.command import reproduce
    from .stopping import Interrupted

    try:
        return reproduce(arguments)
    except Interrupted as stopped:
        return told(f"{stopped}; the same command goes on with it", INTERRUPTED)


def chosen_configuration(arguments: argparse.Namespace, folder: Path) -> Configuration:
    """The preset with the options given, or, to resume, the configuration of the run."""
    given = given_options(arguments)
    if not arguments.resume:
        config = preset(arguments.preset or _preset_for(given), **given)
        _refuse_without_effect(config, given)
        return config
    config = Configuration.load(folder / CONFIGURATION_FILE)
    if arguments.preset:
        given = {**PRESETS[arguments.preset], **given}
    changed = config.with_values(given)
    from .checkpoints import MAY_CHANGE

    for option in options():
        if option.key in given and option.key not in MAY_CHANGE:
            wanted, had = changed.value(option), config.value(option)
            if wanted != had:
                raise TrainerError(
                    f"{option.name}: {wanted} was given, but the run to resume has {had}; "
                    f"leave it out, or start a new run in another --output"
                )
    return changed


def _refuse_without_effect(config: Configuration, given: dict[str, Any]) -> None:
    """The length of a stage that does not run is a mistake."""
    for key, stages in (
        ("pretrain_iterations", {"pretrain"}),
        ("max_iterations", {"finetune", "supervised", "mean_teacher"}),
    ):
        if key in given and not stages & set(config.stages):
            raise TrainerError(
                f"--{key.replace('_', '-')} has no effect with --stage {config.run.stage}"
            )


def _preset_for(given: dict[str, Any]) -> str:
    """Without ``--preset``: the demos on phantoms, the paper's 10 % setting on a data folder."""
    of_phantoms = {"phantom": "demo", "phantom-atrium": "demo-3d"}
    return of_phantoms.get(given.get("data", "phantom"), "acdc-10")


def agreed_folder(arguments: argparse.Namespace) -> Path:
    """The output folder, the same for all processes that torchrun started."""
    choose = functools.partial(output_folder, arguments.output, arguments.preset, arguments.resume)
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return choose()
    from .world import joined_world

    return joined_world().from_first(choose)


def output_folder(output: Path | None, preset_name: str | None, resume: bool) -> Path:
    """The folder given; else runs/PRESET, the next free one for a new run, the latest one to resume."""
    if output is not None:
        return output
    stem = preset_name or "train"
    used = [path for path in _numbered(stem) if path.exists()]
    if resume:
        if not used:
            raise TrainerError(
                f"--resume: there is no run in runs/{stem}; name its folder with --output"
            )
        return used[-1]
    return next(path for path in _numbered(stem) if path not in used)


def _numbered(stem: str) -> list[Path]:
    return [
        Path("runs") / (stem if number == 1 else f"{stem}-{number}") for number in range(1, 1000)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    parser = argparse.ArgumentParser(prog="action-kernels")
    add_commands(parser.add_subparsers(dest="command", required=True))
    arguments = parser.parse_args(argv)
    return arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
