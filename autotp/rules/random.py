"""Random operators: the mask of a sharded tensor differs from rank to rank, that of a replicated or partial one does not."""

from autotp.rules.registry import rule

rule("aten.dropout.default", "... -> ...", linear=((0,),), random=True)
rule("aten.native_dropout.default", "... -> ..., ...", random=True)
rule("aten.rand_like.default aten.randn_like.default aten.bernoulli.default", "... -> ...", random=True)
