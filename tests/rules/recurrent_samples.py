"""Sample calls of recurrent layers and cells."""

from __future__ import annotations

from sampling import Sample, add, call, each, real
from torch import Tensor

INPUTS, UNITS = 3, 6


def weights(gates: int, layers: int = 1, directions: int = 1, bias: bool = True, units: int = UNITS, projected: int = 0) -> list[Tensor]:
    """What a layer's `_flat_weights` holds."""
    found = []
    for layer in range(layers):
        for _ in range(directions):
            size = INPUTS if layer == 0 else (projected or units) * directions
            found += [real(gates * units, size), real(gates * units, projected or units)]
            found += [real(gates * units), real(gates * units)] if bias else []
            found += [real(projected, units)] if projected else []
    return found


def samples(gates: int, states: int) -> list[Sample]:
    """Calls (input, states, weights, bias, layers, dropout, train, bidirectional, batch_first)."""

    def state(count: int, units: int = UNITS) -> Tensor | list[Tensor]:
        return [real(count, 5, units), real(count, 5, UNITS)] if states == 2 else real(count, 5, units)

    return [
        call(real(4, 5, INPUTS), state(1), weights(gates), True, 1, 0.0, True, False, False),
        call(real(5, 4, INPUTS), state(4), weights(gates, 2, 2), True, 2, 0.0, True, True, True),
        call(real(5, 1, INPUTS), state(2), weights(gates, 2, bias=False), False, 2, 0.5, True, False, True),
    ]


CELL = real(5, UNITS)

# fmt: off
add({"aten.lstm.input": [
    *samples(4, 2),
    call(
        real(4, 5, INPUTS), [real(2, 5, 2), real(2, 5, UNITS)], weights(4, 1, 2, projected=2),
        True, 1, 0.0, False, True, False,
    ),
]})
add({"aten.gru.input": samples(3, 1), "aten.rnn_tanh.input": samples(1, 1), "aten.rnn_relu.input": samples(1, 1)})
add(each(
    "lstm_cell.default", call(real(5, INPUTS), [CELL, real(5, UNITS)], *weights(4)),
    call(real(3, INPUTS), [real(3, 5), real(3, 5)], *weights(4, bias=False, units=5), None, None),
))
add(each(
    "gru_cell.default", call(real(5, INPUTS), CELL, *weights(3)),
    call(real(3, INPUTS), real(3, 5), *weights(3, bias=False, units=5)),
))
add(each(
    "rnn_tanh_cell.default rnn_relu_cell.default", call(real(5, INPUTS), CELL, *weights(1)),
    call(real(3, INPUTS), CELL[:3], *weights(1, bias=False)),
))
# fmt: on
