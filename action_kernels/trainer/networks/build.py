"""The networks by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from ..errors import TrainerError
from .adapt import load_network
from .basic import PyramidBasicUNet
from .layers import Norm
from .unet import UNet
from .vnet import VNet

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "basic-unet": PyramidBasicUNet,
    "unet": UNet,
    "vnet": VNet,
}


def build_network(
    name: str,
    *,
    spatial_dims: int,
    in_channels: int,
    num_classes: int,
    widths: Sequence[int],
    norm: Norm,
    dropout: float | None = None,
) -> nn.Module:
    """A network of the protocol, by its name in `NETWORKS` or as ``package.module:factory``.

    Args:
        name: ``"unet"``, ``"vnet"``, ``"basic-unet"``, or a user's factory, which decides widths, norm and dropout
            itself.
        spatial_dims, in_channels, num_classes, widths, norm: see the networks.
        dropout: None leaves the network's own.

    Raises:
        TrainerError: a name or a value that does not fit, with the option's name.
    """
    if ":" in name:
        return load_network(
            name, spatial_dims=spatial_dims, in_channels=in_channels, num_classes=num_classes
        )
    if name not in NETWORKS:
        raise TrainerError(
            f"--network: {name!r} was given, one of {', '.join(sorted(NETWORKS))} or "
            "package.module:factory is accepted"
        )
    own = {} if dropout is None else {"dropout": dropout}
    try:
        return NETWORKS[name](spatial_dims, in_channels, num_classes, widths, norm, **own)
    except ValueError as error:
        raise TrainerError(f"--network {name}: {error}") from error
