"""Checkpoints whose names are not the model's: transformers renames while it loads, and puts the experts of a mixture into one tensor."""

from __future__ import annotations

from typing import Any

from torch import nn

from autotp.runtime.assembled import Assembled, concatenate, single, stack
from autotp.runtime.weights import SafeTensor, StoredTensor, Weights


def converted(weights: Weights, model: nn.Module) -> Weights:
    """The checkpoint under the names of a model of transformers, as its own `from_pretrained` converts it; of other models as it is.

    Renaming, stacking and concatenating are followed, so that each rank reads pieces still. Names that transformers would convert in
    another way are left, and then missed by name.

    Raises:
        AutotpError: tensors that are to be put together do not fit.
    """
    if not hasattr(type(model), "from_pretrained") or not all(isinstance(stored, SafeTensor) for stored in weights.tensors.values()):
        return weights
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
    except ImportError:  # an older or newer release, which has no such table
        return weights
    transforms: list[Any] = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    if not transforms:
        return weights
    found: dict[str, StoredTensor] = {}
    gathered: dict[str, dict[str, list[Any]]] = {}
    for key in sorted(weights.tensors, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters)
        if pattern is None:
            found[name] = weights.tensors[key]
        else:
            gathered.setdefault(name, {}).setdefault(pattern, []).append(weights.tensors[key])
    for name, by_pattern in gathered.items():
        converter = next(converter for converter in converters if set(by_pattern) <= set(converter.source_patterns))
        whole = _assembled(by_pattern, converter)
        found.update({stored.key: stored for part in by_pattern.values() for stored in part} if whole is None else {name: whole})
    return Weights(weights.path, found, weights.files)


def _assembled(by_pattern: dict[str, list[SafeTensor]], converter: Any) -> Assembled | None:
    """What a converter makes of tensors that its patterns match; None if it does more than stack and concatenate."""
    if len(converter.target_patterns) != 1:
        return None
    lists = [[single(stored) for stored in by_pattern[pattern]] for pattern in converter.source_patterns if pattern in by_pattern]
    for operation in converter.operations:
        kind = type(operation).__name__
        if kind == "MergeModulelist":
            lists = [[stack(tensors, operation.dim)] for tensors in lists]
        elif kind == "Concatenate":
            lists = [[concatenate([tensor for tensors in lists for tensor in tensors], operation.dim)]]
        else:
            return None
    return lists[0][0] if len(lists) == 1 and len(lists[0]) == 1 else None
