"""Train a small Llama on Shakespeare's sonnets, character by character, with checkpoints, on any number of CPU ranks:

    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1     # for restarts: see docs/running.md
    torchrun --nproc-per-node 2 --max-restarts 3 examples/04_train_with_checkpoints.py run

Stop it, kill one of its processes, start it again on three ranks, or on one: it goes on from the last checkpoint in the folder `run`, and
the losses are those of a run that was never interrupted.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

import autotp

options = argparse.ArgumentParser()
options.add_argument("folder", help="where the checkpoints are")
options.add_argument("--steps", type=int, default=60)
options.add_argument("--every", type=int, default=10, help="steps between checkpoints")
asked = options.parse_args()

TEXT = (Path(__file__).parent / "sonnets.txt").read_text()
LETTERS = sorted(set(TEXT))
TOKENS = torch.tensor([LETTERS.index(letter) for letter in TEXT])


def batch(step: int, rows: int = 8, length: int = 64) -> torch.Tensor:
    """The data of a step depends on its number alone, so that a run that goes on sees the same."""
    random = torch.Generator().manual_seed(step)
    starts = torch.randint(len(TOKENS) - length, (rows,), generator=random)
    return torch.stack([TOKENS[start : start + length] for start in starts])


dist.init_process_group("gloo")
torch.manual_seed(0)  # every rank builds the same model
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
one = LlamaForCausalLM(LlamaConfig(vocab_size=len(LETTERS), max_position_embeddings=64, **sizes))

pins = {"*.q_proj": "column", "*.k_proj": "column", "*.v_proj": "column", "*.o_proj": "row", "*.up_proj": "column"}
model = autotp.parallelize(one, kwargs={"input_ids": batch(0), "labels": batch(0)}, pins=pins)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
first = autotp.load(asked.folder, model, optimizer)["steps"] if autotp.latest(asked.folder) else 0
print(f"rank {dist.get_rank()} of {dist.get_world_size()} is process {os.getpid()} and starts at step {first}", flush=True)

for step in range(first, asked.steps):
    tokens = batch(step)
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if dist.get_rank() == 0:
        print(f"step {step}: {float(loss.detach()):.6f}", flush=True)
    if (step + 1) % asked.every == 0:
        autotp.save(asked.folder, model, optimizer, extra={"steps": step + 1})
dist.destroy_process_group()
