"""The inputs of one step of a Hugging Face model, from its configuration and the signature of its forward."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from autotp.errors import AutotpError

AUDIO_SAMPLES = 16000
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")


def example_inputs(
    model: Any, name: str, batch: int, seq: int, dtype: torch.dtype, mode: str, pixels: int = 224
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Keyword arguments for one step of a transformers model, and notes; built under whatever tensor mode is active.

    The main input is that of `main_input_name`; a language model that reads images or audio gets one per sequence, an
    encoder-decoder also `decoder_input_ids`, a two-tower model both of its inputs, every other argument that the
    forward demands is made by its name, and in train mode come the `labels` of the model's task. Token ids have shape
    (batch, seq); images have the configuration's size, or `pixels` × `pixels` where it names none; no two inputs are one
    tensor.
    """
    config, main = model.config, model.main_input_name
    accepted = inspect.signature(model.forward).parameters
    if main == "inputs" and hasattr(getattr(model, "encoder", None), "main_input_name"):
        inputs = {main: main_input(model.encoder.main_input_name, model.encoder.config, name, batch, seq, dtype, pixels)}
    else:
        inputs = {main: main_input(main, config, name, batch, seq, dtype, pixels)}
    notes = []
    head = getattr(model, "get_output_embeddings", lambda: None)() is not None
    if head and "input_ids" in accepted:
        for sense in SENSES:
            if hasattr(config, sense.config) and sense.kind in accepted:
                found = with_sense(model, sense, inputs.get("input_ids"), name, batch, seq, dtype, pixels)
                inputs |= found
                if not found and main == "input_ids":
                    notes.append(f"The part of the model that reads {sense.what} is left out: its inputs are text alone.")
    elif hasattr(config, "vision_config") and hasattr(config, "text_config"):
        towers = [kind for kind in ("input_ids", "pixel_values") if kind in accepted]
        inputs = {kind: main_input(kind, config, name, batch, seq, dtype, pixels) for kind in towers} | inputs
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = token_ids(config, batch, seq)
    for key, parameter in accepted.items():
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD and key not in inputs:
            inputs[key] = demanded(key, config, name, batch, seq, dtype, pixels)
    if mode == "train":
        labels = None if "labels" not in accepted else targets(model, head, batch, seq, inputs)
        if labels is None:
            notes.append(f"{type(model).__name__} gets no labels: the sum of its outputs stands for the loss.")
        else:
            inputs["labels"] = labels
    return inputs, notes


@dataclass(frozen=True)
class Sense:
    """What a language model may read besides text: its part of the configuration, input, token, and the method that reads it."""

    what: str
    config: str
    kind: str
    tokens: tuple[str, ...]
    method: str


SENSES = (
    Sense("images", "vision_config", "pixel_values", ("image_token_id", "image_token_index"), "get_image_features"),
    Sense("audio", "audio_config", "input_features", ("audio_token_id", "audio_token_index"), "get_audio_features"),
)


def with_sense(
    model: Any, sense: Sense, ids: torch.Tensor | None, name: str, batch: int, seq: int, dtype: torch.dtype, pixels: int
) -> dict[str, torch.Tensor]:
    """Text with one image (or recording) per sequence, and as many tokens for it in the text as it has features.

    The number is that of the model's own method, tried with the shapes in use. Empty where the model has no such method,
    refuses all shapes (it may want more inputs, such as a grid of patches), or gives no equal number per sequence.
    """
    token = first_int(model.config, *sense.tokens)
    accepted = inspect.signature(model.forward).parameters
    if token is None or not hasattr(model, sense.method):
        return {}
    seen = main_input(sense.kind, getattr(model.config, sense.config), name, batch, seq, dtype, pixels)
    for given in (seen, seen[:, None]):
        try:
            with torch.no_grad():
                found = getattr(model, sense.method)(**{sense.kind: given})
        except Exception:  # another shape is tried, then the model is left to its text
            continue
        leaves = [leaf for leaf in _tensors(getattr(found, "pooler_output", found)) if leaf.ndim > 1]
        count = sum(leaf.numel() // leaf.shape[-1] for leaf in leaves)
        if count % batch or count < batch:
            continue
        count //= batch
        text = token_ids(model.config, batch, seq) if ids is None else ids
        text = text[:, count:] if text.shape[1] > count else text
        ids = torch.cat([torch.full((batch, count), token, dtype=text.dtype), text], 1)
        kinds = {key: (ids == token).to(ids.dtype) for key in TOKEN_TYPES if key in accepted}
        return {"input_ids": ids, sense.kind: given, **kinds}
    return {}


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested lists and tuples."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _tensors(item)


def targets(
    model: Any, head: bool, batch: int, seq: int, inputs: dict[str, torch.Tensor]
) -> torch.Tensor | None:
    """The labels of a model's task (tokens, classes, or a class per pixel), or None where they are no single tensor.

    The task is the end of the class's name, by which the library itself tells heads apart. Transcripts for a CTC loss are
    left out, since its models look at the values of their labels, which no trace can.
    """
    config, task = model.config, type(model).__name__
    classes = getattr(config, "num_labels", None) or 2
    main = inputs[model.main_input_name]
    if task.endswith("ForTokenClassification"):
        return torch.randint(0, classes, main.shape[:2])
    if task.endswith("Classification") and classes > 1:
        return torch.randint(0, classes, (batch,))
    if task.endswith("ForSemanticSegmentation") and main.ndim == 4:
        return torch.randint(0, classes, (batch, *main.shape[2:]))
    if not head:
        return None
    tokens = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    return token_ids(config, batch, seq if tokens is None else tokens.shape[1])


def demanded(key: str, config: Any, name: str, batch: int, seq: int, dtype: torch.dtype, pixels: int) -> torch.Tensor:
    """The tensor for an argument that a forward demands besides its main input, by the argument's name."""
    if key.endswith("input_ids"):
        return token_ids(config, batch, seq)
    if key.endswith("_mask"):
        return torch.ones(batch, seq, dtype=torch.long)
    if key == "bbox":
        return torch.tensor([0, 0, 1, 1]).expand(batch, seq, 4).clone()
    return main_input(key, config, name, batch, seq, dtype, pixels)


def main_input(kind: str, config: Any, name: str, batch: int, seq: int, dtype: torch.dtype, pixels: int = 224) -> torch.Tensor:
    """The tensor for the input that transformers calls `kind`: tokens, an image, a video, audio features or samples."""
    if kind == "input_ids":
        return token_ids(config, batch, seq)
    seen, heard = part_of(config, "vision_config", "encoder"), part_of(config, "audio_config", "encoder_config", "encoder")
    size = getattr(seen, "image_size", None) or pixels
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    image = (first_int(seen, "num_channels", "in_channels", "in_chans") or 3, height, width)
    mel, source = first_int(heard, "num_mel_bins"), first_int(heard, "max_source_positions")
    frames = first_int(heard, "max_length") or seq
    spectrogram = kind == "input_features" or (kind == "input_values" and mel and not hasattr(heard, "conv_stride"))
    shape: tuple[int, ...]
    if kind == "pixel_values" and first_int(seen, "num_frames") is None:
        shape = (batch, *image)
    elif kind in ("pixel_values", "pixel_values_videos"):
        shape = (batch, first_int(seen, "num_frames", "frames_per_clip") or 16, *image)
    elif kind == "input_features" and mel and source:
        shape = (batch, mel, 2 * source)  # a convolution of stride 2 turns mel frames into positions
    elif spectrogram:
        features = first_int(heard, "feature_projection_input_dim", "input_feat_per_channel", "hidden_size")
        shape = (batch, frames, mel or features or 80)
    elif kind == "input_values":
        channels = first_int(config, "audio_channels")
        shape = (batch, channels, AUDIO_SAMPLES) if channels else (batch, AUDIO_SAMPLES)
    elif kind == "past_values":
        lags = getattr(config, "lags_sequence", None)
        length = (first_int(config, "context_length") or seq) + (max(lags) if lags else 0)
        channels = first_int(config, "num_input_channels", "input_size") or 1
        shape = (batch, length, channels) if channels > 1 or not lags else (batch, length)
    else:
        raise AutotpError(
            f"no example can be made for the input `{kind}` of `{name}`; give file.py:callable with inputs."
        )
    return torch.randn(shape, dtype=dtype)


def part_of(config: Any, *names: str) -> Any:
    """The first of the nested configurations `names`, or `config` itself where there is none of them."""
    return next((part for name in names if hasattr(part := getattr(config, name, None), "to_dict")), config)


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


def text_config(config: Any) -> Any:
    """The configuration of the text part of a model with several parts; `config` itself where there is only one."""
    try:
        return config.get_text_config()
    except (AttributeError, ValueError):
        return config


def first_int(config: Any, *names: str) -> int | None:
    """The first of the fields `names` of a configuration that is an int."""
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)
