"""A user's own network: any segmentation module in the protocol, by forward hooks."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import TrainerError
from .layers import Pyramid

_INTERPOLATION = {2: "bilinear", 3: "trilinear"}
_PROBE_LENGTH = 64  # pixels a side of the image that finds the channels out


class Adapted(nn.Module):
    """A module that returns logits, with the outputs of some of its submodules as the feature pyramid.

    Made by `adapt`. The hooks live for one forward pass, so copies, state dicts and pickles know nothing of them.

    Attributes:
        model: the user's module; its state dict is found under ``model.``.
        levels: names of the submodules, coarse to fine.
        channels: of the pyramid, coarse to fine.
    """

    def __init__(self, model: nn.Module, levels: Sequence[str], channels: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self.levels = tuple(levels)
        self.channels = tuple(channels)

    def forward(self, images: Tensor) -> tuple[Tensor, Pyramid]:
        """Logits (B, K, *size) and the maps of the levels, coarse to fine, of images (B, C, *size).

        Where the finest level is coarser than the logits it is upsampled to their size (linear, aligned corners).
        """
        logits, pyramid = run_with_hooks(self.model, self.levels, images)
        size = logits.shape[2:]
        if pyramid[-1].shape[2:] != size:
            finest = functional.interpolate(
                pyramid[-1], size=size, mode=_INTERPOLATION[len(size)], align_corners=True
            )
            pyramid = (*pyramid[:-1], finest)
        return logits, pyramid


def adapt(
    model: nn.Module,
    levels: Sequence[str],
    *,
    channels: Sequence[int] | None = None,
    example: Tensor | None = None,
) -> Adapted:
    """Any segmentation network as one that also returns a feature pyramid.

    The pyramid are the outputs of the submodules `levels`, caught by forward hooks; the network itself is unchanged.
    An activation that works in place changes what the module before it returned: the map is then the activated one.

    Args:
        model: images (B, C, *size) to logits (B, K, *size), in two or three dimensions.
        levels: names of submodules as in ``model.named_modules()``, coarse to fine, each called once in a forward
            pass and returning a map (B, channels, *size_l).
        channels: of those maps. None: found out by one forward pass in evaluation mode.
        example: images for that pass. None: zeros with 64 pixels a side and as many channels as the network's first
            convolution takes.

    Returns:
        A module with ``channels``; called with images it returns ``(logits, pyramid)``.

    Raises:
        ValueError: a level does not exist, is not called exactly once, does not return a map, or the levels do not
            run from coarse to fine.
        TypeError: the network does not return one tensor.

    Example::

        network = adapt(my_network, levels=["bottleneck", "up_2", "up_1", "up_0"])
        logits, pyramid = network(images)
    """
    check_levels(model, levels)
    if channels is None:
        channels = probe(model, levels, example_images(model) if example is None else example)
    elif len(channels) != len(levels):
        raise ValueError(f"channels must be {len(levels)} counts, one a level, got {len(channels)}")
    return Adapted(model, levels, channels)


def load_network(name: str, *, spatial_dims: int, in_channels: int, num_classes: int) -> nn.Module:
    """The network that ``package.module:factory`` makes.

    The factory is called as ``factory(spatial_dims=…, in_channels=…, num_classes=…)`` and returns a module in the
    protocol: its own, or what `adapt` made of it. Modules are looked for in the working directory too.

    Raises:
        TrainerError: the module or the factory does not exist, or what it returns is no such network.
    """
    module_name, _, factory_name = name.partition(":")
    if not (module_name and factory_name):
        raise TrainerError(
            f"--network: {name!r} was given, package.module:factory or a network's name is accepted"
        )
    with working_directory_on_path():
        try:
            factory = importlib.import_module(module_name)
            for part in factory_name.split("."):
                factory = getattr(factory, part)
        except (ImportError, AttributeError) as error:
            raise TrainerError(f"--network: {name!r} cannot be loaded: {error}") from error
        except Exception as error:  # the module is the user's: it may do anything
            raise TrainerError(
                f"--network: {name!r} cannot be loaded: {type(error).__name__}: {error}"
            ) from error
    if not callable(factory):
        raise TrainerError(f"--network: {name!r} is no function or class, but {factory!r}")
    try:
        network = factory(
            spatial_dims=spatial_dims, in_channels=in_channels, num_classes=num_classes
        )
    except Exception as error:
        raise TrainerError(
            f"--network: {name!r} could not be called with spatial_dims, in_channels and num_classes: "
            f"{type(error).__name__}: {error}"
        ) from error
    counts = getattr(network, "channels", None)
    if not isinstance(network, nn.Module) or not isinstance(counts, Sequence) or not counts:
        raise TrainerError(
            f"--network: {name!r} made a {type(network).__name__}; wanted is a torch module with channels "
            "(of its feature maps, coarse to fine) that returns (logits, pyramid): see adapt"
        )
    return network


def check_levels(model: nn.Module, levels: Sequence[str]) -> None:
    """Every level is a submodule, none is named twice."""
    if isinstance(levels, str) or not levels:
        raise ValueError(f"levels must be names of submodules, coarse to fine, got {levels!r}")
    names = [name for name, _ in model.named_modules() if name]
    for level in levels:
        if level not in names:
            near = ", ".join(get_close_matches(str(level), names, n=5, cutoff=0.4) or names[:10])
            raise ValueError(f"levels: the network has no submodule {level!r}; it has {near}, …")
    if len(set(levels)) != len(levels):
        raise ValueError(f"levels must differ from each other, got {tuple(levels)}")


def run_with_hooks(
    model: nn.Module, levels: Sequence[str], images: Tensor
) -> tuple[Tensor, Pyramid]:
    """The model's logits, and what its submodules `levels` returned on the way."""
    caught: dict[str, list[object]] = {level: [] for level in levels}
    hooks = [
        model.get_submodule(level).register_forward_hook(
            lambda _module, _inputs, output, seen=caught[level]: seen.append(output)
        )
        for level in levels
    ]
    try:
        logits = model(images)
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"model must return the logits as one tensor, got {type(logits).__name__}; wrap it so that it does"
        )
    return logits, tuple(_only_map(level, outputs, logits) for level, outputs in caught.items())


def _only_map(level: str, outputs: list[object], logits: Tensor) -> Tensor:
    if len(outputs) != 1:
        raise ValueError(f"levels: {level!r} was called {len(outputs)} times in a pass, not once")
    (output,) = outputs
    if not isinstance(output, Tensor) or output.dim() != logits.dim():
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"levels: {level!r} returns {found}, wanted is a map (batch, channels, *size) with "
            f"{logits.dim() - 2} axes in size"
        )
    return output


def probe(model: nn.Module, levels: Sequence[str], example: Tensor) -> tuple[int, ...]:
    """Channels of the levels, from a forward pass that changes nothing; also checks their order."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            _, pyramid = run_with_hooks(model, levels, example)
    finally:
        for module, training in modes:
            module.training = training
    sizes = [tuple(level.shape[2:]) for level in pyramid]
    if any(any(a > b for a, b in zip(*pair, strict=True)) for pair in pairwise(sizes)):
        raise ValueError(
            f"levels must run from coarse to fine, but the sizes of {tuple(levels)} are {sizes}"
        )
    return tuple(level.shape[1] for level in pyramid)


def example_images(model: nn.Module) -> Tensor:
    """Zeros that fit the network's first convolution."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            size = [_PROBE_LENGTH] * len(module.kernel_size)
            return module.weight.new_zeros(1, module.in_channels, *size)
    raise ValueError(
        "model has no 2D or 3D convolution to tell its input by: give channels, or an example"
    )


@contextmanager
def working_directory_on_path() -> Iterator[None]:
    """Modules of the working directory can be imported, as with ``python -m``."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
