"""Which layers of a transformers configuration a small copy keeps, so that every kind of layer is still there."""

from __future__ import annotations

import re
from typing import Any

# The spellings of each size in transformers' configurations.
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth")

# How layers of different kinds are laid out: every n-th, the first n, the last n, or by a list of indices.
ATTENTION_PERIODS = (
    "full_attention_interval",
    "sliding_window_pattern",
    "global_attn_every_n_layers",
    "attn_layer_period",
)
MLP_PERIODS = (
    "decoder_sparse_step",
    "encoder_sparse_step",
    "moe_layer_freq",
    "moe_layer_interval",
    "interleave_moe_layer_step",
    "expert_layer_period",
)
FIRST_LAYERS = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
LAST_LAYERS = ("num_kv_shared_layers",)
INDEX_LIST = re.compile(r"(^|_)(layers|layer_ids|indexes|indices)$")
STAGE = re.compile(r"^stage(\d+)$")
SHARED = "hybrid"
"""Kind of the layers that use one block together: at least two of them stay."""
SPECIAL_TOKEN = re.compile(r"_token_(id|ids|index)$")


def first(fields: dict[str, Any], names: tuple[str, ...]) -> int | None:
    """The first of the fields `names` that is a positive int."""
    values = (fields.get(name) for name in names)
    return next((value for value in values if type(value) is int and value > 0), None)


def kept_layers(fields: dict[str, Any]) -> list[int]:
    """Indices of the layers that stay: at least 2, and one of each kind that lists, periods and borders tell apart."""
    layers = first(fields, LAYERS)
    if layers is None:
        return []
    periods: tuple[str, ...] = () if per_layer(fields, "layer_types", layers) else ATTENTION_PERIODS
    periods += () if per_layer(fields, "mlp_layer_types", layers) else MLP_PERIODS
    prefix = max((fields[name] for name in periods if type(fields.get(name)) is int), default=1)
    lists = [value for name, value in fields.items() if per_layer(fields, name, layers)]
    indices = [value for name, value in fields.items() if is_index_list(name, value, layers)]
    special = {int(layer): entry for layer, entry in (fields.get("per_layer_config") or {}).items()}
    tapped = {layer for _, taken in tapped_layers(fields) for layer in taken if 0 <= layer < layers}
    starts = [fields[name] for name in FIRST_LAYERS if type(fields.get(name)) is int]
    ends = [layers - fields[name] for name in LAST_LAYERS if type(fields.get(name)) is int]
    kinds: dict[str, int] = {}
    for layer in range(layers):
        marks = [entry[layer] for entry in lists] + [layer in entry for entry in indices] + [special.get(layer)]
        kinds.setdefault(repr((marks, [layer < start for start in (*starts, *ends)])), layer)
    shared = [layer for entry in lists for layer, kind in enumerate(entry) if kind == SHARED][:2]
    keep = sorted({*kinds.values(), *tapped, *shared})
    if prefix > 1 and not shared:
        return list(range(min(layers, max(prefix, keep[-1] + 1))))
    others = (layer for layer in range(layers) if layer not in keep)
    while len(keep) < min(2, layers):
        keep = sorted([*keep, next(others)])
    return keep


def per_layer(fields: dict[str, Any], name: str, layers: int) -> bool:
    """Whether a field is a list with one entry per layer."""
    value = fields.get(name)
    listed = isinstance(value, (list, tuple)) and len(value) == layers > 2 and not SPECIAL_TOKEN.search(name)
    return listed and not is_index_list(name, value, layers)


def is_index_list(name: str, value: Any, layers: int) -> bool:
    """Whether a field lists some layers by their index."""
    return (
        isinstance(value, (list, tuple))
        and all(type(item) is int and 0 <= item < layers for item in value)
        and sorted(set(value)) == list(value)
        and INDEX_LIST.search(name) is not None
        and "out_" not in name
    )


def tapped_layers(fields: dict[str, Any]) -> list[tuple[str, list[int]]]:
    """(field, layers) for the fields that say after which layers a backbone's features are taken, layers counted from 0.

    With `stage_names`, `stage3` and index 3 are what comes after the third layer; without, indices count layers from 0.
    """
    layers = first(fields, LAYERS) or 0
    staged = len(fields.get("stage_names") or ()) == layers + 1
    found: list[tuple[str, list[int]]] = []
    for name, value in fields.items():
        if not isinstance(value, (list, tuple)) or not value or not layers:
            continue
        if name.endswith("out_features") and staged:
            marks = [STAGE.match(str(item)) for item in value]
            found += [(name, [int(mark[1]) - 1 for mark in marks if mark])] if all(marks) else []
        elif name.endswith("out_indices") and all(type(item) is int for item in value):
            found.append((name, [item - 1 if staged else min(item, layers - 1) for item in value]))
    return found


def shrink_taps(fields: dict[str, Any], keep: list[int]) -> dict[str, Any]:
    """The fields of `tapped_layers`, and the names of all stages, for the layers that are kept."""
    staged = len(fields.get("stage_names") or ()) == (first(fields, LAYERS) or 0) + 1
    small: dict[str, Any] = {}
    if staged and keep:
        small["stage_names"] = [fields["stage_names"][0], *(f"stage{place + 1}" for place in range(len(keep)))]
    for name, taken in tapped_layers(fields):
        places = [keep.index(layer) if layer in keep else layer for layer in taken]
        if name.endswith("out_features"):
            small[name] = [f"stage{place + 1}" for place in places]
        else:
            small[name] = [place + 1 if staged else place for place in places]
    return small
