"""Train a tiny Llama on CPU ranks, beside the same model on one device: `torchrun --nproc-per-node 2 examples/03_parallelize_llama.py`.

The pins ask for Megatron's pattern, which the planner would find by itself for a model that is large enough for it to pay.
The optimizer, gradient clipping and the training loop are ordinary PyTorch.
"""

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

import autotp

COLUMN, ROW = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")
PINS = {f"*.{name}": "column" for name in COLUMN} | {f"*.{name}": "row" for name in ROW}

dist.init_process_group("gloo")
torch.manual_seed(0)  # every rank builds the same model and the same data
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 257, "max_position_embeddings": 32}
one = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4)).train()
batch = torch.randint(257, (4, 32))

many = autotp.parallelize(one, kwargs={"input_ids": batch, "labels": batch}, pins=PINS)
models = {"one device": one, f"{dist.get_world_size()} ranks": many}
optimizers = [torch.optim.AdamW(model.parameters(), lr=3e-3) for model in models.values()]

for step in range(5):
    losses = []
    for model, optimizer in zip(models.values(), optimizers, strict=True):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[1], losses[0])
    if dist.get_rank() == 0:
        print(f"step {step}: " + ", ".join(f"{float(loss):.4f} on {name}" for name, loss in zip(models, losses, strict=True)))

if dist.get_rank() == 0:
    print("the losses are equal to float32 rounding")
dist.destroy_process_group()
