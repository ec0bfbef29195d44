"""A parallel module on a part of a larger mesh; copies of it on another axis, averaged or fully sharded, train like one device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import autotp
from autotp.errors import AutotpError
from autotp.runtime.agreement import agree, agree_on, broadcast, is_first, share, together
from tests.models import TOLERANCE, Example, InFloat64, example, splitting_pays
from tests.ranks import run_ranks

ROWS = 4


def assert_close(found: Any, wanted: Any, what: str) -> None:
    torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=TOLERANCE, msg=lambda text: f"{what}: {text}")


def full_batch(name: str) -> Example:
    """Every row counts the same number of tokens, so that the mean of the parts' means is the mean."""
    one = example(name, batch=ROWS, **({} if name == "mlp" else {"tie_word_embeddings": True}))
    return Example(one.model, one.args, dict.fromkeys(one.kwargs, one.kwargs.get("input_ids")))


def rows_of(one: Example, mesh: DeviceMesh) -> Example:
    """This copy's rows."""
    rows = ROWS // mesh.size()
    part = slice(rows * mesh.get_local_rank(), rows * (mesh.get_local_rank() + 1))
    return Example(one.model, tuple(arg[part] for arg in one.args), {key: value[part] for key, value in one.kwargs.items()})


def loss_of(output: Any) -> torch.Tensor:
    return output.square().mean() if isinstance(output, torch.Tensor) else output.loss


def average_gradients(module: torch.nn.Module, outer: DeviceMesh) -> None:
    """What docs/running.md says for copies without `fully_shard`."""
    for parameter in module.parameters():
        gradient = parameter.grad.to_local()
        dist.all_reduce(gradient, group=outer.get_group())
        gradient.div_(outer.size())


def train(name: str, whole: DeviceMesh, inner: tuple[str, ...], wrap: Callable[[Any], Any], reduce: Callable[[Any], None]) -> Any:
    """Three AdamW steps with clipping: the loss of all rows, the gradients' norm, and every parameter equal one device's."""
    one = full_batch(name)
    mine = rows_of(one, whole["dp"])
    many = wrap(autotp.parallelize(one.model, mine.args, mine.kwargs, mesh=whole[inner], cluster=splitting_pays(), check=False))
    split = [key for key, value in many.named_parameters() if value.to_local().numel() < value.numel()]
    assert split, "nothing is split"
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in (one.model, many)]
    for step in range(3):
        wanted, found = loss_of(one.model(*one.args, **one.kwargs)), loss_of(many(*mine.args, **mine.kwargs))
        wanted.backward()
        found.backward()
        mean = found.detach().clone()
        dist.all_reduce(mean, group=whole.get_group("dp"))
        assert_close(mean / whole["dp"].size(), wanted.detach(), f"{name} loss, step {step}")
        reduce(many)
        norms = [torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1) for model in (one.model, many)]
        assert_close(norms[1].full_tensor() if isinstance(norms[1], DTensor) else norms[1], norms[0], f"{name} norm, step {step}")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for key, value in many.full_state_dict().items():
        assert_close(value, one.model.state_dict()[key], f"{name} {key} after three steps")
    return many


def nothing(module: Any) -> None:
    pass


def copies() -> None:
    whole = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    train("gpt2", whole, ("tp",), lambda module: module, lambda module: average_gradients(module, whole["dp"]))


def sharded_copies() -> None:
    whole = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    train("gpt2", whole, ("tp",), lambda module: fully_shard(module, mesh=whole["dp"], reshard_after_forward=True), nothing)
    many = train("llama", whole, ("tp",), lambda module: fully_shard(module, mesh=whole["dp"]), nothing)
    before = many.full_state_dict()
    with pytest.raises(AutotpError, match="load full values before it"):
        many.load_state_dict(before)
    with pytest.raises(AutotpError, match="Muon looks at whole tensors"):
        torch.optim.Muon([parameter for parameter in many.parameters() if parameter.ndim == 2]).step()
    saved = {key: value.clone() for key, value in many.state_dict().items()}
    with torch.no_grad():
        for parameter in many.parameters():
            parameter.add_(1)
    assert_close(many.full_state_dict(), {key: value + 1 for key, value in before.items()}, "changed")
    many.load_state_dict(saved)
    assert_close(many.full_state_dict(), before, "loaded")
    one = full_batch("llama")
    mine = rows_of(one, whole["dp"])
    parts = autotp.parallelize(one.model, mine.args, mine.kwargs, mesh=whole["tp"], cluster=splitting_pays(), check=False)
    fully_shard(parts.model.norm, mesh=whole["dp"])
    with pytest.raises(AutotpError, match="apply it to the parallel module as a whole"):
        parts(**mine.kwargs)


def data_parallel_wrapper() -> None:
    """`DistributedDataParallel` hooks on to parameters that no graph reads: it must not pass for averaging. It never does."""
    whole = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    one = full_batch("mlp")
    many = autotp.parallelize(one.model, one.args, mesh=whole["tp"], check=False)
    with pytest.raises(NotImplementedError, match="sharding strategy"):
        DistributedDataParallel(many, process_group=whole.get_group("dp"))
    wrapped = DistributedDataParallel(many, device_mesh=whole["dp"])
    with pytest.raises(AutotpError, match="was replaced by another tensor"):
        wrapped(*one.args)


def two_axes_of_three() -> None:
    whole = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("dp", "sp", "tp"))
    train("mlp", whole, ("sp", "tp"), lambda module: module, lambda module: average_gradients(module, whole["dp"]))


def parts_differ() -> None:
    """Errors stay within a part of the mesh, and name the ranks by their numbers in the whole."""
    whole = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    one = full_batch("mlp")
    rank = dist.get_rank()
    args = one.args if rank != 3 else (one.args[0][:2],)
    if rank < 2:
        autotp.parallelize(one.model, args, mesh=whole["tp"])(*args)
    else:
        differ = r"the example input .* rank 3 has argument 0 \(2, 20\) torch.float64, rank 2 has argument 0 \(4, 20\)"
        with pytest.raises(AutotpError, match=differ):
            autotp.parallelize(one.model, args, mesh=whole["tp"])
    outside = DeviceMesh("cpu", [0, 1])
    if rank > 1:
        with pytest.raises(AutotpError, match=f"rank {rank} is not on the device mesh"):
            autotp.parallelize(one.model, one.args, mesh=outside)


def agreement_axis_by_axis() -> None:
    """On a mesh of two axes, numbered otherwise than its ranks, which has no process group of its own."""
    mesh, rank = DeviceMesh("cpu", [[0, 2], [1, 3]]), dist.get_rank()
    assert is_first(mesh) == (rank == 0)
    assert share(f"from {rank}", mesh) == "from 0"
    number = torch.tensor(rank + 3)
    broadcast(number, mesh)
    assert number == 3
    agree("same", "the plan", mesh)
    with pytest.raises(AutotpError, match="the plan is not the same on every rank: ranks 2, 1 have another than rank 0"):
        agree("other" if rank in (1, 2) else "same", "the plan", mesh)
    with pytest.raises(AutotpError, match="width is not the same on every rank: rank 1 has 5, rank 2 has 4"):
        agree_on({"depth": "2" if rank else None, "width": {0: None, 2: "4"}.get(rank, "5")}, mesh)

    def fails_on_2() -> int:
        if rank == 2:
            raise ValueError("no")
        return rank

    with pytest.raises(AutotpError, match=r"ValueError: no \(on rank 2\)"):
        together(fails_on_2, mesh)
    assert together(lambda: rank, mesh) == rank
    one = full_batch("mlp")
    with pytest.raises(AutotpError, match="in ascending order"):
        autotp.parallelize(one.model, one.args, mesh=DeviceMesh("cpu", [[0, 1], [3, 2]]))


def all_of(*checks: Any) -> None:
    with InFloat64():
        for check in checks:
            check()


def test_parts_of_a_mesh() -> None:
    """One start of the ranks for all: starting costs more than checking."""
    run_ranks(all_of, 4, agreement_axis_by_axis, copies, sharded_copies, data_parallel_wrapper, two_axes_of_three, parts_differ)
