"""Rules that users add: however they name the operator, what is refused at once, and what planning says when a rule does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autotp
from autotp.errors import AutotpError
from autotp.planning import Request, prepare
from autotp.rules import RULES
from autotp.trace import trace


@torch.library.custom_op("autotp_own::sums", mutates_args=())
def sums(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Running sums along dim 1, times a weight, plus a bias; and their last row."""
    y = x.cumsum(1) * weight
    y = y + bias if bias is not None else y
    return y, y[:, -1].clone()


@sums.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0], x.shape[2])


def _backward(ctx: Any, grad_y: Tensor, grad_last: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    x, weight = ctx.saved_tensors
    total = torch.cat([grad_y[:, :-1], (grad_y[:, -1] + grad_last).unsqueeze(1)], 1)
    grad_bias = total.sum((0, 1)) if ctx.has_bias else None
    return (total * weight).flip(1).cumsum(1).flip(1), (total * x.cumsum(1)).sum((0, 1)), grad_bias


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.has_bias = inputs[2] is not None


sums.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("autotp_own::forward_only", mutates_args=())
def forward_only(x: Tensor) -> Tensor:
    """An operator without an autograd formula."""
    return x * 2


NAME = "autotp_own.sums.default"
PATTERN = "b t^ d, d, d -> b t^ d, b d"
X, WEIGHT, BIAS = (torch.randn(shape, dtype=torch.float64) for shape in ((3, 5, 7), (7,), (7,)))


class Summing(nn.Module):
    """A model whose submodule calls the operator."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(7))

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = sums(x, self.weight)[0]
            return found

    def __init__(self) -> None:
        super().__init__()
        self.inner = self.Inner()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x)
        return found


@pytest.fixture(autouse=True)
def _restored_table() -> Iterator[None]:
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


@pytest.mark.parametrize(
    "operator",
    [
        sums,
        torch.ops.autotp_own.sums,
        torch.ops.autotp_own.sums.default,
        "autotp_own::sums",
        "autotp_own.sums",
        NAME,
        ["autotp_own::sums"],
        [sums],
    ],
    ids=repr,
)
def test_ways_to_name_an_operator(operator: Any) -> None:
    autotp.rule(operator, PATTERN)
    assert NAME in RULES
    proof = autotp.prove_rule(operator[0] if isinstance(operator, list) else operator, X, WEIGHT, BIAS)
    assert (proof.op, proof.factors) == (NAME, {"b", "d"})
    autotp.prove_rule("autotp_own::sums", X, WEIGHT)


def test_name_of_an_operator_that_comes_later() -> None:
    autotp.rule("autotp_later::op", "... -> ...")
    assert "autotp_later.op.default" in RULES


def test_function_of_the_arguments() -> None:
    @autotp.rule_for(sums)
    def rule(call: autotp.Call) -> autotp.Rule | None:
        return autotp.bind(PATTERN, call) if call.argument(2, "bias") is None else None

    assert rule is RULES[NAME]
    assert autotp.prove_rule(sums, X, WEIGHT).factors
    with pytest.raises(AutotpError, match="autotp_own.sums.default has no rule for this call"):
        autotp.prove_rule(sums, X, WEIGHT, BIAS)


def share_of_mean(x: Tensor, width: int) -> Tensor:
    """What one rank, which holds a piece of the last dim, adds to a mean over all `width` elements."""
    return x.sum(-1) / width


def test_local_form() -> None:
    def local(call: autotp.Local) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        return share_of_mean, (call.args[0], call.call.tensors[0].shape[-1]), {}

    def mean(x: Tensor) -> Tensor:
        return x.mean(-1)

    autotp.rule(mean, "... d! -> ...", linear=((0,),), local=local)
    assert autotp.prove_rule(mean, X).factors == {"dim-1", "dim-2", "d"}


@pytest.mark.parametrize(
    ("operator", "pattern", "options", "sentence"),
    [
        (sums, "b t^ d -> b t^ d", {}, r"has 1 operands, but autotp_own.sums.default has 3 \(x, weight, bias\)"),
        (sums, "b t^ d, d, d -> b t^ d", {}, r"has 1 outputs, but autotp_own.sums.default has 2"),
        (sums, "b t^ d, d, d, b", {}, "needs exactly one '->'"),
        (sums, "b t^ (d, d, d -> b t^ d, b d", {}, r"opens a '\('"),
        (sums, "b t? d, d, d -> b t? d, b d", {}, r"has 't\?' where a factor name"),
        (sums, PATTERN, {"lineer": ((0,),)}, "unknown option 'lineer'; the options are linear, work"),
        (sums, PATTERN, {"linear": (0,)}, r"linear=\(0,\); write groups of operands"),
        (sums, PATTERN, {"linear": ((5,),)}, "its operands are numbered 0 to 2"),
        (sums, PATTERN, {"work": "heavy"}, "work='heavy'; choose one of gemm"),
        (sums, PATTERN, {"reduction": "max"}, r"reduction='max'; choose 'P' \(a sum\)"),
        (sums, PATTERN, {"local": 3}, "local=3; pass a function"),
        (sums, "b t! d, d, d -> b t! d, b d", {}, "marks 't' with '!', which needs local"),
        ("autotp_own.sums.other", PATTERN, {}, "autotp_own.sums has no overload 'other'; name one of autotp_own.sums.default"),
        ("aten::add", "..., ... -> ...", {}, "aten.add has several overloads; name one of aten.add"),
        ("scan", "... -> ...", {}, "'scan' is no operator's name; write 'mylib::scan'"),
        (3.5, "... -> ...", {}, "3.5 is no operator; pass a name such as"),
    ],
)
def test_refused_at_once(operator: Any, pattern: str, options: dict[str, Any], sentence: str) -> None:
    before = dict(RULES)
    with pytest.raises(AutotpError, match=sentence):
        autotp.rule(operator, pattern, **options)
    assert before == RULES


def test_pattern_that_does_not_fit_names_operator_module_and_line() -> None:
    autotp.rule(sums, "t^ d, d, d -> t^ d, d")
    program = trace(Summing(), (X.float(),), {})
    place = r"does not fit a tensor of shape .* at autotp_own.sums.default in module `inner` \(.*test_own_rules.py:\d+\)"
    with pytest.raises(AutotpError, match=place):
        prepare(program, Request({"tp": 2}))


def test_factor_of_unknown_size() -> None:
    autotp.rule(sums, "b t^ (g d), (g d), (g d) -> b t^ (g d), b (g d)")
    with pytest.raises(AutotpError, match=r"does not tell the size of 'g' in \(g d\); name it in a dim of its own, or pass sizes"):
        autotp.prove_rule(sums, X, WEIGHT)
    autotp.rule(sums, "b t^ (g d), (g d), (g d) -> b t^ (g d), b (g d)", sizes={"g": 2})
    assert autotp.prove_rule(sums, torch.cat([X, X], -1), torch.cat([WEIGHT, WEIGHT])).factors == {"b", "d", "g"}


def test_function_that_fails() -> None:
    autotp.rule_for(sums)(lambda call: call.args[9])
    with pytest.raises(AutotpError, match="the rule of autotp_own.sums.default in module .* fails with IndexError"):
        autotp.prove_rule(sums, X, WEIGHT)
    autotp.rule_for(sums)(lambda call: PATTERN)  # type: ignore[arg-type, return-value]
    with pytest.raises(AutotpError, match=r"gives a str; return autotp.bind\(pattern, call\), or None"):
        autotp.prove_rule(sums, X, WEIGHT)


def test_missing_autograd_formula() -> None:
    autotp.rule(forward_only, "... -> ...", linear=((0,),))
    with pytest.raises(AutotpError, match="autotp_own.forward_only.default has no autograd formula"):
        autotp.prove_rule(forward_only, X)
    assert autotp.prove_rule(forward_only, X, gradient=False).factors


def test_wrong_rule_is_disproved() -> None:
    autotp.rule(sums, "b t d, d, d -> b t d, b d")
    with pytest.raises(AutotpError, match=r"the rule of autotp_own.sums.default is wrong: on mesh \(2,\) with t"):
        autotp.prove_rule(sums, X, WEIGHT, BIAS)


def test_plan_with_and_without_the_rule() -> None:
    model = Summing()
    without = autotp.plan(model, (X.float(),), mesh=2)
    assert [node.strategy for node in without.nodes if node.op == NAME] == ["replicate"]
    autotp.rule(sums, PATTERN)
    space, _ = prepare(trace(model, (X.float(),), {}), Request({"tp": 2}))
    assert any("d" in strategy.key for found in space.strategies.values() for strategy in found)
