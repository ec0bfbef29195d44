"""Numbered checkpoints in one folder: written aside, completed by a single rename, and checked by digests before they are read.

    runs/llama/7/            a complete checkpoint: the files of torch.distributed.checkpoint, what else belongs to it, and
    runs/llama/7/autotp.json   the size and sha256 of each of them
    runs/llama/8.partial/    one that is being written, or was when its writer was killed; never read
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from autotp.errors import AutotpError

MANIFEST = "autotp.json"
FORMAT = 1
ASIDE = ".partial"

Digest = tuple[int, str]
"""Bytes and sha256 of a file."""


def latest(path: str | Path) -> Path | None:
    """The newest complete checkpoint in the folder `path`, or `path` itself if it is one; None if there is none."""
    path = Path(path)
    if (path / MANIFEST).is_file():
        return path
    complete = [number for number in _numbers(path) if (path / str(number) / MANIFEST).is_file()]
    return path / str(max(complete)) if complete else None


def complete(path: str | Path) -> Path:
    """The same.

    Raises:
        AutotpError: there is none.
    """
    found = latest(path)
    if found is not None:
        return found
    if not Path(path).is_dir():
        raise AutotpError(f"there is no folder {path}; give the one that autotp.save() wrote to")
    if (Path(path) / ".metadata").exists():
        raise AutotpError(f"the checkpoint {path} was not written by autotp.save(); read it with torch.distributed.checkpoint.load()")
    raise AutotpError(f"there is no complete checkpoint in {path}; autotp.latest() tells beforehand")


def begin(path: str | Path) -> Path:
    """A new folder to write the next checkpoint in; what interrupted saves left behind is removed. One rank calls this.

    Raises:
        AutotpError: `path` cannot be written to, or is itself a checkpoint.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        raise AutotpError(f"{path} is itself a checkpoint; give the folder above it, {path.parent}, in which the next one is numbered")
    path.mkdir(parents=True, exist_ok=True)
    for leftover in path.glob(f"*{ASIDE}"):
        shutil.rmtree(leftover)
    aside = path / f"{max(_numbers(path), default=0) + 1}{ASIDE}"
    aside.mkdir()
    return aside


def digests(folder: Path, names: Iterable[str]) -> dict[str, Digest]:
    """Size and sha256 of each of these files."""
    return {name: _digest(folder / name) for name in names}


def seal(aside: Path, files: Mapping[str, Digest]) -> Path:
    """Complete a checkpoint whose files are written and synced: note their digests, and rename its folder. One rank calls this.

    Raises:
        AutotpError: a file that a rank wrote is not there.
    """
    for name, (size, _) in files.items():
        if not (aside / name).is_file() or (aside / name).stat().st_size != size:
            raise AutotpError(f"{aside / name}, which another rank wrote, is not there; give a folder that all ranks share")
    content = {"format": FORMAT, "torch": torch.__version__, "files": {name: list(files[name]) for name in sorted(files)}}
    with open(aside / MANIFEST, "w") as file:
        json.dump({**content, "sha256": _digest_of(content)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(aside)
    final = aside.with_suffix("")
    aside.rename(final)
    sync_folder(final.parent)
    return final


def prune(path: str | Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints."""
    for number in sorted(_numbers(Path(path)))[: -keep or None]:
        doomed = Path(path) / f"{number}{ASIDE}"
        (Path(path) / str(number)).rename(doomed)  # so that one that is half removed is not taken for complete
        shutil.rmtree(doomed)


def verify(folder: Path, part: int = 0, parts: int = 1) -> None:
    """Compare the files of a checkpoint with what was written: all sizes, and the digests of every `parts`-th file.

    Raises:
        AutotpError: a file is missing, or differs; it is named.
    """
    files = _read_manifest(folder)
    for number, (name, (size, digest)) in enumerate(files.items()):
        file = folder / name
        if not file.is_file():
            raise AutotpError(f"{file} is missing; {_instead(folder)}")
        if file.stat().st_size != size:
            raise AutotpError(f"{file} has {file.stat().st_size} bytes and was written with {size}: it was cut off; {_instead(folder)}")
        if number % parts == part and _digest(file)[1] != digest:
            raise AutotpError(f"{file} is damaged: its content is not what was written (sha256); {_instead(folder)}")


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _numbers(path: Path) -> list[int]:
    return [int(entry.name) for entry in path.iterdir() if entry.name.isdecimal()] if path.is_dir() else []


def _digest(file: Path) -> Digest:
    with open(file, "rb") as content:
        return os.fstat(content.fileno()).st_size, hashlib.file_digest(content, "sha256").hexdigest()


def _digest_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_manifest(folder: Path) -> dict[str, Digest]:
    file = folder / MANIFEST
    try:
        content = json.loads(file.read_bytes())
        written = content.pop("sha256")
        intact = written == _digest_of(content)
    except (ValueError, KeyError, AttributeError, TypeError):
        intact = False
    if not intact:
        raise AutotpError(f"{file} is damaged: its content is not what was written; {_instead(folder)}")
    if content["format"] != FORMAT:
        raise AutotpError(f"{file} is of format {content['format']}, this version of autotp reads {FORMAT}; use the version that wrote it")
    return {name: (size, digest) for name, (size, digest) in content["files"].items()}


def _instead(folder: Path) -> str:
    """What to do where a checkpoint is damaged."""
    older = []
    if folder.name.isdecimal():
        found = (number for number in _numbers(folder.parent) if number < int(folder.name))
        older = [number for number in sorted(found) if (folder.parent / str(number) / MANIFEST).is_file()]
    return f"load the one before it, {folder.parent / str(older[-1])}" if older else "restore it from a copy"
