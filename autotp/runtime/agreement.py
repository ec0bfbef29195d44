"""Every rank must act on the same plan: compare what the ranks hold, and hand out what one rank made."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from hashlib import sha256
from typing import Any, TypeVar, cast

import torch.distributed as dist

from autotp.errors import AutotpError

T = TypeVar("T")


def agree(payload: str | bytes, what: str, group: dist.ProcessGroup | None = None) -> None:
    """Check that every rank of `group` calls with the same payload; only 32-byte sha256 digests travel.

    `what` names the payload in the error, e.g. "the plan". Without a process group there is nothing to compare.

    Raises:
        AutotpError: on every rank, the same sentence, if any payload differs.
    """
    if not dist.is_initialized():
        return
    digest = sha256(payload.encode() if isinstance(payload, str) else payload).digest()
    digests: list[bytes] = [b""] * dist.get_world_size(group)
    dist.all_gather_object(digests, digest, group=group)
    others = [rank for rank, other in enumerate(digests) if other != digests[0]]
    if others:
        named = f"rank {others[0]} has" if len(others) == 1 else f"ranks {', '.join(map(str, others))} have"
        raise AutotpError(
            f"{what} is not the same on every rank: {named} another than rank 0; "
            f"start every rank with the same code, model, inputs and options"
        )


def share(value: T | BaseException, group: dist.ProcessGroup | None = None, src: int = 0) -> T:
    """The value that rank `src` of `group` gives, on every rank; what the other ranks pass is ignored.

    If `src` gives an exception, or a value that cannot be pickled, every rank raises, so that none is left waiting:

        try:
            plan = make_plan() if rank == 0 else None
        except Exception as error:
            plan = error
        plan = share(plan)
    """
    if not dist.is_initialized():
        if isinstance(value, BaseException):
            raise value
        return value
    own = dist.get_rank(group) == src
    box: list[bytes | None] = [_packed(value, src) if own else None]
    dist.broadcast_object_list(box, group=group, group_src=src)
    if own and isinstance(value, BaseException):
        raise value
    assert box[0] is not None
    failed, received = pickle.loads(box[0])
    if failed:
        raise received
    return cast(T, value if own else received)


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


def together(step: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
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
    messages: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(messages, message, group=group)
    failed = [rank for rank, text in enumerate(messages) if text is not None]
    if not failed:
        return result  # type: ignore[return-value]
    where = "" if len(failed) == len(messages) else f" (on rank {failed[0]})"
    raise AutotpError(f"{messages[failed[0]]}{where}") from failure
