"""Checkpoints: written whole or not at all, checked when read, and enough to go on as if nothing had happened."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .configuration import CONFIGURATION_FILE, FORMAT, Configuration, StageName, options
from .errors import TrainerError
from .files import replace_file
from .stages import Stage

Kind = Literal["last", "best"]
Weights = dict[str, dict[str, Tensor]]
FILES: dict[Kind, str] = {"last": "checkpoint.pt", "best": "best.pt"}
WEIGHTS_FILES: dict[Kind, str] = {"last": "last.safetensors", "best": "best.safetensors"}
WEIGHTS = ("network", "head")  # of a stage's modules: what is needed to predict, and to start from
SNAPSHOTS = "snapshots"  # a folder beside the checkpoints
CENTERS = ("centers", "allocation")  # of SAACL's state: what its embeddings are measured against

# What may differ when a run goes on: where it runs and what it records, not what it computes.
MAY_CHANGE = frozenset(
    {
        "data",
        "allow_missing",
        "stride",
        "blend",
        "largest_component",
        "init_from",
        "device",
        "num_workers",
        "log_every",
        "validate_every",
        "checkpoint_every",
        "snapshot_every",
        "pictures",
        "final_list",
        "max_iterations",
        "pretrain_iterations",
    }
)


@dataclass(frozen=True)
class Progress:
    """Where a stage stands: steps done, and the record of them."""

    iteration: int
    history: dict[str, Any]


class Checkpoints:
    """The checkpoints of one stage of one run, in one folder: the last one and the best on validation."""

    def __init__(self, folder: Path, config: Configuration, stage: StageName) -> None:
        self.folder, self.config, self.stage = folder, config, stage

    def exists(self, kind: Kind = "last") -> bool:
        return (self.folder / FILES[kind]).is_file()

    def iteration(self) -> int:
        """Steps done at the last checkpoint."""
        done: int = read_checkpoint(self.folder / FILES["last"])["iteration"]
        return done

    def save(self, stage: Stage, progress: Progress, kind: Kind = "last") -> None:
        """Write everything that the stage keeps, its progress, the configuration and the random states."""
        content = {
            "format": FORMAT,
            "kind": kind,
            "stage": self.stage,
            "configuration": self.config.as_dict(),
            "iteration": progress.iteration,
            "history": progress.history,
            "modules": {name: module.state_dict() for name, module in stage.modules.items()},
            "random": _random_states(_device_of(stage)),
        }
        replace_file(self.folder / FILES[kind], lambda temporary: torch.save(content, temporary))

    def load(self, stage: Stage, kind: Kind = "last") -> Progress:
        """Restore what `save` wrote into the stage and torch's generators.

        Raises:
            TrainerError: when the file is missing or damaged, or belongs to another run or stage.
        """
        return self.restore(stage, self.read(kind), kind)

    def read(self, kind: Kind = "last") -> dict[str, Any]:
        """The content of a checkpoint of this run and stage.

        Raises:
            TrainerError: as `load`.
        """
        path = self.folder / FILES[kind]
        content = read_checkpoint(path)
        self._check(path, content, kind)
        return content

    def restore(self, stage: Stage, content: dict[str, Any], kind: Kind = "last") -> Progress:
        """Put what was read into the stage and torch's generators.

        Raises:
            TrainerError: when it does not fit.
        """
        path = self.folder / FILES[kind]
        try:
            for name, module in stage.modules.items():
                module.load_state_dict(content["modules"][name])
            _restore_random_states(content["random"], _device_of(stage))
        except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise TrainerError(
                f"the checkpoint {path} does not fit this version's {self.stage}: {_first_line(error)}"
            ) from error
        return Progress(content["iteration"], content["history"])

    def _check(self, path: Path, content: dict[str, Any], kind: Kind) -> None:
        for name, wanted in (("stage", self.stage), ("kind", kind)):
            if content[name] != wanted:
                raise TrainerError(
                    f"{path} is the checkpoint of {name} {content[name]!r}, and {wanted!r} was expected there"
                )
        written = Configuration.from_dict(content["configuration"], f"{path}: its configuration")
        for option in options():
            mine, its = self.config.value(option), written.value(option)
            if option.key not in MAY_CHANGE and mine != its:
                raise TrainerError(
                    f"{path} was written with {option.name} {_shown(its)}, but {CONFIGURATION_FILE} says "
                    f"{_shown(mine)}; a run goes on with the configuration that it began with"
                )


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint file, on the CPU, once its checksums and its form are right.

    Raises:
        TrainerError: when there is none, it cannot be read, or it is of another format.
    """
    if not path.is_file():
        raise TrainerError(f"there is no checkpoint {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise TrainerError(f"the checkpoint {path} is damaged: {damaged} has a wrong checksum")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except TrainerError:
        raise
    except MemoryError:
        raise
    except Exception as error:  # what is raised for a damaged file depends on the damage
        raise TrainerError(f"the checkpoint {path} cannot be read: {_first_line(error)}") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise TrainerError(
            f"the checkpoint {path} is of format {found or 1}, this version reads format {FORMAT}"
        )
    wanted = {"kind": str, "stage": str, "configuration": dict, "iteration": int,
              "history": dict, "modules": dict, "random": dict}  # fmt: skip
    for name, kind in wanted.items():
        if not isinstance(content.get(name), kind):
            raise TrainerError(f"the checkpoint {path} is not complete: {name} is missing")
    return content


# Weights alone


def save_weights(path: Path, stage: Stage, facts: dict[str, str]) -> None:
    """The student's weights as safetensors (``network.…``, ``head.…``), `facts` in its header; SAACL's centres too."""
    tensors = {
        f"{part}.{name}": tensor.detach().cpu().contiguous().clone()
        for part in (*WEIGHTS, "saacl")
        if part in stage.modules
        for name, tensor in stage.modules[part].state_dict().items()
        if part != "saacl" or name in CENTERS
    }
    path.parent.mkdir(exist_ok=True)
    replace_file(path, lambda temporary: temporary.write_bytes(save(tensors, facts)))


def snapshot_path(folder: Path, iteration: int) -> Path:
    """Where a stage's snapshot of a step lies; names sort as steps do."""
    return folder / SNAPSHOTS / f"step-{iteration:08d}.safetensors"


def snapshots(folder: Path) -> dict[int, Path]:
    """A stage's snapshots by step, in order."""
    paths = sorted((folder / SNAPSHOTS).glob("step-*.safetensors"))
    return {int(path.stem.partition("-")[2]): path for path in paths}


def load_weights(path: Path) -> Weights:
    """The student's weights of a run's folder, a checkpoint or a safetensors file.

    Of a run: those of its last stage that has a checkpoint. A safetensors file without our prefixes is taken as the
    network's state dict.

    Raises:
        TrainerError: when there is nothing of the kind, or it cannot be read.
    """
    path = path.expanduser()
    if path.is_dir():
        path = _checkpoint_of(path)
    if path.suffix == ".safetensors":
        return _from_safetensors(path)
    modules = read_checkpoint(path)["modules"]
    return {part: modules[part] for part in WEIGHTS if part in modules}


def _checkpoint_of(folder: Path) -> Path:
    config = Configuration.load(folder / CONFIGURATION_FILE)
    for stage in reversed(config.stages):
        path = folder / stage / FILES["last"]
        if path.is_file():
            return path
    raise TrainerError(f"--init-from: the run {folder} has no checkpoint yet")


def _from_safetensors(path: Path) -> Weights:
    try:
        with safe_open(path, framework="pt") as file:
            names: list[str] = list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise TrainerError(f"the weights {path} cannot be read: {_first_line(error)}") from None
    if not any(name.startswith("network.") for name in tensors):
        return {"network": tensors}
    parts: Weights = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = tensor
    return parts


def initialise(stage: Stage, weights: Weights, source: str) -> None:
    """Start the stage from trained weights.

    Raises:
        TrainerError: when they are not those of its network.
    """
    try:
        stage.initialise(weights)
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise TrainerError(
            f"--init-from: the weights of {source} do not fit this network: {_first_line(error)}"
        ) from error


def _device_of(stage: Stage) -> torch.device:
    device: torch.device = next(stage.modules["network"].parameters()).device
    return device


def _random_states(device: torch.device) -> dict[str, Any]:
    """Torch's generators of the CPU and the stage's GPU; nothing in training draws from those of NumPy or Python."""
    cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return {"torch": torch.get_rng_state(), "cuda": cuda}


def _restore_random_states(states: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"] and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"][0], device)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines else type(error).__name__


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
