"""lightly, Lightning and nnU-Net import torchvision, whose wheels on PyPI are built for CUDA.

Beside a CPU build of torch its C++ operators cannot be loaded, and its import fails where it describes two
of them. Those clients use neither: importing this module declares them, without a kernel, if need be.
"""

from __future__ import annotations

import importlib.util

import torch


def _declared() -> torch.library.Library | None:
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    else:
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


operators = _declared()  # as long as it lives, so do the operators
