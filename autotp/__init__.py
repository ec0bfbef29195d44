"""autotp: an ordinary PyTorch model in, the same model running in parallel on many GPUs out.

    plan(model, args, mesh=8)           decide how to split it, and what that costs
    parallelize(model, args)            the model, sharded, as a trainable `nn.Module`
    parallelize_generation(model)       a decoder, sharded with its key/value cache, that generates text
    recommend(model, args, gpus=8)      which mesh to use, or how many devices to rent
    save(path, module, optimizer)       a checkpoint; load(path, module, optimizer) puts it back on any mesh
    export(path, module)                plain safetensors, as transformers reads them
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autotp.advice import recommend
    from autotp.api import parallelize, plan
    from autotp.errors import AutotpError
    from autotp.generation import GenerationPlans, Generator, parallelize_generation, plan_generation
    from autotp.plans import Plan
    from autotp.price.cluster import Cluster, load_cluster
    from autotp.prove import Proof, prove_rule
    from autotp.recommendation import Candidate, Recommendation
    from autotp.rules import Call, Rule, bind, rule, rule_for
    from autotp.rules.language import Local, LocalSize, LocalStart
    from autotp.runtime.checkpoint import load, save
    from autotp.runtime.checkpoint_files import latest
    from autotp.runtime.export import export
    from autotp.runtime.module import ParallelModule
    from autotp.runtime.optimizers import optimizer
    from autotp.runtime.outputs import cross_entropy

_HOMES = {
    "AutotpError": "autotp.errors",
    "Call": "autotp.rules",
    "Candidate": "autotp.recommendation",
    "Cluster": "autotp.price.cluster",
    "GenerationPlans": "autotp.generation",
    "Generator": "autotp.generation",
    "Local": "autotp.rules.language",
    "LocalSize": "autotp.rules.language",
    "LocalStart": "autotp.rules.language",
    "ParallelModule": "autotp.runtime.module",
    "Plan": "autotp.plans",
    "Proof": "autotp.prove",
    "Recommendation": "autotp.recommendation",
    "Rule": "autotp.rules",
    "bind": "autotp.rules",
    "export": "autotp.runtime.export",
    "cross_entropy": "autotp.runtime.outputs",
    "latest": "autotp.runtime.checkpoint_files",
    "load": "autotp.runtime.checkpoint",
    "load_cluster": "autotp.price.cluster",
    "optimizer": "autotp.runtime.optimizers",
    "parallelize": "autotp.api",
    "parallelize_generation": "autotp.generation",
    "plan": "autotp.api",
    "plan_generation": "autotp.generation",
    "prove_rule": "autotp.prove",
    "recommend": "autotp.advice",
    "rule": "autotp.rules",
    "rule_for": "autotp.rules",
    "save": "autotp.runtime.checkpoint",
}

__all__ = [
    "AutotpError",
    "Call",
    "Candidate",
    "Cluster",
    "GenerationPlans",
    "Generator",
    "Local",
    "LocalSize",
    "LocalStart",
    "ParallelModule",
    "Plan",
    "Proof",
    "Recommendation",
    "Rule",
    "bind",
    "cross_entropy",
    "export",
    "latest",
    "load",
    "load_cluster",
    "optimizer",
    "parallelize",
    "parallelize_generation",
    "plan",
    "plan_generation",
    "prove_rule",
    "recommend",
    "rule",
    "rule_for",
    "save",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: torch takes seconds, and `autotp --help` should not."""
    if name not in _HOMES:
        raise AttributeError(f"module 'autotp' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, also those that are not imported yet."""
    return sorted({*globals(), *__all__})
