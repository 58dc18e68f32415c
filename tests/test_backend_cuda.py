"""Row preparation in CUDA C++: the library's face without a GPU, its numbers with one."""

from __future__ import annotations

import pytest
import torch
from support import relative_error

import action_kernels
from action_kernels.backends import cuda
from action_kernels.ops import prepare_rows


@pytest.fixture
def library():
    try:
        return cuda.load()
    except OSError as error:
        pytest.skip(str(error))


def test_the_library_tells_its_architectures(library):
    assert library.ak_cuda_abi_version() == cuda.ABI_VERSION
    assert all(float(name) >= 7.5 for name in cuda.architectures())


def test_bad_arguments_have_codes_with_messages(library):
    def forward(batch, dtype):
        return library.ak_cuda_prepare_rows_forward(
            0, None, None, dtype, batch, 4, 1, None, 1, None, 0, None
        )

    assert forward(0, 0) == 0  # nothing to do needs no GPU
    bad_shape = forward(-1, 0)
    assert bad_shape < 0
    assert b"negative" in library.ak_cuda_error_message(bad_shape)
    with pytest.raises(RuntimeError, match=r"prepare_rows: a shape has a negative length \(code"):
        cuda._check(bad_shape, "prepare_rows")


def test_does_not_serve_the_cpu():
    assert "not 'cpu'" in cuda.unavailable("cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 1), (33, 128), (257, 70), (2, 48, 5, 7), (3, 33, 64, 65)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalize", [True, False])
def test_rows_and_gradients_are_the_references(shape, dtype, out, normalize):
    features = torch.randn(shape, device="cuda").to(dtype)
    n = shape[0] * torch.Size(shape[2:]).numel()
    mask = torch.rand(n, device="cuda") > 0.2
    gradients, rows = [], []
    for backend, precise in (("cuda", features), ("reference", features.double())):
        x = precise.clone().requires_grad_()
        with action_kernels.use_backend(backend):
            y = prepare_rows(
                x, mask=mask, normalize=normalize, dtype=out if backend == "cuda" else None
            )
            upstream = torch.linspace(-1, 1, y.numel(), device="cuda").view_as(y)
            (y.double() * upstream).sum().backward()
        rows.append(y)
        gradients.append(x.grad)
    eps = torch.finfo(out).eps + torch.finfo(dtype).eps
    assert relative_error(rows[0], rows[1]) < 2 * eps
    assert relative_error(gradients[0], gradients[1]) < 4 * eps
