"""Saving a module and its optimizer, and putting them back on any number of ranks.

A checkpoint is one of `torch.distributed.checkpoint`: every rank writes the pieces that it holds, each piece once, with its place in the
whole tensor; a rank that loads reads whatever overlaps its own pieces. Beside it stands one file with all that is no tensor, and a
list of digests.
"""

from __future__ import annotations

import os
import pickle
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from autotp.errors import AutotpError
from autotp.runtime import checkpoint_files as files
from autotp.runtime import optimizer_state
from autotp.runtime.generators import random_state, resume_random
from autotp.runtime.joint import Joint
from autotp.runtime.saved_weights import PREFIX

PLAIN = "autotp.pt"
"""The file of all that is no tensor of the model or the optimizer."""


def save(
    path: str | Path,
    module: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    extra: Any = None,
    keep: int = 2,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write the next checkpoint into the folder `path`, which all ranks share. All ranks of `group` call this together.

    It is written aside and takes its place, `path/1`, `path/2`, …, by a rename once it is complete on the disk: whenever the processes are
    killed or the disk fills up, the checkpoint before it stays what it was. Every element is written once, by a rank that holds it.

    Args:
        path: a folder for the checkpoints of one run; made if it is not there.
        module: what `parallelize` returned, a module that contains such, or a plain module.
        optimizer: over parameters of `module`; its options and state are saved under the parameters' names.
        extra: anything else that training goes on from, such as the step, a scheduler's `state_dict()`, losses: what `pickle` takes, as
            rank 0 has it.
        keep: how many of the newest checkpoints stay in `path`.
        group: the ranks that take part; by default all.

    Returns:
        The folder of this checkpoint.

    Raises:
        AutotpError: on every rank that is alive: the state cannot be saved, the disk refuses, or a rank has ended.
    """
    work = Joint(f"saving to {path}", group, ending=lambda: _kept(path))
    with work.sentences():
        _check_same(work, path)
        tensors, plain = work.each(lambda: _state_of(module, optimizer, keep, extra))
        aside = work.first(lambda: files.begin(path))
        try:
            plain |= {"random": work.gather(random_state(module))}
            planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
            with _quiet():
                writer = FileSystemWriter(aside)
                state_dict_saver.save(tensors, storage_writer=writer, planner=planner, process_group=group, no_dist=work.single)
            written = work.each(lambda: _write_own(aside, plain, work.rank))
            listed = {name: digest for found in work.gather(written) for name, digest in found.items()}
            return work.first(lambda: _finish(aside, listed, keep))
        except (AutotpError, CheckpointException):  # all ranks are alive, and none writes any more
            if work.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
            raise


def load(
    path: str | Path,
    module: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    verify: bool = True,
    group: dist.ProcessGroup | None = None,
) -> Any:
    """Put a checkpoint back, whatever the mesh and the plan that it was saved from; `extra` is returned.

    All ranks of `group` call this together. For a plain module, whose tensors are whole, each rank that calls reads alone.

    Args:
        path: a folder that `save` wrote to, of whose checkpoints the newest complete one is taken, or one checkpoint in it.
        module: of the same parameters and buffers; they are overwritten in place. Values of another dtype are converted, with a warning.
        optimizer: over the parameters that the saved one had, in the same groups. If it is given, training goes on: the states of the
            random generators are restored too. Each rank gets its own state again; on another number of ranks, rank r gets that of r modulo
            the former number.
        verify: read all files once more before, spread over the ranks, to find damaged ones.
        group: the ranks that take part; by default all.

    Raises:
        AutotpError: on every rank that is alive: there is no complete checkpoint, it is damaged (the file is named), or it does not fit.
    """
    alone = not any(isinstance(value, DTensor) for value in module.state_dict().values())
    work = Joint(f"loading {path}", group, alone)
    with work.sentences():
        folder = work.first(lambda: files.complete(path))
        if verify:
            work.each(lambda: files.verify(folder, work.rank, work.size))
        reader = FileSystemReader(folder)
        plain, tensors = work.each(lambda: _targets(folder, reader, module, optimizer))
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        with _quiet():
            state_dict_loader.load(tensors, storage_reader=reader, planner=planner, process_group=group, no_dist=work.single)
        work.each(lambda: _put_back(plain, tensors, module, optimizer, work.rank))
        return plain["extra"]


# ---- the state of a module and an optimizer -------------------------------------------------------------------------


def _check_same(work: Joint, path: str | Path) -> None:
    """All ranks name one folder: each would else write a part of a checkpoint into another, and none be whole."""
    paths = work.gather(str(Path(path).absolute()))
    for rank, other in enumerate(paths):
        if other != paths[0]:
            raise AutotpError(f"rank {rank} saves to {other} and rank 0 to {paths[0]}; give all ranks the same folder")


def _state_of(
    module: nn.Module, optimizer: Optimizer | None, keep: int, extra: Any
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What is saved: tensors by name, each tied one once, and everything else."""
    if not isinstance(keep, int) or keep < 1:
        raise AutotpError(f"keep is {keep!r}; give the number of checkpoints that stay, at least 1")
    state = module.state_dict()
    first = {names[0] for names in _ties(module)}
    tensors = {PREFIX + name: value for name, value in state.items() if name in first}
    others = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
    states, packed = ({}, None) if optimizer is None else optimizer_state.pack(optimizer, module)
    try:
        pickle.dumps(extra)
    except Exception as error:
        raise AutotpError(f"extra cannot be pickled ({error}); give plain values, such as a step and a scheduler's state_dict()") from error
    return {**tensors, **states}, {"others": others, "optimizer": packed, "extra": extra}


def _ties(module: nn.Module) -> list[list[str]]:
    """The names of every tensor in the state dict, tied ones together."""
    names: dict[int, list[str]] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor):
            names.setdefault(id(value), []).append(name)
    return list(names.values())


def _targets(
    folder: Path, reader: FileSystemReader, module: nn.Module, optimizer: Optimizer | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What was saved beside the tensors, and the memory that these are read into."""
    saved = reader.read_metadata().state_dict_metadata
    plain: dict[str, Any] = torch.load(folder / PLAIN, map_location="cpu", weights_only=False)
    state, found = module.state_dict(), {}
    missing = []
    for names in _ties(module):
        stored = next((name for name in names if PREFIX + name in saved), None)
        if stored is None:
            missing.append(names[0])
        else:
            found[PREFIX + stored] = state[stored]
    unexpected = [name for name in (key.removeprefix(PREFIX) for key in saved if key.startswith(PREFIX)) if name not in state]
    if missing or unexpected:
        differ = [f"lacks {_listed(missing)}"] * bool(missing) + [f"has {_listed(unexpected)} besides"] * bool(unexpected)
        raise AutotpError(f"the checkpoint {folder} is of another model: it {' and '.join(differ)}; load it into the model that was saved")
    _check_types(folder, found, saved)
    if optimizer is None:
        return plain, found
    if plain["optimizer"] is None:
        raise AutotpError(f"the checkpoint {folder} was saved without an optimizer; load it without one, or another checkpoint")
    return plain, {**found, **optimizer_state.targets(optimizer, module, plain["optimizer"], saved)}


def _check_types(folder: Path, found: Mapping[str, Tensor], saved: Mapping[str, Any]) -> None:
    converted = []
    for key, value in found.items():
        stored, name = saved[key], key.removeprefix(PREFIX)
        assert isinstance(stored, TensorStorageMetadata)
        if tuple(stored.size) != tuple(value.shape):
            raise AutotpError(
                f"'{name}' has shape {tuple(stored.size)} in the checkpoint {folder} and {tuple(value.shape)} in the module; "
                "load it into the model that was saved"
            )
        if stored.properties.dtype != value.dtype:
            converted.append(f"'{name}' from {stored.properties.dtype} to {value.dtype}")
    if converted:
        warnings.warn(f"the checkpoint {folder} is converted: {_listed(converted, quoted=False)}", stacklevel=2)


def _put_back(
    plain: Mapping[str, Any], tensors: Mapping[str, Tensor], module: nn.Module, optimizer: Optimizer | None, rank: int
) -> None:
    """Hand over what was read. The module's tensors have it already, unless its `state_dict` makes copies."""
    state = {name: tensors[PREFIX + stored] for names in _ties(module) for stored in names if PREFIX + stored in tensors for name in names}
    module.load_state_dict({**state, **plain["others"]})
    if optimizer is not None:
        optimizer_state.unpack(optimizer, module, plain["optimizer"], tensors)
        resume_random(module, plain["random"], rank)


def _listed(names: list[str], quoted: bool = True) -> str:
    shown = [f"'{name}'" if quoted else name for name in names[:3]]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# ---- files ----------------------------------------------------------------------------------------------------------


def _write_own(aside: Path, plain: Mapping[str, Any], rank: int) -> dict[str, files.Digest]:
    """Write what is the first rank's; the digests of all that this rank wrote."""
    names = [file.name for file in aside.glob(f"__{rank}_*")]
    if rank == 0:
        with open(aside / PLAIN, "wb") as file:
            torch.save(plain, file)
            file.flush()
            os.fsync(file.fileno())
        names += [PLAIN, ".metadata"]
    return files.digests(aside, names)


def _finish(aside: Path, listed: Mapping[str, files.Digest], keep: int) -> Path:
    final = files.seal(aside, listed)
    files.prune(final.parent, keep)
    return final


def _kept(path: str | Path) -> str:
    found = files.latest(path)
    return "; no checkpoint is complete" if found is None else f"; the last complete checkpoint is {found}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that there is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
