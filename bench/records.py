"""Records of measurements, one JSON file for each op and kind of machine: `results/<op>.<machine>.json`."""

import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from fastattn.measure import matmul_tflops

Record = dict[str, Any]
RESULTS = Path(__file__).parent / "results"


def machine(device: torch.device) -> dict[str, Any]:
    """What a record says of the machine, with its rate at matrix products measured now."""
    common = {"torch": torch.__version__, "gemm_tflops": float(f"{matmul_tflops(device):.4g}")}
    if device.type == "cpu":
        return {
            "cpu": _cpu_name(),
            "threads": torch.get_num_threads(),
            "instruction_set": torch.backends.cpu.get_cpu_capability().lower(),
            **common,
        }
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    driver = subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip()
    return {"gpu": torch.cuda.get_device_name(), "driver": driver, "cuda": torch.version.cuda, **common}


def _cpu_name() -> str:
    match = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return match[1] if match else platform.machine()


def slug(machine: dict[str, Any]) -> str:
    """`h100` for an NVIDIA H100 80GB HBM3, `cpu` for a CPU."""
    match = re.search(r"[A-Z]+\d+", machine.get("gpu", ""))
    return match[0].lower() if match else "cpu"


def path(folder: Path, op: str, machine: dict[str, Any]) -> Path:
    return folder / f"{op}.{slug(machine)}.json"


def commit() -> str:
    """The commit that is measured: FASTATTN_COMMIT where there is no git."""
    if name := os.environ.get("FASTATTN_COMMIT"):
        return name
    describe = ["git", "describe", "--always", "--abbrev=12", "--dirty"]
    try:
        result = subprocess.run(describe, cwd=Path(__file__).parent, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(
            "a record names the commit that it measures: run in the git repository, or set FASTATTN_COMMIT"
        ) from error
    return result.stdout.strip()


def read(path: Path) -> list[Record]:
    return json.loads(path.read_text()) if path.exists() else []


def merge(path: Path, records: list[Record]) -> None:
    """Write `records` over those of the same case, mode and dtype; the others stay."""
    merged = {_key(record): record for record in [*read(path), *records]}
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(record) for record in merged.values())
    path.write_text(f"[\n{lines}\n]\n")


def of_bound(speedup: float | None, bound: float | None) -> str:
    """A speedup over dense attention, and what share that is of what the mask allows."""
    if speedup is None:
        return "–"
    return f"{speedup:.2f}" if bound is None else f"{speedup:.2f}, {speedup / bound:.0%}"


def _key(record: Record) -> tuple[str, str, str]:
    return record["case"], record["mode"], record["dtype"]
