"""What a parallel module starts from: checkpoints of safetensors, read in slices; functions that build the model, with a seed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

import autotp
from autotp import initial
from autotp.errors import AutotpError
from autotp.initial import built, state_values
from autotp.runtime.weights import SafeTensor, open_safetensors
from autotp.trace import trace
from tests.models import example, splitting_pays
from tests.ranks import run_ranks


class Tied(nn.Module):
    """Embedding and head share their rows; `steps` is a buffer that no checkpoint has."""

    steps: Tensor

    def __init__(self, rows: int = 7) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(rows, 4), nn.Linear(4, rows)
        self.register_buffer("steps", torch.arange(4.0), persistent=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids) * self.steps)


IDS = torch.tensor([1, 2, 6])


def test_a_model_is_built_as_on_one_device() -> None:
    torch.manual_seed(3)
    wanted = Tied().state_dict()
    torch.manual_seed(4)
    drawn = torch.rand(1)
    torch.manual_seed(4)
    made = built(Tied, seed=3, deferred=False)
    assert all(torch.equal(made.state_dict()[name], value) for name, value in wanted.items())
    assert torch.equal(torch.rand(1), drawn)  # the caller's generator was left alone
    assert built(made, seed=None, deferred=True) is made


def test_a_deferred_model_has_real_buffers_and_ties() -> None:
    made = built(Tied, seed=None, deferred=True)
    assert isinstance(made, Tied)
    assert made.embed.weight.is_meta
    assert made.embed.weight is made.head.weight
    assert torch.equal(made.steps, torch.arange(4.0))
    assert not nn.Linear(2, 2).weight.is_meta  # outside of it nothing has changed


def test_what_cannot_be_built() -> None:
    with pytest.raises(AutotpError, match="seed is for a function that builds the model"):
        built(Tied(), seed=1, deferred=False)
    with pytest.raises(AutotpError, match="returned int; it must return a torch.nn.Module"):
        built(lambda: 3, seed=None, deferred=True)  # type: ignore[arg-type,return-value]
    with pytest.raises(AutotpError, match=r"the model is 3, which is no torch.nn.Module"):
        built(3, seed=None, deferred=False)  # type: ignore[arg-type]


def starting(model: nn.Module, path: Path, **tensors: Tensor) -> dict[str, Any]:
    save_file(tensors, path / "model.safetensors")
    return dict(state_values(model, trace(model, (IDS,)), open_safetensors(path)))


def test_a_checkpoint_must_fit_the_model(tmp_path: Path) -> None:
    model = built(Tied, seed=None, deferred=True)
    weight, bias = torch.randn(7, 4), torch.randn(7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("head.weight", "embed.weight"):  # one of the tied names is enough
            found = starting(model, tmp_path, **{name: weight, "head.bias": bias})
            assert isinstance(found["embed.weight"], SafeTensor)
            assert found["embed.weight"].key == name
            assert torch.equal(found["steps"], torch.arange(4.0))
    with pytest.warns(UserWarning, match=r"has 'scale', which Tied does not have"):
        starting(model, tmp_path, **{"head.weight": weight, "head.bias": bias, "scale": bias.clone()})
    with pytest.warns(UserWarning, match=r"are converted: 'head.bias' from torch.float16 to torch.float32"):
        starting(model, tmp_path, **{"head.weight": weight, "head.bias": bias.half()})
    with pytest.raises(AutotpError, match=r"lacks 'embed.weight' of Tied; it has names such as 'table'"):
        starting(model, tmp_path, **{"table": weight, "head.bias": bias})
    with pytest.raises(AutotpError, match=r"'embed.weight' has shape \(7, 4\) in the model and \(8, 4\) in the checkpoint"):
        starting(model, tmp_path, **{"embed.weight": torch.randn(8, 4), "head.bias": bias})
    with pytest.raises(AutotpError, match="not quantised"):
        starting(model, tmp_path, **{"embed.weight": weight.to(torch.int8), "head.bias": bias})
    with torch.device("meta"):
        bare = Tied()
    with pytest.raises(AutotpError, match=r"buffer 'steps' has no values .* pass a function that builds the model"):
        starting(bare, tmp_path, **{"embed.weight": weight, "head.bias": bias})
    with pytest.raises(AutotpError, match=r"parameter 'embed.weight' has no values .* or pass weights="):
        state_values(bare, trace(bare, (IDS,)))


OTHER = {"gpt2": {"*.wte": "vocab", "*.c_attn": "row"}, "llama": {"*.embed_tokens": "vocab", "*.q_proj": "row"}}
"""Another plan than the best."""


# ---- on two ranks ---------------------------------------------------------------------------------------------------


def equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def published(folder: str) -> None:
    """Checkpoints as transformers writes them: in shards with an index, the body alone, tied weights once; models on meta or deferred."""
    import transformers

    for name, changed in (("gpt2", {"n_layer": 1}), ("llama", {"num_hidden_layers": 1, "tie_word_embeddings": True})):
        one = example(name, dtype=torch.float32, **changed)
        whole, body = f"{folder}/{name}", f"{folder}/{name}-body"
        if dist.get_rank() == 0:
            one.model.save_pretrained(whole, max_shard_size="30KB")
            one.model.base_model.save_pretrained(body)
            assert len(list(Path(whole).glob("*.safetensors"))) > 1
        dist.barrier()
        config, kind = one.model.config, transformers.AutoModelForCausalLM
        with torch.device("meta"):
            bare = kind.from_config(config).train()
        tied = name == "gpt2" or changed["tie_word_embeddings"]
        for model, path in ((lambda: kind.from_config(config).train(), whole), (bare, body if tied else whole)):  # noqa: B023
            many = autotp.parallelize(model, one.args, one.kwargs, cluster=splitting_pays(), weights=path)
            equal(many.full_state_dict(), one.model.state_dict())
            torch.testing.assert_close(many(**one.kwargs).loss, one.model(**one.kwargs).loss)
        autotp.save(f"{folder}/{name}-saved", many)
        saved = f"{folder}/{name}-saved"
        again = autotp.parallelize(bare, (), one.kwargs, cluster=splitting_pays(), weights=saved, pins=OTHER[name])
        equal(again.full_state_dict(), one.model.state_dict())
        if name == "llama":
            build = lambda: kind.from_config(config).eval()  # noqa: E731, B023
            writer = autotp.parallelize_generation(build, batch=2, context=12, cluster=splitting_pays(), weights=whole)
            ids = one.kwargs["input_ids"][:2, :5]
            wanted_tokens = one.model.eval().generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=-1)
            assert torch.equal(writer.generate(ids, max_new_tokens=4), wanted_tokens)
        exported = Path(folder, f"{name}-exported")
        for limit, count in ((20_000, None), (5_000_000_000, 1)):
            autotp.export(exported, many, shard_bytes=limit)
            config.save_pretrained(exported) if dist.get_rank() == 0 else None
            dist.barrier()
            files = sorted(file.name for file in exported.iterdir() if file.suffix != ".json")
            assert files == ["model.safetensors"] if count else len(files) > 5
            again, seen = kind.from_pretrained(exported, output_loading_info=True, dtype=torch.float32)
            assert not any(seen.values()), seen
            assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
            equal(again.state_dict(), one.model.state_dict())
            dist.barrier()


def seeded(folder: str) -> None:
    """The parameters are those of one device with this seed, on ranks whose own generators stand elsewhere."""
    torch.manual_seed(11)
    wanted = Tied(31).state_dict()
    torch.manual_seed(dist.get_rank())
    for largest in (initial.WHOLE, 0):  # built whole, and tensor by tensor
        initial.WHOLE = largest
        many = autotp.parallelize(lambda: Tied(31), (IDS,), cluster=splitting_pays(), seed=11)
        equal(many.full_state_dict(), wanted)
        torch.testing.assert_close(many(IDS), built(partial(Tied, 31), seed=11, deferred=False)(IDS))
    with pytest.raises(AutotpError, match=r"the model's weights .* is not the same on every rank"):
        autotp.parallelize(lambda: Tied(31), (IDS,), cluster=splitting_pays(), seed=dist.get_rank())
    with pytest.raises(AutotpError, match=r"the model's weights .* is not the same on every rank"):
        autotp.parallelize(lambda: Tied(31), (IDS,), cluster=splitting_pays())
    file = autotp.save(f"{folder}/tied", many) / "autotp.pt"
    many = autotp.parallelize(lambda: Tied(31).half(), (IDS,), cluster=splitting_pays(), weights=f"{folder}/tied", check=False)
    equal(many.full_state_dict(), {name: value.half() for name, value in wanted.items()})
    dist.barrier()
    if dist.get_rank() == 1:
        save_file({"embed.weight": torch.randn(31, 4)}, f"{folder}/other.safetensors")
        content = bytearray(file.read_bytes())
        content[100] ^= 1
        file.write_bytes(content)
    dist.barrier()
    with pytest.raises(AutotpError, match="autotp.pt is damaged"):
        autotp.parallelize(lambda: Tied(31), (IDS,), weights=f"{folder}/tied")
    with pytest.raises(AutotpError, match=r"there is no file or directory .* \(on rank 0\)"):
        autotp.parallelize(lambda: Tied(31), (IDS,), weights=f"{folder}/other.safetensors" if dist.get_rank() else f"{folder}/none")


def layers(width: int, depth: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth)))


def memory(folder: str) -> None:
    """The peak of the whole start, planning included, is the rank's shard and at most a tenth more; files that are mapped count too."""
    file, depth = f"{folder}/large.safetensors", 64
    for width in (64, 1024):  # the first time, code is loaded
        if dist.get_rank() == 0:
            save_file({f"{layer}.weight": torch.full((width, width), float(layer)) for layer in range(depth)}, file)
        dist.barrier()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = resident("VmRSS")
        build = partial(layers, width, depth)
        many = autotp.parallelize(build, (torch.randn(4, width),), cluster=splitting_pays(), weights=file, pins={"*": "column"})
        shard = sum(parameter.to_local().nbytes for parameter in many.parameters())
        assert shard == depth * width * width * 4 // 2
        assert all((parameter.to_local() == layer).all() for layer, parameter in enumerate(many.parameters()))
    assert resident("VmHWM") - before < 1.1 * shard, (before, resident("VmHWM"), shard)
    del many
    initial.WHOLE = 0  # an initialiser: the shard, and one tensor
    for width in (64, 1024):
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        build = partial(layers, width, depth)
        many = autotp.parallelize(build, (torch.randn(4, width),), cluster=splitting_pays(), seed=0, pins={"*": "column"})
        assert sum(parameter.to_local().nbytes for parameter in many.parameters()) == depth * width * width * 4 // 2
    assert resident("VmHWM") - before < 1.15 * shard, (before, resident("VmHWM"), shard)


def resident(key: str) -> int:
    """Bytes that /proc says."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def all_of(folder: str, *checks: Callable[[str], None]) -> None:
    for check in checks:
        check(folder)


def test_starts_on_two_ranks(tmp_path: Path) -> None:
    run_ranks(all_of, 2, str(tmp_path), memory, seeded, published)
