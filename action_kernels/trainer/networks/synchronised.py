"""Batch normalisation by the statistics of all processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from action_kernels.distributed import Processes, processes_of
from action_kernels.ops.all_reduce_sum import all_reduce_sum


class SyncBatchNorm(nn.SyncBatchNorm):
    """PyTorch's, which knows no CPU, and the same there: (x − μ) / √(σ² + ε) · w + b over the batches of all processes."""

    def forward(self, input: Tensor) -> Tensor:
        if input.device.type != "cpu":
            return super().forward(input)
        if self.training:
            return self._by_batch(input, processes_of(dist.group.WORLD))
        return self._by_running(input)

    def _by_running(self, features: Tensor) -> Tensor:
        return nn.functional.batch_norm(
            features, self.running_mean, self.running_var, self.weight, self.bias,
            training=self.running_mean is None, eps=self.eps,
        )  # fmt: skip

    def _by_batch(self, features: Tensor, group: Processes | None) -> Tensor:
        x, over = features.float(), [0, *range(2, features.dim())]
        own_count = x.new_full((1,), x.numel() // x.shape[1])
        *_, count = total = all_reduce_sum(torch.cat([x.sum(over), own_count]), group)
        mean = total[:-1] / count
        shape = (1, -1, *[1] * (x.dim() - 2))
        centred = x - mean.view(shape)
        variance = all_reduce_sum(centred.square().sum(over), group) / count
        self._remember(mean.detach(), variance.detach(), count.detach())
        scale = (variance + self.eps).rsqrt()
        if self.weight is None:
            return (centred * scale.view(shape)).to(features.dtype)
        scaled = centred * (scale * self.weight).view(shape) + self.bias.view(shape)
        return scaled.to(features.dtype)

    def _remember(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Move the running statistics, the variance by its unbiased estimate."""
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance * count / (count - 1).clamp(min=1), momentum)


def synchronised(network: nn.Module) -> nn.Module:
    """The network with all of its batch normalisations synchronised; parameters and state dict stay."""
    if isinstance(network, _BatchNorm) and not isinstance(network, nn.SyncBatchNorm):
        return _replacement(network)
    for name, child in network.named_children():
        setattr(network, name, synchronised(child))
    return network


def _replacement(norm: _BatchNorm) -> SyncBatchNorm:
    new = SyncBatchNorm(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
    )
    new.load_state_dict(norm.state_dict())
    return new.train(norm.training)
