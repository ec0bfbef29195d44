"""Loading models by name: shipped configurations, callables, inputs, and every error sentence."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from autotp.errors import AutotpError
from autotp.huggingface import build_from_config
from autotp.loading import parse_dtype
from autotp.models import load_model
from autotp.shrink import shrink_config

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "examples" / "configs"
MLP = f"{ROOT / 'examples' / 'mlp.py'}:mlp"
PARAMETERS = {
    "llama-3.1-8b": 8.03e9,
    "llama-3.1-70b": 70.6e9,
    "llama-3.1-405b": 405.9e9,
    "gpt2": 124e6,
    "gpt2-xl": 1.56e9,
    "qwen2-0.5b": 494e6,
    "qwen3-8b": 8.19e9,
    "mistral-7b": 7.25e9,
    "gemma-2-9b": 9.24e9,
    "opt-1.3b": 1.32e9,
    "bert-base": 110e6,
    "mixtral-8x7b": 46.7e9,
    "deepseek-v3": 671.0e9,
    "llama-1t": 996.4e9,
}
TINY: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "vocab_size": 101,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
    "t5": {"model_type": "t5", "vocab_size": 99, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4},
    "bert": {
        "model_type": "bert",
        "architectures": ["BertForMaskedLM"],
        "vocab_size": 99,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
    "roberta": {
        "model_type": "roberta",
        "architectures": ["RobertaForMaskedLM"],
        "vocab_size": 99,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 34,
    },
    "vit": {
        "model_type": "vit",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    },
    "whisper": {
        "model_type": "whisper",
        "vocab_size": 99,
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "num_mel_bins": 8,
        "max_source_positions": 10,
        "max_target_positions": 12,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 3,
    },
    "clip": {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "text_config": {
            "vocab_size": 99,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "eos_token_id": 2,
        },
        "vision_config": {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
    },
}


@pytest.fixture
def config(tmp_path: Path) -> Any:
    """Writes the fields of a configuration to a file and returns its path."""

    def write(fields: Any, **more: Any) -> str:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(fields | more if isinstance(fields, dict) else fields))
        return str(path)

    return write


@pytest.fixture
def code(tmp_path: Path) -> Any:
    """Writes Python source to `model.py` and returns its path."""

    def write(source: str) -> str:
        path = tmp_path / "model.py"
        path.write_text("import torch\nfrom torch import nn\n" + source)
        return str(path)

    return write


def refused(*args: Any, **kwargs: Any) -> str:
    """The sentence with which `load_model` refuses; it is one line and ends with a full stop."""
    with pytest.raises(AutotpError) as caught:
        load_model(*args, **kwargs)
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith(".")
    return sentence


# Shipped configurations


def test_every_shipped_config_is_listed() -> None:
    assert {path.parent.name for path in CONFIGS.glob("*/config.json")} == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_shipped_config(name: str) -> None:
    loaded = load_model(str(CONFIGS / name))
    parameters = list(loaded.model.parameters())
    assert math.isclose(sum(parameter.numel() for parameter in parameters), PARAMETERS[name], rel_tol=0.006)
    assert all(isinstance(parameter, FakeTensor) for parameter in parameters)
    assert loaded.name == name and loaded.model.training and not loaded.model.config.use_cache
    assert loaded.batch == 1 and loaded.seq is not None and loaded.seq <= 4096
    ids, labels = loaded.kwargs["input_ids"], loaded.kwargs["labels"]
    assert ids.shape == labels.shape == (1, loaded.seq) and ids is not labels
    assert all(tensor.device.type == "cpu" and isinstance(tensor, FakeTensor) for tensor in loaded.model.buffers())
    assert isinstance(ids, FakeTensor) and ids.fake_mode is parameters[0].fake_mode


def test_options_are_followed() -> None:
    loaded = load_model(str(CONFIGS / "gpt2" / "config.json"), batch=3, seq=17, dtype="fp32", mode="inference")
    assert loaded.kwargs.keys() == {"input_ids"} and loaded.kwargs["input_ids"].shape == (3, 17)
    assert next(loaded.model.parameters()).dtype is torch.float32 and not loaded.model.training
    assert (loaded.name, loaded.batch, loaded.seq) == ("gpt2", 3, 17)


def test_default_dtypes(config: Any) -> None:
    path = config(TINY["llama"])
    assert next(load_model(path).model.parameters()).dtype is torch.bfloat16
    assert next(load_model(path, fake=False).model.parameters()).dtype is torch.float32
    path = config(TINY["llama"], torch_dtype="float16")
    assert next(load_model(path).model.parameters()).dtype is torch.float16


def test_real_weights_are_seeded_and_leave_the_generator_alone(config: Any) -> None:
    path = config(TINY["llama"])
    before = torch.random.get_rng_state()
    first, second = (load_model(path, batch=2, seq=8, fake=False) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    for one, two in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, two)
    assert torch.equal(first.kwargs["input_ids"], second.kwargs["input_ids"])
    assert not torch.equal(first.kwargs["input_ids"], first.kwargs["labels"])
    assert torch.isfinite(first.model(**first.kwargs).loss)


def test_overrides(config: Any) -> None:
    path = config({"model_type": "gpt2", "n_layer": 12, "n_embd": 32, "n_head": 2, "vocab_size": 99})
    assert load_model(path, overrides={"num_hidden_layers": 3}).model.config.n_layer == 3
    assert load_model(path, overrides={"n_layer": 2}).model.config.n_layer == 2
    path = config(TINY["clip"])
    model = load_model(path, overrides={"text_config.num_hidden_layers": 3}).model
    assert model.config.text_config.num_hidden_layers == 3


def test_hub_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.PreTrainedConfig, "get_config_dict", lambda name: (TINY["llama"], {}))
    assert load_model("hf:someone/some-llama").name == "someone/some-llama"


def test_tied_weights_stay_one_tensor() -> None:
    model = load_model(str(CONFIGS / "gpt2")).model
    assert model.lm_head.weight is model.transformer.wte.weight
    assert "lm_head.weight" in model.state_dict() and "lm_head.weight" not in dict(model.named_parameters())


def test_constructor_that_reads_a_tensor(config: Any) -> None:
    path = config(
        {"model_type": "convnext", "num_stages": 2, "depths": [1, 1], "hidden_sizes": [8, 16], "image_size": 32}
    )
    assert load_model(path, batch=2).kwargs["pixel_values"].shape == (2, 3, 32, 32)


# Inputs by introspection


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        ("bert", {"input_ids": (2, 8), "labels": (2, 8)}),
        ("roberta", {"input_ids": (2, 8), "labels": (2, 8)}),
        ("t5", {"input_ids": (2, 8), "decoder_input_ids": (2, 8), "labels": (2, 8)}),
        ("whisper", {"input_features": (2, 8, 20), "decoder_input_ids": (2, 8), "labels": (2, 8)}),
        ("vit", {"pixel_values": (2, 3, 16, 16), "labels": (2,)}),
        ("clip", {"input_ids": (2, 8), "pixel_values": (2, 3, 32, 32)}),
    ],
)
def test_inputs(config: Any, kind: str, shapes: dict[str, tuple[int, ...]]) -> None:
    path = config(TINY[kind])
    loaded = load_model(path, batch=2, seq=8)
    assert {name: tuple(value.shape) for name, value in loaded.kwargs.items()} == shapes
    real = load_model(path, batch=2, seq=8, fake=False)
    assert type(real.model) is type(loaded.model)
    real.model(**real.kwargs)
    assert bool(loaded.notes) == ("labels" not in shapes)
    assert "labels" not in load_model(path, seq=8, mode="inference").kwargs


def inputs_of(config: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of the inputs of a shrunken real model, which must accept them."""
    options: dict[str, Any] = {"batch": 2, "seq": 8, "dtype": torch.float32, "mode": "train", "fake": False, "pixels": 64}
    loaded = build_from_config(shrink_config(config), "it", **options)
    loaded.model(**loaded.kwargs)
    return {name: tuple(value.shape) for name, value in loaded.kwargs.items()}


def test_an_image_takes_its_tokens_in_the_text() -> None:
    shapes = inputs_of(transformers.LlavaConfig())
    assert shapes == {"input_ids": (2, 24), "pixel_values": (2, 3, 56, 56), "labels": (2, 24)}  # 4 × 4 patches of 14
    shapes = inputs_of(transformers.Idefics3Config())
    assert shapes["pixel_values"] == (2, 1, 3, 128, 128) and shapes["input_ids"] == shapes["labels"]


def test_audio_takes_its_tokens_in_the_text() -> None:
    shapes = inputs_of(transformers.VoxtralConfig(audio_token_id=24))
    assert shapes["input_features"] == (2, 128, 128) and shapes["input_ids"][1] > 8


def test_parts_left_out_are_noted() -> None:
    config = shrink_config(transformers.Qwen2VLConfig())
    options: dict[str, Any] = {"batch": 1, "seq": 8, "dtype": None, "mode": "train"}
    loaded = build_from_config(config, "it", fake=True, **options)
    assert loaded.notes == ("The part of the model that reads images is left out: its inputs are text alone.",)


def test_labels_of_the_task(config: Any) -> None:
    for head, shape in [("TokenClassification", (2, 8)), ("SequenceClassification", (2,))]:
        path = config(TINY["bert"], architectures=[f"BertFor{head}"])
        labels = load_model(path, batch=2, seq=8, fake=False).kwargs["labels"]
        assert labels.shape == shape and labels.max() < 2
    pixels = inputs_of(transformers.SegformerConfig(architectures=["SegformerForSemanticSegmentation"]))["labels"]
    assert pixels == (2, *inputs_of(transformers.SegformerConfig())["pixel_values"][2:])


def test_parts_of_a_composite_decide_its_inputs() -> None:
    vit, bert = transformers.ViTConfig(), transformers.BertConfig()
    both = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vit, bert)
    assert inputs_of(both)["pixel_values"] == (2, 3, 64, 64)
    both = transformers.SpeechEncoderDecoderConfig.from_encoder_decoder_configs(transformers.Wav2Vec2Config(), bert)
    assert inputs_of(both)["inputs"] == (2, 16000)


def test_arguments_that_a_forward_demands() -> None:
    shapes = inputs_of(transformers.GroundingDinoConfig())
    assert shapes["input_ids"] == (2, 8) and shapes["pixel_values"] == (2, 3, 64, 64)


def test_token_ids_avoid_special_tokens(config: Any) -> None:
    path = config(TINY["llama"], vocab_size=20, pad_token_id=0, bos_token_id=1, eos_token_id=[17, 18])
    ids = load_model(path, batch=8, seq=64, fake=False).kwargs["input_ids"]
    assert ids.min() >= 2
    assert ids.max() < 17


def test_architecture_decides_the_class(config: Any) -> None:
    assert type(load_model(config(TINY["llama"])).model).__name__ == "LlamaForCausalLM"
    assert type(load_model(config(TINY["llama"], architectures=["LlamaModel"])).model).__name__ == "LlamaModel"
    assert type(load_model(config(TINY["llama"], architectures=["Unheard"])).model).__name__ == "LlamaForCausalLM"


def test_positions_after_a_padding_index_count(config: Any) -> None:
    path = config(TINY["roberta"])
    assert load_model(path).seq == 32
    assert "33 is longer than the 32 positions" in refused(path, seq=33)


# Callables


def test_example_mlp() -> None:
    loaded = load_model(MLP, batch=8, overrides={"width": 16})
    assert loaded.args[0].shape == (8, 16) and (loaded.name, loaded.batch, loaded.seq) == ("mlp", 8, None)
    assert isinstance(loaded.args[0], FakeTensor) and isinstance(next(loaded.model.parameters()), FakeTensor)
    real = load_model(MLP, batch=8, dtype="fp64", fake=False, overrides={"width": 16})
    assert real.model(*real.args).dtype is torch.float64 and real.model(*real.args).shape == (8, 16)


def test_module_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "__init__.py").write_text("")
    (tmp_path / "shop" / "net.py").write_text("import torch\ndef net(): return torch.nn.ReLU(), (torch.ones(2),), {}\n")
    monkeypatch.chdir(tmp_path)
    loaded = load_model("shop.net:net", mode="inference")
    assert isinstance(loaded.model, torch.nn.ReLU) and not loaded.model.training
    assert "no callable `nett` (did you mean net?)" in refused("shop.net:nett")


def test_callable_returns(code: Any) -> None:
    path = code(
        "def pair(): return nn.Linear(4, 4), [torch.ones(2, 4)]\n"
        "def triple(seq): return nn.Linear(4, 4), (), {'input': torch.ones(seq, 4)}\n"
        "def alone(): return Alone()\n"
        "class Alone(nn.Module):\n"
        "    def forward(self): return torch.ones(1)\n"
    )
    assert load_model(f"{path}:pair", dtype="bf16").args[0].dtype is torch.bfloat16
    assert load_model(f"{path}:triple", seq=6).kwargs["input"].shape == (6, 4)
    assert load_model(f"{path}:alone").args == ()


@pytest.mark.parametrize("fake", [True, False])
def test_dtype_of_a_callable(code: Any, fake: bool) -> None:
    path = code(
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.lstm, self.up, self.down = nn.LSTM(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)\n"
        "        self.down.weight = self.up.weight\n"
        "        self.register_buffer('steps', torch.zeros(1, dtype=torch.long))\n"
        "    def forward(self, x): return self.down(self.up(self.lstm(x)[0]))\n"
        "def net(): return Net(), (torch.ones(3, 4),)\n"
    )
    loaded = load_model(f"{path}:net", dtype="fp64", fake=fake)
    model: Any = loaded.model
    assert loaded.notes == () and isinstance(model.up.weight, FakeTensor) is fake
    assert model.up.weight is model.down.weight and isinstance(model.up.weight, torch.nn.Parameter)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64} and model.steps.dtype is torch.long
    assert loaded.args[0].dtype is torch.float64
    if not fake:
        model(*loaded.args).sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


def test_callable_returns_a_transformers_model(code: Any) -> None:
    path = code(
        "from transformers import GPT2Config, GPT2LMHeadModel\n"
        "def gpt(): return GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=16, n_layer=1, n_head=2, n_positions=32))\n"
    )
    loaded = load_model(f"{path}:gpt")
    assert loaded.kwargs["input_ids"].shape == (1, 32) and "labels" in loaded.kwargs


def test_callable_imports_its_neighbour(code: Any, tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_model.py").write_text("WIDTH = 5\n")
    path = code(
        "from neighbour_of_model import WIDTH\ndef net(): return nn.Linear(WIDTH, 1), (torch.ones(2, WIDTH),)\n"
    )
    assert load_model(f"{path}:net").args[0].shape == (2, 5)


def test_callable_falls_back_to_real_weights(code: Any) -> None:
    path = code(
        "def net():\n    model = nn.Linear(4, 4)\n    model.scale = model.weight.sum().item()\n"
        "    return model, (torch.ones(2, 4),)\n"
    )
    loaded = load_model(f"{path}:net")
    assert not isinstance(loaded.model.weight, FakeTensor) and not isinstance(loaded.args[0], FakeTensor)
    assert "built with real weights" in loaded.notes[0]


# Sentences


def test_wrong_options() -> None:
    assert refused(MLP, batch=0) == "batch is 0, but must be at least 1."
    assert refused(MLP, seq=-1) == "seq is -1, but must be at least 1."
    assert refused(MLP, mode="fast") == "unknown mode `fast`; choose train or inference."
    assert refused(MLP, dtype="int7") == "unknown dtype `int7`; choose bfloat16, float16, float32 or float64."
    assert "takes no argument `seq`" in refused(MLP, seq=4)


@pytest.mark.parametrize("name", ["bf16", "bfloat16", "torch.bfloat16", "BF16"])
def test_dtype_names(name: str) -> None:
    assert parse_dtype(name) is torch.bfloat16


def test_unknown_models(tmp_path: Path) -> None:
    assert refused("no/such/dir").startswith(
        "no such model `no/such/dir`; write hf:ID, a config.json, file.py:callable"
    )
    assert refused("llama-3.1-8B").endswith("e.g. examples/configs/llama-3.1-8b.")
    assert refused("examples/configs/gpt-2/config.json").endswith("e.g. examples/configs/gpt2.")
    assert "has no config.json" in refused(str(tmp_path))
    assert "write " + str(ROOT / "examples" / "mlp.py") + ":NAME" in refused(str(ROOT / "examples" / "mlp.py"))


def test_hub_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str) -> Any:
        raise OSError(f"We couldn't connect to the hub\nto load {name}.")

    monkeypatch.setattr(transformers.PreTrainedConfig, "get_config_dict", offline)
    sentence = refused("hf:meta-llama/Llama-3.1-8B-Instruct")
    assert sentence.startswith("no configuration of `meta-llama/Llama-3.1-8B-Instruct` on the Hugging Face hub")
    assert sentence.endswith("give the path of a config.json instead, e.g. examples/configs/llama-3.1-8b.")
    monkeypatch.setattr(transformers.PreTrainedConfig, "get_config_dict", lambda name: ({}, {}))
    assert refused("hf:x/y") == "`x/y` has no config.json; give the path of a config.json instead."


def test_wrong_configurations(config: Any, tmp_path: Path) -> None:
    assert "has no `model_type`" in refused(config({"hidden_size": 4}))
    assert "has no `model_type`" in refused(config([1]))
    assert "does not know (did you mean llama" in refused(config({"model_type": "lama"}))
    assert "is not a valid llama configuration" in refused(config(TINY["llama"], hidden_size="wide"))
    assert "LlamaForCausalLM cannot be built" in refused(config(TINY["llama"], hidden_act="squish"))
    assert "has no field `hiden_size` (did you mean hidden_size" in refused(
        config(TINY["llama"]), overrides={"hiden_size": 4}
    )
    assert "has no field `vision.depth`" in refused(config(TINY["llama"]), overrides={"vision.depth": 4})
    assert "65 is longer than the 64 positions" in refused(config(TINY["llama"]), seq=65)
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    assert "is not a JSON configuration: JSONDecodeError" in refused(str(broken))


def test_unknown_input_kind(config: Any) -> None:
    sentence = refused(config({"model_type": "pix2struct"}))
    assert "no example can be made for the input `flattened_patches`" in sentence


def test_quantization_is_left_out(config: Any) -> None:
    path = config(TINY["llama"], quantization_config={"quant_method": "fp8"})
    assert "left out" in load_model(path).notes[0]


def test_wrong_callables(code: Any) -> None:
    path = code(
        "def build():\n    raise KeyError('depth')\n"
        "def nothing(): return None\n"
        "def four(): return nn.ReLU(), (), {}, 1\n"
        "def tensor(): return nn.ReLU(), torch.ones(2)\n"
        "def alone(): return nn.ReLU()\n"
        "value = 3\n"
    )
    assert refused("nowhere.py:net").startswith("no such file `nowhere.py`")
    assert "has no callable `biuld` (did you mean build?)" in refused(f"{path}:biuld")
    assert "has no callable `value`" in refused(f"{path}:value")
    assert refused(f"{path}:build").endswith("build raised KeyError: 'depth' (model.py, line 4).")
    assert "returned (NoneType); return a torch.nn.Module" in refused(f"{path}:nothing")
    assert "returned (ReLU, tuple, dict, int); return" in refused(f"{path}:four")
    assert "returned args of type" in refused(f"{path}:tensor")
    assert "without inputs, but its forward needs `input`" in refused(f"{path}:alone")
    assert "raised TypeError" in refused(f"{path}:build", overrides={"depth": 3})


def test_modules_that_do_not_import(code: Any) -> None:
    assert "`no_such_module_here` cannot be imported: ModuleNotFoundError" in refused("no_such_module_here:net")
    assert "cannot be imported: ZeroDivisionError: division by zero (model.py, line 3)" in refused(f"{code('1 / 0')}:x")
    assert "SyntaxError" in refused(f"{code('def (')}:x") and "(model.py, line 3)" in refused(f"{code('def (')}:x")
    assert refused("hf-user/model:main").startswith("no such model `hf-user/model:main`")
