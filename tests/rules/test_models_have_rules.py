"""Every operator of the common language models that depends on a parameter has a rule, at free sizes as well as fixed ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from autotp.rules import call_of, rule_of
from autotp.shrink import load_shrunken
from autotp.trace import trace

pytest.importorskip("transformers")

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
MODELS = (
    "gpt2", "llama-3.1-8b", "mistral-7b", "mixtral-8x7b", "qwen2-0.5b", "qwen3-8b", "gemma-2-9b", "opt-1.3b", "bert-base",
)  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_every_operator_has_a_rule(name: str) -> None:
    loaded = load_shrunken(str(CONFIGS / name / "config.json"))
    program = trace(loaded.model, loaded.args, loaded.kwargs)
    trained: set[int] = set()
    without = set()
    for node in program.nodes:
        if node.kind == "parameter" or any(ref.node in trained for ref in node.inputs):
            trained.add(node.index)
            if node.kind == "op" and rule_of(call_of(node, program.type_of)) is None:
                without.add(f"{node.op} in {node.path}")
    assert len(trained) > len(program.nodes) / 2
    assert not without
