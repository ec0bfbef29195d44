"""A parallel module's state as plain safetensors files, which need neither ranks nor autotp to be read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from autotp._torch import local_of
from autotp.errors import AutotpError
from autotp.runtime.joint import Joint
from autotp.runtime.state import gather_full, specs_of
from autotp.sharded import StateSpec

NAME = "model.safetensors"
ASIDE = ".partial"


def export(path: str | Path, module: nn.Module, *, shard_bytes: int = 5_000_000_000, group: dist.ProcessGroup | None = None) -> None:
    """Write parameters and buffers, whole and under the original names, as `from_pretrained` of transformers reads them.

    All ranks of `group` call this together; rank 0 writes. `path/model.safetensors` holds everything or, beyond `shard_bytes`,
    `path/model-00001-of-0000N.safetensors` and so on, with `path/model.safetensors.index.json`. Of tied weights the first name is written.
    Files of an earlier export are replaced once all are complete. Rank 0 holds one file at a time in its memory, other ranks one tensor.

    Args:
        path: a directory, made if it is not there; what else is in it, such as a `config.json`, stays.
        module: what `parallelize` returned, a module that contains such, or a plain module.
        shard_bytes: the size beyond which another file is begun; a larger tensor has one for itself.

    Raises:
        AutotpError: on every rank: nothing to write, or the disk refuses.
    """
    work, folder = Joint(f"writing {path}", group), Path(path)
    with work.sentences():
        work.each(lambda: _check(shard_bytes))
        tensors = _first_names(module)
        files = _files({name: value.nbytes for name, value in tensors.items()}, int(shard_bytes))
        work.first(lambda: folder.mkdir(parents=True, exist_ok=True))
        specs = specs_of(module)
        for file, names in files.items():
            held: dict[str, Tensor] = {}
            for name in names:
                whole = _whole(name, tensors[name], specs)
                if work.rank == 0:
                    held[name] = whole.cpu().contiguous()
            work.first(lambda file=file, held=held: _write(folder / f"{file}{ASIDE}", held))  # type: ignore[misc]
        work.first(lambda: _complete(folder, files, sum(value.nbytes for value in tensors.values())))


def _check(shard_bytes: int) -> None:
    if not shard_bytes >= 1:
        raise AutotpError(f"shard_bytes is {shard_bytes}; give the bytes of a file, at least 1")


def _first_names(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of the state dict, each tied one once."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor):
            found.setdefault(id(value), (name, value))
    return dict(found.values())


def _files(sizes: Mapping[str, int], limit: int) -> dict[str, list[str]]:
    """What goes into which file, in order."""
    groups: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if groups[-1] and size > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    if len(groups) == 1:
        return {NAME: groups[0]}
    return {f"model-{number:05}-of-{len(groups):05}.safetensors": names for number, names in enumerate(groups, 1)}


def _whole(name: str, value: Tensor, specs: Mapping[str, tuple[StateSpec, DeviceMesh]]) -> Tensor:
    """The global tensor; all ranks call this."""
    if not isinstance(value, DTensor):
        return value.detach()
    if name not in specs:
        return value.full_tensor().detach()
    spec, device_mesh = specs[name]
    return gather_full(local_of(value), spec, device_mesh)


def _write(file: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, file, metadata={"format": "pt"})
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _complete(folder: Path, files: Mapping[str, list[str]], size: int) -> None:
    """Give the files their names, and remove those of an earlier export."""
    index = folder / f"{NAME}.index.json"
    stale = {*folder.glob("model-*-of-*.safetensors"), folder / NAME, index} - {folder / file for file in files}
    for file in files:
        (folder / f"{file}{ASIDE}").replace(folder / file)
    if len(files) > 1:
        content = {"metadata": {"total_size": size}, "weight_map": {name: file for file, names in files.items() for name in names}}
        aside = Path(f"{index}{ASIDE}")
        aside.write_text(json.dumps(content, indent=2))
        aside.replace(index)
        stale.discard(index)
    for old in stale:
        old.unlink(missing_ok=True)
