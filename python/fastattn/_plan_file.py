"""Plans as safetensors files, with what is no tensor of them in the metadata."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor


def save(path: Path | str, plan: str, format: str, numbers: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Of a plan whose class is called ``plan``."""
    _require_safetensors(plan)
    from safetensors.torch import save_file

    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path, metadata={"format": format, **numbers})


def load(path: Path | str, plan: str, format: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """What ``save`` wrote: numbers and tensors.

    Raises:
        ValueError: if the file holds something else.
    """
    _require_safetensors(plan)
    from safetensors import SafetensorError, safe_open

    try:
        opened = safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(f"{plan}: {path} must be a safetensors file: {error}") from None
    with opened as file:
        metadata = dict(file.metadata() or {})
        if metadata.pop("format", None) != format:
            found = (file.metadata() or {}).get("format")
            raise ValueError(f"{plan}: {path} must have format {format}, got {found}")
        return metadata, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping


def _require_safetensors(plan: str) -> None:
    if find_spec("safetensors") is None:
        raise ImportError(f"{plan}: saving and loading need safetensors: pip install 'fastattn[plans]'")
