"""The folder for Hugging Face's `kernels`: made by the script, loaded from disk, beside the installed library."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

LOADED = """
import sys
from pathlib import Path
import torch
import action_kernels as installed
from kernels import get_local_kernel

hub = get_local_kernel(Path(sys.argv[1]))
assert str(hub.__file__).startswith(sys.argv[1])
generator = torch.Generator().manual_seed(0)
features, labels = torch.randn(40, 16, generator=generator), torch.arange(40) % 4
allocation = hub.allocate_centers(hub.class_centers(4, 16), hub.class_centers(4, 16).flip(0))
assert allocation.tolist() == [3, 2, 1, 0]
gradients = []
for library in (installed, hub):
    with library.use_backend("reference" if library is installed else sys.argv[2]):
        rows = features.clone().requires_grad_()
        loss = library.supcon_loss(rows, labels, num_classes=4)
        loss.backward()
    gradients.append(torch.cat([rows.grad.flatten(), loss.detach()[None]]))
error = (gradients[0] - gradients[1]).abs().max() / gradients[0].abs().max()
assert 0 <= error < 1e-5, error
used = [name for name in sys.modules if name.startswith(hub.__name__ + ".backends.triton")]
print("triton" if used else "no triton")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("hub")
    command = [sys.executable, ROOT / "packaging" / "hub.py", "--output", output]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    return output


def test_what_the_folder_holds(folder):
    variant = folder / "build" / "torch-universal"
    assert {path.name for path in folder.iterdir()} == {"build", "LICENSE", "README.md"}
    assert json.loads((variant / "metadata.json").read_text())["name"] == "action-kernels"
    assert (variant / "backends" / "triton" / "pairwise_lse.py").is_file()
    for left_out in ("trainer", "backends/cuda", "backends/cpu.py"):
        assert not (variant / left_out).exists()
    for path in variant.rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"^\s*(from|import) action_kernels\b(?!.*```)", text, re.MULTILINE), (
            path
        )
        assert "torch.ops.action_kernels." not in text


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_it_computes_beside_the_installed_library(folder, backend, tmp_path):
    for needed in ("kernels", *["triton"] * (backend == "triton")):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"needs {needed}")
    script = tmp_path / "loaded.py"
    script.write_text(LOADED)
    done = subprocess.run(
        [sys.executable, str(script), str(folder), backend], cwd=tmp_path, capture_output=True, text=True, check=False,
        env=os.environ | {"TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ("triton" if backend == "triton" else "no triton")
