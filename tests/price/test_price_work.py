"""What one operator costs: the bytes that its kernels read and write, forward and backward, on a device where seconds are bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from autotp.planning import Request, prepare, traced_sizes
from autotp.price.cluster import load_cluster
from autotp.price.conversion import ConversionPrices
from autotp.price.work import UPDATE_KERNELS, node_seconds, update_seconds
from tests.price.fixed_prices import counting, program_of, spent

ROWS, WIDTH = 64, 32
X, W = torch.randn(ROWS, WIDTH), torch.randn(WIDTH)
FULL, ROW = ROWS * WIDTH * 4, WIDTH * 4
IDS = torch.arange(ROWS)


@pytest.mark.parametrize(
    ("name", "function", "forward", "backward"),
    [
        ("gelu", functional.gelu, 2 * FULL, 3 * FULL),  # backward reads gradient and operand, writes a gradient
        ("tanh", torch.tanh, 2 * FULL, 3 * FULL),  # or its result in place of the operand
        ("softmax", lambda x: x.softmax(-1), 2 * FULL, 3 * FULL),
        ("dropout", lambda x: functional.dropout(x, 0.5), 2.25 * FULL, 2.25 * FULL),  # and a mask of bytes
        ("neg", torch.neg, 2 * FULL, 2 * FULL),
        ("to", lambda x: x.to(torch.bfloat16), 1.5 * FULL, 1.5 * FULL),
        ("mul", lambda x: x * 2.0, 2 * FULL, 2 * FULL),
        ("sum", lambda x: x.sum(-1), FULL + ROWS * 4, 0.0),  # its gradient is a view
        ("t", lambda x: x.t(), 0.0, 0.0),
        ("reshape", lambda x: x.reshape(-1), 0.0, 0.0),
        ("expand", lambda x: x[None].expand(3, -1, -1), 0.0, 4 * FULL),
        ("slice", lambda x: x[:, : WIDTH // 2], 0.0, 2 * FULL),  # zeros as large as the operand, then the piece
        ("cat", lambda x: torch.cat([x, x]), 4 * FULL, 3 * FULL),  # two gradients that are views, and their sum
    ],
)
def test_one_operand(name: str, function: Callable[[Tensor], Tensor], forward: float, backward: float) -> None:
    found = spent(program_of(function, X))[name]
    assert (found.forward, found.backward) == (forward, backward)


def test_views_launch_no_kernel_and_copies_one() -> None:
    views = spent(program_of(lambda x: x.view(ROWS, 4, -1).transpose(0, 1)[1:, None].permute(3, 2, 1, 0), X), "kernels", train=False)
    assert {found.forward for found in views.values()} == {0.0}
    copied = program_of(lambda x: x.view(ROWS, 4, -1).transpose(0, 1).reshape(4, -1), X)
    assert spent(copied)["reshape"].forward == 2 * FULL
    assert spent(copied, "kernels")["reshape"].forward == pytest.approx(1)


def test_what_fused_attention_gives_lies_as_its_projection_wants_it() -> None:
    def attend(q: Tensor, width: Tensor) -> Tensor:
        heads = q.view(2, 8, 4, -1).transpose(1, 2)
        return functional.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).reshape(2, 8, -1) * width

    assert spent(program_of(attend, torch.randn(2, 8, 32), W))["reshape"].forward == 0.0


def test_a_product_of_more_dims_copies_what_is_not_in_order() -> None:
    def scores(x: Tensor) -> Tensor:
        heads = x.view(2, ROWS // 2, 4, -1).transpose(1, 2)
        return heads @ heads.transpose(-1, -2)

    in_order = spent(program_of(lambda x: x.view(2, 4, -1, 8) @ x.view(2, 4, 8, -1), X), "kernels", train=False)["matmul"].forward
    assert spent(program_of(scores, X), "kernels", train=False)["matmul"].forward == pytest.approx(in_order + 2, rel=1e-3)


def test_an_expanded_tensor_is_read_as_large_as_it_is() -> None:
    found = spent(program_of(lambda x, w: x + w.expand(ROWS, WIDTH), X, W))
    assert found["add"].forward == 2 * FULL + ROW


def test_sums_hand_their_gradient_on_and_reduce_it_for_what_was_stretched() -> None:
    assert spent(program_of(lambda x, y: x + y, X, X.clone()))["add"].backward == 0.0
    assert spent(program_of(lambda x, w: x + w, X, W))["add"].backward == FULL + ROW
    assert spent(program_of(lambda x, w: x * w, X, W))["mul"].backward == (2 * FULL + ROW) + 3 * FULL + (FULL + ROW)


def test_a_tensor_with_two_consumers_adds_its_gradients_once() -> None:
    alone = spent(program_of(lambda x: functional.gelu(x), X))["gelu"].backward
    both = spent(program_of(lambda x: functional.gelu(x) + torch.tanh(x), X))
    assert both["gelu"].backward == alone
    assert both["tanh"].backward == alone + 3 * FULL


def test_a_norm_reads_its_operand_twice_in_backward() -> None:
    found = spent(program_of(lambda x, w, b: functional.layer_norm(x, (WIDTH,), w, b), X, W, W.clone()))["layer_norm"]
    assert found.forward == 2 * FULL + 2 * ROW
    assert 5 * FULL <= found.backward < 5.2 * FULL


def test_an_embedding_reads_rows_and_its_gradient_is_as_large_as_the_table() -> None:
    table = torch.randn(10_000, WIDTH)
    found = spent(program_of(lambda w, ids: functional.embedding(ids, w), table, inputs=(IDS,)))["embedding"]
    assert found.forward == 2 * FULL + ROWS * 8
    assert found.backward == table.numel() * 4 + 3 * FULL
    assert spent(program_of(lambda w, ids: functional.embedding(ids, w), table, inputs=(IDS,)), train=False)["embedding"].backward == 0


def test_a_lookup_reads_no_more_than_it_writes_and_a_scatter_copies_first() -> None:
    index = torch.zeros(2, WIDTH, dtype=torch.long)
    gather = spent(program_of(lambda x, i: x.gather(0, i), X, inputs=(index,)), train=False)["gather"]
    assert gather.forward == 2 * 2 * ROW + index.numel() * 8
    scatter = spent(program_of(lambda x, i: x.scatter_add(0, i, x[:2]), X, inputs=(index,)), train=False)["scatter_add"]
    assert scatter.forward == 2 * FULL + 2 * 2 * ROW + index.numel() * 8


def test_creation_and_random_numbers_are_written_once() -> None:
    made = spent(program_of(lambda x: x + torch.zeros(ROWS, WIDTH), X), train=False)
    assert made.get("zeros", made.get("full")).forward == FULL  # type: ignore[union-attr]
    assert spent(program_of(lambda x: x + torch.rand(ROWS, WIDTH), X), train=False)["rand"].forward == FULL


def test_a_loss_in_pieces_is_what_its_kernels_are() -> None:
    def loss(x: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(x, target)

    target = torch.zeros(ROWS, dtype=torch.long)
    eager, compiled = (spent(program_of(loss, X, inputs=(target,)), compiled=kind) for kind in (False, True))
    assert eager["sum_exp"].forward == 5 * FULL and eager["row_maximum"].forward == FULL + ROWS * 4
    assert compiled["sum_exp"].forward + compiled["row_maximum"].forward < 1.2 * FULL


def test_a_bias_costs_a_sum_of_gradients_beside_the_products() -> None:
    def kernels(*parameters: Tensor) -> float:
        return spent(program_of(functional.linear, X, *parameters), "kernels")["linear"].backward

    weight = torch.randn(16, WIDTH)
    assert kernels(weight, torch.randn(16)) == pytest.approx(kernels(weight) + 1, rel=1e-3)


def test_the_update_reads_and_writes_the_state_and_launches_for_every_parameter() -> None:
    program = program_of(lambda x, w: x * w, X, W)
    node = program.nodes[0]
    space, _ = prepare(program, Request({"tp": 2}))
    layout = space.strategies[0][0].outputs[0]
    for what, compiled, expected in (("bytes", False, 7 * FULL), ("kernels", False, UPDATE_KERNELS), ("kernels", True, 1)):
        prices = ConversionPrices(counting(what), (2,), True, traced_sizes(program), compiled=compiled)
        assert update_seconds(prices, node.outputs[0], layout) == pytest.approx(expected)


OPERATORS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "gelu": (functional.gelu, (X,)),
    "add": (torch.add, (X, W)),
    "mul": (torch.mul, (X, X.clone())),
    "softmax": (lambda x: x.softmax(-1), (X,)),
    "layer_norm": (lambda x, w, b: functional.layer_norm(x, (WIDTH,), w, b), (X, W, W.clone())),
    "dropout": (lambda x: functional.dropout(x, 0.1), (X,)),
    "cat": (lambda x, y: torch.cat([x, y]), (X, X.clone())),
    "where": (lambda x, y: torch.where(x > 0, x, y), (X, X.clone())),
    "linear": (functional.linear, (X, torch.randn(16, WIDTH))),
    "cumsum": (lambda x: x.cumsum(0), (X,)),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_no_price_is_below_the_physical_floor(name: str, compiled: bool) -> None:
    """Every strategy of the last operator, alone in its chain: distinct operands and results over the raw bandwidth."""
    function, parameters = OPERATORS[name]
    program, cluster = program_of(function, *parameters), load_cluster("dgx-h100")
    space, _ = prepare(program, Request({"tp": 4}))
    prices: Any = ConversionPrices(cluster, (4,), True, traced_sizes(program), compiled=compiled)
    node = program.nodes[-1]
    for strategy in space.strategies[node.index]:
        moved = sum(prices.local_bytes(tensor, layout) for tensor, layout in zip(node.outputs, strategy.outputs, strict=True))
        for ref, layout in dict(zip(node.inputs, strategy.operands, strict=True)).items():
            inside = compiled and not prices.accesses(program)[ref.node].writes[ref.output]
            moved += 0 if inside else prices.local_bytes(program.type_of(ref), layout)
        found = node_seconds(program, node, space.rules[node.index], strategy, prices)
        assert found.forward >= moved / cluster.accelerator.bandwidth
        assert found.backward >= 0.0
