"""Rules: one line per operator. `language` explains the notation; one file per operator family holds the table."""

from autotp.rules import (
    attention,
    convolution,
    creation,
    experts,
    indexing,
    linear_algebra,
    loss,
    normalization,
    parts,
    pointwise,
    pooling,
    random,
    recurrent,
    reduction,
    scatter,
    shape,
)
from autotp.rules.language import Call, Rule, bind, call_of
from autotp.rules.registry import RULES, rule, rule_for, rule_of

__all__ = [
    "RULES",
    "Call",
    "Rule",
    "attention",
    "bind",
    "call_of",
    "convolution",
    "creation",
    "experts",
    "indexing",
    "linear_algebra",
    "loss",
    "normalization",
    "parts",
    "pointwise",
    "pooling",
    "random",
    "recurrent",
    "reduction",
    "rule",
    "rule_for",
    "rule_of",
    "scatter",
    "shape",
]
