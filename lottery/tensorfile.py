"""Named tensors in a file, with what they are: written whole or not at all, and checked when they are read."""

import contextlib
import hashlib
import json
from pathlib import Path

import torch

from lottery import files


def write(path: Path | str, tensors: dict[str, torch.Tensor], about: dict) -> str:
    """Write `{name: tensor}` and a JSON object as one safetensors file, by rename; returns the file's sha256.

    The same tensors and words give the same bytes. Raises `files.CannotWrite`.
    """
    from safetensors.torch import save

    path = Path(path)
    said = json.dumps(about, sort_keys=True)
    content = save(tensors, metadata={"about": json.dumps([said, digest(tensors, said)])})
    files.write(path, content)
    return hashlib.sha256(content).hexdigest()


def read(path: Path | str) -> tuple[dict[str, torch.Tensor], dict, str]:
    """What `write` wrote: the tensors, the object, the file's sha256.

    Raises FileNotFoundError, and ValueError for a file in which any byte that matters has changed.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    content = files.read(Path(path))
    with contextlib.suppress(SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        said, stated = json.loads(header["__metadata__"]["about"])
        if stated == digest(tensors, said):
            return tensors, json.loads(said), hashlib.sha256(content).hexdigest()
    raise ValueError(f"Damaged file {path}: it does not hold what was written.")


def digest(tensors: dict[str, torch.Tensor], said: str = "") -> str:
    """sha256 of named tensors, their types, shapes and values, and of a text."""
    found = hashlib.sha256(said.encode())
    for name, t in sorted(tensors.items()):
        found.update(f"\n{name} {t.dtype} {tuple(t.shape)} ".encode())
        found.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()
