"""Every rank must act on the same plan: compare what the ranks hold, and hand out what one rank made.

All functions are called by every rank of a `Group`. On a mesh of several axes they go through it axis by axis, so that a part of a
larger `DeviceMesh` needs no process group of its own.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from autotp.errors import AutotpError

T = TypeVar("T")

Group = dist.ProcessGroup | DeviceMesh | None
"""The ranks that agree: those of a process group, those of a mesh, or (None) all that run."""

SAME = "start every rank with the same code, versions, model, inputs and options"


def agree(payload: str | bytes, what: str, group: Group = None) -> None:
    """Check that every rank of `group` calls with the same payload; only 32-byte sha256 digests travel.

    `what` names the payload in the error, e.g. "the plan". Without a process group there is nothing to compare.

    Raises:
        AutotpError: on every rank, the same sentence, if any payload differs.
    """
    if not dist.is_initialized():
        return
    digests = _gather(sha256(payload.encode() if isinstance(payload, str) else payload).digest(), group)
    others = [rank for rank, digest in zip(members(group), digests, strict=True) if digest != digests[0]]
    if others:
        named = f"rank {others[0]} has" if len(others) == 1 else f"ranks {', '.join(map(str, others))} have"
        raise AutotpError(f"{what} is not the same on every rank: {named} another than rank {members(group)[0]}; {SAME}")


def agree_on(facts: Mapping[str, str | None], group: Group = None) -> None:
    """Check that every rank of `group` states the same short facts: name → value, in one order; None is equal to anything.

    Raises:
        AutotpError: on every rank, the same sentence: the first fact that differs, and what two ranks say of it.
    """
    if not dist.is_initialized():
        return
    stated = list(zip(members(group), _gather(dict(facts), group), strict=True))
    for name in facts:
        known = [(rank, found[name]) for rank, found in stated if found.get(name) is not None]
        for rank, value in known[1:]:
            if value != known[0][1]:
                first, wanted = known[0]
                raise AutotpError(f"{name} is not the same on every rank: rank {rank} has {value}, rank {first} has {wanted}; {SAME}")


def share(value: T | BaseException, group: Group = None, src: int = 0) -> T:
    """The value that rank `src` of `group` gives, on every rank; what the other ranks pass is ignored.

    If `src` gives an exception, or a value that cannot be pickled, every rank raises, so that none is left waiting:

        try:
            plan = make_plan() if rank == 0 else None
        except Exception as error:
            plan = error
        plan = share(plan)

    On a mesh it is the first rank that gives the value, and `src` must be 0.
    """
    if not dist.is_initialized():
        if isinstance(value, BaseException):
            raise value
        return value
    assert src == 0 or not isinstance(group, DeviceMesh)
    own = is_first(group) if src == 0 else dist.get_rank(_axes(group)[0]) == src
    box: list[bytes | None] = [_packed(value, src) if own else None]
    for axis in _axes(group):  # along the first axis from the first rank, then along the next from all that have it, …
        dist.broadcast_object_list(box, group=axis, group_src=src)
    if own and isinstance(value, BaseException):
        raise value
    assert box[0] is not None
    failed, received = pickle.loads(box[0])
    if failed:
        raise received
    return cast(T, value if own else received)


def once(step: Callable[[], T], group: Group = None) -> T:
    """Run `step` on the first rank of `group` alone; every rank gets what it gives, or raises what it raises."""
    result: T | BaseException | None = None
    if is_first(group):
        try:
            result = step()
        except Exception as error:
            result = error
    return share(cast("T | BaseException", result), group)


def broadcast(tensor: Tensor, group: Group = None) -> None:
    """Replace the values of `tensor` by those that the first rank of `group` has."""
    for axis in _axes(group):
        dist.broadcast(tensor, group=axis, group_src=0)


def together(step: Callable[[], T], group: Group = None) -> T:
    """Run `step` on every rank; if it fails on any, every rank raises the same sentence, so that none is left waiting.

    Raises:
        AutotpError: on every rank, naming the first rank that failed and what it said.
    """
    try:
        result, failure = step(), None
    except Exception as error:
        result, failure = None, error
    if not dist.is_initialized():
        if failure is not None:
            raise failure
        return result  # type: ignore[return-value]
    message = None if failure is None else str(failure) if isinstance(failure, AutotpError) else f"{type(failure).__name__}: {failure}"
    messages: list[str | None] = _gather(message, group)
    failed = [(rank, text) for rank, text in zip(members(group), messages, strict=True) if text is not None]
    if not failed:
        return result  # type: ignore[return-value]
    rank, text = failed[0]
    raise AutotpError(text if len(failed) == len(messages) else f"{text} (on rank {rank})") from failure


def is_first(group: Group = None) -> bool:
    """Whether this is the first rank of the group, which plans; also where there is no process group."""
    return not dist.is_initialized() or all(dist.get_rank(axis) == 0 for axis in _axes(group))


@contextmanager
def exchanging(who: str) -> Iterator[None]:
    """Say in a sentence what a backend says of an exchange that failed.

    Raises:
        AutotpError: in the place of the backend's error.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        said = str(error).strip().partition("\n")[0]
        raise AutotpError(
            f"an exchange between {who} failed, as one of them has died, hangs or does something else: look for the first "
            f"error among their outputs, and start again from the last checkpoint ({said})"
        ) from error


def _axes(group: Group) -> list[dist.ProcessGroup | None]:
    """The process groups to go through, outermost first."""
    return [group.get_group(axis) for axis in range(group.ndim)] if isinstance(group, DeviceMesh) else [group]


def members(group: Group) -> list[int]:
    """The numbers of the ranks among all that run, in the order of `_gather`."""
    if isinstance(group, DeviceMesh):
        ranks: list[int] = group.mesh.flatten().tolist()
        return ranks
    return list(range(dist.get_world_size())) if group is None else dist.get_process_group_ranks(group)


def _gather(value: Any, group: Group) -> list[Any]:
    """What every rank passes, on every rank, in the order of `members`."""
    values = [value]
    for axis in reversed(_axes(group)):
        parts: list[list[Any]] = [[]] * dist.get_world_size(axis)
        dist.all_gather_object(parts, values, group=axis)
        values = [item for part in parts for item in part]
    return values


def _packed(value: Any, src: int) -> bytes:
    """(whether it is an exception, the value) pickled; an AutotpError stands for what does not survive it."""
    failed = isinstance(value, BaseException)
    try:
        packed = pickle.dumps((failed, value))
        if failed:
            pickle.loads(packed)
        return packed
    except Exception as error:
        if failed:
            sentence = f"rank {src} failed with {type(value).__name__}: {value}"
        else:
            sentence = f"rank {src} cannot share a {type(value).__name__} with the other ranks: {error}"
        return pickle.dumps((True, AutotpError(sentence)))
