"""What only a GPU shows: graphs, streams, offsets past 2³¹, repeatability at size."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from action_kernels.ops import (
    indexed_lse,
    pairwise_lse,
    prepare_rows,
    sample_pixels,
    sampled_features,
)

pytestmark = pytest.mark.gpu


def unit_rows(n: int, d: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return normalize(torch.randn(n, d, device="cuda")).to(dtype)


def step(rows: Tensor, mask: Tensor | None = None) -> Tensor:
    rows = rows.detach().requires_grad_()
    lse = pairwise_lse(rows, scale=10.0, mask=mask, normalized=True)
    (gradient,) = torch.autograd.grad(lse.sum(), rows)
    return gradient


CALLS: dict[str, Callable[[], object]] = {
    "pairwise_lse": lambda x=None: step(SHARED["rows"]),
    "pairwise_lse of some rows": lambda x=None: step(SHARED["rows"], SHARED["mask"]),
    "prepare_rows": lambda: prepare_rows(SHARED["maps"], dtype=torch.bfloat16),
    "indexed_lse": lambda: indexed_lse(SHARED["rows"], SHARED["rows"], SHARED["runs"], scale=2.0),
    "sample_pixels": lambda: sample_pixels(
        SHARED["maps"][:, :4], SHARED["labels"], 16, num_classes=4, threshold=0.9
    )[0],
    "sampled_features": lambda: sampled_features(SHARED["maps"], SHARED["pixels"], (32, 32)),
}
SHARED: dict[str, Tensor] = {}


@pytest.fixture(autouse=True)
def shared_inputs(device: torch.device) -> None:
    SHARED.update(
        rows=unit_rows(1000, 128),
        mask=torch.rand(1000, device=device) < 0.5,
        maps=torch.randn(2, 16, 16, 16, device=device),
        labels=torch.randint(0, 4, (2, 16, 16), device=device),
        runs=torch.randint(0, 1000, (4, 64), device=device),
        pixels=torch.randint(0, 2 * 32 * 32, (100,), device=device),
    )


@pytest.mark.parametrize("name", CALLS)
def test_can_be_captured_in_a_cuda_graph(name: str) -> None:
    """No synchronisation, no allocation outside torch: capture refuses both."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        CALLS[name]()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = CALLS[name]()
    graph.replay()
    first = captured.clone()
    if name == "sample_pixels":
        graph.replay()
        assert not torch.equal(captured, first)  # the seed is drawn anew at every replay
        return
    expected = CALLS[name]()
    torch.testing.assert_close(first, expected, rtol=1e-2, atol=1e-4)


def test_follows_the_current_stream() -> None:
    rows = unit_rows(8192, 128)
    expected = step(rows)
    stream = torch.cuda.Stream()
    late = torch.zeros_like(rows)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # the input is ready on this stream only, and late
        late.copy_(rows)
        gradient = step(late)
    stream.synchronize()
    torch.testing.assert_close(gradient, expected, rtol=1e-2, atol=1e-3)


def test_deterministic_at_size() -> None:
    rows = unit_rows(20_000, 128)
    torch.use_deterministic_algorithms(True)
    try:
        gradients = [step(rows) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


def test_offsets_past_two_to_the_31() -> None:
    """8.5 million rows of 256: the last ones begin beyond 2³¹ elements; anchors are only the last."""
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    n, d = 8_500_000, 256
    assert (n - 64) * d > 2**31
    keys = torch.zeros(n, d, dtype=torch.bfloat16, device="cuda")
    keys[-64:] = unit_rows(64, d)
    key_mask = torch.zeros(n, dtype=torch.bool, device="cuda")
    key_mask[-64:] = True
    anchors = unit_rows(32, d).requires_grad_()
    keys.requires_grad_()
    lse = pairwise_lse(anchors, keys, scale=10.0, key_mask=key_mask, normalized=True)
    lse.sum().backward()
    few = keys[-64:].detach().double().requires_grad_()
    expected = (anchors.detach().double() @ few.T * 10.0).logsumexp(1)
    expected.sum().backward()
    torch.testing.assert_close(lse.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(keys.grad[-64:].double(), few.grad, rtol=3e-2, atol=3e-2)
    assert not keys.grad[:-64].any()


def test_prepare_rows_past_two_to_the_31() -> None:
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    features = torch.zeros(2, 64, 4200, 4096, dtype=torch.bfloat16, device="cuda")
    assert features.numel() > 2**31
    features[1, :, -1, -1] = 3.0
    rows = prepare_rows(features)
    torch.testing.assert_close(rows[-1], torch.full_like(rows[-1], 0.125))
    assert not rows[-2].any()
