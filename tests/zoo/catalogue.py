"""The cases of the zoo: one per transformers class, found by walking the library's own tables, and the plain torch models."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autotp.errors import AutotpError
from autotp.huggingface import build_from_config
from autotp.loading import LoadedModel, tensors
from autotp.shrink import SMALL_PIXELS, count, shrink_config
from autotp.verify import without_dropout
from tests.zoo import plain, plain_convolutions  # noqa: F401  (the import enters its models into the table of plain)

BATCH, SEQ = 2, 12
LARGEST = 40_000_000
"""Parameters of the largest model that is run: all ranks hold their parts in one process."""

GROUPED = "+grouped_mm"
"""Ends the name of a mixture-of-experts model that is run in float32 with the experts' default implementation."""

SAME_BODY = (
    "SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING", "MULTIPLE_CHOICE", "NEXT_SENTENCE_PREDICTION",
    "PRETRAINING", "TEXT_ENCODING", "BACKBONE", "IMAGE", "AUDIO_FRAME_CLASSIFICATION", "AUDIO_XVECTOR", "MASKED_IMAGE_MODELING",
    "RETRIEVAL", "TABLE_QUESTION_ANSWERING", "DOCUMENT_QUESTION_ANSWERING", "MULTIMODAL_LM",
)  # fmt: skip
"""Heads that put one more linear layer on a body that another head covers; taken only where there is no other head."""


@dataclass(frozen=True)
class Case:
    """One model of the zoo: its name, the transformers configuration it is built from (empty: a plain model), and its head."""

    name: str
    kind: str = ""
    head: str = "plain"
    grouped: bool = False

    def build(self, dtype: torch.dtype) -> LoadedModel:
        """The tiny random model with real inputs, in train mode without dropout."""
        return build_transformers(self, dtype) if self.kind else build_plain(self.name, dtype)


@functools.cache
def cases(every_head: bool = False) -> tuple[Case, ...]:
    """All cases: for each configuration its heads that are more than a linear layer, or with `every_head` all of them."""
    found = [Case(name) for name in plain.MODELS] + list(_transformers(every_head))
    return tuple(sorted(found, key=lambda case: case.grouped))


def case_of(name: str) -> Case:
    """The case of that name."""
    return next(case for case in cases() if case.name == name)


def _transformers(every_head: bool) -> Iterator[Case]:
    from transformers.models.auto import modeling_auto

    tables = {name: table for name, table in vars(modeling_auto).items() if name.startswith("MODEL_") and name.endswith("MAPPING_NAMES")}
    heads = {
        name.removeprefix("MODEL_").removeprefix("FOR_").removesuffix("MAPPING_NAMES").removesuffix("_") or "BASE": table
        for name, table in tables.items()
    }
    main = [head for head in heads if head not in (*SAME_BODY, "BASE")]
    seen: set[str] = set()
    kinds: set[str] = set()
    for head in [*main, *(head for head in (*SAME_BODY, "BASE") if head in heads)]:
        extra = head not in main
        before = set(kinds)
        for kind, names in heads[head].items():
            if extra and kind in before and not every_head:
                continue
            for name in names if isinstance(names, (tuple, list)) else (names,):
                if name in seen:
                    continue
                seen.add(name)
                kinds.add(kind)
                yield Case(name, kind, head.lower())
                if _has_experts(name):
                    yield Case(name + GROUPED, kind, head.lower(), grouped=True)


def _has_experts(name: str) -> bool:
    """Whether a class has experts whose implementation can be chosen; read off its file, since importing all takes a minute."""
    import transformers

    module = transformers._class_to_module.get(name, "")
    path = Path(transformers.__file__).parent.joinpath(*module.split(".")).with_suffix(".py")
    return path.is_file() and "use_experts_implementation" in path.read_text()


def build_plain(name: str, dtype: torch.dtype) -> LoadedModel:
    """A model of `tests.zoo.plain` in train mode, in `dtype`."""
    with tensors(False):
        model, args, kwargs = plain.MODELS[name]()
        model = model.to(dtype).train()
        without_dropout(model)
        args, kwargs = torch.utils._pytree.tree_map_only(
            torch.Tensor, lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, (args, kwargs)
        )
    return LoadedModel(model, args, kwargs, name, None, None)


def build_transformers(case: Case, dtype: torch.dtype) -> LoadedModel:
    """A shrunken random transformers model of the case's class."""
    import transformers

    transformers.logging.set_verbosity_error()
    config = shrink_config(make_config(case))
    config.architectures = [case.name.removesuffix(GROUPED)]
    if case.grouped:
        dtype = torch.float32
    options: dict[str, Any] = {"batch": BATCH, "seq": SEQ, "dtype": dtype, "mode": "train", "pixels": SMALL_PIXELS}
    loaded = build_from_config(config, case.name, fake=False, **options)
    size = count(loaded)
    if size > LARGEST:
        raise AutotpError(f"still has {size / 1e6:.0f} million parameters when shrunk")
    return loaded


def make_config(case: Case) -> Any:
    """The default configuration of a model type, with what it leaves open although the model needs it."""
    import transformers

    config = transformers.CONFIG_MAPPING[case.kind]()
    cls = getattr(transformers, case.name.removesuffix(GROUPED))
    rotates_by_section = "mrope_section" in inspect.getsource(inspect.getmodule(cls) or cls)
    for part in _parts(config):
        complete(part, rotates_by_section)
    if case.head == "causal_lm" and getattr(config, "is_decoder", None) is False:
        config.is_decoder = True
    return config


def _parts(config: Any) -> Iterator[Any]:
    """A configuration and those nested in it."""
    yield config
    for part in vars(config).values():
        if hasattr(part, "to_dict"):
            yield from _parts(part)


def complete(config: Any, rotates_by_section: bool) -> None:
    """Give fields that a default configuration leaves None, and every published one sets, the value that follows from the others."""
    own = vars(config)  # attributes that vary by layer raise when they are asked for
    hidden, heads = own.get("hidden_size"), own.get("num_attention_heads")
    follows: dict[str, Any] = {
        "vocab_size": 1000, "num_experts_per_tok": 2, "n_routed_experts": 8, "n_shared_experts": 1, "num_key_value_heads": heads,
        "default_language": next(iter(own.get("languages") or []), None),
        "prediction_length": 4, "context_length": 8, "audio_token_id": 24, "image_token_id": 25, "image_token_index": 25,
    }  # fmt: skip
    if isinstance(hidden, int) and isinstance(heads, int):
        follows["head_dim"] = hidden // heads
    for name, value in follows.items():
        if value is not None and own.get(name, 0) is None:
            setattr(config, name, value)
    rope = own.get("rope_parameters")
    if rotates_by_section and isinstance(rope, dict) and "rope_type" in rope and "head_dim" in follows:
        head = own.get("head_dim") or follows["head_dim"]
        turned = int(head * rope.get("partial_rotary_factor", 1.0)) // 2
        rope.setdefault("mrope_section", [turned - 2 * (3 * turned // 8), 3 * turned // 8, 3 * turned // 8])
