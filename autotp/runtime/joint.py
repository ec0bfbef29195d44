"""Work that ranks do in steps, together: whatever fails on one of them becomes one sentence on all that are alive."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from autotp.errors import AutotpError
from autotp.runtime.agreement import once, together

T = TypeVar("T")


@dataclass(frozen=True)
class Joint:
    """The ranks of a group at some work.

    Attributes:
        doing: what sentences begin with, such as "saving to runs/7".
        group: the ranks; by default all.
        alone: this process works by itself, whatever others do.
        ending: what sentences end with, asked when something fails.
    """

    doing: str
    group: dist.ProcessGroup | None = None
    alone: bool = False
    ending: Callable[[], str] = str

    @property
    def rank(self) -> int:
        """The place of this process in the group."""
        return 0 if self.single else dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """How many work together."""
        return 1 if self.single else dist.get_world_size(self.group)

    @property
    def single(self) -> bool:
        """Whether there is nobody else."""
        return self.alone or not dist.is_initialized()

    def each(self, step: Callable[[], T]) -> T:
        """Every rank's own result of `step`; if it fails on one, all raise."""
        return self._said(step) if self.single else together(lambda: self._said(step), self.group)

    def first(self, step: Callable[[], T]) -> T:
        """What `step` gives on the first rank, on every rank; if it fails there, all raise."""
        return self._said(step) if self.single else once(lambda: self._said(step), self.group)

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, on every rank."""
        if self.single:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    @contextmanager
    def sentences(self) -> Iterator[None]:
        """Say what `torch.distributed` and its checkpoints raise inside, such as when a rank has ended.

        Raises:
            AutotpError: in the place of any of these.
        """
        try:
            yield
        except CheckpointException as error:
            rank, (cause, _) = min(error.failures.items())
            raise self._failed(cause, f" on rank {rank}" if self.size > 1 else "") from None
        except RuntimeError as error:
            if self.single:
                raise
            why = f"since another rank has ended or cannot be reached ({str(error).splitlines()[0]})"
            raise AutotpError(f"{self.doing} was broken off on rank {self.rank}, {why}{self.ending()}") from error

    def _said(self, step: Callable[[], T]) -> T:
        try:
            return step()
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: BaseException, where: str = "") -> AutotpError:
        return AutotpError(f"{self.doing} failed{where}: {_reason(error)}{self.ending()}")


def _reason(error: BaseException) -> str:
    """What the operating system said, if it is the cause."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror + (f" ({cause.filename})" if cause.filename else "")
    return str(error) if isinstance(error, AutotpError) else f"{type(error).__name__}: {error}".splitlines()[0]
