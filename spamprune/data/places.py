"""Where the files of a data set are: a given folder, the usual places, or a download."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from spamprune.errors import DataError


@dataclass(frozen=True)
class FileSet:
    """The raw files of a data set and how to come by them.

    Attributes:
        name: Of the data set.
        folder: Where torchvision keeps the files, below a parent folder.
        files: Their standard names, each of which may also end in ``.gz``.
        url: Where they are downloaded from, in words.
        download: Downloads them into ``folder`` below the parent folder that it is given.
        system: A place where a package of the operating system puts them.
        way_out: What to do when they are nowhere to be had.
    """

    name: str
    folder: str
    files: tuple[str, ...]
    url: str
    download: Callable[[Path], object]
    system: Path | None = None
    way_out: str = "give the folder with the files as data.root"


def locate(files: FileSet, root: Path | None) -> dict[str, Path]:
    """Find the files: in ``root`` if given, else in the usual places, else by a download.

    The usual places are the parent folder ``$SPAMPRUNE_DATA``, the operating system's and
    ``~/.cache/spamprune``. A folder that exists must be complete: nothing falls through it.

    Args:
        files: What to find.
        root: The folder with the files, or its parent in torchvision's layout.

    Returns:
        The path of each file by its standard name.

    Raises:
        DataError: A folder or file is missing, or the download failed.
    """
    if root is not None:
        nested = root / files.folder
        return _complete(files, nested if nested.is_dir() else root, "data.root: ")
    cache = Path("~/.cache/spamprune").expanduser()
    places = [cache / files.folder]
    if files.system:
        places.insert(0, files.system)
    if parent := os.environ.get("SPAMPRUNE_DATA"):
        if not Path(parent).is_dir():
            raise DataError(f"SPAMPRUNE_DATA: no folder {parent}: correct the variable or unset it")
        places.insert(0, Path(parent, files.folder))
    for place in places:
        if place.is_dir():
            return _complete(files, place)
    try:
        _download(files, cache)
    except (OSError, RuntimeError, HTTPException) as error:
        tried = ", ".join(map(str, places))
        reason = " ".join(str(error).split())
        raise DataError(
            f"{files.name}: not in {tried}, and the download from {files.url} failed ({reason}): "
            f"{files.way_out}"
        ) from error
    return _complete(files, cache / files.folder)


def _complete(files: FileSet, folder: Path, key: str = "") -> dict[str, Path]:
    if not folder.is_dir():
        raise DataError(f"{key}no folder {folder}: give one that holds {files.files[0]}")
    paths = {}
    for name in files.files:
        found = [path for path in (folder / name, folder / f"{name}.gz") if path.is_file()]
        if not found:
            raise DataError(
                f"{key}folder {folder} has no file {name} (nor {name}.gz) of {files.name}: "
                f"put it there, or give the folder that holds it or its {files.folder}"
            )
        paths[name] = found[0]
    return paths


def _download(files: FileSet, cache: Path) -> None:
    target = cache / files.folder
    cache.mkdir(parents=True, exist_ok=True)
    # the folder appears in one step, so that a killed download is never taken for a complete one
    with tempfile.TemporaryDirectory(dir=cache) as staging:
        files.download(Path(staging))
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.is_dir():  # another process may have been faster
            Path(staging, files.folder).rename(target)
