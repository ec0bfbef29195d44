"""Seconds of collectives, by kind, bytes, and where the group's members sit in the cluster.

First an estimate, from the links alone. On one tier, with n ranks, b bytes, launch time β, latency α per step and
usable bandwidth W:

    all_reduce      min of ring β + 2(n-1)α + 2(n-1)/n·b/W, tree β + 2⌈log2 n⌉α + 2b/W, in-switch β + 2α + 1.4·b/W
    all_gather      β + (n-1)α + (n-1)/n·b/W, and so reduce_scatter
    all_to_all      β + (n-1)α/2 + (n-1)/n·b/W

Across tiers it is the cheaper of one ring through all members, which uses every member's network port, and the
hierarchy: reduce-scatter inside, the collective across on 1/P of the bytes, all-gather inside (P members inside).

Then measurement: where the cluster's YAML has a sweep, the factor measured / estimated corrects the estimate at the
measured sizes, and the first and last factor beyond them; between these points seconds lie on straight lines in
log-log. So measured points are met exactly, up to noise: a smaller message never costs more than a bigger one. A
group size or kind without a sweep takes the correction of the nearest one of the same tier.

Ring and tree steps follow NCCL's tuner (NVIDIA/nccl, src/graph/tuning.cc); 1.4 is fitted to NVLS on H200 (1.35) and
B200 (1.43), ml-engineering, network. Nothing is ever below the physical floor: the bytes that must cross a link,
over its raw bandwidth.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import ceil, inf, log, log2, pow

from autotp.errors import AutotpError
from autotp.price.cluster import KINDS, Cluster, Link, Sweep

IN_SWITCH_TRAFFIC = 1.4
GRID = tuple(float(1 << power) for power in range(10, 37))
"""Message sizes, 1 KiB to 64 GiB, at which curves are computed; smaller messages cost as much as 1 KiB."""
SIMILAR = {
    "all_reduce": ("all_reduce", "reduce_scatter", "all_gather", "all_to_all"),
    "all_gather": ("all_gather", "reduce_scatter", "all_reduce", "all_to_all"),
    "reduce_scatter": ("reduce_scatter", "all_gather", "all_reduce", "all_to_all"),
    "all_to_all": ("all_to_all", "all_gather", "reduce_scatter", "all_reduce"),
}
"""Whose measured sweeps stand in for a kind, best first."""


@dataclass(frozen=True)
class Group:
    """`size` ranks, consecutive members `stride` devices apart; the last axis of a mesh has stride 1.

    All groups of an axis act at once, each member on its own port. A group lies inside a domain of D devices when
    size · stride ≤ D: meshes are laid out so that domains are whole blocks.
    """

    size: int
    stride: int = 1

    def __post_init__(self) -> None:
        if self.size < 1 or self.stride < 1:
            raise AutotpError(f"no group has {self.size} ranks of stride {self.stride}: give whole numbers, at least 1")


def tier_of(cluster: Cluster, group: Group) -> Link:
    """The slowest link that the group crosses; the innermost one for a group of size 1.

    Raises:
        AutotpError: the group spans more devices than the cluster has.
    """
    crossed = [level.link for level in _levels(cluster, group)]
    return min(crossed, key=lambda link: link.bandwidth) if crossed else cluster.links[0]


def collective_seconds(cluster: Cluster, kind: str, nbytes: float, group: Group) -> float:
    """Seconds of one collective; 0 in a group of one, never less for more bytes.

    Args:
        kind: "all_reduce", "all_gather", "reduce_scatter" or "all_to_all".
        nbytes: bytes of the FULL tensor: all_reduce, the tensor that each rank holds; all_gather, the gathered result;
            reduce_scatter, the input that each rank holds; all_to_all, the local tensor that each rank holds.

    Raises:
        AutotpError: unknown kind, negative bytes, or a group that spans more devices than the cluster has.
    """
    curve = _curve(cluster, kind, group.size, group.stride)
    position = bisect_right(curve.sizes, nbytes)
    if position:
        return curve.scales[position - 1] * pow(nbytes, curve.powers[position - 1])
    if not nbytes >= 0:
        raise AutotpError(f"cannot price a collective of {nbytes} bytes: give a number of at least 0")
    return curve.least


def latency_seconds(cluster: Cluster, kind: str, group: Group) -> float:
    """Seconds of the collective for a tiny message. Raises as `collective_seconds`."""
    return _curve(cluster, kind, group.size, group.stride).least


def floor_seconds(cluster: Cluster, kind: str, nbytes: float, group: Group) -> float:
    """The physical floor of `collective_seconds`: bytes that must cross a link over that link's raw bandwidth."""
    return nbytes * _floor(kind, _levels(cluster, group))


@dataclass(frozen=True)
class _Curve:
    """Piecewise power law: from `sizes[i]` bytes on, seconds are scales[i] · bytes ** powers[i]; `least` before."""

    least: float
    sizes: tuple[float, ...] = ()
    scales: tuple[float, ...] = ()
    powers: tuple[float, ...] = ()


@dataclass(frozen=True)
class _Level:
    """The part of a group that one tier joins: `ranks` domains of the tier inside it, each with `inner` members."""

    link: Link
    ranks: int
    inner: int

    @property
    def bandwidth(self) -> float:
        """Raw bytes/s per member and direction."""
        link = self.link
        if link.mesh and link.devices:
            return link.bandwidth * (self.ranks - 1) / (link.devices - 1)
        return link.bandwidth

    @property
    def usable(self) -> float:
        """Bytes/s per member and direction that collectives reach."""
        return self.bandwidth * self.link.efficiency


def _levels(cluster: Cluster, group: Group) -> tuple[_Level, ...]:
    """The tiers that the group crosses, innermost first; the product of their ranks is at least the group's size."""
    levels: list[_Level] = []
    members = 1
    for link in cluster.links:
        whole = link.devices is None or group.size * group.stride <= link.devices
        joined = group.size if whole else max(1, min(group.size, (link.devices or 0) // group.stride))
        if joined > members:
            levels.append(_Level(link, ceil(joined / members), members))
            members = joined
        if whole:
            return tuple(levels)
    raise AutotpError(
        f"a group of {group.size} ranks, stride {group.stride}, spans more than the {cluster.max_devices} devices of "
        f"cluster {cluster.name!r}: use a smaller mesh or another cluster"
    )


@lru_cache(maxsize=1 << 14)
def _curve(cluster: Cluster, kind: str, size: int, stride: int) -> _Curve:
    """The seconds of one kind in one group, compiled for every message size."""
    if kind not in KINDS:
        raise AutotpError(f"unknown collective {kind!r}: use one of {', '.join(KINDS)}")
    group = Group(size, stride)
    levels = _levels(cluster, group)
    if not levels:
        return _Curve(0.0)
    corrections = _corrections(cluster, _nearest(levels[-1].link.sweeps, kind, group))
    sizes = [nbytes for nbytes, _ in corrections]
    seconds = [_estimate(cluster, kind, nbytes, group) * factor for nbytes, factor in corrections]
    for i in range(len(sizes) - 2, -1, -1):  # noise: a smaller message never costs more than a bigger one
        seconds[i] = min(seconds[i], seconds[i + 1])
    floor = _floor(kind, levels)
    seconds = [max(value, floor * nbytes) for nbytes, value in zip(sizes, seconds, strict=True)]
    pairs = list(zip(sizes, seconds, strict=True))
    powers = [log(t1 / t0) / log(b1 / b0) for (b0, t0), (b1, t1) in pairwise(pairs)] + [1.0]
    scales = [value / nbytes**power for (nbytes, value), power in zip(pairs, powers, strict=True)]
    return _Curve(seconds[0], tuple(sizes), tuple(scales), tuple(powers))


def _nearest(sweeps: tuple[Sweep, ...], kind: str, group: Group) -> Sweep | None:
    """The sweep whose kind, then group size, then stride is nearest."""

    def distance(sweep: Sweep) -> tuple[float, float, float]:
        return (
            SIMILAR[kind].index(sweep.kind),
            abs(log(sweep.ranks / group.size)),
            abs(log(sweep.stride / group.stride)),
        )

    return min(sweeps, key=distance, default=None)


def _corrections(cluster: Cluster, sweep: Sweep | None) -> list[tuple[float, float]]:
    """(bytes, measured / estimated seconds of the sweep's own collective), continued to all sizes of the grid."""
    if sweep is None:
        return [(nbytes, 1.0) for nbytes in GRID]
    group = Group(sweep.ranks, sweep.stride)
    known = [(b, seconds / _estimate(cluster, sweep.kind, b, group)) for b, seconds in sweep.points]
    (first, first_factor), (last, last_factor) = known[0], known[-1]
    below = [(b, first_factor) for b in GRID if b < first]
    above = [(b, last_factor) for b in GRID if b > last]
    return below + known + above


def _estimate(cluster: Cluster, kind: str, nbytes: float, group: Group) -> float:
    """Seconds from the links alone (and, inside a domain, from what was measured there)."""
    levels = _levels(cluster, group)
    if len(levels) == 1:
        return _one_tier(levels[0], kind, nbytes)
    through = _through_all(levels, kind, nbytes, group.size)
    if kind == "all_to_all":
        return through
    outer = levels[-1]
    inside = Group(outer.inner, group.stride)
    across = _one_tier(outer, kind, nbytes / outer.inner)
    phases = ("reduce_scatter", "all_gather") if kind == "all_reduce" else (kind,)
    hierarchy = across + sum(collective_seconds(cluster, phase, nbytes, inside) for phase in phases)
    return max(min(through, hierarchy), collective_seconds(cluster, kind, nbytes, inside))


def _one_tier(level: _Level, kind: str, nbytes: float) -> float:
    """Seconds among `level.ranks` ranks that one tier joins: the formulas at the top of this file."""
    link, n, transfer = level.link, level.ranks, nbytes / level.usable
    share = (n - 1) / n
    if kind == "all_to_all":
        return link.launch + (n - 1) * link.latency / 2 + share * transfer
    if kind != "all_reduce":
        return link.launch + (n - 1) * link.latency + share * transfer
    ring = 2 * (n - 1) * link.latency + 2 * share * transfer
    tree = 2 * ceil(log2(n)) * link.latency + 2 * transfer
    in_switch = 2 * link.latency + IN_SWITCH_TRAFFIC * transfer if link.in_switch_reduction else inf
    return link.launch + min(ring, tree, in_switch)


def _through_all(levels: tuple[_Level, ...], kind: str, nbytes: float, size: int) -> float:
    """Seconds of one ring (or, for all_to_all, of direct messages) through all members of several tiers.

    A ring enters each domain once per port: of its size - 1 steps, those of a tier are the domains it joins less one.
    """
    launch = max(level.link.launch for level in levels)
    if kind == "all_to_all":
        peers = [(level, min(size, level.ranks * level.inner) - level.inner) for level in levels]
        return launch + sum(
            count * level.link.latency / 2 + count / size * nbytes / level.usable for level, count in peers
        )
    passes = 2 if kind == "all_reduce" else 1
    steps = [size / level.inner * (1 - 1 / level.ranks) * level.link.latency for level in levels]
    slowest = min(level.usable * level.inner for level in levels)
    return launch + passes * (sum(steps) + (size - 1) / size * nbytes / slowest)


def _floor(kind: str, levels: tuple[_Level, ...]) -> float:
    """Least seconds per byte: at every tier, what must enter a domain over the bandwidth of all its members' ports."""
    size = levels[-1].inner * levels[-1].ranks if levels else 1
    least = 0.0
    for level in levels:
        n = level.ranks
        if kind == "all_to_all":
            least = max(least, (n - 1) * level.inner / size / level.bandwidth)
            continue
        share = (n - 1) / n
        passes = 1 / share if level.link.in_switch_reduction else 2
        least = max(least, share * (passes if kind == "all_reduce" else 1) / (level.bandwidth * level.inner))
    return least
