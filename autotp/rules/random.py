"""Random operators: the numbers of a sharded tensor differ from rank to rank, those of a replicated or partial one do not."""

from __future__ import annotations

from autotp.rules.language import Call, Rule, bind
from autotp.rules.registry import rule, rule_for

rule("aten.dropout.default", "... -> ...", linear=((0,),), random=True)
rule("aten.native_dropout.default", "... -> ..., ...", random=True)
rule(
    """
    aten.rand_like.default aten.randn_like.default aten.randint_like.default aten.randint_like.low_dtype aten.bernoulli.default
    aten.bernoulli.p aten.exponential.default aten.uniform.default aten.cauchy.default
    aten.log_normal.default aten.normal_functional.default aten.normal.Tensor_float aten.normal.float_Tensor aten.poisson.default
    """.split(),
    "... -> ...",
    random=True,
)
rule("aten.normal.Tensor_Tensor aten.binomial.default", "..., ... -> ...", random=True)


@rule_for("aten.multinomial.default")
def multinomial(call: Call) -> Rule:
    """One draw for every row of weights, which stays whole."""
    return bind("... c^ -> ... n^", call, random=True)
