"""Checkpoints of real Gloo ranks: bit-equal on any number of them, and on one device."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import autotp
from autotp.errors import AutotpError
from autotp.runtime import checkpoint_files as files
from autotp.runtime.state import gather_full
from tests.models import splitting_pays
from tests.ranks import run_ranks

PINS = {"embed": "vocab", "qkv": "column"}


class Tiny(nn.Module):
    """Seven heads in one fused projection, tied weights, buffers that training changes, a frozen bias, a parameter without dims."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.embed, self.qkv, self.out = nn.Embedding(31, 28), nn.Linear(28, 84), nn.Linear(28, 28, bias=False)
        self.norm, self.head = nn.BatchNorm1d(28), nn.Linear(28, 31)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.head.weight = self.embed.weight
        self.qkv.bias.requires_grad_(False)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.dropout(self.embed(ids))
        q, k, v = (part.unflatten(-1, (7, 4)).transpose(1, 2) for part in self.qkv(x).split(28, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
        x = x + self.out(mixed) * self.scale
        return nn.functional.cross_entropy(self.head(self.norm(x.flatten(0, 1))), labels.flatten())


def tiny(dropout: float = 0.0) -> tuple[nn.Module, tuple[Any, ...]]:
    torch.manual_seed(0)
    return Tiny(dropout), (torch.randint(31, (3, 6)), torch.randint(31, (3, 6)))


def optimizer_of(module: nn.Module) -> torch.optim.Optimizer:
    """AdamW in two groups: its moments follow the parameters, its steps are numbers of their own."""
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    bare = [parameter for name, parameter in trained.items() if name.endswith("bias")]
    others = [parameter for name, parameter in trained.items() if not name.endswith("bias")]
    return torch.optim.AdamW([{"params": bare, "weight_decay": 0.0}, {"params": others, "lr": 3e-3}], lr=1e-2, amsgrad=True)


def step(module: nn.Module, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float:
    found = module(*args, **kwargs)
    loss: Tensor = found if isinstance(found, Tensor) else found["loss"]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def whole(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Everything of the model and the optimizer, unsplit, under names; all ranks call this."""
    specs = {slot.spec.name: slot.spec for slot in module._held} if isinstance(module, autotp.ParallelModule) else {}
    found: dict[str, Any] = dict(module.full_state_dict() if specs else module.state_dict())
    for name, parameter in module.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            split = isinstance(value, DTensor)
            found[f"{name}/{key}"] = gather_full(value.to_local(), specs[name], module._device_mesh) if split else value  # type: ignore
    found["options"] = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in found.items()}


def assert_same(found: dict[str, Any], wanted: dict[str, Any], what: str) -> None:
    assert set(found) == set(wanted), what
    for key, value in wanted.items():
        same = torch.equal(found[key], value) and found[key].dtype == value.dtype if isinstance(value, Tensor) else found[key] == value
        assert same, f"{what}: {key}"


def resharded(folder: str, mesh: Any, before: str | None, after: str) -> None:
    """Load what another mesh saved, find it bit-equal, train on, and save: the next mesh goes on from there."""
    warnings.filterwarnings("error", message="the checkpoint")
    module, args = tiny()
    if mesh is not None:
        module = autotp.parallelize(module, args, mesh=mesh, cluster=splitting_pays(), pins=PINS, check=False)
        cuts = {spec.name: str(spec.layout) for spec in module._sharded.state}
        segmented = any("3×" in cut for cut in cuts.values())  # a fused projection in heads, for which DTensor has no word
        assert segmented or mesh == 3, cuts
    optimizer, root = optimizer_of(module), Path(folder)
    if before is not None:
        assert autotp.load(root / "saved", module, optimizer) == {"at": before}
        assert_same(whole(module, optimizer), torch.load(root / f"{before}.pt"), f"from {before} to {mesh}")
    for _ in range(2):
        step(module, optimizer, *args)
    saved = autotp.save(root / "saved", module, optimizer, extra={"at": after}, keep=1)
    assert saved == autotp.latest(root / "saved")
    truth = whole(module, optimizer)
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(truth, root / f"{after}.pt")


def on_four_ranks(folder: str) -> None:
    resharded(folder, {"dp": 2, "tp": 2}, "one", "2x2")
    beside_fully_shard(f"{folder}/fully_shard")


def beside_fully_shard(folder: str) -> None:
    """Each local tensor is split once more, over an outer axis; a plain model takes it, and so does the module itself."""
    (model, args), (other, _) = tiny(), tiny()
    for part in (model, other):
        part.scale = nn.Parameter(torch.tensor([1.5]))  # fully_shard takes none without dims
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    inner = autotp.parallelize(model, args, mesh=mesh["tp"], cluster=splitting_pays(), pins=PINS, check=False)
    assert any("3×" in str(spec.layout) for spec in inner._sharded.state)
    module = fully_shard(inner, mesh=mesh["dp"])
    optimizer = optimizer_of(module)
    step(module, optimizer, *args)
    autotp.save(folder, module, optimizer)
    wanted = dict(module.full_state_dict())
    plain_optimizer = optimizer_of(other)
    autotp.load(folder, other, plain_optimizer)
    assert_same(dict(other.state_dict()), wanted, "fully_shard, into the plain model")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    fresh = optimizer_of(module)
    autotp.load(folder, module, fresh)
    assert_same(dict(module.full_state_dict()), wanted, "fully_shard, into itself")
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            pair = [part.to_local() if isinstance(part, DTensor) else part for part in (value, fresh.state[parameter][key])]
            assert torch.equal(*pair), key
    step(module, fresh, *args)
    step(other, plain_optimizer, *args)
    for name, value in module.full_state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], atol=1e-4, rtol=1e-4)


def test_any_mesh_continues_from_any_other(tmp_path: Path) -> None:
    """One device → 2 × 2 → 3 ranks → 2 ranks → one device: parameters, buffers and optimizer state bit for bit."""
    folder = str(tmp_path)
    resharded(folder, None, None, "one")
    run_ranks(on_four_ranks, 4, folder)
    run_ranks(resharded, 3, folder, 3, "2x2", "three")
    run_ranks(resharded, 2, folder, 2, "three", "two")
    resharded(folder, None, "two", "last")
    assert [entry.name for entry in (tmp_path / "saved").iterdir()] == ["5"]


# ---- on two ranks ---------------------------------------------------------------------------------------------------


def parallel(
    dropout: float = 0.0, training: bool = True, randomness: str = "independent"
) -> tuple[autotp.ParallelModule, nn.Module, tuple[Any, ...]]:
    model, args = tiny(dropout)
    model.train(training)
    many = autotp.parallelize(model, args, cluster=splitting_pays(), pins=PINS, check=False, randomness=randomness)
    return many, model, args


def training_goes_on(folder: str) -> None:
    """Losses with dropout after a load equal those of the run that was not interrupted."""
    module, _, args = parallel(dropout=0.3)
    optimizer = optimizer_of(module)
    step(module, optimizer, *args)
    torch.manual_seed(5 + dist.get_rank())
    autotp.save(f"{folder}/dropout", module, optimizer)
    wanted = [step(module, optimizer, *args) for _ in range(2)], torch.rand(()), whole(module, optimizer)
    assert wanted[0][0] != wanted[0][1]
    for into in (module, parallel(dropout=0.3)[0]):
        fresh = optimizer_of(into)
        autotp.load(f"{folder}/dropout", into, fresh)
        found = [step(into, fresh, *args) for _ in range(2)], torch.rand(()), whole(into, fresh)
        assert found[:2] == wanted[:2]
        assert_same(found[2], wanted[2], "after two more steps")
    evaluated = parallel(dropout=0.3, training=False)[0]  # its graph of training, which has the seeds, is made only now
    autotp.load(f"{folder}/dropout", evaluated, optimizer_of(evaluated))
    step(evaluated.train(), optimizer_of(evaluated), *args)
    autotp.load(f"{folder}/dropout", module)
    step(module, optimizer_of(module), *args)
    assert not torch.equal(evaluated.random_state()["seeds"], module.random_state()["seeds"])  # without an optimizer: as it was
    autotp.load(f"{folder}/dropout", module, optimizer)
    step(module, optimizer, *args)
    assert torch.equal(evaluated.random_state()["seeds"], module.random_state()["seeds"])


def one_device_goes_on(folder: str) -> None:
    """With exact randomness one device takes over, and its losses are those that the ranks would have had."""
    module, model, args = parallel(dropout=0.3, randomness="exact")
    pair = [optimizer_of(part) for part in (module, model)]
    step(module, pair[0], *args)
    autotp.save(f"{folder}/exact", module, pair[0])
    wanted = [step(module, pair[0], *args) for _ in range(2)]
    autotp.load(f"{folder}/exact", model, pair[1])
    torch.testing.assert_close([step(model, pair[1], *args) for _ in range(2)], wanted, atol=1e-5, rtol=1e-5)
    autotp.load(f"{folder}/exact", module, pair[0])
    assert [step(module, pair[0], *args) for _ in range(2)] == wanted


def plain_checkpoints_of_torch(folder: str) -> None:
    """`torch.distributed.checkpoint` itself takes the state dict as it is, also pieces for which DTensor has no word."""
    module, model, _ = parallel()
    wanted = {name: value.clone() for name, value in module.full_state_dict().items()}
    assert_same(wanted, dict(model.state_dict()), "at first")
    dcp.save({"model": module.state_dict()}, checkpoint_id=f"{folder}/plain")
    with torch.no_grad():
        for parameter in (*module.parameters(), *model.parameters()):
            parameter.zero_()
    assert_same(dict(module.full_state_dict()), dict(model.state_dict()), "zeros")
    dcp.load({"model": module.state_dict()}, checkpoint_id=f"{folder}/plain")
    assert_same(dict(module.full_state_dict()), wanted, "into the parallel module")
    dcp.load({"model": model.state_dict()}, checkpoint_id=f"{folder}/plain")
    assert_same(dict(model.state_dict()), wanted, "into the plain model")


def numbered(folder: str) -> None:
    """The newest `keep` stay; each can be named; a wrapped module, a load without optimizer or in another dtype."""
    module, model, _ = parallel()
    first = dict(module.full_state_dict())
    for count in range(4):
        autotp.save(f"{folder}/numbered", module, extra=count, keep=3)
        with torch.no_grad():
            module.scale.add_(1)
    assert sorted(entry.name for entry in Path(folder, "numbered").iterdir()) == ["2", "3", "4"]
    assert [autotp.load(f"{folder}/numbered/{n}", module) for n in ("2", "4", "3")] == [1, 3, 2]
    assert torch.equal(module.full_state_dict()["scale"], first["scale"] + 2)
    outer = nn.ModuleDict({"inner": module})
    autotp.save(f"{folder}/wrapped", outer, optimizer_of(outer))
    autotp.load(f"{folder}/wrapped", outer, optimizer_of(outer))
    with pytest.warns(UserWarning, match=r"is converted: 'scale' from torch.float32 to torch.float64, .* and \d+ more"):
        autotp.load(f"{folder}/numbered", model.double())
    assert torch.equal(model.state_dict()["scale"], first["scale"].double() + 3)


def whole_state(folder: str) -> None:
    """An optimizer that looks at whole matrices has its state whole on every rank; one device goes on with it, and the other way round."""
    (module, _, args), (other, _) = parallel(), tiny()
    pair = []
    for part in (module, other):
        matrices = [parameter for parameter in part.parameters() if parameter.ndim == 2]
        pair.append(autotp.optimizer(torch.optim.Muon, part, matrices, lr=0.02) if part is module else torch.optim.Muon(matrices, lr=0.02))
    step(module, pair[0], *args)
    autotp.save(f"{folder}/muon", module, pair[0])
    autotp.load(f"{folder}/muon", other, pair[1])
    step(module, pair[0], *args)
    step(other, pair[1], *args)
    autotp.save(f"{folder}/muon-plain", other, pair[1])
    for name, value in module.full_state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], atol=1e-4, rtol=1e-4)
    autotp.load(f"{folder}/muon-plain", module, pair[0])
    for count in range(2):
        torch.testing.assert_close(step(module, pair[0], *args), step(other, pair[1], *args), atol=1e-4, rtol=1e-4, msg=f"step {count}")


def refusals(folder: str) -> None:
    module, model, args = parallel()
    path = f"{folder}/refusals"
    with pytest.raises(AutotpError, match="there is no folder"):
        autotp.load(path, module)
    Path(path).mkdir(exist_ok=True)
    with pytest.raises(AutotpError, match="there is no complete checkpoint in"):
        autotp.load(path, module)
    with pytest.raises(AutotpError, match=r"keep is 0; .* \(on rank 1\)"):
        autotp.save(path, module, keep=2 - 2 * dist.get_rank())
    with pytest.raises(AutotpError, match="is no parameter of the module"):
        autotp.save(path, module, optimizer_of(model))
    assert autotp.latest(path) is None
    saved = autotp.save(path, module)
    with pytest.raises(AutotpError, match="is itself a checkpoint"):
        autotp.save(saved, module)
    with pytest.raises(AutotpError, match="saved without an optimizer"):
        autotp.load(path, module, optimizer_of(module))
    with pytest.raises(AutotpError, match=r"it lacks 'weight', 'bias' and has 'scale', 'embed.weight', .* and \d+ more besides"):
        autotp.load(path, nn.Linear(3, 4))
    model.norm = nn.BatchNorm1d(27)
    with pytest.raises(AutotpError, match=r"'norm.weight' has shape \(28,\) in the checkpoint .* \(27,\) in the module"):
        autotp.load(path, model)
    optimizer = optimizer_of(module)
    step(module, optimizer, *args)
    autotp.save(path, module, optimizer)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    with pytest.raises(AutotpError, match="has 2 parameter groups, this one has 1"):
        autotp.load(path, module, torch.optim.AdamW(trained))
    with pytest.raises(AutotpError, match=r"is in parameter group 0 of .* alone"):
        autotp.load(path, module, torch.optim.AdamW([{"params": trained[:2]}, {"params": trained[2:]}]))
    other = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(AutotpError, match="the saved optimizer is AdamW, this one is SGD"):
        autotp.load(path, module, other)
    with pytest.raises(AutotpError, match=r"rank 1 saves to .*elsewhere1 and rank 0 to .*elsewhere0; give all ranks the same folder"):
        autotp.save(Path(path).with_name(f"elsewhere{dist.get_rank()}"), module)
    with pytest.raises(AutotpError, match="extra cannot be pickled"):
        autotp.save(path, module, extra=lambda: 1)


def damaged(folder: str) -> None:
    """A flipped bit, a lost tail, a lost file: named on both ranks, with the checkpoint to take instead."""
    module, _, _ = parallel()
    path, first = Path(folder, "damaged"), dist.get_rank() == 0
    for _ in range(2):
        autotp.save(path, module, optimizer_of(module))
    names = sorted(json.loads((path / "2" / files.MANIFEST).read_text())["files"])
    assert names == [".metadata", "__0_0.distcp", "__1_0.distcp", "autotp.pt"]
    before = dict(module.full_state_dict())
    for name in (*names, files.MANIFEST):
        file = path / "2" / name
        content = file.read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 4
        for change, match in ((bytes(flipped), "damaged"), (content[:-3], "cut off|damaged"), (None, "missing|no complete")):
            dist.barrier()
            if first:
                file.unlink() if change is None else file.write_bytes(change)
            dist.barrier()
            if change is None and name == files.MANIFEST:
                autotp.load(path, module)  # not complete: the one before it is taken
                assert autotp.latest(path) == path / "1"
                continue
            with pytest.raises(AutotpError, match=f"{name}.*({match}).*load the one before it, {path}/1"):
                autotp.load(path, module)
        dist.barrier()
        if first:
            file.write_bytes(content)
        dist.barrier()
        autotp.load(path, module)
    assert_same(dict(module.full_state_dict()), before, "after all")


def disk_full(folder: str) -> None:
    """The disk refuses a write of rank 1, or of rank 0 at the end: both ranks say so, and the checkpoint before stays."""
    module, _, _ = parallel()
    path = Path(folder, "full")
    autotp.save(path, module, extra="good")
    begin = files.begin
    for name in ("__1_0.distcp", ".metadata.tmp", "autotp.pt", files.MANIFEST):

        def full(there: Path, name: str = name) -> Path:
            aside = begin(there)
            (aside / name).symlink_to("/dev/full")  # where every write fails with ENOSPC
            return aside

        files.begin = full
        try:
            with pytest.raises(AutotpError, match=r"No space left on device.*the last complete checkpoint is .*full/1"):
                autotp.save(path, module, extra="bad")
        finally:
            files.begin = begin
        dist.barrier()
        assert [entry.name for entry in path.iterdir()] == ["1"], name
    assert autotp.load(path, module) == "good"


def all_of(folder: str, *checks: Callable[[str], None]) -> None:
    for check in checks:
        check(folder)


def test_checkpoints_of_two_ranks(tmp_path: Path) -> None:
    checks = (training_goes_on, one_device_goes_on, plain_checkpoints_of_torch, numbered, whole_state, refusals, damaged, disk_full)
    run_ranks(all_of, 2, str(tmp_path), *checks)
