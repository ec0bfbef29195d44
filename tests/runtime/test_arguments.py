"""Calls bound to the inputs of a graph as in the trace; everything that does not fit is one clear sentence."""

import inspect
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autotp.errors import AutotpError
from autotp.layouts import Layout, Segment, Split
from autotp.program import Size, TensorType
from autotp.runtime.arguments import Arguments
from autotp.sharded import BorderSpec, Sharded

X = torch.randn(3, 6)
BATCH = sympy.Symbol("batch")
CPU = torch.device("cpu")


def forward(x: Tensor, mask: Tensor | None = None, factor: float = 2.0, *rest: Any, **options: Any) -> None:
    """The signature of the traced model; the example was `forward(x, mask=None, factor=2.0, pair=[...])`."""


INVARIANT = Layout(("I",))


def border(name: str, position: int, shape: tuple[Size, ...], layout: Layout = INVARIANT) -> BorderSpec:
    hint = tuple(size if isinstance(size, int) else 3 for size in shape)
    return BorderSpec(name, position, TensorType(shape, hint, torch.float32, False), layout)


def make_arguments(*inputs: BorderSpec, signature: bool = True) -> Arguments:
    example = ((X,), {"mask": None, "factor": 2.0, "pair": [X, X]})
    sharded = Sharded(
        graph=torch.fx.GraphModule(nn.Module(), torch.fx.Graph()),
        state=(),
        inputs=inputs or (border("x", 0, (BATCH, 6)), border("pair.0", 3, (BATCH, 6)), border("pair.1", 4, (4,))),
        outputs=(),
        updates=(),
        mesh=(2,),
        coordinate=(1,),
        in_spec=pytree.tree_flatten(example)[1],
        out_spec=pytree.tree_flatten(())[1],
        in_names=("x", "mask", "factor", "pair.0", "pair.1"),
        in_constants={1: None, 2: 2.0},
        out_constants={},
    )
    return Arguments(sharded, CPU, inspect.signature(forward) if signature else None)


PAIR = [X, torch.ones(4)]


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((X,), {"mask": None, "factor": 2.0, "pair": PAIR}),
        ((), {"pair": PAIR, "x": X}),
        ((X, None), {"pair": PAIR}),
        ((X, None, 2.0), {"pair": PAIR, "other": None}),
        ((X,), {"factor": 2, "pair": PAIR}),
    ],
)
def test_a_call_may_pass_by_position_or_by_keyword(args: Any, kwargs: Any) -> None:
    found = make_arguments().match(args, kwargs)
    assert [id(tensor) for tensor in found] == [id(tensor) for tensor in (X, *PAIR)]


def test_dynamic_sizes_may_change_together() -> None:
    more = torch.ones(7, 6)
    assert make_arguments().match((more,), {"pair": [more, PAIR[1]]})[0] is more
    with pytest.raises(AutotpError) as error:
        make_arguments().match((more,), {"pair": PAIR})
    sentence = (
        "input 'pair.0' has size 3 in dim 0, where input 'x' has 7 in dim 0, but the model needs one size for both"
    )
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("args", "kwargs", "sentence"),
    [
        ((), {}, "argument 'x' is missing, but the example passed it"),
        ((X,), {"pair": None}, "argument 'pair' is nested otherwise"),
        ((X,), {"pair": [X]}, "argument 'pair' is nested otherwise"),
        ((X, X), {}, "input 'mask' is a tensor of shape (3, 6), but the example had None"),
        ((X,), {"factor": 3.0}, "input 'factor' is 3.0, but the example had 2.0, which is part of the graph"),
        ((X,), {"factor": X}, "input 'factor' is a tensor of shape (3, 6), but the example had 2.0"),
        ((X,), {"other": 1}, "argument 'other' is 1, but the example did not pass it"),
        ((X, None, 2.0, X), {}, "argument number 3 is a tensor of shape (3, 6), but the example did not pass it"),
        ((X,), {"x": X}, "argument 'x' is passed by position and by keyword"),
        ((None,), {}, "input 'x' is None, but it was a tensor in the example"),
        ((X.double(),), {}, "input 'x' is torch.float64, but it was torch.float32 in the example"),
        ((X[0],), {}, "input 'x' has 1 dims, but it had 2 in the example"),
        ((X[:, :5],), {}, "input 'x' has size 5 in dim 1, which the example fixed at 6; pass that size"),
        ((X.clone().requires_grad_(),), {}, "input 'x' requires grad, but it did not in the example"),
        ((X.to("meta"),), {}, "input 'x' is on meta, but the module is on cpu"),
    ],
)
def test_what_does_not_fit_is_one_sentence(args: Any, kwargs: Any, sentence: str) -> None:
    with pytest.raises(AutotpError) as error:
        make_arguments().match(args, {"pair": PAIR, **kwargs})
    assert sentence in str(error.value)


def test_a_missing_keyword_is_named() -> None:
    with pytest.raises(AutotpError, match="argument 'pair' is missing"):
        make_arguments().match((X,), {})


def test_gradients_do_not_matter_without_grad_mode() -> None:
    with torch.no_grad():
        make_arguments().match((X.clone().requires_grad_(),), {"pair": PAIR})


def test_without_a_signature_only_none_may_be_left_out() -> None:
    arguments = make_arguments(signature=False)
    assert arguments.match((X,), {"pair": PAIR, "factor": 2.0, "unused": None})[0] is X
    with pytest.raises(AutotpError, match="argument 'factor' is missing"):
        arguments.match((X,), {"pair": PAIR})
    with pytest.raises(AutotpError, match="argument number 0 is missing"):
        arguments.match((), {"pair": PAIR, "factor": 2.0, "x": X})


def test_sharded_inputs_are_this_ranks_part() -> None:
    by_column = Layout(("S",), (Split(1, (0,), (Segment(1, 5, 1),)),))
    arguments = make_arguments(border("x", 0, (BATCH, 5), by_column))
    assert len(arguments.match((X[:, :2],), {"pair": PAIR})) == 1
    with pytest.raises(AutotpError, match="has size 5 in dim 1, which the example fixed at 2"):
        arguments.match((X[:, :5],), {"pair": PAIR})
