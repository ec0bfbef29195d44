"""Safetensors files: pieces of every kind of cut, names with one part more or less, files that cannot be read."""

from itertools import product
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from autotp.errors import AutotpError
from autotp.runtime.state import local_part
from autotp.runtime.weights import open_safetensors
from tests.runtime.test_chunks import CASES

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", CASES)
def test_a_rank_reads_its_part(name: str, tmp_path: Path) -> None:
    shape, layout, mesh = CASES[name]
    full = torch.arange(prod(shape), dtype=torch.float32).reshape(shape)
    save_file({"weight": full}, tmp_path / "model.safetensors")
    stored = open_safetensors(tmp_path).tensors["weight"]
    assert (stored.shape, stored.dtype) == (shape, torch.float32)
    for coordinate in product(*map(range, mesh)):
        for dtype in (torch.float32, torch.bfloat16):
            wanted = local_part(full, layout, mesh, coordinate).to(dtype)
            found = stored.local_part(layout, mesh, coordinate, dtype, CPU)
            assert torch.equal(found, wanted)
            assert found.is_contiguous()


def test_names_with_a_part_more_or_less(tmp_path: Path) -> None:
    def keys(*names: str) -> dict[str, str]:
        save_file({name: torch.zeros(1) for name in stored}, tmp_path / "model.safetensors")
        return open_safetensors(tmp_path / "model.safetensors").keys_of(names)

    stored = ["a.b", "a.c", "head"]
    assert keys("a.b", "head") == {"a.b": "a.b", "head": "head"}
    assert keys("body.a.b", "body.a.c", "head", "body.d") == {"body.a.b": "a.b", "body.a.c": "a.c", "head": "head"}
    assert keys("b", "c", "other") == {"b": "a.b", "c": "a.c"}
    stored = ["a.w", "b.w", "b.v"]
    assert keys("w", "v") == {"w": "b.w", "v": "b.v"}
    assert keys("x.a.w", "y.a.w", "x.b.w") == {"x.a.w": "a.w", "x.b.w": "b.w"}
    assert keys("q.r") == {}


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    def refused(match: str, path: Path = tmp_path) -> None:
        with pytest.raises(AutotpError, match=match):
            open_safetensors(path)

    refused("there is no file or directory", tmp_path / "none")
    refused("has neither safetensors files nor")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    refused("has neither safetensors files nor")
    refused("pytorch_model.bin is no safetensors file", tmp_path / "pytorch_model.bin")
    save_file({"weight": torch.arange(100.0)}, tmp_path / "part.safetensors")
    assert set(open_safetensors(tmp_path).tensors) == {"weight"}
    save_file({"weight": torch.arange(100.0)}, tmp_path / "other.safetensors")
    refused(r"has 2 files \*.safetensors, such as other.safetensors; give the one that is meant")
    content = (tmp_path / "part.safetensors").read_bytes()
    stored = open_safetensors(tmp_path / "part.safetensors").tensors["weight"]
    for damaged in (b"", content[:50], content[:-7], b"\xff" * 16 + content):
        (tmp_path / "part.safetensors").write_bytes(damaged)
        refused("part.safetensors cannot be read .*; download it again", tmp_path / "part.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("{}")
    refused("it has no weight_map")
    index.write_text('{"weight_map": {"weight": "other.safetensors", "bias": "other.safetensors"}}')
    refused("lists 'bias', which is not in other.safetensors")
    index.write_text('{"weight_map": {"weight": "other.safetensors", "bias": "gone.safetensors"}}')
    refused("gone.safetensors is missing; download the checkpoint again")
    (tmp_path / "part.safetensors").unlink()
    with pytest.raises(AutotpError, match="part.safetensors is missing"):
        stored.local_part(CASES["whole"][1], (1,), (0,), torch.float32, CPU)
