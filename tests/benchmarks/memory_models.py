"""The models of `memory_accuracy`: small, of different kinds, at sizes at which no part of memory is noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY = 1000


@dataclass(frozen=True)
class Step:
    """A model that returns a loss, and the inputs of one step."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class WithLoss(nn.Module):
    """A classifier and its cross-entropy."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(self.body(x).float(), labels)


class Recurrent(nn.Module):
    """An embedding, an LSTM, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(500, 64), nn.Linear(96, 500)
        self.lstm = nn.LSTM(64, 96, num_layers=2, batch_first=True)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(self.lstm(self.embedding(ids))[0])
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def _causal(config: Any, batch: int = 8, seq: int = 64, dtype: torch.dtype = torch.float32) -> Step:
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    ids, labels = torch.randint(1, config.vocab_size, (2, batch, seq))
    return Step(model, (), {"input_ids": ids, "labels": labels})


def _decoder(name: str, **changed: Any) -> Any:
    import transformers

    sizes = {
        "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 16, "vocab_size": VOCABULARY, "max_position_embeddings": 128, "use_cache": False, "pad_token_id": 0,
    }  # fmt: skip
    return getattr(transformers, name)(**{**sizes, **changed})


def gpt2() -> Step:
    import transformers

    return _causal(transformers.GPT2Config(n_embd=128, n_layer=4, n_head=8, vocab_size=VOCABULARY, n_positions=128, use_cache=False))


def bert() -> Step:
    import transformers

    config = transformers.BertConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8, vocab_size=VOCABULARY
    )
    torch.manual_seed(0)
    ids, labels = torch.randint(1, VOCABULARY, (2, 8, 64))
    return Step(transformers.BertForMaskedLM(config), (), {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})


def t5() -> Step:
    import transformers

    config = transformers.T5Config(
        d_model=128, d_kv=16, d_ff=320, num_layers=3, num_heads=8, vocab_size=VOCABULARY, use_cache=False, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    ids, labels = torch.randint(1, VOCABULARY, (2, 8, 48))
    return Step(transformers.T5ForConditionalGeneration(config), (), {"input_ids": ids, "labels": labels})


def vit() -> Step:
    import transformers

    config = transformers.ViTConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8, image_size=64, patch_size=8, num_labels=100
    )
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config)
    return Step(model, (), {"pixel_values": torch.randn(8, 3, 64, 64), "labels": torch.randint(0, 100, (8,))})


def whisper() -> Step:
    import transformers

    config = transformers.WhisperConfig(
        d_model=128, encoder_layers=2, decoder_layers=2, encoder_attention_heads=8, decoder_attention_heads=8, encoder_ffn_dim=384,
        decoder_ffn_dim=384, vocab_size=VOCABULARY, num_mel_bins=20, max_source_positions=64, max_target_positions=64, use_cache=False,
        decoder_start_token_id=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.WhisperForConditionalGeneration(config)
    return Step(model, (), {"input_features": torch.randn(4, 20, 128), "labels": torch.randint(1, VOCABULARY, (4, 32))})


def mamba() -> Step:
    import transformers

    config = transformers.MambaConfig(hidden_size=96, num_hidden_layers=2, vocab_size=VOCABULARY, state_size=8, use_cache=False)
    return _causal(config, batch=4, seq=32)


def mlp() -> Step:
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Linear(256, 512), nn.GELU(), nn.Dropout(0.1), nn.Linear(512, 512), nn.ReLU(), nn.LayerNorm(512), nn.Linear(512, 100)
    )
    return Step(WithLoss(body), (torch.randn(512, 256), torch.randint(0, 100, (512,))), {})


def convnet() -> Step:
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 128, 3, padding=1),
        nn.BatchNorm2d(128), nn.ReLU(), nn.Conv2d(128, 128, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(128, 100),
    )  # fmt: skip
    return Step(WithLoss(body), (torch.randn(8, 3, 32, 32), torch.randint(0, 100, (8,))), {})


def lstm() -> Step:
    torch.manual_seed(0)
    ids, labels = torch.randint(0, 500, (2, 8, 24))
    return Step(Recurrent(), (ids, labels), {})


MODELS: dict[str, Callable[[], Step]] = {
    "gpt2": gpt2,
    "llama": lambda: _causal(_decoder("LlamaConfig")),
    "llama bf16": lambda: _causal(_decoder("LlamaConfig"), dtype=torch.bfloat16),
    "qwen2": lambda: _causal(_decoder("Qwen2Config")),
    "gemma2": lambda: _causal(_decoder("Gemma2Config", sliding_window=32)),
    "mixtral": lambda: _causal(_decoder("MixtralConfig", num_local_experts=4, num_hidden_layers=2, intermediate_size=192)),
    "mamba": mamba,
    "bert": bert,
    "t5": t5,
    "vit": vit,
    "whisper": whisper,
    "mlp": mlp,
    "convnet": convnet,
    "lstm": lstm,
}
