"""Key figures of a plan, from its seconds, bytes and sizes. Pure functions; every one says its formula."""

from __future__ import annotations

from collections.abc import Mapping


def communication_to_computation(communication_s: float, compute_s: float) -> float:
    """Seconds of communication for each second of compute; 0 where there is no compute."""
    return communication_s / compute_s if compute_s else 0.0


def shard_efficiency(alone_s: float, compute_s: float, ranks: int) -> float:
    """Balance of work: compute seconds of one device / (ranks × compute seconds of the rank that has most to do).

    1 when every rank does 1/ranks of the work. Less when work is repeated on several ranks, pieces are uneven, or small pieces run
    at a lower efficiency. At most 1: a rooflined piece that runs better than the whole counts as perfect.
    """
    return min(1.0, alone_s / (ranks * compute_s)) if compute_s else 1.0


def exposed_communication_s(communication_s: float, hidden_s: float = 0.0) -> float:
    """Seconds of communication that no compute hides: communication − hidden, at least 0.

    Args:
        hidden_s: seconds of communication that run beside compute; 0 for the emitted module, which runs one after the other.
    """
    return max(0.0, communication_s - hidden_s)


def rates(batch: int | None, sequence: int | None, step_s: float) -> dict[str, float]:
    """`samples_per_s` = batch / step, and `tokens_per_s` = batch × sequence / step; what has no size, or takes no time, is left out.

    Args:
        batch, sequence: samples of one step over all ranks, and tokens of each.
    """
    if not batch or not step_s:
        return {}
    found = {"samples_per_s": batch / step_s}
    return found | ({"tokens_per_s": batch * sequence / step_s} if sequence else {})


def model_flops_utilisation(model_flops: Mapping[float, float], step_s: float, ranks: int) -> float:
    """MFU = Σ (model FLOPs / peak FLOP/s) / (step seconds × ranks): the share of the step that ideal devices would need.

    Chowdhery et al. 2022 (PaLM, arXiv:2204.02311, appendix B), for models that multiply in several dtypes too.

    Args:
        model_flops: peak FLOP/s of one device → the model FLOPs of one step at that peak. Only products of the whole, unsplit model
            count, and nothing that is computed twice: see `autotp.price.flops.model_flops`.
    """
    ideal_s = sum(flops / peak for peak, flops in model_flops.items())
    return ideal_s / (step_s * ranks) if step_s else 0.0


def memory_fraction(peak_bytes: float, device_bytes: float) -> float:
    """Predicted peak bytes per device / the device's memory; above 1 the plan does not fit."""
    return peak_bytes / device_bytes
