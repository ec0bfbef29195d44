"""Wrong rules of attention, recurrent cells, slices and einsum, planted one by one in place of the right one: each makes the proof fail."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from all_samples import SAMPLES
from sampling import Sample, call, real, target_of

from autotp.errors import AutotpError
from autotp.prove import prove_rule
from autotp.rules import RULES, bind
from autotp.rules.attention import attention, causal_attention_of_rows
from autotp.rules.language import Call, Local, LocalStart, Rule
from autotp.rules.parts import slice_
from autotp.rules.recurrent import gru_cell_of_units, lstm_cell_of_units
from autotp.rules.registry import RuleFunction

NAME = "aten.scaled_dot_product_attention.default"
CAUSAL = call(*[real(2, 3, 5, 4)] * 3, is_causal=True)
GROUPED = call(real(2, 6, 7, 4), real(2, 2, 7, 4), real(2, 2, 7, 4), is_causal=True, enable_gqa=True)


def changed(**changes: Any) -> RuleFunction:
    """The right rule with some fields wrong."""
    return lambda call: replace(attention(call), **changes)


def called(function: Any) -> RuleFunction:
    """The right rule with a wrong local call of (q, k, v, start)."""

    def local_call(local: Local) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        split = local.operand_split(0, len(local.call.tensors[0].shape) - 2)
        if split is None:
            return local.target, local.args, local.kwargs
        return function, (*local.args[:3], LocalStart(split)), {}

    return lambda call: replace(attention(call), local=local_call)


def shifted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int) -> torch.Tensor:
    """Every query sees one key more."""
    return causal_attention_of_rows(q, k, v, start + 1)


def first_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int) -> torch.Tensor:
    """As if every rank held the first queries."""
    return causal_attention_of_rows(q, k, v, 0)


def lower_right(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int) -> torch.Tensor:
    """The mask aligned at the last query and the last key."""
    mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril(k.shape[-2] - q.shape[-2])
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)


def detached_keys(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int) -> torch.Tensor:
    """The right output, and no gradient for the keys."""
    return causal_attention_of_rows(q, k.detach(), v, start)


def scattered_rows(call: Call) -> Rule:
    """One offset for pieces that may nevertheless be cut in several runs."""
    return replace(attention(call), special=frozenset())


def slice_from(start: Any) -> RuleFunction:
    """The right rule of a slice, called from the wrong element."""

    def local_call(local: Local) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        return torch.ops.aten.narrow.default, (local.args[0], 1, start, local.output_shape()[1]), {}

    return lambda call: replace(slice_(call), local=local_call)


def pattern(text: str, **options: Any) -> RuleFunction:
    """A rule that is one pattern."""
    return lambda call: bind(text, call, **options)


GATES = "(g^ u!) i^, (g^ u!) k^, (g^ u!), (g^ u!)"
INSIDE_OUT = "(u! g^) i^, (u! g^) k^, (u! g^), (u! g^)"
LSTM = "aten.lstm_cell.default"
LSTM_RULE = f"b i^, b k^, b u!, {INSIDE_OUT} -> b u!, b u!"
GRU = "aten.gru_cell.default"


def first_units(local: Local) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """A GRU step that takes the first units of the old state, whichever the rank holds."""
    x, h, *weights = local.args
    return gru_cell_of_units, (x, h, 0, local.output_shape()[1], *weights), {}


def lstm_units(local: Local) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The right local step."""
    x, (h, c), *weights = local.args
    return lstm_cell_of_units, (x, h, c, *weights), {}


OTHERS: dict[str, tuple[str, RuleFunction, Sample]] = {
    "gates inside out": (LSTM, pattern(LSTM_RULE, local=lstm_units), SAMPLES[LSTM][0]),
    "old state of the first units": (GRU, pattern(f"b i^, b k^, {GATES} -> b u!", local=first_units), SAMPLES[GRU][0]),
    "steps split": (
        "aten.gru.input",
        pattern("t b i^, l^ b h^, w0^ v0^, w1^ v1^, w2^, w3^ -> t b o^, l^ b h^"),
        SAMPLES["aten.gru.input"][0],
    ),
    "slice blind to what stands before": ("aten.slice.Tensor", slice_from(12), call(real(3, 24), 1, 12, 24)),
    "slice of the first half": ("aten.slice.Tensor", slice_from(0), call(real(3, 24), 1, 12, 24)),
    "diagonal split": ("aten.einsum.default", pattern("b i j^ -> b i"), call("bii->bi", [real(3, 5, 5)])),
    "summed index kept": ("aten.einsum.default", pattern("b i, c i -> b i"), call("bi,ci", [real(5, 5), real(5, 5)])),
}


WRONG: dict[str, tuple[RuleFunction, Sample]] = {
    "mask without offset": (changed(local=None), CAUSAL),
    "mask of the first rows": (called(first_rows), CAUSAL),
    "mask shifted by one": (called(shifted), CAUSAL),
    "mask aligned at the end": (called(lower_right), CAUSAL),
    "keys without gradient": (called(detached_keys), CAUSAL),
    "scale forgotten": (called(causal_attention_of_rows), call(*CAUSAL.args, is_causal=True, scale=0.3)),
    "rows in several runs": (scattered_rows, GROUPED),
    "queries as summands": (changed(linear=((0,),)), CAUSAL),
    "keys split too": (lambda call: replace(attention(call), whole=frozenset("ef")), CAUSAL),
    "random numbers unannounced": (changed(random=False), call(*CAUSAL.args, is_causal=True, dropout_p=0.5)),
}


CASES = {**{case: (NAME, *found) for case, found in WRONG.items()}, **OTHERS}


@pytest.mark.parametrize("case", CASES)
def test_wrong_rule(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, wrong, sample = CASES[case]
    prove_rule(target_of(name), *sample.args, limit=4, meshes=[(2,)], **sample.kwargs)
    monkeypatch.setitem(RULES, name, wrong)
    with pytest.raises(AutotpError, match=r"the rule of .* is wrong: on mesh"):
        prove_rule(target_of(name), *sample.args, **sample.kwargs)
