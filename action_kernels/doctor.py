"""The diagnosis: versions, libraries, devices, and the backend that each op will use here."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import warnings
from collections.abc import Iterator

import torch

from action_kernels._version import __version__
from action_kernels.ops import registry

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def report() -> str:
    """The diagnosis as text, a section a topic."""
    lines: list[str] = []
    warnings.simplefilter("ignore", RuntimeWarning)  # what they say stands in the report
    for title, section in (
        ("versions", _versions()),
        ("devices", _devices()),
        ("backends", _backends()),
        ("backend of each op", _choices()),
    ):
        lines += [title, *(f"  {line}" for line in section), ""]
    return "\n".join(lines).rstrip()


def _versions() -> Iterator[str]:
    yield f"action_kernels  {__version__}"
    yield f"python          {platform.python_version()} on {platform.platform()}"
    yield f"torch           {torch.__version__} (built for CUDA {torch.version.cuda or '–'})"
    for name in ("triton", "numpy", "monai"):
        yield f"{name:<15} {_installed(name)}"


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> Iterator[str]:
    yield f"cpu     {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    if not torch.cuda.is_available():
        yield "cuda    none"
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = device.total_memory / 2**30
        yield f"cuda:{index}  {device.name}, sm_{device.major}{device.minor}, {memory:.0f} GiB"


def _backends() -> Iterator[str]:
    for backend in registry.backends():
        devices = ", ".join(sorted(backend.devices)) if backend.devices else "every device"
        kinds = sorted(backend.devices or {"cpu"})
        reasons = [registry.unavailable(backend.name, kind) for kind in kinds]
        state = "ready" if None in reasons else f"not available: {reasons[0]}"
        if not backend.automatic:
            state += f'; used if asked for: use_backend("{backend.name}")'
        yield f"{backend.name:<10} for {devices}: {state}"
        module = importlib.import_module(backend.module) if None in reasons else None
        describe = getattr(module, "describe", None)
        if describe is not None:
            yield from (f"           {line}" for line in describe())
    yield f"asked for: {registry.requested_backend() or 'auto'}"


def _choices() -> Iterator[str]:
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        yield f"{device:<30}" + "".join(
            f"{str(dtype).removeprefix('torch.'):<11}" for dtype in DTYPES
        )
        for op in registry.operations():
            chosen = "".join(f"{_choice(op, device, dtype):<11}" for dtype in DTYPES)
            yield f"  {op:<28}{chosen}"


def _choice(op: str, device: str, dtype: torch.dtype) -> str:
    try:
        return registry.backend_of(op, device, dtype)
    except (NotImplementedError, RuntimeError):
        return "–"
