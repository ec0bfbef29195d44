"""Plan Llama-3.1-8B for eight H100s. Needs no GPU and no weights: `python examples/01_plan.py`.

The model is built on the `meta` device, where tensors have shapes but no memory, from the configuration beside this file.
"""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import autotp

config = AutoConfig.from_pretrained(Path(__file__).parent / "configs" / "llama-3.1-8b")
with torch.device("meta"):
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tokens = torch.ones(2, 4096, dtype=torch.long)

found = autotp.plan(model, kwargs={"input_ids": tokens, "labels": tokens}, mesh=8, cluster="dgx-h100")
print(found)
print()

pinned = autotp.plan(
    model,
    kwargs={"input_ids": tokens, "labels": tokens},
    mesh=8,
    cluster="dgx-h100",
    pins={"*.q_proj": "column", "*.k_proj": "column", "*.v_proj": "column", "*.o_proj": "row"},
)
for name, step in (("the planner's own choice", found), ("attention pinned to column and row", pinned)):
    print(f"{step.time.step_s * 1e3:6.1f} ms per step: {name}")
