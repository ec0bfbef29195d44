"""Operators that make tensors shaped like another."""

from autotp.rules.registry import rule

rule("aten.zeros_like.default aten.ones_like.default aten.empty_like.default aten.full_like.default", "... -> ...")
