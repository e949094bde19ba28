"""Where tests run: one that takes `device` or `place` runs on the CPU and, if there is one, on a Hopper GPU."""

import pytest
import torch

GPU = pytest.mark.gpu
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
PLACES = [
    pytest.param(("cpu", torch.float32), id="cpu-fp32"),
    pytest.param(("cpu", torch.float16), id="cpu-fp16"),
    pytest.param(("cpu", torch.bfloat16), id="cpu-bf16"),
    pytest.param(("cuda", torch.float16), id="cuda-fp16", marks=GPU),
    pytest.param(("cuda", torch.bfloat16), id="cuda-bf16", marks=GPU),
]


def why_no_gpu() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device (or a torch without CUDA)"
    if torch.cuda.get_device_capability() != (9, 0):
        return f"{torch.cuda.get_device_name()} is not of compute capability 9.0"
    return None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--repeats", type=int, default=20, help="Runs whose bits test_determinism.py compares.")


@pytest.fixture
def repeats(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("--repeats")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = why_no_gpu()
    if reason is not None:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> tuple[str, torch.dtype]:
    return request.param


@pytest.fixture
def dtype(device: str) -> torch.dtype:
    """The most accurate dtype of a device, for tests whose subject is not precision."""
    return torch.float32 if device == "cpu" else torch.bfloat16


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
