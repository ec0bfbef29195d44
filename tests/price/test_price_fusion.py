"""Which operators are one kernel: chains are as long as they can be, never cyclic, and read and write what they must."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from autotp.planning import Request, make_plan, prepare, traced_sizes
from autotp.price.cluster import load_cluster
from autotp.price.conversion import ConversionPrices
from autotp.price.fusion import Access, accesses
from autotp.price.storage import is_view
from autotp.program import Program, Ref
from autotp.trace import trace
from tests.models import example
from tests.price.fixed_prices import counting, program_of, spent

ROWS, WIDTH = 64, 32
X = torch.randn(ROWS, WIDTH)
BYTES = ROWS * WIDTH * 4


def kernels(program: Program) -> dict[str, list[Access]]:
    """Operator → how its nodes use memory in the compiled program."""
    found: dict[str, list[Access]] = {}
    for node, access in zip(program.nodes, accesses(program, compiled=True), strict=True):
        if node.kind == "op":
            found.setdefault(node.op.split(".")[1], []).append(access)
    return found


def total(program: Program, what: str, *, compiled: bool, train: bool = True) -> tuple[float, float]:
    """Bytes or kernels of the whole program, forward and backward."""
    found = spent(program, what, compiled=compiled, train=train).values()
    return sum(one.forward for one in found), sum(one.backward for one in found)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """The norm as transformers writes it."""
    wide = x.to(torch.float32)
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def test_a_gated_activation_is_one_kernel_and_its_middle_never_reaches_memory() -> None:
    program = program_of(lambda a, b: functional.silu(a) * b, X, X.clone())
    assert total(program, "kernels", compiled=True) == pytest.approx((1, 1))
    assert total(program, "bytes", compiled=True) == (3 * BYTES, 5 * BYTES)  # backward: gradient, both read, both written
    assert total(program, "kernels", compiled=False) == pytest.approx((2, 3))
    silu, mul = kernels(program)["silu"][0], kernels(program)["mul"][0]
    assert (silu.writes, mul.reads, mul.writes) == ((False,), (0.0, 1.0), (True,))


def test_a_norm_in_seven_operators_is_seven_kernels_in_eager_and_one_compiled() -> None:
    program = program_of(rms_norm, X.bfloat16(), torch.ones(WIDTH, dtype=torch.bfloat16))
    assert total(program, "kernels", compiled=False)[0] == pytest.approx(8)
    assert total(program, "kernels", compiled=True)[0] == pytest.approx(1)
    assert total(program, "bytes", compiled=True)[0] == BYTES / 2 + WIDTH * 2 + BYTES / 2
    assert total(program, "bytes", compiled=False)[0] > 9 * BYTES / 2


def test_a_long_row_is_read_again_after_its_reduction() -> None:
    long = torch.randn(2, 1 << 19)
    program = program_of(lambda x: x - x.sum(-1, keepdim=True), long)
    assert total(program, "kernels", compiled=True)[0] == pytest.approx(2)


def test_a_reduction_over_other_than_the_last_dims_ends_its_chain() -> None:
    program = program_of(lambda x: x - torch.relu(x).sum(0, keepdim=True), X)
    assert total(program, "kernels", compiled=True)[0] == pytest.approx(2)


def test_a_product_is_never_part_of_a_chain_and_what_spans_it_is_two() -> None:
    def spans(x: Tensor, weight: Tensor) -> Tensor:
        a = torch.relu(x)
        return a + torch.relu(a @ weight)

    program = program_of(spans, X, torch.randn(WIDTH, WIDTH))
    before, after = kernels(program)["relu"]
    add = kernels(program)["add"][0]
    assert before.kernel and after.kernel and not add.kernel
    assert before.writes == (True,) and after.writes == (False,) and add.reads == (1.0, 0.0)


def test_what_the_chain_hands_to_the_user_is_written() -> None:
    program = program_of(lambda x: torch.stack([torch.relu(x), torch.relu(torch.relu(x)).exp()]), X)
    assert all(access.fused for access in kernels(program)["relu"])
    kept = torch.nn.Parameter(X)

    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = kept

        def forward(self) -> tuple[Tensor, Tensor]:
            middle = torch.relu(self.x)
            return middle, middle.exp()

    both = kernels(trace(Two(), (), dynamic=False))
    assert both["relu"][0].writes == (True,) and not both["exp"][0].kernel and both["exp"][0].reads == (0.0,)


def test_pieces_of_one_tensor_are_read_once_each() -> None:
    def halves(x: Tensor) -> Tensor:
        return functional.silu(x[:, : WIDTH // 2]) * x[:, WIDTH // 2 :]

    program = program_of(lambda x, w: halves(x @ w), X, torch.randn(WIDTH, WIDTH))
    found = spent(program, compiled=True)
    assert found["silu"].forward + found["mul"].forward == 1.5 * BYTES


def test_a_conversion_inside_a_chain_pays_for_breaking_it() -> None:
    program = program_of(lambda a, b: functional.silu(a) * b, X, X.clone())
    silu = next(node for node in program.nodes if node.op == "aten.silu.default")
    space, _ = prepare(program, Request({"tp": 2}))
    for compiled, expected in ((False, 0.0), (True, 2 * (BYTES / 2 + BYTES))):
        prices = ConversionPrices(counting("bytes"), (2,), True, traced_sizes(program), compiled=compiled)
        table = prices.table(silu.outputs[0], space.dim_cuts(Ref(silu.index)))
        whole = next(layout for layout in table.layouts if layout.kinds == ("R",))
        split = next(layout for layout in table.layouts if layout.kinds == ("S",))
        assert prices.broken_seconds(program, Ref(silu.index), table, split, whole) == expected
        assert prices.broken_seconds(program, Ref(silu.index + 1), table, split, whole) == 0.0


MODELS = {"gpt2": {"n_layer": 2}, "llama": {"num_hidden_layers": 2}, "gemma2": {"num_hidden_layers": 2}, "bert": {"num_hidden_layers": 2}}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Program:
    """A small model with its loss."""
    one = example(request.param, **MODELS[request.param])
    return trace(one.model, one.args, one.kwargs, dynamic=False)


def test_compiled_models_take_fewer_kernels_and_bytes_and_never_less_than_they_must(model: Program) -> None:
    eager, compiled = (total(model, "kernels", compiled=kind) for kind in (False, True))
    assert compiled[0] < 0.7 * eager[0] and compiled[1] < eager[1]
    eager, compiled = (total(model, "bytes", compiled=kind) for kind in (False, True))
    assert compiled[0] < eager[0] and compiled[1] < eager[1]
    weights = sum(node.outputs[0].bytes for node in model.nodes if node.kind == "parameter" and len(node.outputs[0].shape) == 1)
    assert compiled[0] > weights


def test_every_tensor_that_is_read_from_memory_was_written_there(model: Program) -> None:
    found = accesses(model, compiled=True)
    for node, access in zip(model.nodes, found, strict=True):
        if node.kind == "op" and not is_view(node):
            for ref, share in zip(node.inputs, access.reads, strict=True):
                assert not share or found[ref.node].writes[ref.output], node.name
    for value in model.outputs:
        if isinstance(value, Ref):
            assert found[value.node].writes[value.output]


def test_it_is_the_same_every_time(model: Program) -> None:
    assert accesses(model, compiled=True) == accesses(replace(model), compiled=True)


def test_a_plan_for_a_compiled_module_is_cheaper_and_says_so() -> None:
    one = example("llama", num_hidden_layers=2)
    program = trace(one.model, one.args, one.kwargs, dynamic=False)
    eager, compiled = (make_plan(program, Request({"tp": 2}, compiled=kind), load_cluster("dgx-h100"), "llama") for kind in (False, True))
    assert compiled.time.compute_s < eager.time.compute_s
    assert any("torch.compile" in note for note in compiled.notes) and not any("torch.compile" in note for note in eager.notes)
