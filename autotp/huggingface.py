"""Hugging Face models: from a configuration (`hf:ID` or a `config.json`) to a module and the inputs of one step."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from autotp.errors import AutotpError
from autotp.loading import (
    DEFAULT_SEQ,
    LoadedModel,
    config_path,
    did_you_mean,
    explained,
    map_tensors,
    nearest_example,
    parse_dtype,
    tensors,
)

# Auto classes tried in turn for a config that names no architecture; SEQ2SEQ_HEADS come first for an encoder-decoder.
DECODER_HEADS = ("CAUSAL_LM", "MASKED_LM", "IMAGE_TEXT_TO_TEXT")
SEQ2SEQ_HEADS = ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ")
OTHER_HEADS = ("CTC", "IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION", "VIDEO_CLASSIFICATION", "SEQUENCE_CLASSIFICATION")

AUDIO_SAMPLES = 16000
POSITIONS = ("max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len", "max_sequence_length")


def read_config(spec: str, overrides: dict[str, Any] | None = None) -> tuple[str, Any]:
    """The name and the `PreTrainedConfig` that `hf:ID`, a directory or a JSON file stands for.

    Raises:
        AutotpError: no such model, directory or file, or not a configuration that the installed transformers knows.
    """
    if spec.startswith("hf:"):
        transformers = load_transformers(spec)
        name = spec.removeprefix("hf:")
        advice = f"give the path of a config.json instead{nearest_example(name)}"
        with explained(
            f"no configuration of `{name}` on the Hugging Face hub or in its local cache (ERROR); {advice}."
        ):
            data = transformers.PreTrainedConfig.get_config_dict(name)[0]
        if not data:
            raise AutotpError(f"`{name}` has no config.json; {advice}.")
        return name, make_config(data, spec, overrides)
    path = config_path(spec)
    with explained(f"`{path}` is not a JSON configuration: ERROR."):
        data = json.loads(path.read_text())
    name = path.resolve().parent.name if path.name == "config.json" else path.stem
    return name, make_config(data, str(path), overrides)


def load_transformers(spec: str) -> Any:
    """The package transformers, imported when a model needs it; AutotpError if it is not installed."""
    try:
        import transformers
    except ImportError:
        raise AutotpError(f"`{spec}` needs the package transformers; install it or use file.py:callable.") from None
    return transformers


def make_config(data: Any, where: str, overrides: dict[str, Any] | None = None) -> Any:
    """The transformers configuration for the contents of a `config.json`, `overrides` in place of its own fields."""
    known_kinds = load_transformers(where).CONFIG_MAPPING
    kind = data.get("model_type") if isinstance(data, dict) else None
    if kind is None:
        raise AutotpError(f"`{where}` has no `model_type`, so it is no Hugging Face configuration; add the field.")
    if kind not in known_kinds:
        raise AutotpError(
            f"`{where}` has model_type `{kind}`, which the installed transformers does not know"
            f"{did_you_mean(kind, list(known_kinds.keys()))}; build the model in Python and give file.py:callable."
        )

    def construct(fields: dict[str, Any]) -> Any:
        with explained(f"`{where}` is not a valid {kind} configuration: ERROR."):
            return known_kinds[kind].from_dict(copy.deepcopy(fields))

    config = construct(data)
    if not overrides:
        return config
    changed = copy.deepcopy(data)
    for key, value in overrides.items():
        *parents, last = key.split(".")
        owner, fields = config, changed
        for parent in parents:
            owner, fields = getattr(owner, parent, None), fields.setdefault(parent, {})
        if owner is None or not hasattr(owner, last):
            known = [] if owner is None else list(owner.to_dict())
            raise AutotpError(f"the {kind} configuration `{where}` has no field `{key}`{did_you_mean(last, known)}.")
        fields[owner.attribute_map.get(last, last)] = value
    return construct(changed)


def model_class(config: Any) -> type[nn.Module]:
    """The class to build: the configuration's own `architectures[0]`, else the first Auto class that takes it."""
    import transformers
    from transformers.models.auto import modeling_auto

    named: Any = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    if isinstance(named, type) and issubclass(named, nn.Module):
        return named
    heads = DECODER_HEADS + SEQ2SEQ_HEADS
    if getattr(config, "is_encoder_decoder", False):
        heads = SEQ2SEQ_HEADS + DECODER_HEADS
    for table in [f"MODEL_FOR_{head}_MAPPING" for head in heads + OTHER_HEADS] + ["MODEL_MAPPING"]:
        mapping = getattr(modeling_auto, table)
        if type(config) in mapping:
            found: Any = mapping[type(config)]
            chosen: type[nn.Module] = found[0] if isinstance(found, (tuple, list)) else found
            return chosen
    raise AutotpError(
        f"transformers has no model class for a `{config.model_type}` configuration; name one in `architectures`."
    )


def build_from_config(
    config: Any, name: str, *, batch: int | None, seq: int | None, dtype: torch.dtype | None, mode: str, fake: bool
) -> LoadedModel:
    """The model of a transformers configuration (which is changed: no cache) and inputs for it; see `load_model`."""
    notes = []
    if getattr(config, "quantization_config", None) is not None:
        notes.append("The configuration's quantization is left out: weights are built unquantized.")
        del config.quantization_config
    for part in (config, text_config(config)):
        if hasattr(part, "use_cache"):
            part.use_cache = False
    cls: Any = model_class(config)
    if getattr(cls, "config_class", None) is type(text_config(config)):
        config = text_config(config)
    own = getattr(config, "dtype", None) or getattr(text_config(config), "dtype", None)
    own = parse_dtype(own) if isinstance(own, str) else own
    dtype = dtype or own or (torch.bfloat16 if fake else torch.float32)
    experts = {}
    if dtype is torch.float64 and getattr(cls, "_can_set_experts_implementation", lambda: False)():
        experts = {"experts_implementation": "batched_mm"}  # grouped_mm has no float64 kernel
        notes.append(
            "Experts are multiplied by batched instead of grouped matrix products, which have no float64 kernel."
        )
    batch = 1 if batch is None else batch
    # On the meta device transformers skips initialisation, and constructors that read a number off a tensor still work.
    refusal = f"{cls.__name__} cannot be built from the configuration of `{name}`: ERROR."
    with explained(refusal), torch.device("meta") if fake else tensors(False):
        model = cls._from_config(config, dtype=dtype, **experts)
    with tensors(fake):
        if fake:
            map_tensors(model, empty_like)
        model.train(mode == "train")
        limit = max_positions(model)
        if seq is not None and limit is not None and seq > limit:
            raise AutotpError(
                f"sequence length {seq} is longer than the {limit} positions of `{name}`; ask for at most {limit}."
            )
        seq = min(limit or DEFAULT_SEQ, DEFAULT_SEQ) if seq is None else seq
        kwargs, more = example_inputs(model, name, batch, seq, dtype, mode)
    has_sequence = any(tensor.ndim > 1 and tensor.shape[1] == seq for tensor in kwargs.values())
    return LoadedModel(model, (), kwargs, name, batch, seq if has_sequence else None, (*notes, *more))


def empty_like(tensor: torch.Tensor) -> torch.Tensor:
    """A CPU tensor of the same shape, strides and dtype, under whatever tensor mode is active."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


def text_config(config: Any) -> Any:
    """The configuration of the text part of a model with several parts; `config` itself where there is only one."""
    try:
        return config.get_text_config()
    except (AttributeError, ValueError):
        return config


def max_positions(model: Any) -> int | None:
    """Longest sequence in tokens that the model has positions for; None if unlimited (e.g. relative positions)."""
    text = text_config(model.config)
    if hasattr(text, "relative_attention_num_buckets"):
        return None
    limit = first_int(text, *POSITIONS)
    if limit is None or limit < 1:
        return None
    for path, module in model.named_modules():
        # Positions counted from the padding index on (as in RoBERTa) leave that many rows unused.
        if not (path.endswith("position_embeddings") and isinstance(module, nn.Embedding)):
            continue
        if module.padding_idx is not None:
            limit = min(limit, module.num_embeddings - module.padding_idx - 1)
    return limit


def first_int(config: Any, *names: str) -> int | None:
    """The first of the fields `names` of a configuration that is an int."""
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)


def example_inputs(
    model: Any, name: str, batch: int, seq: int, dtype: torch.dtype, mode: str
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Keyword arguments for one step of a transformers model, and notes; built under whatever tensor mode is active.

    The main input is that of `main_input_name`; an encoder-decoder also gets `decoder_input_ids`, a two-tower model
    both of its inputs, and a language model in train mode `labels`. Token ids have shape (batch, seq); no two inputs
    are one tensor.
    """
    config, main = model.config, model.main_input_name
    accepted = inspect.signature(model.forward).parameters
    inputs = {main: main_input(main, config, name, batch, seq, dtype)}
    notes = []
    head = getattr(model, "get_output_embeddings", lambda: None)() is not None
    if hasattr(config, "vision_config") and head and main == "input_ids":
        notes.append("Inputs are text alone: the part of the model that reads images is left out.")
    elif hasattr(config, "vision_config") and hasattr(config, "text_config"):
        towers = [kind for kind in ("input_ids", "pixel_values") if kind in accepted]
        inputs = {kind: main_input(kind, config, name, batch, seq, dtype) for kind in towers} | inputs
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = token_ids(config, batch, seq)
    if mode == "train":
        if head and "labels" in accepted:
            inputs["labels"] = token_ids(config, batch, seq)
        else:
            notes.append(f"{type(model).__name__} gets no labels: the sum of its outputs stands for the loss.")
    return inputs, notes


def main_input(kind: str, config: Any, name: str, batch: int, seq: int, dtype: torch.dtype) -> torch.Tensor:
    """The tensor for the input that transformers calls `kind`: tokens, an image, a video, audio features or samples."""
    if kind == "input_ids":
        return token_ids(config, batch, seq)
    seen = getattr(config, "vision_config", config)
    size = getattr(seen, "image_size", None) or 224
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    image = (first_int(seen, "num_channels", "in_channels", "in_chans") or 3, height, width)
    mel, source = first_int(config, "num_mel_bins"), first_int(config, "max_source_positions")
    frames = first_int(config, "max_length") or seq
    shape: tuple[int, ...]
    if kind == "pixel_values" and first_int(seen, "num_frames") is None:
        shape = (batch, *image)
    elif kind in ("pixel_values", "pixel_values_videos"):
        shape = (batch, first_int(seen, "num_frames", "frames_per_clip") or 16, *image)
    elif kind == "input_features" and mel and source:
        shape = (batch, mel, 2 * source)  # a convolution of stride 2 turns mel frames into positions
    elif kind == "input_features" or (kind == "input_values" and mel):
        features = first_int(config, "feature_projection_input_dim", "input_feat_per_channel", "hidden_size")
        shape = (batch, frames, mel or features or 80)
    elif kind == "input_values":
        shape = (batch, AUDIO_SAMPLES)
    else:
        raise AutotpError(
            f"no example can be made for the input `{kind}` of `{name}`; give file.py:callable with inputs."
        )
    return torch.randn(shape, dtype=dtype)


def token_ids(config: Any, batch: int, seq: int) -> torch.Tensor:
    """Random token ids of shape (batch, seq), from the widest run of ids without a special token."""
    vocabulary = (
        first_int(text_config(config), "vocab_size") or first_int(config, "vocab_size", "decoder_vocab_size") or 2
    )
    fences = sorted({-1, vocabulary} | {token for token in special_tokens(config.to_dict()) if 0 <= token < vocabulary})
    low, high = max(itertools.pairwise(fences), key=lambda pair: pair[1] - pair[0])
    return torch.randint(low + 1, max(high, low + 2), (batch, seq))


def special_tokens(fields: dict[str, Any]) -> Iterator[int]:
    """Every id in fields such as `pad_token_id` or `image_token_index`, nested configurations included."""
    for key, value in fields.items():
        if isinstance(value, dict):
            yield from special_tokens(value)
        elif str(key).endswith(("_token_id", "_token_ids", "_token_index")):
            yield from (
                item for item in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(item, int)
            )
