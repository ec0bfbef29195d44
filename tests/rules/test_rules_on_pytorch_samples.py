"""Rules proved on the sample inputs of PyTorch's own operator tests."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
from sampling import Sample, target_of
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import OpInfo
from torch.utils import _pytree as pytree

from autotp.errors import AutotpError
from autotp.prove import prove_rule
from autotp.rules import RULES

LARGEST = 400
"""Elements of the largest operand of a sample that is proved."""

NO_GRADIENT = re.compile("not differentiable with respect to argument|derivative for .* is not implemented")

UNFILLED = "aten.empty_like.default"


def infos(name: str) -> list[OpInfo]:
    """PyTorch's descriptions of an operator."""
    packet = name.split(".")[1]
    return [info for info in op_db if packet in (info.name.rpartition(".")[2], info.aten_name)]


OPERATORS = sorted(name for name in RULES if name.startswith("aten.") and name != UNFILLED and infos(name))


def fits(target: Any, sample: Sample) -> bool:
    """Whether the overload takes the arguments of this sample of the Python function: tensors where it expects tensors."""
    for place, value in enumerate(sample.args):
        schema = target._schema.arguments
        if place >= len(schema) or (isinstance(value, Tensor) and "Tensor" not in str(schema[place].type)):
            return False
    try:
        target(*sample.args, **sample.kwargs)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    return True


def samples(name: str, most: int) -> Iterator[Sample]:
    """The first sample inputs of each of PyTorch's descriptions that the overload takes, with the keyword `gradient`."""
    target = target_of(name)
    for info in infos(name):
        dtype = next((dtype for dtype in (torch.float64, torch.int64, torch.bool) if dtype in info.dtypes), None)
        found = 0
        for given in info.sample_inputs("cpu", dtype, requires_grad=False) if dtype else ():
            sample = Sample((given.input, *given.args), given.kwargs)
            sizes = [leaf.numel() for leaf in pytree.tree_leaves(sample) if isinstance(leaf, Tensor)]
            if found < most and min(sizes, default=0) > 0 and max(sizes) <= LARGEST and fits(target, sample):
                found += 1
                yield sample._replace(kwargs={**sample.kwargs, "gradient": info.supports_autograd})


def prove(name: str, most: int, limit: int | None) -> None:
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)
    for sample in samples(name, most):
        for gradient in (sample.kwargs["gradient"], False):
            try:
                prove_rule(target_of(name), *sample.args, limit=limit, **{**sample.kwargs, "gradient": gradient})
            except AutotpError as error:
                if gradient and NO_GRADIENT.search(str(error)):
                    continue  # an operand has none: prove the outputs
                if "no rule for this call" not in str(error):  # then the call is run replicated
                    raise
            break


@pytest.mark.parametrize("name", OPERATORS)
def test_rule_on_pytorch_samples(name: str) -> None:
    prove(name, most=3, limit=5)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATORS)
def test_rule_on_all_pytorch_samples(name: str) -> None:
    prove(name, most=200, limit=40)
