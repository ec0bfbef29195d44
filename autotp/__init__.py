"""autotp: an ordinary PyTorch model in, the same model running in parallel on many GPUs out.

    plan(model, args, mesh=8)           decide how to split it, and what that costs
    parallelize(model, args)            the model, sharded, as a trainable `nn.Module`
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autotp.api import parallelize, plan
    from autotp.errors import AutotpError
    from autotp.plans import Plan
    from autotp.price.cluster import Cluster, load_cluster
    from autotp.prove import prove_rule
    from autotp.rules import bind, rule, rule_for
    from autotp.runtime.module import ParallelModule

_HOMES = {
    "AutotpError": "autotp.errors",
    "Cluster": "autotp.price.cluster",
    "ParallelModule": "autotp.runtime.module",
    "Plan": "autotp.plans",
    "bind": "autotp.rules",
    "load_cluster": "autotp.price.cluster",
    "parallelize": "autotp.api",
    "plan": "autotp.api",
    "prove_rule": "autotp.prove",
    "rule": "autotp.rules",
    "rule_for": "autotp.rules",
}

__all__ = [
    "AutotpError",
    "Cluster",
    "ParallelModule",
    "Plan",
    "bind",
    "load_cluster",
    "parallelize",
    "plan",
    "prove_rule",
    "rule",
    "rule_for",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: torch takes seconds, and `autotp --help` should not."""
    if name not in _HOMES:
        raise AttributeError(f"module 'autotp' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
