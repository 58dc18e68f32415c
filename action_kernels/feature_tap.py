"""What a submodule of somebody else's network returned, for a loss on features."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class FeatureTap:
    """Keeps what a submodule returned in its last training pass, for a loss on features.

    A forward hook: the network, its state dict and what it returns stay as they are, and a deep copy, such as
    a mean teacher, is not tapped. In evaluation mode
    nothing is kept and `take` returns None, so that a loss that the validation calls as well leaves the
    contrast, and whatever state it has, alone. The features are those that the network computed: in half
    precision under autocast, and with their gradient.

    An in-place operation that follows the module, such as ``ReLU(inplace=True)``, changes what it returned:
    then tap that one, or what comes before.

    Attach it before the first pass of a network that `torch.compile` compiled, which traces the hooks that
    it finds then. Not for several threads: under `torch.nn.DataParallel` tap a network of one device.

    Args:
        module: the submodule, such as ``network.decoder.stages[-1]``. It returns a tensor, or a list or
            tuple whose first entry is one (deep supervision: the finest map).

    Raises:
        TypeError: `module` is no module.

    Examples:

        >>> import torch
        >>> from action_kernels import FeatureTap, supcon_loss
        >>> network = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.Conv2d(8, 2, 1))
        >>> tap = FeatureTap(network[0])
        >>> logits = network(torch.randn(1, 1, 6, 6))
        >>> loss = supcon_loss(tap.take(), logits.argmax(1), num_classes=2)
        >>> loss.backward()
        >>> network.eval()(torch.randn(1, 1, 6, 6)).shape
        torch.Size([1, 2, 6, 6])
        >>> tap.take() is None
        True
        >>> tap.close()
    """

    def __init__(self, module: nn.Module) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"module must be a submodule of the network, got {type(module).__name__}; by name: "
                "network.get_submodule(name)"
            )
        self._kept: Any = None
        self._state = "no pass"
        self._tapping = True
        self._handle: RemovableHandle | None = module.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not self._tapping:
            return
        if module.training:
            self._kept, self._state = output, "kept"
        else:
            self._kept, self._state = None, "evaluation"

    def take(self) -> Tensor | None:
        """The features of the last pass, which the tap then lets go; None after one in evaluation mode.

        Where the module was called several times, those of its last call.

        Raises:
            RuntimeError: there was no pass since the last `take`.
            TypeError: the module returned no tensor.
        """
        if self._state == "evaluation":
            return None
        if self._state != "kept":
            raise RuntimeError(_WHY_NOTHING[self._state])
        output, self._kept, self._state = self._kept, None, "taken"
        first = output[0] if isinstance(output, list | tuple) and output else output
        if not isinstance(first, Tensor):
            raise TypeError(
                f"the tapped module must return a tensor, or a list that begins with one, got "
                f"{type(first).__name__}"
            )
        return first

    def close(self) -> None:
        """Remove the hook; also at the end of a ``with`` statement."""
        if self._handle is not None:
            self._handle.remove()
        self._kept, self._state, self._tapping, self._handle = None, "closed", False, None

    def __enter__(self) -> FeatureTap:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied or pickled network, such as a teacher, brings a tap along that is closed."""
        return _closed_tap, ()


def _closed_tap() -> FeatureTap:
    tap = object.__new__(FeatureTap)
    tap._handle = None
    tap.close()
    return tap


_WHY_NOTHING = {
    "no pass": "the tapped module has not run: tap one that the network's forward pass calls, and tap a "
    "network for torch.compile before its first pass",
    "taken": "the features of the last pass were taken already, and the tapped module has not run since",
    "closed": "this tap is closed",
}
