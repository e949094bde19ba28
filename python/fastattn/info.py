"""What this machine and this build can run."""

import platform

import torch

from . import __version__, _library

CAPABILITY = (9, 0)
"""Compute capability of the GPUs that the kernels are compiled for."""


def gpu_obstacle() -> str | None:
    """Why the GPU kernels cannot be used here; None if they can."""
    if not _library.built_with_cuda():
        return "this fastattn is built without CUDA: install a wheel built with FASTATTN_CUDA=on"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    capability = torch.cuda.get_device_capability()
    if capability != CAPABILITY:
        needed, got = (f"{major}.{minor}" for major, minor in (CAPABILITY, capability))
        return f"the kernels need compute capability {needed}; {torch.cuda.get_device_name()} has {got}"
    return None


def best_device() -> torch.device:
    return torch.device("cpu" if gpu_obstacle() else "cuda")


def facts() -> dict[str, str]:
    obstacle = gpu_obstacle()
    return {
        "fastattn": __version__,
        "op library": str(_library.path),
        "Python": platform.python_version(),
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}",
        "CPU kernels": f"{_library.cpu_instruction_set()}, {torch.get_num_threads()} threads",
        "GPU kernels": f"unavailable: {obstacle}" if obstacle else f"ready on {torch.cuda.get_device_name()}",
    }
