"""Hugging Face models: from a configuration (`hf:ID` or a `config.json`) to a module and the inputs of one step."""

from __future__ import annotations

import copy
import json
from typing import Any

import torch
from torch import nn

from autotp.errors import AutotpError
from autotp.huggingface_inputs import example_inputs, first_int, text_config
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
    config: Any,
    name: str,
    *,
    batch: int | None,
    seq: int | None,
    dtype: torch.dtype | None,
    mode: str,
    fake: bool,
    pixels: int = 224,
) -> LoadedModel:
    """The model of a transformers configuration (which is changed: no cache) and inputs for it; see `load_model`.

    Images are `pixels` × `pixels` where the configuration names no size.
    """
    notes = []
    if getattr(config, "quantization_config", None) is not None:
        notes.append("The configuration's quantization is left out: weights are built unquantized.")
        del config.quantization_config
    for part in (config, text_config(config)):
        if hasattr(part, "use_cache"):
            part.use_cache = False
    cls: Any = model_class(config)
    parts = [config, text_config(config), *vars(config).values()]
    config = next((part for part in parts if type(part) is getattr(cls, "config_class", None)), config)
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
        kwargs, more = example_inputs(model, name, batch, seq, dtype, mode, pixels)
    has_sequence = any(tensor.ndim > 1 and tensor.shape[1] == seq for tensor in kwargs.values())
    return LoadedModel(model, (), kwargs, name, batch, seq if has_sequence else None, (*notes, *more))


def empty_like(tensor: torch.Tensor) -> torch.Tensor:
    """A CPU tensor of the same shape, strides and dtype, under whatever tensor mode is active."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


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
