"""`prove_rule` on operators of one's own, and what it says when something is wrong."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from autotp.errors import AutotpError
from autotp.prove import prove_rule
from autotp.rules import RULES, rule
from autotp.runtime.random import RandomCall


@torch.library.custom_op("autotp_test::scale", mutates_args=())
def scale(x: Tensor, weight: Tensor) -> Tensor:
    """Rows times a weight."""
    return x * weight


scale.register_autograd(
    lambda ctx, gradient: (gradient * ctx.saved_tensors[1], (gradient * ctx.saved_tensors[0]).flatten(0, -2).sum(0)),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@torch.library.custom_op("autotp_test::steps", mutates_args=())
def steps(x: Tensor) -> Tensor:
    """An operator without a gradient."""
    return x.round()


NAME = "autotp_test.scale.default"
OPERANDS = torch.randn(2, 3, 7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _restored_table() -> Iterator[None]:
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


def test_operator_of_ones_own() -> None:
    rule(NAME, "... d, d -> ... d", linear=((0,), (1,)))
    proof = prove_rule("autotp_test::scale", *OPERANDS)
    assert proof.op == NAME
    assert proof.factors == {"d", "dim-1", "dim-2"}
    assert proof.partial > 0
    assert prove_rule(scale._opoverload, *OPERANDS, meshes=[(2,)], limit=3).strategies == 3


def test_its_wrong_rule() -> None:
    rule(NAME, "... d, d -> ... d", linear=((0, 1),))
    with pytest.raises(
        AutotpError, match=r"rule of autotp_test.scale.default is wrong: on mesh \(2,\) with P0 .* differs .* by "
    ):
        prove_rule("autotp_test::scale.default", *OPERANDS)


def test_wrong_gradient_alone() -> None:
    """A value can be right and its gradient wrong."""

    def local(call: object) -> tuple[object, tuple[object, ...], dict[str, object]]:
        return lambda x, weight: x * weight.detach(), call.args, {}  # type: ignore[attr-defined]

    rule(NAME, "... d, d -> ... d", local=local)
    with pytest.raises(AutotpError, match="gradient of operand 1 differs"):
        prove_rule("autotp_test::scale", *OPERANDS)
    prove_rule("autotp_test::scale", *OPERANDS, gradient=False)


def test_operator_without_gradient() -> None:
    rule("autotp_test.steps.default", "... -> ...")
    with pytest.raises(AutotpError, match="gradient=False"):
        prove_rule("autotp_test::steps", OPERANDS[0])
    assert prove_rule("autotp_test::steps", OPERANDS[0], gradient=False).factors


def test_plain_function() -> None:
    def double(x: Tensor) -> Tensor:
        return 2 * x

    rule(f"{double.__module__}.double", "... -> ...", linear=((0,),))
    assert prove_rule(double, OPERANDS[1]).partial > 0


@pytest.mark.parametrize(
    ("operator", "sentence"),
    [
        ("autotp_test::nothing", "there is no operator 'autotp_test::nothing'"),
        ("autotp_test::scale", "autotp_test.scale.default has no rule for this call"),
        ("aten::mm", "aten.mm.default cannot be called so, even on a single device"),
    ],
)
def test_what_it_says(operator: str, sentence: str) -> None:
    with pytest.raises(AutotpError, match=sentence):
        prove_rule(operator, *OPERANDS)


def test_pattern_that_does_not_fit() -> None:
    rule(NAME, "a b, b -> a b")
    with pytest.raises(AutotpError, match="does not fit a tensor of shape"):
        prove_rule("autotp_test::scale", *OPERANDS)


def test_shards_draw_different_masks() -> None:
    """The proof of dropout asks for equal masks where pieces are equal; here, that different pieces get different ones."""
    whole = torch.ones(64, dtype=torch.float64)
    masks = [RandomCall(torch.ops.aten.dropout.default, shard)(whole, 0.5, True) for shard in range(2)]
    assert not torch.equal(*masks)
    assert all(0.2 < float((mask == 0).double().mean()) < 0.8 for mask in masks)
