"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from spamprune.errors import OutputError


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a sibling path to write to; it takes the place of ``path`` once that succeeded.

    After a failure or a kill, ``path`` is as it was.
    """
    final = Path(path)
    partial = final.with_name(f".{final.name}.partial")
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, final)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` to ``path`` atomically, as UTF-8."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: dict[str, str]
) -> None:
    """Write ``tensors`` to the safetensors file ``path`` atomically, whatever their layout.

    Raises:
        OutputError: The file cannot be written.
    """
    # safetensors wants each tensor in contiguous memory of its own, on the CPU
    owned = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    with replacing(path) as partial:
        try:
            save_file(owned, partial, metadata)
        except SafetensorError as error:  # a full disk, above all
            raise OutputError(f"cannot write {os.fspath(path)}: {error}") from error
        partial.chmod(0o644)  # safetensors writes for the owner only
