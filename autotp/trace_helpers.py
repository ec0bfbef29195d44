"""Tracing helpers: what makes more models trace, and trace as they run.

Each is a context around the export. It goes by what a model's attributes are called or by what its code asks, never by the model's
name; it changes the model only inside, and says in `notes` what it changed where that matters to the user.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from autotp import _torch
from autotp.errors import AutotpError

__all__ = ["HELPERS", "prepared"]

Helper = Callable[[nn.Module, list[str]], AbstractContextManager[None]]


@contextmanager
def prepared(model: nn.Module, notes: list[str]) -> Iterator[None]:
    """All helpers at once: inside, the model runs as it is traced."""
    with ExitStack() as stack:
        for helper in HELPERS:
            stack.enter_context(helper(model, notes))
        yield


@contextmanager
def causal_masks(model: nn.Module, notes: list[str]) -> Iterator[None]:
    """Let transformers keep `is_causal` attention: no search for packed sequences, which depends on the values of positions."""
    masking = sys.modules.get("transformers.masking_utils")
    name, asked = "find_packed_sequence_indices", []

    def not_packed(*args: Any, **kwargs: Any) -> None:
        asked.append(name)

    with changed([(masking, name, not_packed)] if hasattr(masking, name) else []):
        yield
    if asked:
        notes.append("Sequences packed into one row are not told apart by their positions; pass an explicit mask for them.")


@contextmanager
def no_cache(model: nn.Module, notes: list[str]) -> Iterator[None]:
    """Switch `use_cache` off in the model's configurations: keys and values of past tokens are no output to plan.

    A model that holds its cache itself (`autotp.key_value_cache`) does not ask the configuration, so that there is nothing to say.
    """
    found = [config for config in configurations(model) if getattr(config, "use_cache", None) is True]
    with changed([(config, "use_cache", False) for config in found]):
        yield
    if found and not hasattr(model, "key_value_cache"):
        notes.append("The model was traced with use_cache=False; its outputs hold no key/value cache.")


LAYER_DROP = re.compile(r"layer_?drop(?!out)")


@contextmanager
def no_layer_drop(model: nn.Module, notes: list[str]) -> Iterator[None]:
    """Set LayerDrop's rates to 0 in training: whether a layer runs is a branch on a random number, which no graph has."""
    owners = [*configurations(model), *(module for module in model.modules() if module.training)] if model.training else []
    found = [
        (owner, name, type(value)(0))
        for owner in owners
        for name, value in vars(owner).items()
        if LAYER_DROP.search(name) and type(value) in (float, int) and value > 0
    ]
    with changed(found):
        yield
    if found:
        names = ", ".join(f"`{name}`" for name in dict.fromkeys(name for _, name, _ in found))
        notes.append(f"LayerDrop ({names}) is off in the parallel model, in which every layer runs at every step.")


@contextmanager
def no_spec_augment(model: nn.Module, notes: list[str]) -> Iterator[None]:
    """Switch `apply_spec_augment` off in training: its masks are drawn with numpy, and a trace would repeat one forever."""
    found = [config for config in configurations(model) if getattr(config, "apply_spec_augment", None) is True] if model.training else []
    found = [config for config in found if any(getattr(config, name, 0) > 0 for name in ("mask_time_prob", "mask_feature_prob"))]
    with changed([(config, "apply_spec_augment", False) for config in found]):
        yield
    if found:
        notes.append("SpecAugment (`apply_spec_augment`) is off in the parallel model; mask the features before they are passed.")


@contextmanager
def traceable_attention(model: nn.Module, notes: list[str]) -> Iterator[None]:
    """Use PyTorch's own attention where a transformers model asks for flash or flex kernels, which do not trace."""
    modules = [module for module in model.modules() if hasattr(getattr(module, "config", None), "_attn_implementation")]
    without = {id(module.config) for module in modules if getattr(module, "_supports_sdpa", True) is False}
    field = "_attn_implementation_internal"
    found = []
    for config in configurations(model):
        asked = getattr(config, "_attn_implementation", None)
        if isinstance(asked, str) and asked not in ("eager", "sdpa"):
            found.append((config, asked, "eager" if id(config) in without else "sdpa"))
    with changed([(config, field, given) for config, _, given in found if hasattr(config, field)]):
        yield
    for asked, given in dict.fromkeys((asked, given) for _, asked, given in found):
        notes.append(f'The model was traced with attn_implementation="{given}" in place of "{asked}", which cannot be traced.')


@contextmanager
def traceable_experts(model: nn.Module, notes: list[str]) -> Iterator[None]:
    """Compute transformers' experts by grouped matrix products, not in a loop over experts that depends on the routing.

    PyTorch's grouped product traces in bfloat16 alone; in float32 transformers' own does, in float64 it is batched products.
    """
    if not any(can() for module in model.modules() if (can := getattr(module, "_can_set_experts_implementation", None))):
        yield
        return
    double = any(parameter.dtype == torch.float64 for parameter in model.parameters())
    wanted, field = "batched_mm" if double else "grouped_mm", "_experts_implementation_internal"
    untraceable = ("eager", "grouped_mm") if double else ("eager",)
    found = [
        (config, asked)
        for config in configurations(model)
        if (asked := getattr(config, "_experts_implementation", None)) in untraceable and hasattr(config, field)
    ]
    kernels, name = sys.modules.get("transformers.integrations.moe"), "_can_use_grouped_mm"

    def traceable(input: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> bool:
        return weight.dtype == torch.bfloat16

    with changed([*((config, field, wanted) for config, _ in found), *([(kernels, name, traceable)] if hasattr(kernels, name) else [])]):
        yield
    for asked in dict.fromkeys(asked for _, asked in found):
        reason = "whose loop depends on the routing" if asked == "eager" else "which has no kernel for float64"
        notes.append(f'The model was traced with experts_implementation="{wanted}" in place of "{asked}", {reason}.')


@contextmanager
def idle_casts(model: nn.Module, notes: list[str]) -> Iterator[None]:
    """Let a forward convert a module to the dtype and device that it has (`self.head.to(dtype)`): traced weights cannot be exchanged."""
    original = nn.Module._apply

    def apply(module: nn.Module, function: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        with _torch.untraced(), torch.no_grad():
            pairs = [(tensor, function(tensor)) for tensor in (*module.parameters(), *module.buffers())]
        same = all((old.dtype, old.device) == (new.dtype, new.device) for old, new in pairs)
        return module if same else original(module, function, recurse)

    with changed([(nn.Module, "_apply", apply)]):
        yield


@contextmanager
def assigned_buffers(model: nn.Module, notes: list[str]) -> Iterator[None]:
    """Let a forward assign new tensors to its buffers (`self.mean = 0.9 * self.mean + ...`), which an export would lose.

    At the end of the forward the buffer itself is given the new value.

    Raises:
        AutotpError: the new tensor has another shape or dtype.
    """
    before: list[tuple[str, nn.Module, str, torch.Tensor | None]] = []

    def remember(*_: Any) -> None:
        before[:] = [
            (f"{path}.{key}".lstrip("."), module, key, tensor)
            for path, module in model.named_modules()
            for key, tensor in module._buffers.items()
        ]

    def write(*_: Any) -> None:
        for name, module, key, tensor in before:
            now = module._buffers.get(key)
            if now is tensor or now is None:
                continue
            if tensor is None or (tensor.shape, tensor.dtype) != (now.shape, now.dtype):
                raise AutotpError(f"the forward gives the buffer `{name}` another shape or dtype, which cannot be traced; keep both.")
            with torch.no_grad():
                tensor.copy_(now)
            module._buffers[key] = tensor

    handles = [model.register_forward_pre_hook(remember), model.register_forward_hook(write)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def plain_indices(model: nn.Module, notes: list[str]) -> Iterator[None]:
    """Let `torch.vmap`'s lookups by traced indices be plain ones, not an autograd Function of PyTorch's own."""
    with changed([(*_torch.index_function(), torch.ops.aten.index)]):
        yield


@contextmanager
def given_masks(model: nn.Module, notes: list[str]) -> Iterator[None]:
    """Let `nn.Transformer`'s layers take masks as they are given, not look whether their values are those of a causal one."""

    def as_said(mask: torch.Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
        return is_causal is True

    with changed([(*_torch.CAUSAL_SEARCH, as_said)]):
        yield


def configurations(model: nn.Module) -> list[Any]:
    """The `config` of every module, with the configurations nested in them, each once."""
    found: dict[int, Any] = {}
    pending = [config for module in model.modules() if (config := getattr(module, "config", None)) is not None]
    while pending:
        config = pending.pop(0)
        if id(config) in found or not hasattr(config, "__dict__") or isinstance(config, (type, nn.Module)):
            continue
        found[id(config)] = config
        pending += [value for name, value in vars(config).items() if name.endswith("config")]
    return list(found.values())


@contextmanager
def changed(changes: Sequence[tuple[Any, str, Any]]) -> Iterator[None]:
    """Set attributes, given as (owner, name, value), and set them back at the end."""
    saved = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in reversed(saved):
            setattr(owner, name, value)


HELPERS: tuple[Helper, ...] = (
    causal_masks, no_cache, no_layer_drop, no_spec_augment, traceable_attention, traceable_experts, idle_casts, given_masks,
    plain_indices, assigned_buffers,
)  # fmt: skip
"""Contexts entered around every export."""
