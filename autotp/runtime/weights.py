"""Reading the weights of a model from files, by its names for them: each rank reads the slices that it holds, and no more.

Here for safetensors files, as Hugging Face publishes them. They are mapped into memory and copied slice by slice to where the parameters
live; no rank ever makes a whole tensor.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from autotp.errors import AutotpError
from autotp.layouts import Coordinate, Layout, local_shape
from autotp.runtime.chunks import boxes, cut_box

INDEX = ".safetensors.index.json"


class StoredTensor(Protocol):
    """A tensor in a file, of which pieces can be read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""

    @property
    def dtype(self) -> torch.dtype:
        """As it is stored."""

    def local_part(
        self, layout: Layout, mesh: tuple[int, ...], coordinate: Coordinate, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """What the rank at `coordinate` holds of it, as `runtime.state.local_part` cuts it, in `dtype` on `device`."""


@dataclass(frozen=True)
class SafeTensor:
    """A tensor in a safetensors file: its key there, its shape and its dtype."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def local_part(
        self, layout: Layout, mesh: tuple[int, ...], coordinate: Coordinate, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """What the rank at `coordinate` holds of it, as `runtime.state.local_part` cuts it, in `dtype` on `device`.

        Raises:
            AutotpError: the file cannot be read any more.
        """
        local = torch.empty(local_shape(self.shape, layout, mesh, coordinate), dtype=dtype, device=device)
        with opened(self.file) as content:  # anew for each tensor, so that what was mapped is given up
            if not self.shape:
                return local.copy_(content.get_tensor(self.key))
            stored = content.get_slice(self.key)
            for box in boxes(self.shape, layout, mesh, coordinate):
                window = tuple(slice(start, start + size) for start, size in zip(box.start, box.sizes, strict=True))
                cut_box(local, box).copy_(stored[window])
        return local


@dataclass(frozen=True)
class Weights:
    """A checkpoint: where it is, its tensors by their keys, and its files."""

    path: Path
    tensors: Mapping[str, StoredTensor]
    files: tuple[Path, ...]

    def digest(self) -> bytes:
        """A digest of all keys, shapes and dtypes, and of the files' sizes."""
        types = [(key, tensor.shape, str(tensor.dtype)) for key, tensor in sorted(self.tensors.items())]
        return sha256(repr((types, [file.stat().st_size for file in self.files])).encode()).digest()

    def keys_of(self, names: Iterable[str]) -> dict[str, str]:
        """The key of each of these names of a model that is found: the name itself, or with one leading part more or less.

        A checkpoint of a model without its head lacks the part that leads to the body (`model.layers.0…` is `layers.0…` there), and
        the other way round. Which part that is, most names decide.
        """
        names = list(names)
        found = {name: name for name in names if name in self.tensors}
        left = {name for name in names if name not in found}
        fewer = Counter(name.partition(".")[0] for name in left if name.partition(".")[2] in self.tensors.keys() - found.keys())
        more = Counter(key.partition(".")[0] for key in self.tensors if key.partition(".")[2] in left)
        for part, _ in fewer.most_common(1):
            inner = {name: name[len(part) + 1 :] for name in left if name.startswith(f"{part}.")}
            found.update({name: key for name, key in inner.items() if key in self.tensors})
        for part, _ in more.most_common(1):
            found.update({name: f"{part}.{name}" for name in left - found.keys() if f"{part}.{name}" in self.tensors})
        return found


def open_safetensors(path: str | Path) -> Weights:
    """The checkpoint at `path`: a safetensors file, an index of several, or a directory with one of them. Reads no values.

    Raises:
        AutotpError: there is none, or a file of it is missing or cut off.
    """
    place = _place(Path(path))
    if not place.name.endswith(INDEX):
        return Weights(place, _tensors(place), (place,))
    try:
        listed: dict[str, str] = json.loads(place.read_bytes())["weight_map"]
        files = tuple(sorted({place.parent / name for name in listed.values()}))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise AutotpError(f"{place} is no index of safetensors files: it has no weight_map; download it again") from None
    tensors = {key: tensor for file in files for key, tensor in _tensors(file).items()}
    absent = [key for key in listed if key not in tensors]
    if absent:
        raise AutotpError(f"{place} lists '{absent[0]}', which is not in {listed[absent[0]]}; download the checkpoint again")
    return Weights(place.parent, tensors, files)


def _place(path: Path) -> Path:
    if path.is_file():
        if path.suffix == ".safetensors" or path.name.endswith(INDEX):
            return path
        raise AutotpError(f"{path} is no safetensors file; give one, or the directory of a checkpoint")
    if not path.is_dir():
        raise AutotpError(f"there is no file or directory {path}; give a safetensors file, or the directory of a checkpoint")
    for pattern in (f"*{INDEX}", "*.safetensors"):
        found = sorted(path.glob(pattern))
        usual = [file for file in found if file.name.partition(".")[0] == "model"]
        if len(found) == 1 or len(usual) == 1:
            return (usual or found)[0]
        if found:
            raise AutotpError(f"{path} has {len(found)} files {pattern}, such as {found[0].name}; give the one that is meant")
    raise AutotpError(f"{path} has neither safetensors files nor a checkpoint of autotp.save(); give a directory that has one of them")


def _tensors(file: Path) -> dict[str, SafeTensor]:
    found = {}
    with opened(file) as content:
        for key in content.keys():  # noqa: SIM118 (not a mapping)
            stored = content.get_slice(key)
            shape = tuple(stored.get_shape())
            found[key] = SafeTensor(file, key, shape, (stored[0:0] if shape else content.get_tensor(key)).dtype)
    return found


def opened(file: Path) -> safe_open:
    """A safetensors file, to be used as a context.

    Raises:
        AutotpError: it is missing, or cut off.
    """
    try:
        return safe_open(file, "pt")
    except FileNotFoundError:
        raise AutotpError(f"{file} is missing; download the checkpoint again") from None
    except (SafetensorError, OSError) as error:
        raise AutotpError(f"{file} cannot be read ({error}); download it again") from error
