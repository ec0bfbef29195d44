"""autotp: an ordinary PyTorch model in, the same model running in parallel on many GPUs out.

    plan(model, args, mesh=8)           decide how to split it, and what that costs
    parallelize(model, args)            the model, sharded, as a trainable `nn.Module`
"""

from autotp.api import parallelize, plan
from autotp.errors import AutotpError
from autotp.plan import Plan
from autotp.price.cluster import Cluster, load_cluster
from autotp.rules import bind, rule, rule_for
from autotp.runtime.module import ParallelModule

__all__ = ["AutotpError", "Cluster", "ParallelModule", "Plan", "bind", "load_cluster", "parallelize", "plan", "rule", "rule_for"]
