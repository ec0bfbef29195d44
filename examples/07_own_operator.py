"""An operator of one's own, split like any other: `torchrun --nproc-per-node 2 examples/07_own_operator.py`.

The operator is a leaky sum over time, y[t] = decay * y[t - 1] + x[t], as state-space models have it. One line tells autotp how it
may be split, one line proves that line, and the planner uses it from then on. docs/rules.md explains the notation.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

import autotp


@torch.library.custom_op("mylib::leaky_sum", mutates_args=())
def leaky_sum(x: Tensor, decay: Tensor) -> Tensor:
    """x: (batch, time, features); decay: (features). Returns (batch, time, features)."""
    y = torch.empty_like(x)
    state = torch.zeros_like(x[:, 0])
    for t in range(x.shape[1]):
        state = decay * state + x[:, t]
        y[:, t] = state
    return y


@leaky_sum.register_fake
def _(x: Tensor, decay: Tensor) -> Tensor:
    return torch.empty_like(x)


def backward(ctx, grad_y: Tensor) -> tuple[Tensor, Tensor]:
    """The same sum from the last step to the first; the decay's gradient is the sum of that times the state before."""
    decay, y = ctx.saved_tensors
    grad_x = leaky_sum(grad_y.flip(1), decay).flip(1)
    return grad_x, (grad_x[:, 1:] * y[:, :-1]).sum((0, 1))


leaky_sum.register_autograd(backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[1], output))

# Batch and features may be split, time may not; without a term's factor (the decay has no batch) an operand is replicated.
# For a given decay the operator is linear in x, so x may also be a partial sum.
autotp.rule(leaky_sum, "b t^ d, d -> b t^ d", linear=((0,),))
proof = autotp.prove_rule(leaky_sum, torch.randn(3, 5, 7).double(), torch.rand(7).double())


class Mixer(nn.Module):
    """A linear up, the leaky sum over time, and a linear down."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner)
        self.decay = nn.Parameter(torch.rand(inner))
        self.down = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(leaky_sum(self.up(x), torch.sigmoid(self.decay)))


dist.init_process_group("gloo")
torch.manual_seed(0)  # every rank builds the same model and the same inputs
model, x = Mixer(64, 256), torch.randn(4, 16, 64)
plan = autotp.plan(model, (x,), mesh=dist.get_world_size(), pins={"up": "column", "down": "row"})
parallel = autotp.parallelize(model, (x,), plan=plan)

output, expected = parallel(x), model(x)
torch.testing.assert_close(output, expected)
for result in (output, expected):
    result.square().sum().backward()
for (name, mine), one in zip(parallel.named_parameters(), model.parameters(), strict=True):
    torch.testing.assert_close(mine.grad.full_tensor(), one.grad, rtol=1e-4, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}")
if dist.get_rank() == 0:
    print(f"{proof.op}: {proof.strategies} strategies proved, factors {', '.join(sorted(proof.factors))}")
    print(plan)
    print("outputs and gradients equal those of one device")
dist.destroy_process_group()
