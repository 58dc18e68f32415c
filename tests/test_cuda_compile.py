"""The CUDA kernels compiled for every architecture they are for: what they take, no GPU needed."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="its cuobjdump reads the binaries")

import cuda_resources

pytestmark = pytest.mark.skipif(cuda_resources.nvcc() is None, reason="needs nvcc")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", cuda_resources.ARCHITECTURES)
def test_hot_kernels_have_no_faults(architecture: str) -> None:
    """No spills, tensor cores and copies in use, no product made to wait, the scheduler not the limit.

    Of the architectures with one set of kernels, all dims on the first, and one dim on the others.
    """
    all_dims = architecture in ("80", "90a")
    results = cuda_resources.measure([architecture], () if all_dims else ("-DAK_DIMS=128",))
    kernels = [kernel for result in results for kernel in result.kernels]
    assert len(kernels) == (36 if all_dims else 12)  # forward and backward, 3 forms, 2 dtypes, dims
    assert [fault for result in results for fault in result.faults()] == []


def test_a_fault_would_be_told() -> None:
    """A kernel that spills, has no tensor instruction and made ptxas serialise its products."""
    kernel = cuda_resources.sass.Kernel(
        "_ZN2ak18lse_forward_sm90aI13__nv_bfloat16Li128ELNS_7ForwardE2EE",
        255,
        8,
        ((0, "STL [R1], R2"),),
    )
    result = cuda_resources.Compiled(
        "x_sm90a.cu", "90a", (kernel,), "wgmma instructions are serialized"
    )
    faults = result.faults()
    assert len(faults) == 4
    assert "8 bytes spilled" in faults[0]
    assert "no HGMMA" in faults[1]
    assert "serialized" in faults[3]
