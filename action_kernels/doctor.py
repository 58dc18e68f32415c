"""The diagnosis: versions, libraries, devices, and the backend that each op will use here."""

from __future__ import annotations

import importlib
import importlib.metadata
import itertools
import platform
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from action_kernels import ops
from action_kernels._version import __version__
from action_kernels.backends._library import LIBRARY_FOLDER
from action_kernels.ops import registry

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PACKAGE = Path(__file__).resolve().parent
PASSES = ("", "_forward", "_backward")  # an op's kernels are called like it, with one of these
FALLBACK = "fallback"
LEGEND = {
    "reference": "PyTorch, and meant so: float64, and what has no other kernel for the dtype",
    FALLBACK: "PyTorch in place of a backend that is not available (see above): slower",
    "/": "forward pass / backward pass",
    "raises": "the backend is misconfigured or does not serve this device (see above), or has no kernel",
}


def report() -> str:
    """The diagnosis as text, a section a topic."""
    lines: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # what they say stands in the report
        problem = registry.misconfiguration()
        for title, section in (
            ("versions", _versions()),
            ("devices", _devices()),
            ("backends", _backends(problem)),
            ("backend of each op", [f"every op raises: {problem}"] if problem else _choices()),
        ):
            lines += [title, *(f"  {line}" for line in section), ""]
    return "\n".join(lines).rstrip()


def _versions() -> Iterator[str]:
    yield f"action_kernels  {__version__}"
    yield from (f"{'':<15} {line}" for line in _origin())
    yield f"python          {platform.python_version()} on {platform.platform()}"
    yield f"torch           {torch.__version__} (built for CUDA {torch.version.cuda or '–'})"
    for name in ("triton", "numpy", "monai"):
        yield f"{name:<15} {_installed(name)}"


def _origin() -> Iterator[str]:
    """Where the package is, and what it means that it is a clone's sources."""
    clone = PACKAGE.parent
    if not (clone / "csrc").is_dir() or not (clone / "setup.py").is_file():
        yield f"in {PACKAGE}"
        return
    yield f"from the sources in {clone}, not from an installed copy"
    hidden = _installed_elsewhere()
    if hidden is not None:
        yield f"they hide the copy installed in {hidden}: start Python in another folder for that"
    if not any(LIBRARY_FOLDER.glob("*.so")):
        yield "they hold no compiled library: what it serves falls back to PyTorch, slower; for it run"
        yield "python setup.py build_ext --inplace, or pip install . and start Python elsewhere"


def _installed_elsewhere() -> Path | None:
    for distribution in importlib.metadata.distributions(name="action_kernels"):
        folder = Path(str(distribution.locate_file("action_kernels")))
        if (folder / "__init__.py").is_file() and folder.resolve() != PACKAGE:
            return folder
    return None


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


def _backends(problem: str | None) -> Iterator[str]:
    for backend in registry.backends():
        devices = ", ".join(sorted(backend.devices)) if backend.devices else "every device"
        state, details = _state(backend, problem)
        if not backend.automatic:
            state += f'; used if asked for: use_backend("{backend.name}")'
        yield f"{backend.name:<10} for {devices}: {state}"
        yield from (f"{'':<11}{line}" for line in details)
    if problem is None:
        yield f"asked for: {registry.requested_backend() or 'auto'}"


def _state(backend: registry.Backend, problem: str | None) -> tuple[str, Iterable[str]]:
    """Whether a backend can be used, and what it runs on."""
    reasons = [
        registry.unavailable(backend.name, kind) for kind in sorted(backend.devices or ["cpu"])
    ]
    if None not in reasons:
        return f"not available: {reasons[0]}", ()
    if problem is not None:
        return "there, but no op runs (see below)", ()
    misconfigured = registry.misconfigured(backend.name)
    if misconfigured is not None:
        return f"its ops raise: {misconfigured}", ()
    if backend.devices is None:
        return "PyTorch itself", ()
    describe = getattr(importlib.import_module(backend.module), "describe", tuple)
    return "ready", describe()


def _choices() -> Iterator[str]:
    """A table of ops and dtypes for each kind of device, and what its words mean."""
    rows = []
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        rows.append([device, *(str(dtype).removeprefix("torch.") for dtype in DTYPES)])
        rows += [
            [f"  {op}", *(_choice(op, device, dtype) for dtype in DTYPES)] for op in ops.__all__
        ]
    widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        yield "".join(cells).rstrip()
    used = "".join(itertools.chain.from_iterable(rows))
    yield from (f"{word}: {meaning}" for word, meaning in LEGEND.items() if word in used)


def _choice(op: str, device: str, dtype: torch.dtype) -> str:
    """The backend of an op's passes, or both if forward and backward differ."""
    kernels = [op + suffix for suffix in PASSES if op + suffix in registry.operations()]
    return "/".join(dict.fromkeys(_choice_of_kernel(kernel, device, dtype) for kernel in kernels))


def _choice_of_kernel(kernel: str, device: str, dtype: torch.dtype) -> str:
    try:
        chosen = registry.backend_of(kernel, device, dtype)
    except (NotImplementedError, RuntimeError):
        return "raises"
    if registry.misconfigured(chosen) is not None:
        return "raises"
    instead = registry.passed_over(kernel, device, dtype)
    return FALLBACK if chosen == "reference" and instead else chosen
