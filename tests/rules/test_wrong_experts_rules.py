"""Wrong rules of the pieces of a mixture of experts, planted one by one: each makes the proof fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from all_samples import SAMPLES
from sampling import target_of

from autotp.errors import AutotpError
from autotp.prove import prove_rule
from autotp.rules import RULES
from autotp.rules.language import Call, Local, Rule, SortedRows

Change = Callable[[Rule], Rule]


def without(*places: int) -> Change:
    """A local form that forgets some of its arguments."""

    def change(rule: Rule) -> Rule:
        def local(given: Local) -> Any:
            assert rule.local is not None
            target, args, kwargs = rule.local(given)
            return target, tuple(None if place in places and place < len(args) else arg for place, arg in enumerate(args)), kwargs

        return replace(rule, local=local)

    return change


def first_expert(rule: Rule) -> Rule:
    """Every rank believes that its experts are the first ones."""

    def local(given: Local) -> Any:
        assert rule.local is not None
        target, args, kwargs = rule.local(given)
        return target, (*args[:5], 0) if len(args) > 5 else args, kwargs

    return replace(rule, local=local)


def one_slot_per_token(rule: Rule) -> Rule:
    """Rows that belong to other tokens than those of the rank."""
    outputs = tuple(tuple(d._replace(repeat=1) if isinstance(d, SortedRows) else d for d in dims) for dims in rule.outputs)
    return replace(rule, outputs=outputs)


WRONG: dict[str, tuple[str, Change]] = {
    "all rows on every rank": ("autotp.experts.dispatch", without(4)),
    "tokens looked up by their global number": ("autotp.experts.dispatch", without(5)),
    "slots of other tokens": ("autotp.experts.dispatch", one_slot_per_token),
    "rows taken for all rows": ("autotp.experts.combine", without(3)),
    "slots of other experts lost": ("autotp.experts.combine", without(4)),
    "sums over all rows": ("autotp.experts.collect", without(4)),
    "tokens of other ranks": ("autotp.experts.collect", without(6)),
    "keys of all rows": ("autotp.experts.grouped_product", without(4)),
    "experts without offset": ("autotp.experts.grouped_product", first_expert),
    "linear in both operands at once": ("autotp.experts.grouped_product", lambda rule: replace(rule, linear=((0, 1),))),
    "summed width kept": (
        "autotp.experts.grouped_product",
        lambda rule: replace(rule, operands=(rule.operands[0], (("expert",), (), ("n",)), rule.operands[2])),
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_rule(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, change = WRONG[case]
    right, sample = RULES[name], SAMPLES[name][0]

    def wrong(call: Call) -> Rule | None:
        rule = right(call)
        return None if rule is None else change(rule)

    monkeypatch.setitem(RULES, name, wrong)
    with pytest.raises(AutotpError, match="is wrong"):
        prove_rule(target_of(name), *sample.args, **sample.kwargs)
