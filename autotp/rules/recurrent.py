"""Recurrent layers and cells.

A layer is one operator over all time steps: every step needs the whole hidden state of the step before, so its batch is split and
nothing else. A cell is one step: its hidden units are split like the columns of a linear, each rank holding the same units of
every gate.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor
from torch.nn import functional

from autotp.rules.language import Call, Local, LocalSize, LocalStart, Rule, bind
from autotp.rules.registry import rule, rule_for

# ---- layers ---------------------------------------------------------------------------------------------------------


@rule_for("aten.lstm.input aten.gru.input aten.rnn_tanh.input aten.rnn_relu.input")
def layer(call: Call) -> Rule:
    """(input, states, weights, …): the states are (layers and directions, batch, units); an LSTM has two of them."""
    dropout, train, batch_first = call.args[5], call.args[6], call.args[8]
    states = 2 if call.op == "aten.lstm.input" else 1
    sequence = "b t^ {}^" if batch_first else "t^ b {}^"
    state = [f"l^ b h{i}^" for i in range(states)]
    weights = [f"w{i}^ v{i}^" if len(w.shape) == 2 else f"w{i}^" for i, w in enumerate(call.tensors[1 + states :])]
    operands = ", ".join([sequence.format("i"), *state, *weights])
    outputs = ", ".join([sequence.format("o"), *state])
    random = bool(dropout and train and call.args[4] > 1)
    return bind(f"{operands} -> {outputs}", call, random=random)


# ---- cells ----------------------------------------------------------------------------------------------------------


def lstm_cell_of_units(
    x: Tensor, h: Tensor, c: Tensor, w_x: Tensor, w_h: Tensor, b_x: Tensor | None = None, b_h: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM for some of its units.

    Args:
        x: (batch, inputs); h: (batch, all units); c: (batch, units); w_x: (4 · units, inputs); w_h: (4 · units, all units).
        b_x, b_h: (4 · units), or None.

    Returns:
        The new hidden and cell state of these units, (batch, units) each, as `torch.nn.LSTMCell` defines them.
    """
    gates = functional.linear(x, w_x, b_x) + functional.linear(h, w_h, b_h)
    enter, forget, cell, out = gates.unflatten(1, (4, c.shape[1])).unbind(1)
    c = forget.sigmoid() * c + enter.sigmoid() * cell.tanh()
    return out.sigmoid() * c.tanh(), c


def gru_cell_of_units(
    x: Tensor, h: Tensor, start: int, units: int, w_x: Tensor, w_h: Tensor, b_x: Tensor | None = None, b_h: Tensor | None = None
) -> Tensor:
    """One step of a GRU for its units [start, start + units).

    Args:
        x: (batch, inputs); h: (batch, all units); w_x: (3 · units, inputs); w_h: (3 · units, all units).
        b_x, b_h: (3 · units), or None.

    Returns:
        The new hidden state of these units, (batch, units), as `torch.nn.GRUCell` defines it.
    """
    from_x = functional.linear(x, w_x, b_x).unflatten(1, (3, units)).unbind(1)
    from_h = functional.linear(h, w_h, b_h).unflatten(1, (3, units)).unbind(1)
    reset, update = ((a + b).sigmoid() for a, b in zip(from_x[:2], from_h[:2], strict=True))
    new = (from_x[2] + reset * from_h[2]).tanh()
    stepped: Tensor = new + update * (h.narrow(1, start, units) - new)
    return stepped


def rnn_cell_of_units(
    activation: Literal["tanh", "relu"],
    x: Tensor,
    h: Tensor,
    w_x: Tensor,
    w_h: Tensor,
    b_x: Tensor | None = None,
    b_h: Tensor | None = None,
) -> Tensor:
    """One step of a plain recurrent cell for some of its units.

    Args:
        x: (batch, inputs); h: (batch, all units); w_x: (units, inputs); w_h: (units, all units); b_x, b_h: (units), or None.

    Returns:
        The new hidden state of these units, (batch, units).
    """
    total = functional.linear(x, w_x, b_x) + functional.linear(h, w_h, b_h)
    return total.tanh() if activation == "tanh" else total.relu()


def _local_lstm_cell(local: Local) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    if local.outputs[0].split_at(1) is None:
        return local.target, local.args, local.kwargs
    x, (h, c), *weights = local.args
    return lstm_cell_of_units, (x, h, c, *weights), local.kwargs


def _local_gru_cell(local: Local) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    split = local.outputs[0].split_at(1)
    if split is None:
        return local.target, local.args, local.kwargs
    x, h, *weights = local.args
    return gru_cell_of_units, (x, h, LocalStart(split), LocalSize(split), *weights), local.kwargs


def _local_rnn_cell(local: Local) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    if local.outputs[0].split_at(1) is None:
        return local.target, local.args, local.kwargs
    return rnn_cell_of_units, ("tanh" if "tanh" in local.call.op else "relu", *local.args), local.kwargs


GATES = "(g^ u!) i^, (g^ u!) k^, (g^ u!), (g^ u!)"
rule("aten.lstm_cell.default", f"b i^, b k^, b u!, {GATES} -> b u!, b u!", local=_local_lstm_cell)
rule("aten.gru_cell.default", f"b i^, b k^, {GATES} -> b u!", local=_local_gru_cell)
rule("aten.rnn_tanh_cell.default aten.rnn_relu_cell.default", "b i^, b k^, u i^, u k^, u, u -> b u", local=_local_rnn_cell)
