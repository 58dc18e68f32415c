"""`pytest bench/ --benchmark [--save]`: measure here; without the option, benchmarks are skipped."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import outputs
import pytest
import torch

# For the processes that measure memory: they import the benchmarks as bench.…. At the end, so that an
# installed package is found first.
sys.path.append(str(Path(__file__).resolve().parents[1]))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--benchmark", action="store_true", help="run the benchmarks (they take minutes)"
    )
    parser.addoption("--save", action="store_true", help=outputs.HELP)


@pytest.fixture
def results(pytestconfig: pytest.Config) -> Path:
    """The folder for results: the tracked one with --save."""
    return outputs.results(pytestconfig.getoption("--save"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--benchmark") or config.getoption("--benchmark-only"):
        return
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="benchmarks run with --benchmark"))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine_info["processor"] = platform.processor() or machine_info.get("processor")
