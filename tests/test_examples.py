"""The examples run as they stand, learn what they say, and take no more lines than they say.

That of nnU-Net runs in tests/clients/test_nnunet.py, in a process of its own.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torchvision_operators  # noqa: F401 - Lightning imports torchvision

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NEEDED = {"lightning_saacl": "lightning", "monai_3d": "monai", "mean_teacher": "monai"}


def load(name: str, source: str | None = None) -> ModuleType:
    """An example as a module; of `source` in place of the file, if given."""
    needed = NEEDED.get(name)
    if needed and importlib.util.find_spec(needed) is None:
        pytest.skip(f'{needed} comes with pip install ".[examples]"')
    path = EXAMPLES / f"{name}.py"
    module = ModuleType(name)
    module.__file__ = str(path)
    exec(compile(source or path.read_text(), str(path), "exec"), module.__dict__)
    return module


@pytest.mark.slow
def test_monai_3d(capsys):
    found = load("monai_3d").main()
    assert 0.4 < found <= 1
    assert "mean Dice" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Lightning about loaders without workers
def test_lightning():
    trainer = load("lightning_saacl").main()
    module, metrics = trainer.lightning_module, trainer.callback_metrics
    assert metrics["accuracy"] > 0.3  # of the pixels of the heart
    assert math.isfinite(metrics["contrast"])
    state = {f"saacl.{name}" for name in module.saacl.state_dict()}
    assert {"saacl.centers", "saacl.queue.ring", "saacl.class_means.means"} <= state
    assert state <= module.state_dict().keys()  # hence in Lightning's checkpoints


def test_lightning_validation_leaves_saacl_alone():
    example = load("lightning_saacl")
    module = example.Segmenter().eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module.log = lambda *arguments, **options: None
    images, labels = example.slices(0, 1)[:4]
    module.validation_step((images, labels), 0)
    module.saacl(torch.randn(9, example.DIM), torch.arange(9) % 4)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.slow
def test_mean_teacher():
    example = load("mean_teacher")
    torch.manual_seed(0)
    found = example.main()
    assert found["dice"] > 0.6
    assert all(map(math.isfinite, found.values()))


@pytest.mark.slow
def test_a_mean_teacher_takes_eight_lines_and_runs_without_them():
    lines = (EXAMPLES / "mean_teacher.py").read_text().splitlines()
    added = [line for line in lines if line.endswith("# +")]
    assert len(added) == 8
    without = "\n".join(line for line in lines if line not in added)
    assert "action_kernels import" not in without.replace("action_kernels.trainer", "")
    found = load("mean_teacher", without).main(steps=2)
    assert all(map(math.isfinite, found.values()))


def test_clip():
    example = load("clip")
    found = example.main()
    assert found["accuracy"] > 0.9  # 1 / 256 by chance
    assert not math.isclose(found["temperature"], 0.07, rel_tol=0.01)  # it learned


def test_cross_batch_memory():
    found = load("cross_batch_memory").main()
    without, with_memory = (found[size] for size in sorted(found))
    assert with_memory > 5 * without


@pytest.mark.slow
def test_notebook(tmp_path):
    """It runs from its first cell to its last, draws its pictures, and pixels find their centres."""
    pytest.importorskip("nbclient", reason='nbclient comes with pip install ".[examples]"')
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(EXAMPLES / "pixel_contrast.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # committed without outputs
    assert not any(cell.get("execution_count") for cell in notebook.cells)
    folder = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, resources=folder).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    said = "".join(output.get("text", "") + str(output.get("data", "")) for output in outputs)
    before, after = map(float, re.findall(r"nearest centre ([\d.]+)", said))
    assert before > 0.5
    assert after < 0.2


def test_every_example_is_in_the_list_and_in_these_tests():
    listed = (EXAMPLES / "README.md").read_text()
    here = Path(__file__).read_text()
    found = [path for path in EXAMPLES.rglob("*") if path.suffix in {".py", ".ipynb"}]
    assert len(found) >= 7
    for path in found:
        assert f"({path.relative_to(EXAMPLES)})" in listed, path
        assert path.stem in here or path.parent.name == "nnunet", path


def test_examples_import_the_public_names():
    """What a user would copy: nothing private, and of the trainer the phantoms alone."""
    sources = [path.read_text() for path in EXAMPLES.rglob("*.py")]
    imports = itertools.chain.from_iterable(source.splitlines() for source in sources)
    ours = {line.split(" import ")[0] for line in imports if line.startswith("from action_kernels")}
    assert ours == {"from action_kernels", "from action_kernels.trainer.data.phantom"}
