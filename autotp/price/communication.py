"""Seconds of collectives, by kind, bytes, and where the group's members sit in the cluster.

First an estimate, from the links alone. A transfer that is cut into pieces and passed on in h hops, each of latency α,
through links of usable bandwidth W takes, with the best size of the pieces (Sanders, Speck, Träff, "Two-tree algorithms
for full bandwidth broadcast, reduction and scan", Parallel Computing 35, 2009, section 2),

    t(h, b) = β + (√(hα) + √(b/W))²                  β: launch time

so that bandwidth is reached slowly, as in every measured sweep. On one tier, with n ranks and b bytes:

    all_reduce      least of ring t(2(n-1), 2(n-1)/n·b), tree t(2·4·⌈log2 n⌉, 2b), in-switch t(50, 1.4·b)
    all_gather      t(n-1, (n-1)/n·b), and so reduce_scatter
    all_to_all      t(0.6·(n-1), (n-1)/n·b)

Across tiers it is the cheapest of one ring or tree through all members, which uses every member's network port (hops
add up, each at its own tier's latency; the tier with the least bandwidth limits), and the hierarchy: reduce-scatter
inside, the collective across on 1/P of the bytes, all-gather inside (P members inside).

Then measurement: where the cluster's YAML has a sweep, the factor measured / estimated corrects the estimate. Noise is
averaged before, so that neither the fast nor the slow outlier wins: by isotonic regression (pooling adjacent violators,
in the logarithm of the seconds), after which more bytes never take less time. Between measured sizes the logarithm of
the factor is interpolated in the logarithm of the bytes; beyond them it stays. A group size without a
sweep takes the factor between those of the next smaller and next larger group (in the logarithm of the ranks); an
all-gather takes half of it from the reduce-scatter of its own size, which moves the same bytes through the same ring, and
the other way round; a kind without any sweep takes that of the most similar kind.

The three constants 4, 50 and 0.6, and 1.4, are fitted to the published NVLink sweeps of A100, H100, H200, B200 and GB200
(docs/accuracy.md). Nothing is ever below the physical floor: the bytes that must cross a link, over its raw bandwidth.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, pairwise
from math import ceil, exp, log, log2, pow, sqrt

from autotp.errors import AutotpError
from autotp.price.cluster import KINDS, Cluster, Link, Sweep

TREE_HOP = 4.0
"""A tree's hop, which receives twice, adds and sends twice, in hops of a ring."""
MESSAGE_HOP = 0.6
"""A message of an all-to-all in hops of a ring: messages to several peers are under way at once."""
IN_SWITCH_HOPS = 50.0
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
MIRROR = {"all_gather": "reduce_scatter", "reduce_scatter": "all_gather"}
"""Kinds that are each other's reverse."""


@dataclass(frozen=True)
class Group:
    """`size` ranks, consecutive members `stride` devices apart; the last axis of a mesh has stride 1.

    All groups of an axis act at once, each member on its own port. A group lies inside a domain of D devices when
    size · stride ≤ D: meshes are laid out so that domains are whole blocks. `devices` is how many devices the whole
    mesh has, which share what its hosts share; at least, and by default, those that the group spans.
    """

    size: int
    stride: int = 1
    devices: int = 0

    def __post_init__(self) -> None:
        if self.size < 1 or self.stride < 1:
            raise AutotpError(f"no group has {self.size} ranks of stride {self.stride}: give whole numbers, at least 1")

    @property
    def active(self) -> int:
        """Devices that communicate at once."""
        return max(self.devices, self.size * self.stride)


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
    curve = _curve(cluster, kind, group.size, group.stride, group.active)
    position = bisect_right(curve.sizes, nbytes)
    if position:
        return curve.scales[position - 1] * pow(nbytes, curve.powers[position - 1])
    if not nbytes >= 0:
        raise AutotpError(f"cannot price a collective of {nbytes} bytes: give a number of at least 0")
    return curve.least


def latency_seconds(cluster: Cluster, kind: str, group: Group) -> float:
    """Seconds of the collective for a tiny message. Raises as `collective_seconds`."""
    return _curve(cluster, kind, group.size, group.stride, group.active).least


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
    """The part of a group that one tier joins: `ranks` domains of the tier below, each with `inner` members.

    `bandwidth` is raw bytes/s per member and direction; `detour` is by how much the bytes of an all-to-all grow because
    they pass through other members.
    """

    link: Link
    ranks: int
    inner: int
    bandwidth: float
    detour: float = 1.0

    @property
    def usable(self) -> float:
        """Bytes/s per member and direction that collectives reach."""
        return self.bandwidth * self.link.efficiency


def _levels(cluster: Cluster, group: Group) -> tuple[_Level, ...]:
    """The tiers that the group crosses, innermost first; the product of their ranks is at least the group's size."""
    levels: list[_Level] = []
    members = below = 1
    for link in cluster.links:
        whole = link.devices is None or group.size * group.stride <= link.devices
        joined = group.size if whole else max(1, min(group.size, (link.devices or 0) // group.stride))
        if joined > members:
            levels.append(_level(link, ceil(joined / members), members, below, group))
            members = joined
        if whole:
            return tuple(levels)
        below = link.devices or below
    raise AutotpError(
        f"a group of {group.size} ranks, stride {group.stride}, spans more than the {cluster.max_devices} devices of "
        f"cluster {cluster.name!r}: use a smaller mesh or another cluster"
    )


def _level(link: Link, ranks: int, inner: int, below: int, group: Group) -> _Level:
    """One tier of a group; `below` are the devices of one domain of the tier below."""
    bandwidth, detour = link.bandwidth, 1.0
    if link.ports is not None:
        bandwidth *= link.ports / below
    places = (link.devices or 0) // below
    if link.topology == "mesh":
        bandwidth *= (ranks - 1) / (places - 1)
    if link.topology == "ring":  # a group that does not close the circle is a chain: one wire per neighbour
        step = max(1, group.stride // below)  # as many groups share each wire
        bandwidth /= step if ranks * step >= places else 2 * step
        detour = (ranks * ranks // 4) / (ranks - 1)
    if link.root is not None:
        bandwidth = min(bandwidth, link.root / min(group.active, link.devices or 0))
    return _Level(link, ranks, inner, bandwidth, detour)


@lru_cache(maxsize=1 << 14)
def _curve(cluster: Cluster, kind: str, size: int, stride: int, active: int) -> _Curve:
    """The seconds of one kind in one group, compiled for every message size."""
    if kind not in KINDS:
        raise AutotpError(f"unknown collective {kind!r}: use one of {', '.join(KINDS)}")
    group = Group(size, stride, active)
    levels = _levels(cluster, group)
    if not levels:
        return _Curve(0.0)
    sources = _sources(levels[-1].link.sweeps, kind, group)
    sizes = sorted({*GRID, *(nbytes for sweep, _ in sources for nbytes, _ in sweep.points)})
    logs = [log(_estimate(cluster, kind, nbytes, group)) for nbytes in sizes]
    for sweep, weight in sources:
        logs = [value + weight * factor for value, factor in zip(logs, _log_factors(cluster, sweep, sizes), strict=True)]
    floor = _floor(kind, levels)
    rising = accumulate(logs, max)  # a factor that falls with bytes may leave a dip between measured sizes
    seconds = [max(exp(value), floor * nbytes) for nbytes, value in zip(sizes, rising, strict=True)]
    pairs = list(zip(sizes, seconds, strict=True))
    powers = [log(t1 / t0) / log(b1 / b0) for (b0, t0), (b1, t1) in pairwise(pairs)] + [1.0]
    scales = [value / nbytes**power for (nbytes, value), power in zip(pairs, powers, strict=True)]
    return _Curve(seconds[0], tuple(sizes), tuple(scales), tuple(powers))


def _sources(sweeps: Sequence[Sweep], kind: str, group: Group) -> list[tuple[Sweep, float]]:
    """The sweeps whose corrections a group takes, with their weights; the weights sum to 1, if there are any."""
    known = next((found for like in SIMILAR[kind] if (found := _of_kind(sweeps, like, group))), {})
    if group.size in known or not known:
        return [(known[group.size], 1.0)] if known else []
    smaller = max((ranks for ranks in known if ranks < group.size), default=min(known))
    larger = min((ranks for ranks in known if ranks > group.size), default=max(known))
    share = log(group.size / smaller) / log(larger / smaller) if smaller < larger else 0.0
    share = min(1.0, max(0.0, share))
    between = [(known[smaller], 1.0 - share), (known[larger], share)]
    mirror = _of_kind(sweeps, MIRROR.get(kind, kind), group).get(group.size)
    return between if mirror is None else [(mirror, 0.5), *((sweep, weight / 2) for sweep, weight in between)]


def _of_kind(sweeps: Sequence[Sweep], kind: str, group: Group) -> dict[int, Sweep]:
    """The sweeps of one kind, by ranks; of several strides, those of the nearest."""
    found = [sweep for sweep in sweeps if sweep.kind == kind]
    stride = min((sweep.stride for sweep in found), key=lambda stride: abs(log(stride / group.stride)), default=1)
    return {sweep.ranks: sweep for sweep in found if sweep.stride == stride}


def _log_factors(cluster: Cluster, sweep: Sweep, sizes: Sequence[float]) -> list[float]:
    """Logarithm of measured over estimated seconds of the sweep's own collective, continued to other sizes."""
    group = Group(sweep.ranks, sweep.stride)
    measured = isotonic([log(seconds) for _, seconds in sweep.points])
    points = [
        (log(nbytes), value - log(_estimate(cluster, sweep.kind, nbytes, group)))
        for (nbytes, _), value in zip(sweep.points, measured, strict=True)
    ]
    (first, first_factor), (last, last_factor) = points[0], points[-1]
    factors, position = [], 0
    for place in map(log, sizes):
        if place <= first or place >= last:
            factors.append(first_factor if place <= first else last_factor)
            continue
        while points[position + 1][0] < place:
            position += 1
        (b0, f0), (b1, f1) = points[position : position + 2]
        factors.append(f0 + (f1 - f0) * (place - b0) / (b1 - b0))
    return factors


def isotonic(values: Sequence[float]) -> list[float]:
    """The nearest non-decreasing sequence in the sense of least squares, by pooling adjacent violators."""
    pools: list[tuple[float, int]] = []
    for value in values:
        mean, count = value, 1
        while pools and pools[-1][0] > mean:
            before, many = pools.pop()
            mean, count = (before * many + mean * count) / (many + count), many + count
        pools.append((mean, count))
    return [mean for mean, count in pools for _ in range(count)]


def _estimate(cluster: Cluster, kind: str, nbytes: float, group: Group) -> float:
    """Seconds from the links alone (and, inside a domain, from what was measured there)."""
    levels = _levels(cluster, group)
    through = _through_all(levels, kind, nbytes, group.size)
    if len(levels) == 1:
        return through
    outer = levels[-1]
    inside = Group(outer.inner, group.stride, group.active)
    within = collective_seconds(cluster, kind, nbytes, inside)
    if kind == "all_to_all":
        return max(through, within)
    across = _through_all((replace(outer, inner=1),), kind, nbytes / outer.inner, outer.ranks)
    phases = ("reduce_scatter", "all_gather") if kind == "all_reduce" else (kind,)
    hierarchy = across + sum(collective_seconds(cluster, phase, nbytes, inside) for phase in phases)
    return max(min(through, hierarchy), within)


def _through_all(levels: Sequence[_Level], kind: str, nbytes: float, size: int) -> float:
    """Seconds of the best algorithm that knows no hierarchy: the formulas at the top of this file.

    A ring enters each domain once per port: of its size - 1 hops, those of a tier are the domains it joins less one.
    """
    launch = max(level.link.launch for level in levels)
    if kind == "all_to_all":
        peers = [(level, min(size, level.ranks * level.inner) - level.inner) for level in levels]
        hops = sum(count * MESSAGE_HOP * level.link.latency for level, count in peers)
        return launch + _pipelined(hops, sum(count / size * level.detour * nbytes / level.usable for level, count in peers))
    passes = 2 if kind == "all_reduce" else 1
    transfer = nbytes / min(level.usable * level.inner for level in levels)
    ring = sum(size / level.inner * (1 - 1 / level.ranks) * level.link.latency for level in levels)
    seconds = _pipelined(passes * ring, passes * (size - 1) / size * transfer)
    if kind == "all_reduce":
        tree = sum(ceil(log2(level.ranks)) * TREE_HOP * level.link.latency for level in levels)
        seconds = min(seconds, _pipelined(2 * tree, 2 * transfer))
        if len(levels) == 1 and levels[0].link.in_switch_reduction:
            in_switch = _pipelined(IN_SWITCH_HOPS * levels[0].link.latency, IN_SWITCH_TRAFFIC * transfer)
            seconds = min(seconds, in_switch)
    return launch + seconds


def _pipelined(hops: float, transfer: float) -> float:
    """Seconds of a transfer in pieces of the best size, from the latency of all hops and the time of the bytes."""
    return hops + transfer + 2 * sqrt(hops * transfer)


def _floor(kind: str, levels: tuple[_Level, ...]) -> float:
    """Least seconds per byte: at every tier, what must enter a domain over the bandwidth of all its members' ports."""
    size = levels[-1].inner * levels[-1].ranks if levels else 1
    least = 0.0
    for level in levels:
        n = level.ranks
        if kind == "all_to_all":
            least = max(least, (n - 1) * level.inner / size * level.detour / level.bandwidth)
            continue
        share = (n - 1) / n
        passes = 1 / share if level.link.in_switch_reduction else 2
        least = max(least, share * (passes if kind == "all_reduce" else 1) / (level.bandwidth * level.inner))
    return least
