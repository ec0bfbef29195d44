"""Rules: one line per operator. `language` explains the notation; one file per operator family holds the table."""

from autotp.rules import attention, creation, indexing, linear_algebra, loss, normalization, pointwise, random, reduction, shape
from autotp.rules.language import Call, Rule, bind, call_of
from autotp.rules.registry import RULES, rule, rule_for, rule_of

__all__ = [
    "RULES",
    "Call",
    "Rule",
    "attention",
    "bind",
    "call_of",
    "creation",
    "indexing",
    "linear_algebra",
    "loss",
    "normalization",
    "pointwise",
    "random",
    "reduction",
    "rule",
    "rule_for",
    "rule_of",
    "shape",
]
