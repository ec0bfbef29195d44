"""A sample of the zoo in every run of the tests: one model or more of each family, equal to one device at 2 or at 3 ranks."""

from __future__ import annotations

import json

import pytest

from tests.zoo.catalogue import Case, case_of, cases
from tests.zoo.report import TARGET_BYTES, counts, markdown
from tests.zoo.trial import Result, of_line, trial

pytest.importorskip("transformers")

AT_TWO = (
    "LlamaForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM", "BertForMaskedLM", "T5ForConditionalGeneration",
    "ViTForImageClassification", "ConvNextForImageClassification", "Wav2Vec2ForCTC", "CLIPModel", "LlavaForConditionalGeneration",
    "MambaForCausalLM", "MixtralForCausalLM", "resnet", "u_net", "lstm", "transformer_encoder", "graph_scatter",
    "mixture_of_experts", "shared_and_tied", "changing_buffers",
)  # fmt: skip
AT_THREE = (
    "Gemma2ForCausalLM", "FalconForCausalLM", "DistilBertForMaskedLM", "BartForConditionalGeneration", "SegformerForSemanticSegmentation",
    "ResNetForImageClassification", "WhisperForConditionalGeneration", "Mamba2ForCausalLM", "MixtralForCausalLM+grouped_mm",
    "gru", "transformer_decoder", "mlp_mixer", "autoencoder", "recommender", "nested_output",
)  # fmt: skip


WHOLE = ("lstm", "gru")
"""Models whose weights are read whole: PyTorch runs all layers and steps of a recurrent network as one operator."""


def prove(name: str, ranks: int) -> None:
    """One model through the pipeline; at least 90 % of its weight bytes are consumed split."""
    case = case_of(name)
    result = trial(case.name, case.build, (ranks,), ("float32",) if case.grouped else ("float64", "lifted", "float32"))
    assert result.ok, f"{result.stage}: {result.reason}"
    assert result.errors is not None and result.errors.keys() == {"eager and trace", f"simulate {ranks}"}
    assert result.bytes >= TARGET_BYTES or name in WHOLE, f"{result.bytes:.1%} of the weights are split; whole: {result.whole}"


@pytest.mark.parametrize("name", AT_TWO)
def test_equal_at_two_ranks(name: str) -> None:
    prove(name, 2)


@pytest.mark.parametrize("name", AT_THREE)
def test_equal_at_three_ranks(name: str) -> None:
    prove(name, 3)


def test_catalogue_covers_the_library() -> None:
    found = cases()
    names = [case.name for case in found]
    assert len(names) == len(set(names)) and len(names) > 600
    assert {"plain", "causal_lm", "seq_to_seq_causal_lm", "masked_lm", "image_classification", "ctc"} <= {case.head for case in found}


def test_report() -> None:
    good = Result("a", "ok", errors={"simulate 2": 1e-16}, nodes=7, bytes=0.95, operators=0.5, precision="float64", ruleless=("aten.sort",))
    bad = Result("b", "simulate 2", "differs | by 1 in x", errors={})
    never = Result("c", "eager", "TypeError: no")
    assert of_line(good.line) == good and json.loads(bad.line)["stage"] == "simulate 2"
    found = [(Case(result.name), result) for result in (good, bad, never)]
    assert counts(found) == (3, 2, 1, 1)
    page = markdown(found, (2, 3))
    assert "**1 of 2 (50.0%)**" in page and "| b | simulate 2 | differs \\| by 1 in x |" in page and "| `aten.sort` | 1 |" in page
