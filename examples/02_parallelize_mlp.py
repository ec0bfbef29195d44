"""An MLP on two CPU ranks: `torchrun --nproc-per-node 2 examples/02_parallelize_mlp.py`.

The first linear is pinned to be split by its output features (column), the second by its input features (row): the hidden
activations then stay on their rank, and one all-reduce sums the result. Outputs and trained weights equal those of one device.
"""

import torch
import torch.distributed as dist
from torch import nn

import autotp

dist.init_process_group("gloo")
torch.manual_seed(0)  # every rank builds the same model and the same inputs
model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
x = torch.randn(8, 64)

parallel = autotp.parallelize(model, (x,), pins={"0": "column", "2": "row"})
output, expected = parallel(x), model(x)  # global in, global out
torch.testing.assert_close(output, expected)

shapes = {name: tuple(p.to_local().shape) for name, p in parallel.named_parameters()}
print(f"rank {dist.get_rank()} holds {shapes}", flush=True)
for module, result in ((parallel, output), (model, expected)):
    result.square().sum().backward()
    torch.optim.SGD(module.parameters(), lr=0.01).step()
weights = parallel.full_state_dict()  # full tensors, whatever the cut; all ranks call it
torch.testing.assert_close(weights, dict(model.state_dict()))
dist.barrier()
if dist.get_rank() == 0:
    print("outputs and trained weights equal those of one device")
dist.destroy_process_group()
