"""A tiny model of the same structure, for comparing a rewritten model with the original one in seconds.

Every width is scaled by one factor, and layers, heads, experts, vocabulary and positions are reduced to the least that
still shows each kind. What makes a split uneven survives: 14 heads stay 14, a vocabulary of 50257 stays odd.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any

from autotp.errors import AutotpError
from autotp.huggingface import POSITIONS, build_from_config, read_config
from autotp.loading import LoadedModel, check_options, explained, is_callable_spec, parse_dtype
from autotp.models import accepts, build_from_callable, find_callable
from autotp.shrink_layers import (
    FIRST_LAYERS,
    LAST_LAYERS,
    LAYERS,
    SPECIAL_TOKEN,
    first,
    is_index_list,
    kept_layers,
    per_layer,
    shrink_taps,
)

# The spellings of each size in transformers' configurations.
MORE_LAYERS = ("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads")
HEAD_COUNT = re.compile(r"(_heads|^n_head|_head_kv|^multi_query_group_num)$")
HIDDEN = ("embed_dim", "n_embd", "d_model", "dim", "hidden_size", "emb_dim", "hidden_dim")
HEAD_DIM = ("head_dim", "d_kv", "kv_channels", "d_head", "dim_head")
HEAD_SIZE = re.compile(r"(head_dim|(^|_)d_head|^dim_head|^d_kv|^kv_channels|^rotary_dim)$")
WIDTH = re.compile(
    r"(^|_)(embed_dim|n_embd|d_model|dim|hidden_size|emb_dim|intermediate_size|ffn_dim|d_ff|d_inner|ffn_hidden_size"
    r"|n_inner|mlp_dim|hidden_dim|embedding_size|bottleneck_size|input_size|output_size|proj_dim|lora_rank|time_step_rank"
    r"|lru_width|d_ssm)(_mlp|_per_layer_input|_global)?$"
)
FIXED_WIDTH = re.compile(r"(projection_dim|conv_dim|v_dim|out_dim|in_dim)$")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
EXPERT_GROUPS = ("n_group", "num_expert_group")
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")
PLACES = (*POSITIONS, "n_ctx", "max_source_positions", "seq_length", "original_max_position_embeddings", "max_pos_emb")
WINDOWS = (
    "sliding_window",
    "attention_chunk_size",
    "window_size",
    "attention_window",
    "local_attention",
    "context_size",
    "chunk_size",
    "mamba_chunk_size",
)
FRAMES = ("num_frames", "frames_per_clip")
QUERIES = ("num_queries", "num_object_queries", "num_select", "two_stage_num_proposals")
SCAN_HEADS = ("mamba_n_heads", "n_mamba_heads", "mamba_num_heads")
SCAN_HEAD_SIZES = ("mamba_d_head", "mamba_headdim", "mamba_head_dim")
GROUPS = ("n_groups", "num_conv_pos_embedding_groups")
FEATURE_LAYER = re.compile(r"feature_layers?$")
VOCABULARY = re.compile(r"vocab_size|_vocab$")
IMAGE_TOKENS = ("mm_tokens_per_image",)

SMALL_HEADS = 8
SMALL_HIDDEN = 64
SMALL_VOCABULARY = 128
SMALL_EXPERTS = 8
SMALL_WINDOW = 8
SMALL_IMAGE = 4
SMALL_PIXELS = 64
SMALL_QUERIES = 12
SMALL_MODEL = 20_000_000


def load_shrunken(spec: str, *, seq: int | None = None, batch: int = 2, dtype: str = "float64") -> LoadedModel:
    """A small, real copy of the model that `spec` names, without dropout and in train mode, with example inputs.

    Args:
        spec: as in `load_model`. A Hugging Face configuration is shrunk by `shrink_config`; a callable must return a
            small model, and is given `batch` and `seq` if it has arguments of these names.
        seq: tokens per sequence, default 16.
        batch: sequences per step.
        dtype: dtype of weights and floating inputs.

    Returns:
        The model with random weights of seed 0.

    Raises:
        AutotpError: the model cannot be loaded, or has more than 20 million parameters though it should be small.
    """
    check_options(batch=batch, seq=seq, mode="train")
    target = parse_dtype(dtype)
    if is_callable_spec(spec):
        function = find_callable(spec)
        wanted = {"batch": batch} if seq is None else {"batch": batch, "seq": seq}
        arguments = {key: value for key, value in wanted.items() if accepts(function, key)}
        # Fake tensors count the parameters of a model too large to build.
        if count(build_from_callable(function, spec, arguments, dtype=None, mode="train", fake=True)) <= SMALL_MODEL:
            return build_from_callable(function, spec, arguments, dtype=target, mode="train", fake=False)
        raise AutotpError(f"{spec} has more than 20 million parameters; give a callable that returns a small variant.")
    name, config = read_config(spec)
    seq = 16 if seq is None else seq
    small = shrink_config(config, positions=max(64, 2 * seq))
    options: dict[str, Any] = {"batch": batch, "seq": seq, "dtype": target, "mode": "train", "pixels": SMALL_PIXELS}
    size = count(build_from_config(copy.deepcopy(small), name, fake=True, **options))
    if size > SMALL_MODEL:
        raise AutotpError(
            f"`{name}` still has {size / 1e6:.0f} million parameters when shrunk; "
            "give file.py:callable with a small variant."
        )
    loaded = build_from_config(small, name, fake=False, **options)
    return dataclasses.replace(loaded, notes=(f"`{name}` was shrunk to {size:,} parameters.", *loaded.notes))


def count(loaded: LoadedModel) -> int:
    """Number of parameters, tied ones once."""
    return sum(parameter.numel() for parameter in loaded.model.parameters())


def shrink_config(config: Any, *, zero_dropout: bool = True, positions: int = 64) -> Any:
    """A tiny configuration of the same structure as a transformers configuration, which is left unchanged.

    Layers become 2, or the least that keeps every kind of layer. Heads are halved together with key/value heads while
    both stay multiples of 4, a head gets 4 or 8 elements, and all widths shrink by the same factor as the hidden size,
    so that heads per key/value head, and hidden size against heads times head size, keep their ratio. Nested
    configurations shrink likewise.

    Args:
        config: a `PreTrainedConfig`.
        zero_dropout: also set every dropout and layer-drop rate to 0, so that two runs of the model agree.
        positions: greatest sequence length of the result, in tokens.

    Raises:
        AutotpError: the small configuration is refused by its class.
    """
    fields = config.to_dict()
    small = shrink_fields(fields, hidden_sizes(fields), positions)
    small = move_tokens(small, least_vocabulary(small), {})
    small.pop("quantization_config", None)
    if zero_dropout:
        small = without_dropout(small)
    with explained(
        f"the {config.model_type} configuration cannot be shrunk (ERROR); give file.py:callable with a small variant."
    ):
        return type(config).from_dict(small)


def is_part(key: str, value: Any) -> bool:
    """Whether a field holds the configuration of a part of the model, such as its vision tower."""
    named = key.endswith("_config") and key not in ("quantization_config", "per_layer_config")
    return isinstance(value, dict) and (named or "model_type" in value)


@dataclass(frozen=True)
class Widths:
    """Old and new sizes of one part of a model: elements of a hidden state and of a head; halvings of the heads."""

    hidden: int
    new_hidden: int
    head: int
    new_head: int
    halvings: int


def widths(fields: dict[str, Any]) -> Widths | None:
    """The sizes for one part's fields, or None without a single hidden size (a pyramid of stages keeps its widths)."""
    hidden = first(fields, HIDDEN)
    if hidden is None or isinstance(fields.get("depths"), (list, tuple)):
        return None
    heads = first(fields, HEADS)
    if heads is None:
        new = min(hidden, SMALL_HIDDEN)
        return Widths(hidden, new, 1, 1, 0)
    counts = [n for name, n in fields.items() if HEAD_COUNT.search(name) and type(n) is int and n > 1]
    halvings, small = 0, heads
    while small > SMALL_HEADS and all(number % 8 == 0 for number in counts):
        halvings, small, counts = halvings + 1, small // 2, [number // 2 for number in counts]
    head = first(fields, HEAD_DIM) or max(1, hidden // heads)
    new_head = min(head, small_head(fields, small))
    if heads * head == hidden:
        return Widths(hidden, small * new_head, head, new_head, halvings)
    return Widths(hidden, small * max(1, round(hidden * new_head / (heads * head))), head, new_head, halvings)


def small_head(fields: dict[str, Any], heads: int) -> int:
    """Least elements of a head, from 4 or 8 on, for which the part that rotary positions turn is even."""
    rope = fields.get("rope_parameters") or {}
    nested = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    shares = [part.get("partial_rotary_factor") for part in (*nested, fields)] + [fields.get("rotary_pct")]
    least = 4 if heads > 2 * SMALL_HEADS else 8
    options = range(least, 65, 2)
    turned = [share for share in shares if isinstance(share, float) and share > 0]
    # Rotations over two axes (rows and columns) share what a quarter or half of a head offers: four elements at least.
    return next((size for size in options if all(int(size * s) > 0 and int(size * s) % 4 == 0 for s in turned)), 64)


def hidden_sizes(fields: dict[str, Any]) -> dict[int, int]:
    """Old hidden size → new one, for every part of a model: a projection between parts fits both."""
    sizes: dict[int, int] = {}
    for key, value in fields.items():
        if is_part(key, value):
            sizes |= hidden_sizes(value)
    own = widths(fields)
    return sizes | ({own.hidden: own.new_hidden} if own else {})


def shrink_fields(fields: dict[str, Any], hidden: dict[int, int], positions: int) -> dict[str, Any]:
    """The small fields of one configuration and the parts nested in it; `hidden` maps old hidden sizes to new ones."""
    size, keep = widths(fields), kept_layers(fields)
    experts = shrink_experts(fields)
    small: dict[str, Any] = {}
    for key, value in fields.items():
        if key == "per_layer_config" and isinstance(value, dict):
            special = {keep.index(int(layer)): part for layer, part in value.items() if int(layer) in keep}
            small[key] = {
                place: {name: shrink_fields(fields | part | {key: {}}, hidden, positions)[name] for name in part}
                for place, part in special.items()
            }
        elif is_part(key, value):
            small[key] = shrink_fields(value, hidden, positions)
        elif key in ("rope_parameters", "rope_scaling") and isinstance(value, dict) and size is not None:
            small[key] = shrink_rope(value, size, positions)
        elif isinstance(value, (list, tuple)):
            small[key] = shrink_list(key, list(value), fields, keep, size)
            if WIDTH.search(key) and per_layer(fields, key, first(fields, LAYERS) or 0):
                small[key] = [shrink_number(key, item, fields, size, keep, hidden, positions) for item in small[key]]
        elif type(value) is not int or value <= 0:
            small[key] = value
        elif key in experts:
            small[key] = experts[key]
        else:
            small[key] = shrink_number(key, value, fields, size, keep, hidden, positions)
    if "depths" not in fields and "image_size" in fields:
        small["image_size"] = shrink_image(fields["image_size"], fields.get("patch_size"))
    small |= shrink_taps(fields, keep) | shrink_scan(fields, small)
    if size is not None:
        heads = first(small, HEADS) or size.new_hidden
        for name in GROUPS:
            if isinstance(fields.get(name), int):
                small[name] = math.gcd(fields[name], heads)
    return small


def shrink_number(
    key: str,
    value: int,
    fields: dict[str, Any],
    size: Widths | None,
    keep: list[int],
    hidden: dict[int, int],
    positions: int,
) -> int:
    """The small value of one positive int field, by its name."""
    layers = first(fields, LAYERS) or 0
    if key in LAYERS and keep:
        return len(keep)
    if key in MORE_LAYERS:
        return min(value, 2)
    if key in FIRST_LAYERS:
        return sum(layer < value for layer in keep)
    if key in LAST_LAYERS:
        return sum(layer >= layers - value for layer in keep)
    if VOCABULARY.search(key) and key != "type_vocab_size":
        return min(value, SMALL_VOCABULARY + value % 16)
    if key in PLACES:
        return min(value, positions)
    if key in WINDOWS:
        return min(value, SMALL_WINDOW)
    if key in FRAMES:
        return min(value, 2 * (first(fields, ("tubelet_size", "temporal_patch_size")) or 1) * 2)
    if key in QUERIES:
        return min(value, SMALL_QUERIES)
    if key in IMAGE_TOKENS:
        return min(value, SMALL_IMAGE)  # a square number no greater than the patches of a small image
    if FEATURE_LAYER.search(key):
        return -1  # of a part whose number of layers stands elsewhere
    if size is None or value < SMALL_HEADS:
        return hidden.get(value, value) if WIDTH.search(key) else value
    if HEAD_COUNT.search(key):
        return value >> size.halvings if value > 1 else value
    if key == "query_pre_attn_scalar" and value == size.head:
        return size.new_head
    if HEAD_SIZE.search(key):
        return size.new_head if value == size.head else even(value * size.new_head / size.head)
    if not WIDTH.search(key):
        return value
    if value == size.hidden:
        return size.new_hidden
    if value in hidden:
        return hidden[value]
    if FIXED_WIDTH.search(key):
        return value
    exact = value * size.new_hidden / size.hidden
    return int(exact) if exact.is_integer() else min(value, max(8, 8 * math.ceil(exact / 8)))


def even(value: float) -> int:
    """The nearest even number, at least 2."""
    return max(2, 2 * round(value / 2))


def shrink_experts(fields: dict[str, Any]) -> dict[str, int]:
    """The small numbers of experts, experts per token and expert groups; a count's remainder modulo 8 is kept."""
    total = first(fields, EXPERTS)
    if total is None or total <= SMALL_EXPERTS:
        return {}
    experts = SMALL_EXPERTS + total % SMALL_EXPERTS
    small = {name: experts for name in EXPERTS if fields.get(name) == total}
    small |= {name: min(fields[name], 2) for name in TOP_K if isinstance(fields.get(name), int)}
    name = next((name for name in EXPERT_GROUPS if isinstance(fields.get(name), int)), "")
    groups, chosen = fields.get(name, 1), fields.get("topk_group")
    if isinstance(chosen, int) and groups > 1:
        fewer = math.gcd(groups, experts // 2)  # at least two experts in a group
        small |= {name: fewer, "topk_group": max(1, math.ceil(chosen * fewer / groups))}
    return small


def shrink_image(image: Any, patch: Any) -> Any:
    """A small image size (pixels, or height and width) of a few patches; unchanged where there is no patch size."""
    if isinstance(image, (list, tuple)):
        sides = list(patch) if isinstance(patch, (list, tuple)) else [patch] * len(image)
        return [shrink_image(one, side) for one, side in zip(image, sides, strict=False)]
    if type(image) is not int or type(patch) is not int:
        return image
    # A patch of a few pixels is the first of several reductions, each of which halves the image.
    return min(image, SMALL_IMAGE * patch if patch >= SMALL_IMAGE else SMALL_PIXELS)


def shrink_scan(fields: dict[str, Any], small: dict[str, Any]) -> dict[str, Any]:
    """Heads and head size of a state-space scan, so that their product is the scan's width again if it was before."""
    heads, sizes = (next((name for name in names if fields.get(name)), "") for names in (SCAN_HEADS, SCAN_HEAD_SIZES))
    expand, hidden = fields.get("mamba_expand"), first(fields, HIDDEN)
    if not (heads and sizes and hidden and isinstance(expand, int) and type(fields[sizes]) is int):
        return {}
    new_hidden = first(small, HIDDEN) or hidden
    explicit = fields.get("mamba_d_ssm")
    if fields[heads] * fields[sizes] not in (expand * hidden, explicit):
        return {}
    inner = small["mamba_d_ssm"] if explicit == fields[heads] * fields[sizes] else expand * new_hidden
    count = math.gcd(min(small[heads], SMALL_HEADS), math.gcd(inner, expand * new_hidden))
    return {heads: count, sizes: inner // count}


def shrink_list(name: str, value: list[Any], fields: dict[str, Any], keep: list[int], size: Widths | None) -> list[Any]:
    """A list with one entry per layer cut to the kept layers, indices renumbered, a pyramid's stages one block deep.

    A list of widths that are all the hidden size, or that add up to it, follows the hidden size.
    """
    layers = first(fields, LAYERS) or 0
    if size is not None and value and all(type(item) is int for item in value) and size.hidden >= SMALL_HIDDEN:
        if set(value) == {size.hidden}:
            return [size.new_hidden] * len(value)
        if sum(value) == size.hidden and len(value) > 1 and min(value) >= 8:
            return share(value, size.new_hidden)
    if FEATURE_LAYER.search(name) and all(type(item) is int for item in value):
        return [-1 - place for place in range(len(value))][::-1] if len(value) > 1 else [-1 for _ in value]
    if name == "depths":
        return [min(item, 1) for item in value]
    if per_layer(fields, name, layers):
        picked = [value[layer] for layer in keep]
        return [min(item, SMALL_WINDOW) for item in picked] if name in WINDOWS else picked
    if is_index_list(name, value, layers):
        return [place for place, layer in enumerate(keep) if layer in value]
    return value


def shrink_rope(rope: dict[str, Any], size: Widths, positions: int) -> dict[str, Any]:
    """Rotary parameters for the small head: lists with one entry per frequency cut, original positions bounded."""
    small: dict[str, Any] = {}
    for key, value in rope.items():
        if isinstance(value, dict):
            small[key] = shrink_rope(value, size, positions)
        elif key == "mrope_section" and isinstance(value, (list, tuple)):
            small[key] = share(list(value), sum(value) * size.new_head // size.head)
        elif isinstance(value, (list, tuple)):
            small[key] = list(value)[: max(1, len(value) * size.new_head // size.head)]
        elif key == "original_max_position_embeddings":
            small[key] = min(value, positions // 2)
        else:
            small[key] = value
    return small


def share(parts: list[int], total: int) -> list[int]:
    """`total` divided in proportion to `parts`, rounded down but for the last, which takes what is left."""
    head = [part * total // sum(parts) for part in parts[:-1]]
    return [*head, total - sum(head)]


def least_vocabulary(fields: dict[str, Any]) -> int | None:
    """The smallest vocabulary of a configuration and its parts."""
    own = [fields["vocab_size"]] if isinstance(fields.get("vocab_size"), int) else []
    parts = [least_vocabulary(value) for key, value in fields.items() if is_part(key, value)]
    return min([*own, *(part for part in parts if part is not None)], default=None)


def move_tokens(fields: dict[str, Any], vocabulary: int | None, moved: dict[int, int]) -> dict[str, Any]:
    """`fields`, special token ids that no longer fit moved to the end of the vocabulary; equal ids stay equal."""

    def move(token: Any) -> Any:
        if vocabulary is None or type(token) is not int or token < vocabulary:
            return token
        return moved.setdefault(token, max(0, vocabulary - 1 - len(moved)))

    result: dict[str, Any] = {}
    for key, value in fields.items():
        if is_part(key, value):
            result[key] = move_tokens(value, vocabulary, moved)
        elif SPECIAL_TOKEN.search(key):
            result[key] = [move(item) for item in value] if isinstance(value, (list, tuple)) else move(value)
        else:
            result[key] = value
    return result


def without_dropout(fields: dict[str, Any]) -> dict[str, Any]:
    """`fields` with every dropout, layer drop, router noise and random input mask switched off, in nested parts too."""
    result: dict[str, Any] = {}
    for key, value in fields.items():
        if is_part(key, value):
            result[key] = without_dropout(value)
        elif key == "apply_spec_augment":
            result[key] = False
        elif "drop" in key or "jitter" in key or key.endswith(("_pdrop", "mask_time_prob")):
            several = isinstance(value, (list, tuple)) and all(isinstance(rate, float) for rate in value)
            result[key] = 0.0 if isinstance(value, float) else [0.0] * len(value) if several else value
        else:
            result[key] = value
    return result
