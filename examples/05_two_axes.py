"""Data parallel times tensor parallel, a 2-D mesh of CPU ranks: `torchrun --nproc-per-node 4 examples/05_two_axes.py`.

Along `dp` each rank passes its own rows of the batch; along `tp` the ranks share the work on those rows. The loss that the model
returns is still that of the whole batch, and so are the gradients. No code says who sends what to whom.
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

rows = {"dp": 0}  # dim 0 is split over dp
many = autotp.parallelize(
    one,
    kwargs={"input_ids": batch, "labels": batch},  # examples are of the whole batch
    mesh={"dp": 2, "tp": dist.get_world_size() // 2},
    pins=PINS,  # hold on one of the axes; the declared inputs take the other
    inputs={"input_ids": rows, "labels": rows},
    outputs={"logits": rows},
)
mine = many.get_submodule("model.layers.0.self_attn.q_proj").weight.to_local()
mesh = many.device_mesh
place = dict(zip(mesh.mesh_dim_names, mesh.get_coordinate(), strict=True))
print(f"rank {dist.get_rank()} is at {place} and holds {tuple(mine.shape)} of q_proj", flush=True)

optimizers = [torch.optim.AdamW(model.parameters(), lr=3e-3) for model in (one, many)]
local = batch.chunk(2)[mesh.get_local_rank("dp")]  # this rank's rows
for step in range(3):
    losses = [one(input_ids=batch, labels=batch).loss, many(input_ids=local, labels=local).loss]
    for loss, optimizer in zip(losses, optimizers, strict=True):
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(losses[1], losses[0])
    if dist.get_rank() == 0:
        print(f"step {step}: {float(losses[0].detach()):.4f} on one device, {float(losses[1].detach()):.4f} on the mesh")
dist.destroy_process_group()
