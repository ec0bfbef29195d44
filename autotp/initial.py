"""What a parallel module starts from: a model that the user has, one that is built on demand, or a checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from autotp import _torch
from autotp.errors import AutotpError
from autotp.huggingface_weights import converted
from autotp.layouts import Coordinate, Layout
from autotp.program import Program
from autotp.replay import Recording, record
from autotp.runtime import checkpoint_files as files
from autotp.runtime.agreement import Group, agree, members, together
from autotp.runtime.saved_weights import open_saved
from autotp.runtime.state import local_part
from autotp.runtime.weights import StoredTensor, Weights, open_safetensors
from autotp.sharded import Sharded
from autotp.trace_watch import kept_generators

Model = nn.Module | Callable[[], nn.Module]
"""A model, or a function that builds it."""

WHOLE = 300_000_000
"""Parameters up to which a model that is built with a seed is built whole on every rank; that is exact whatever the function does."""


@dataclass(frozen=True)
class Seeded:
    """An initialiser that runs tensor by tensor when it is known what each rank holds."""

    recording: Recording
    seed: int

    def parts(self, sharded: Sharded) -> dict[str, LocalTensor]:
        """This rank's part of every parameter and buffer that the graph has."""
        layouts = {spec.name: spec.layout for spec in sharded.state}

        def take(name: str, whole: Tensor) -> Tensor:
            return local_part(whole, layouts[name], sharded.mesh, sharded.coordinate) if name in layouts else whole.new_empty(0)

        found = self.recording.replay(self.seed, take)
        shapes = {name: place.shape for name, place in self.recording.places.items()}
        return {name: LocalTensor(shapes[name], part) for name, part in found.items() if name in layouts}


@dataclass(frozen=True)
class LocalTensor:
    """A rank's part of a tensor, in the place of one that is stored."""

    shape: tuple[int, ...]
    part: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Of the part."""
        return self.part.dtype

    def local_part(self, layout: Layout, mesh: tuple[int, ...], coordinate: Coordinate, dtype: torch.dtype, device: torch.device) -> Tensor:
        """See `StoredTensor`."""
        return self.part.to(dtype=dtype, device=device)


Source = Weights | Seeded | None
"""What the values of a model come from, if not from itself."""


def built(model: Model, *, seed: int | None, deferred: bool) -> nn.Module:
    """The model itself, or what the function builds on the CPU.

    Args:
        model: a module, or a function without arguments.
        seed: of the function's random numbers, as `torch.manual_seed(seed)` before it; PyTorch's generator is left as it was.
        deferred: keep the parameters on `meta`, without memory: their values come from elsewhere. Buffers are real.

    Raises:
        AutotpError: there is a seed and nothing to build, or something other than a module is built.
    """
    if isinstance(model, nn.Module):
        if seed is not None:
            raise AutotpError("seed is for a function that builds the model; pass one, such as lambda: Model(config), or leave seed out")
        return model
    if not callable(model):
        raise AutotpError(f"the model is {model!r}, which is no torch.nn.Module; pass the module, or a function that builds it")
    if deferred:
        made = _without_memory(model)
    else:
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            made = model()
    if not isinstance(made, nn.Module):
        raise AutotpError(f"the function that builds the model returned {type(made).__name__}; it must return a torch.nn.Module")
    return made


def begin(model: Model, weights: str | Path | None, seed: int | None, group: Group) -> tuple[nn.Module, Source]:
    """The model, built if that is asked for, and what its values come from if not from itself. Every rank of `group` calls this.

    Raises:
        AutotpError: on every rank: see `built` and `open_weights`.
    """
    stored = open_weights(weights, group)
    if stored is None and seed is not None and not isinstance(model, nn.Module):
        seeded = together(lambda: _seeded(model, seed), group)
        if seeded is not None:
            return seeded.recording.model, seeded
    made = together(lambda: built(model, seed=seed, deferred=stored is not None), group)
    return made, together(lambda: None if stored is None else converted(stored, made), group)


def _seeded(build: Callable[[], nn.Module], seed: int) -> Seeded | None:
    """A large model that can be initialised tensor by tensor."""
    if not callable(build):
        return None
    with kept_generators():
        recording = record(build)
    large = recording is not None and sum(parameter.numel() for parameter in recording.model.parameters()) > WHOLE
    return Seeded(recording, seed) if recording is not None and large else None


def open_weights(path: str | Path | None, group: Group = None) -> Weights | None:
    """The checkpoint at `path`, if one is given: safetensors files, or what `autotp.save` wrote, of which all files are then checked,
    each by one of the ranks. Every rank of `group` calls this.

    Raises:
        AutotpError: on every rank: there is none, or it is damaged.
    """
    if path is None:
        return None
    if together(lambda: files.latest(path), group) is None:
        return together(lambda: open_safetensors(path), group)
    weights = together(lambda: open_saved(path), group)
    ranks = members(group)
    together(lambda: files.verify(weights.path, ranks.index(dist.get_rank()), len(ranks)), group)
    return weights


def _without_memory(build: Callable[[], Any]) -> Any:
    """What a function builds, with parameters on `meta` and real buffers."""
    hook: Any = _to_meta  # what it returns takes the parameter's place, which its annotation leaves out
    handle = register_module_parameter_registration_hook(hook)
    try:
        return build()
    finally:
        handle.remove()


def _to_meta(_: nn.Module, __: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    """Parameters lose their memory as soon as a module gets them; one that has none stays the same object, since it may be tied."""
    if parameter is None or parameter.is_meta:
        return None
    return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)


def state_values(
    model: nn.Module, program: Program, source: Source = None, sharded: Sharded | None = None
) -> dict[str, Tensor | StoredTensor]:
    """The value of every parameter, buffer and constant of the program, by name, in the model's own order.

    From a checkpoint, parameters and buffers of the `state_dict` are read later, slice by slice. For an initialiser that runs tensor by
    tensor, `sharded` says what this rank holds.

    Raises:
        AutotpError: a value is fake or on `meta` and not in the checkpoint, or has another shape there.
    """
    kinds = {node.target: node.kind for node in program.nodes if node.kind in ("parameter", "buffer")}
    weights = source if isinstance(source, Weights) else None
    stored: dict[str, StoredTensor] = {} if weights is None else _stored(model, program, weights)
    if isinstance(source, Seeded) and sharded is not None:
        stored |= source.parts(sharded)
    computed = {} if weights is None else _computed_buffers(model, stored)
    values: dict[str, Tensor | StoredTensor] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name not in kinds:
            continue
        if name in stored:
            values[name] = stored[name]
        elif name in computed:
            values[name] = computed[name].to(tensor.dtype)
        elif is_unreal(tensor):
            raise AutotpError(_no_values(name, kinds[name], weights))
        else:
            values[name] = tensor.detach()
    values.update({node.target: program.constants[node.target] for node in program.nodes if node.kind == "constant"})
    return values


def agree_on_values(model: nn.Module, source: Source, group: Group) -> None:
    """Check that every rank starts from the same values.

    Raises:
        AutotpError: on every rank, if one does not.
    """
    digest = together(lambda: values_digest(model, source), group)
    agree(digest, "the model's weights (seed all ranks alike, or load the same checkpoint)", group)


SAMPLES = 64
"""Elements of each tensor that a digest reads."""


def values_digest(model: nn.Module, source: Source = None) -> bytes:
    """A digest of a few elements of every parameter and buffer: enough to tell models of different seeds or checkpoints apart.

    Of tensors that come from a checkpoint it has the types there, of an initialiser the seed.
    """
    weights = source if isinstance(source, Weights) else None
    digest = sha256(b"" if weights is None else weights.digest())
    if isinstance(source, Seeded):
        digest.update(f"seed {source.seed}".encode())
    from_weights = set() if weights is None else weights.keys_of(model.state_dict().keys()).keys()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if name not in from_weights and not is_unreal(tensor) and tensor.numel():
            step = max(1, tensor.numel() // SAMPLES)
            sample = tensor.detach().reshape(-1)[::step][:SAMPLES].cpu().contiguous()
            digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.digest()


def is_unreal(tensor: Tensor) -> bool:
    """Whether a tensor has no values: it is fake, or on `meta`."""
    return tensor.device.type == "meta" or _torch.fake_mode_of([tensor]) is not None


def _computed_buffers(model: nn.Module, stored: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """Buffers without values that no checkpoint has, such as rotary frequencies, as the constructor computes them.

    That can be asked of models whose class is built from their `config` alone, as in transformers.
    """
    absent = {name for name, buffer in model.named_buffers() if name not in stored and is_unreal(buffer)}
    if not absent or not hasattr(model, "config") or not hasattr(type(model), "from_pretrained"):
        return {}
    fresh: nn.Module = _without_memory(lambda: type(model)(model.config))
    return {name: buffer for name, buffer in fresh.named_buffers() if name in absent and not is_unreal(buffer)}


def _no_values(name: str, kind: str, weights: Weights | None) -> str:
    if weights is None:
        return f"{kind} {name!r} has no values (it is on meta or fake); load weights into the model first, or pass weights="
    return (
        f"{kind} {name!r} has no values (it is on meta or fake) and is not in the checkpoint {weights.path}; pass a function that builds "
        "the model, such as lambda: Model(config), in place of a model on meta: its buffers are then computed"
    )


def _stored(model: nn.Module, program: Program, weights: Weights) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint by the model's names, of each tied one the first."""
    named: dict[int, list[str]] = {}
    kept: dict[str, Any] = model.state_dict(keep_vars=True)
    for name, value in kept.items():
        if isinstance(value, Tensor):
            named.setdefault(id(value), []).append(name)
    keys = weights.keys_of(name for names in named.values() for name in names)
    found: dict[str, StoredTensor] = {}
    missing = []
    for names in named.values():
        key = next((keys[name] for name in names if name in keys), None)
        first, value = names[0], kept[names[0]]
        if key is not None:
            found[first] = _fitting(first, value, weights.tensors[key], weights)
        elif isinstance(value, nn.Parameter) or is_unreal(value):
            missing.append(first)
    if missing:
        raise AutotpError(
            f"the checkpoint {weights.path} lacks {listed(missing)} of {type(model).__name__}; it has names such as "
            f"{listed(sorted(weights.tensors.keys() - set(keys.values())) or sorted(weights.tensors), 2)}"
        )
    converted = [f"'{name}' from {there.dtype} to {kept[name].dtype}" for name, there in found.items() if there.dtype != kept[name].dtype]
    if converted:
        warnings.warn(f"weights of {weights.path} are converted: {listed(converted, quote='')}", stacklevel=2)
    unused = sorted(weights.tensors.keys() - set(keys.values()))
    if unused:
        warnings.warn(f"the checkpoint {weights.path} has {listed(unused)}, which {type(model).__name__} does not have", stacklevel=2)
    return {program.aliases.get(name, name): there for name, there in found.items()}


def _fitting(name: str, value: Tensor, stored: StoredTensor, weights: Weights) -> StoredTensor:
    if stored.shape != tuple(value.shape):
        raise AutotpError(
            f"'{name}' has shape {tuple(value.shape)} in the model and {stored.shape} in the checkpoint {weights.path}; "
            "build the model with the checkpoint's configuration"
        )
    both = (stored.dtype, value.dtype)
    if both[0] != both[1] and not all(dtype.is_floating_point and dtype.itemsize >= 2 for dtype in both):
        raise AutotpError(
            f"'{name}' is {value.dtype} in the model and {stored.dtype} in the checkpoint {weights.path}, which a mere conversion does not "
            "bring together; use a checkpoint that is not quantised"
        )
    return stored


def listed(names: list[str], count: int = 3, quote: str = "'") -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(f"{quote}{name}{quote}" for name in names[:count])
    return shown + (f" and {len(names) - count} more" if len(names) > count else "")
