"""Small random models of real architectures, with sizes that do not divide by the ranks: 14 heads on 2 key heads, vocabulary 131."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from autotp.price.cluster import Cluster, load_cluster

VOCABULARY = 131


@dataclass(frozen=True)
class Example:
    """A model with the inputs of one step, in float64."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _decoder(name: str, **changed: Any) -> Any:
    import transformers

    sizes = {
        "hidden_size": 56, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 14, "num_key_value_heads": 2,
        "head_dim": 4, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "use_cache": False, "pad_token_id": 0,
    }  # fmt: skip
    return getattr(transformers, name)(**{**sizes, **changed})


def _gpt2(**changed: Any) -> Any:
    import transformers

    sizes = {
        "n_embd": 56, "n_layer": 2, "n_head": 14, "vocab_size": VOCABULARY, "n_positions": 64, "use_cache": False,
        "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, "bos_token_id": 1, "eos_token_id": 1,
    }  # fmt: skip
    return transformers.GPT2Config(**{**sizes, **changed})


def _opt(**changed: Any) -> Any:
    import transformers

    sizes = {
        "hidden_size": 56, "ffn_dim": 72, "num_hidden_layers": 2, "num_attention_heads": 14, "vocab_size": VOCABULARY,
        "max_position_embeddings": 64, "dropout": 0, "use_cache": False, "word_embed_proj_dim": 56,
    }  # fmt: skip
    return transformers.OPTConfig(**{**sizes, **changed})


def _bert(**changed: Any) -> Any:
    import transformers

    sizes = {
        "hidden_size": 56, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 14, "vocab_size": VOCABULARY,
        "max_position_embeddings": 64, "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0,
    }  # fmt: skip
    return transformers.BertConfig(**{**sizes, **changed})


CONFIGS: dict[str, Callable[..., Any]] = {
    "gpt2": _gpt2,
    "llama": lambda **k: _decoder("LlamaConfig", **k),
    "mistral": lambda **k: _decoder("MistralConfig", **k),
    "qwen2": lambda **k: _decoder("Qwen2Config", **k),
    "qwen3": lambda **k: _decoder("Qwen3Config", **k),
    "gemma2": lambda **k: _decoder("Gemma2Config", **{"sliding_window": 8, **k}),
    "opt": _opt,
    "bert": _bert,
}
NAMES = (*CONFIGS, "mlp")


def example(name: str, *, batch: int = 3, seq: int = 10, dtype: torch.dtype = torch.float64, **changed: Any) -> Example:
    """The model `name` in train mode with seeded weights and inputs; `changed` are configuration fields."""
    torch.manual_seed(0)
    if name == "mlp":
        model = nn.Sequential(nn.Linear(20, 31), nn.GELU(), nn.Linear(31, 20), nn.LayerNorm(20)).to(dtype)
        return Example(model, (torch.randn(batch, 20, dtype=dtype),), {})
    import transformers

    kind = transformers.AutoModelForMaskedLM if name == "bert" else transformers.AutoModelForCausalLM
    config = CONFIGS[name](**changed)
    model = kind.from_config(config).to(dtype).train()
    ids, labels = torch.randint(1, config.vocab_size, (2, batch, seq))
    labels[0, 3] = -100
    return Example(model, (), {"input_ids": ids, "labels": labels})


def splitting_pays() -> Cluster:
    """A cluster whose devices are so slow that splitting work beats every collective: tiny models are then planned like large ones."""
    cluster = load_cluster("dgx-h100")
    device = cluster.accelerator
    slow = {kind: peak * 1e-7 for kind, peak in device.peak_flops.items()}
    return replace(cluster, accelerator=replace(device, peak_flops=slow, bandwidth=device.bandwidth * 1e-6))


class InFloat64(TorchFunctionMode):
    """Computes in float64 what a model casts to float32 (transformers' norms, rotary tables and losses), so that equality can be strict."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = torch.Tensor.double if func is torch.Tensor.float else func
        args, kwargs = tree_map(lambda item: torch.float64 if item is torch.float32 else item, (args, kwargs or {}))
        return func(*args, **kwargs)


TOLERANCE = 1e-9
"""For float64 throughout."""
