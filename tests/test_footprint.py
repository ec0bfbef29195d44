"""What single calls do to memory, as observed on meta tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from autotp.footprint import Call, Footprint, Observer, Slot, Spec, contiguous

aten = torch.ops.aten


def of(function: Any, *shapes: tuple[int, ...], on_cpu: bool = True, after: tuple[Any, ...] = ()) -> Footprint:
    """The footprint of a function of float32 tensors with gradient."""
    call = Call(function, (*map(Slot, range(len(shapes))), *after), {})
    return Observer(on_cpu).forward(call, function, tuple(contiguous(shape, torch.float32, True) for shape in shapes))


def test_linear_keeps_its_input_and_weight() -> None:
    found = of(aten.linear.default, (6, 4), (8, 4))
    assert (found.new, found.kept, found.peak) == ((6 * 8 * 4,), (0, 1), 6 * 8 * 4)
    assert found.results == ((contiguous((6, 8), torch.float32, True), 2),)


def test_a_view_shares_memory_and_a_reshape_of_a_transposed_tensor_does_not() -> None:
    assert of(aten.transpose.int, (6, 4), after=(0, 1)).results[0][1] == 0  # type: ignore[index]
    flat = Call(aten.reshape.default, (Slot(0), [24]), {})
    transposed = Spec((4, 6), (1, 4), torch.float32, True)
    assert Observer(True).forward(flat, "flat", (transposed,)).new == (96,)
    assert Observer(True).forward(flat, "flat", (contiguous((4, 6), torch.float32, True),)).new == ()


def test_an_exponential_keeps_its_result_and_a_sum_nothing() -> None:
    assert of(aten.exp.default, (6, 4)).kept == (1,)
    assert of(aten.add.Tensor, (6, 4), (6, 4)).kept == ()


def test_both_summands_get_the_very_gradient_that_came() -> None:
    specs = (contiguous((6, 4), torch.float32, True),) * 2
    found = Observer(True).backward(Call(aten.add.Tensor, (Slot(0), Slot(1)), {}), "add", specs, (contiguous((6, 4), torch.float32),))
    assert (found.is_same, found.new, found.peak) == ((0, 0), (), 0)


@pytest.mark.parametrize(("on_cpu", "dropout", "scores"), [(True, 0.0, False), (True, 0.1, True), (False, 0.1, False)])
def test_attention_keeps_scores_where_the_device_has_no_fused_kernel(on_cpu: bool, dropout: float, scores: bool) -> None:
    found = of(aten.scaled_dot_product_attention.default, *[(2, 4, 16, 8)] * 3, on_cpu=on_cpu, after=(None, dropout))
    assert (2 * 4 * 16 * 16 * 4 in found.new) is scores


def test_what_asks_for_values_is_estimated() -> None:
    def rows(x: torch.Tensor) -> torch.Tensor:
        return x[: int(x.sum())]

    expected = contiguous((3, 4), torch.float32, True)
    call = Call(rows, (Slot(0),), {}, (expected,))
    specs = (contiguous((6, 4), torch.float32, True),)
    found = Observer(True).forward(call, "rows", specs)
    assert (found.results, found.new) == (((expected, 1),), (48,))
    assert Observer(True).backward(call, "rows", specs, (expected,)).new == (96,)
