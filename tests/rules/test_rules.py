"""Every rule of the table is proved, on samples of our own and on PyTorch's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from all_samples import SAMPLES
from sampling import Sample, missing, target_of

from autotp.prove import Proof, prove_rule
from autotp.rules import RULES


@pytest.fixture(autouse=True)
def _filled_memory() -> Iterator[None]:
    """Uninitialised memory (`empty_like`) is filled with NaN, so that it can be compared."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def prove(name: str, sample: Sample, limit: int | None) -> Proof:
    return prove_rule(target_of(name), *sample.args, limit=limit, **sample.kwargs)


def test_every_rule_has_a_sample_and_every_sample_a_rule() -> None:
    assert missing() == []
    assert set(SAMPLES) <= set(RULES)


NEVER_SPLIT = ("autotp.experts.sort_by_key",)
"""Their rule says that they are replicated on purpose, not for lack of one."""


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_rule(name: str) -> None:
    """The rule holds, and it is of use: some factor can be split, for one of the samples at least."""
    proofs = [prove(name, sample, limit=10) for sample in SAMPLES[name]]
    assert frozenset().union(*(proof.factors for proof in proofs)) or name in NEVER_SPLIT


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_rule_with_every_strategy(name: str) -> None:
    for sample in SAMPLES[name]:
        prove(name, sample, limit=None)
