"""Ranks that differ are named on every rank; what one rank makes, or its failure, reaches all."""

from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from autotp.errors import AutotpError
from autotp.runtime.agreement import agree, share


class Awkward(Exception):
    """Pickles, but cannot be unpickled."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first + second)


def check_agree(rank: int) -> None:
    agree("same", "the plan")
    agree(b"same", "the plan")
    with pytest.raises(AutotpError) as one:
        agree("other" if rank == 1 else "same", "the plan")
    assert "the plan is not the same on every rank: rank 1 has another than rank 0" in str(one.value)
    with pytest.raises(AutotpError, match="ranks 1, 2 have another than rank 0"):
        agree("first" if rank == 0 else "same", "the plan")
    pair = dist.new_group([0, 2])
    if rank != 1:
        agree("same", "the plan", pair)


def check_share(rank: int) -> None:
    assert share({"answer": 42} if rank == 0 else None) == {"answer": 42}
    assert share(rank, src=2) == 2
    pair = dist.new_group([1, 2])
    if rank != 0:
        assert share(rank, pair, src=1) == 2
    for error, expected, sentence in (
        (AutotpError("no plan fits"), AutotpError, "no plan fits"),
        (ValueError("bad"), ValueError, "bad"),
        (
            Awkward("a", "b"),
            Awkward if rank == 0 else AutotpError,
            "ab" if rank == 0 else "rank 0 failed with Awkward: ab",
        ),
    ):
        with pytest.raises(expected, match=sentence):
            share(error if rank == 0 else None)
    with pytest.raises(AutotpError, match="rank 0 cannot share a function with the other ranks"):
        share((lambda: None) if rank == 0 else None)
    assert share("still together") == "still together"


def run_rank(rank: int, world: int, store: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    try:
        check_agree(rank)
        check_share(rank)
    finally:
        dist.destroy_process_group()


def test_three_ranks(tmp_path: Path) -> None:
    mp.spawn(run_rank, (3, str(tmp_path / "store")), nprocs=3)


def test_without_a_process_group_there_is_nobody_to_ask() -> None:
    agree("plan", "the plan")
    assert share(7) == 7
    with pytest.raises(ValueError, match="bad"):
        share(ValueError("bad"))
