"""Collectives: measured points are met, prices grow with bytes, and no link is outrun."""

from __future__ import annotations

import random
from itertools import pairwise
from math import exp, log
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from autotp.errors import AutotpError
from autotp.price.cluster import KINDS, Cluster, Link, Sweep, cluster_names, load_cluster
from autotp.price.communication import Group, collective_seconds, floor_seconds, isotonic, latency_seconds, tier_of
from autotp.price.conversion import axis_group
from tests.benchmarks.collective_accuracy import LEAST_BYTES, Measured, error, openxla, published, stands_in, without_point

SIZES = [0, 1, 1000, 1024, 1025] + [int(10**4 * 1.37**i) for i in range(50)]
GROUPS = [Group(2), Group(3), Group(4), Group(8), Group(2, 2), Group(2, 4), Group(4, 8), Group(6), Group(16), Group(72)]
GROUPS += [Group(32), Group(16, 4), Group(12, 8), Group(512), Group(64, 8)]
MIB = 1 << 20


def bus_bandwidth(cluster: Cluster, kind: str, nbytes: int, group: Group) -> float:
    passes = 2 if kind == "all_reduce" else 1
    return passes * (group.size - 1) / group.size * nbytes / collective_seconds(cluster, kind, nbytes, group) / 1e9


def groups_of(cluster: Cluster) -> list[Group]:
    limit = cluster.max_devices or 10**9
    return [group for group in GROUPS if group.size * group.stride <= limit]


@pytest.mark.parametrize("name", cluster_names())
@pytest.mark.parametrize("kind", KINDS)
def test_monotone_and_above_the_floor(name: str, kind: str) -> None:
    cluster = load_cluster(name)
    for group in groups_of(cluster):
        seconds = [collective_seconds(cluster, kind, nbytes, group) for nbytes in SIZES]
        assert all(small <= big * (1 + 1e-12) for small, big in pairwise(seconds)), group
        for nbytes, value in zip(SIZES, seconds, strict=True):
            assert value >= floor_seconds(cluster, kind, nbytes, group) * (1 - 1e-12), (group, nbytes)
        assert latency_seconds(cluster, kind, group) == seconds[0] > 0


@pytest.mark.parametrize("name", cluster_names())
def test_floor_by_hand(name: str) -> None:
    """Inside one domain, a member sends (n-1)/n of the bytes or more, and twice that to reduce without a switch."""
    cluster = load_cluster(name)
    link = cluster.links[0]
    for kind in KINDS:
        passes = 2 if kind == "all_reduce" and not link.in_switch_reduction else 1
        least = passes * 0.5 * MIB / link.bandwidth
        assert floor_seconds(cluster, kind, MIB, Group(2)) >= least * (1 - 1e-12)


def test_floor_across_nodes_by_hand() -> None:
    """32 GPUs on 4 nodes: 3/4 of the bytes enter each node through its 8 ports of 25 GB/s."""
    cluster = load_cluster("dgx-a100")
    assert floor_seconds(cluster, "all_gather", 200e9, Group(32)) == pytest.approx(0.75)
    assert floor_seconds(cluster, "all_reduce", 200e9, Group(32)) == pytest.approx(1.5)
    assert floor_seconds(cluster, "all_to_all", 200e9, Group(32)) == pytest.approx(0.75 * 8)


@pytest.mark.parametrize("name", cluster_names())
def test_measured_points_are_met(name: str) -> None:
    """Up to noise, which isotonic regression averages."""
    cluster = load_cluster(name)
    for sweep in (sweep for link in cluster.links for sweep in link.sweeps):
        group = Group(sweep.ranks, sweep.stride)
        rising = isotonic([log(seconds) for _, seconds in sweep.points])
        for (nbytes, _), value in zip(sweep.points, rising, strict=True):
            floor = floor_seconds(cluster, sweep.kind, nbytes, group)
            found = collective_seconds(cluster, sweep.kind, nbytes, group)
            assert found == pytest.approx(max(exp(value), floor), rel=0.02), (sweep.kind, sweep.ranks, nbytes)


@pytest.mark.parametrize(
    ("mib", "busbw"), [(1, 39.9), (4, 107.15), (16, 219.9), (64, 346.5), (256, 436.2), (1024, 463.6)]
)
def test_h200_all_reduce(mib: int, busbw: float) -> None:
    """ml-engineering, network: 8 H200, NCCL."""
    assert bus_bandwidth(load_cluster("hgx-h200"), "all_reduce", mib * MIB, Group(8)) == pytest.approx(busbw, rel=0.01)


def test_between_measured_points_prices_lie_on_the_log_log_line(tmp_path: Path) -> None:
    cluster = written(tmp_path, "{65536: 20, 1048576: 80}")
    middle = collective_seconds(cluster, "all_gather", 262144, Group(4))
    assert middle == pytest.approx(40e-6, rel=0.15)


def test_beyond_measured_points(tmp_path: Path) -> None:
    """Bandwidth stays what it was at the largest size; a sweep of large messages alone leaves small ones estimated."""
    cluster = written(tmp_path, "{1048576: 80, 1073741824: 9000}")
    assert collective_seconds(cluster, "all_gather", 4 << 30, Group(4)) == pytest.approx(36e-3, rel=0.05)
    cluster = written(tmp_path, "{1073741824: 9000}")
    assert latency_seconds(cluster, "all_gather", Group(4)) < 50e-6


def test_other_kinds_and_group_sizes_take_the_correction(tmp_path: Path) -> None:
    """Where all-gather measures twice the estimate, so do its kin."""
    plain, slow = written(tmp_path, None), written(tmp_path, "{1048576: 80, 1073741824: 9000}")
    for nbytes in (MIB, 1024 * MIB):
        ratio = 0.0
        for kind, ranks in (("all_gather", 4), ("all_gather", 8), ("reduce_scatter", 4), ("all_reduce", 2)):
            group = Group(ranks)
            found = collective_seconds(slow, kind, nbytes, group) / collective_seconds(plain, kind, nbytes, group)
            ratio = ratio or found
            assert found == pytest.approx(ratio, rel=1e-6)
        assert ratio > 2


def test_more_nodes_cost_more() -> None:
    cluster = load_cluster("dgx-h100")
    for kind in KINDS:
        for nbytes in (1024, MIB, 64 * MIB, 1024 * MIB):
            seconds = [collective_seconds(cluster, kind, nbytes, Group(8 * nodes)) for nodes in (1, 2, 4, 16)]
            assert seconds == sorted(seconds), (kind, nbytes)


def test_members_of_a_node_share_its_ports() -> None:
    """Across nodes, 8 members per node are far faster than one: the hierarchy uses all ports."""
    cluster = load_cluster("dgx-h100")
    alone = collective_seconds(cluster, "all_reduce", 1024 * MIB, Group(4, 8))
    assert alone > 4 * collective_seconds(cluster, "all_reduce", 1024 * MIB, Group(32))


def test_a_pair_in_a_mesh_has_one_wire() -> None:
    """ml-engineering, network: 47.7 GB/s for 2 MI300X, 312.9 for 8."""
    cluster = load_cluster("mi300x-8")
    assert bus_bandwidth(cluster, "all_reduce", 4 << 30, Group(2)) == pytest.approx(47.671, rel=1e-3)
    assert bus_bandwidth(cluster, "all_reduce", 4 << 30, Group(8)) == pytest.approx(312.912, rel=1e-3)
    assert bus_bandwidth(load_cluster("derecho"), "all_gather", 1 << 30, Group(2)) < 100


def link(tier: str = "x", devices: int | None = 8, bandwidth: float = 1e9, **more: Any) -> Link:
    return Link(tier, devices, bandwidth, 1.0, 1e-6, 1e-5, **more)


def cluster_of(*links: Link) -> Cluster:
    return Cluster("made", load_cluster("cpu").accelerator, links)


def test_ring() -> None:
    """8 devices in a circle, half of 1 GB/s to either neighbour."""
    cluster = cluster_of(link(topology="ring"))
    floors = {group: floor_seconds(cluster, "all_gather", 8e9, group) for group in (Group(8), Group(4), Group(4, 2), Group(2, 4))}
    assert floors[Group(8)] == pytest.approx(7)  # both ways round
    assert floors[Group(4)] == pytest.approx(6 / 0.5)  # a chain: one wire at its end
    assert floors[Group(4, 2)] == pytest.approx(6 / 0.5)  # two circles share the wires
    assert floors[Group(2, 4)] == pytest.approx(4 / 0.25)  # four pairs, each across half the circle
    crossing = 4 * 4 * 1e9 / 1e9  # half of the devices send 1/8 of 8 GB to each of the other half, over two wires
    assert floor_seconds(cluster, "all_to_all", 8e9, Group(8)) == pytest.approx(crossing)
    assert floor_seconds(cluster, "all_to_all", 8e9, Group(2)) == pytest.approx(4 / 0.5)


def test_mesh_of_nodes() -> None:
    """4 nodes of 2: a pair of nodes has one of three wires."""
    cluster = cluster_of(link("in", 2), link("out", 8, topology="mesh"))
    assert floor_seconds(cluster, "all_gather", 3e9, Group(4, 2)) == pytest.approx(2.25)
    assert floor_seconds(cluster, "all_gather", 3e9, Group(2, 2)) == pytest.approx(1.5 * 3)


def test_pcie_tree_shares_the_host() -> None:
    """8 devices of 1 GB/s behind a host that passes 2 GB/s: it limits as many as communicate at once."""
    cluster = cluster_of(link(topology="pcie_tree", root=2e9))
    assert floor_seconds(cluster, "all_gather", 8e9, Group(2)) == pytest.approx(4)
    assert floor_seconds(cluster, "all_gather", 8e9, Group(8)) == pytest.approx(7 * 4)
    assert floor_seconds(cluster, "all_gather", 8e9, Group(2, devices=8)) == pytest.approx(4 * 4)
    alone, among = (collective_seconds(cluster, "all_gather", 8e9, Group(2, devices=n)) for n in (2, 8))
    assert among == pytest.approx(4 * alone, rel=0.01)
    assert axis_group((4, 2), 1) == Group(2, 1, 8)


def test_ports_that_a_node_shares() -> None:
    """8 devices share 2 ports of 1 GB/s: a quarter each, however the group lies, for all groups act at once."""
    for ports, share in ((None, 1.0), (8, 1.0), (2, 0.25)):
        cluster = cluster_of(link("in", 8, 100e9), link("net", None, ports=ports))
        assert floor_seconds(cluster, "all_gather", 2e9, Group(2, 8)) == pytest.approx(1 / share)
        assert floor_seconds(cluster, "all_gather", 2e9, Group(16)) == pytest.approx(1 / 8 / share)


def test_three_tiers() -> None:
    """Groups pay for the tiers that they cross, and the hierarchy beats one ring through all."""
    cluster = load_cluster("dgx-h100-superpod")
    tiers = [tier_of(cluster, group).tier for group in (Group(8), Group(16), Group(32, 8), Group(2, 256), Group(1024))]
    assert tiers == ["NVLink", "leaf", "leaf", "spine", "leaf"]  # leaf and spine are equally fast: the first
    for kind in KINDS:
        seconds = [collective_seconds(cluster, kind, 64 * MIB, Group(n)) for n in (8, 16, 256, 512, 2048)]
        assert seconds == sorted(seconds), kind
    made = cluster_of(link("a", 4, 8e9), link("b", 16, 4e9), link("c", None, 5e7))
    parts = 3 / 4 * 64 * MIB / 8e9 + 3 / 4 * 16 * MIB / 4e9 + 1 / 2 * 4 * MIB / 5e7  # tier by tier, on ever less
    for kind, passes in (("reduce_scatter", 1), ("all_gather", 1), ("all_reduce", 2)):
        assert collective_seconds(made, kind, 64 * MIB, Group(32)) == pytest.approx(passes * parts, rel=0.05)
    through = collective_seconds(cluster_of(link("a", 4, 8e9), link("b", 64, 4e9)), "all_gather", 64 * MIB, Group(64))
    assert through == pytest.approx(63 / 64 * 64 * MIB / 8e9, rel=0.2)  # one ring through both: all ports at once


def test_in_switch_reduction_is_for_all_reduce_where_the_switch_has_it() -> None:
    plain, sums = cluster_of(link()), cluster_of(link(in_switch_reduction=True))
    for kind in KINDS:
        without, within = (collective_seconds(cluster, kind, 1e9, Group(8)) for cluster in (plain, sums))
        assert (within < 0.9 * without) if kind == "all_reduce" else (within == without), kind
    assert floor_seconds(sums, "all_reduce", 1e9, Group(8)) < floor_seconds(plain, "all_reduce", 1e9, Group(8))


def random_cluster(rng: random.Random) -> Cluster:
    """One to three tiers of any topology, with noisy sweeps of any kind and size."""
    links: list[Link] = []
    below = 1
    for tier in "abc"[: rng.randint(1, 3)]:
        devices: int | None = below * rng.choice((2, 3, 4, 8))
        topology = rng.choice(("switch", "mesh", "ring", "pcie_tree"))
        if rng.random() < 0.2 and topology == "switch":
            devices = None
        most = devices or 8 * below
        bandwidth = 10 ** rng.uniform(9, 12)
        sweeps = {}
        for _ in range(rng.randint(0, 4)):
            ranks = rng.randint(below + 1, most)
            sizes = sorted(rng.sample(range(10, 34), rng.randint(1, 12)))
            times = (1e-5 * rng.lognormvariate(0, 0.5) + 2**size / bandwidth * rng.lognormvariate(0.5, 0.5) for size in sizes)
            kind = rng.choice(KINDS)
            sweeps[kind, ranks] = Sweep(kind, ranks, 1, tuple((float(2**size), time) for size, time in zip(sizes, times, strict=True)))
        made = Link(
            tier,
            devices,
            bandwidth,
            rng.uniform(0.1, 1.0),
            10 ** rng.uniform(-7, -4),
            10 ** rng.uniform(-6, -3),
            in_switch_reduction=topology == "switch" and rng.random() < 0.5,
            sweeps=tuple(sweeps.values()),
            topology=topology,
            ports=rng.choice((None, 1, 2, 8)) if below > 1 else None,
            root=10 ** rng.uniform(9, 12) if topology == "pcie_tree" else None,
        )
        links.append(made)
        if devices is None:
            break
        below = devices
    return cluster_of(*links)


@pytest.mark.parametrize("seed", range(60))
def test_any_cluster_is_monotone_and_above_the_floor(seed: int) -> None:
    rng = random.Random(seed)
    cluster = random_cluster(rng)
    limit = cluster.max_devices or 1024
    for _ in range(8):
        stride = rng.choice((1, 1, 1, 2, 3, 4, 8))
        group = Group(rng.randint(2, max(2, limit // stride)), stride, limit if rng.random() < 0.5 else 0)
        if group.size * stride > limit:
            continue
        for kind in KINDS:
            sizes = sorted(rng.uniform(0, 2**37) * 2.0 ** -rng.randint(0, 37) for _ in range(25))
            seconds = [collective_seconds(cluster, kind, nbytes, group) for nbytes in sizes]
            assert all(small <= big * (1 + 1e-9) for small, big in pairwise(seconds)), (kind, group)
            for nbytes, value in zip(sizes, seconds, strict=True):
                assert value >= floor_seconds(cluster, kind, nbytes, group) * (1 - 1e-9), (kind, group, nbytes)


def test_a_group_between_two_sweeps_takes_the_factor_between_theirs(tmp_path: Path) -> None:
    """All-gathers of 2 and 8 take 2 and 4.5 times the estimate: of 4, half way in the logarithm of the ranks, 3 times."""
    plain = cluster_of(link())
    sweeps = tuple(
        Sweep("all_gather", n, 1, tuple((b, factor * collective_seconds(plain, "all_gather", b, Group(n))) for b in (1e6, 1e9)))
        for n, factor in ((2, 2.0), (8, 4.5))
    )
    cluster = cluster_of(link(sweeps=sweeps))
    for kind, group, factor in (("all_gather", 4, 3.0), ("all_to_all", 4, 3.0), ("reduce_scatter", 2, 2.0), ("all_reduce", 8, 4.5)):
        found = collective_seconds(cluster, kind, 1e9, Group(group)) / collective_seconds(plain, kind, 1e9, Group(group))
        assert found == pytest.approx(factor, rel=1e-3), kind


def test_noise_is_averaged() -> None:
    assert isotonic([1.0, 3.0, 2.0, 4.0]) == [1.0, 2.5, 2.5, 4.0]
    assert isotonic([3.0, 2.0, 1.0]) == [2.0, 2.0, 2.0]
    assert isotonic([]) == []


def test_a_left_out_point_is_predicted() -> None:
    """On the published sweeps that stand in the shipped files: median 8 %, nine in ten within 20 %."""
    errors = []
    for name in ("dgx-a100", "dgx-h100", "hgx-b200", "nvl72", "mi355x-8"):
        cluster = load_cluster(name)
        for sweep in (sweep for link in cluster.links for sweep in link.sweeps):
            for nbytes, seconds in (point for point in sweep.points if point[0] >= LEAST_BYTES):
                point = Measured(name, sweep.kind, sweep.ranks, nbytes, seconds)
                errors.append(error(without_point(cluster, point), point))
    assert len(errors) > 1000
    assert median(errors) <= 0.08 and sorted(errors)[int(0.9 * len(errors))] <= 0.20


def test_the_benchmark_reads_published_figures(tmp_path: Path) -> None:
    header = "arch,collective,dtype,n_ranks,n_groups,total_bytes,time_us\n"
    (tmp_path / "openxla_collectives.csv").write_text(header + "sm_90,all-gather,F32,4,2,1048576,20.48\nsm_00,all-gather,F32,4,2,1,1\n")
    row = "{kind: collective, confidence: %s, hardware: 8xH200 NVLink4, model: all_gather, ranks: 8, total_bytes: 8000, value: 7, unit: %s}"
    rows = "\n".join("- " + row % pair for pair in (("A", "us"), ("A", "GB/s"), ("B", "us")))
    (tmp_path / "published_figures.yaml").write_text(f"rows:\n{rows}\n")
    [ours] = openxla(tmp_path / "openxla_collectives.csv")
    assert (ours.cluster, ours.kind, ours.ranks) == ("dgx-h100", "all_gather", 4)
    assert stands_in(load_cluster("dgx-h100"), ours)
    assert not stands_in(without_point(load_cluster("dgx-h100"), ours), ours)
    assert [point.seconds for point in published(tmp_path / "published_figures.yaml")] == [7e-6, pytest.approx(1e-6)]


def test_tier_of() -> None:
    cluster = load_cluster("dgx-h100")
    tiers = {group: tier_of(cluster, group).tier for group in (Group(1), Group(8), Group(2, 4), Group(2, 8), Group(16))}
    assert list(tiers.values()) == ["NVLink", "NVLink", "NVLink", "InfiniBand", "InfiniBand"]
    assert tier_of(load_cluster("nvl72"), Group(9, 8)).tier == "NVLink"


def test_a_group_of_one_is_free() -> None:
    cluster = load_cluster("dgx-h100")
    for kind in KINDS:
        assert collective_seconds(cluster, kind, 1 << 30, Group(1)) == 0 == latency_seconds(cluster, kind, Group(1, 8))
        assert floor_seconds(cluster, kind, 1 << 30, Group(1)) == 0


def test_wrong_input() -> None:
    cluster = load_cluster("pcie-workstation")
    with pytest.raises(AutotpError, match=r"unknown collective 'allreduce': use one of all_reduce, all_gather"):
        collective_seconds(cluster, "allreduce", 8, Group(2))
    with pytest.raises(AutotpError, match=r"unknown collective 'broadcast'"):
        latency_seconds(cluster, "broadcast", Group(1))
    with pytest.raises(AutotpError, match=r"4 ranks, stride 1, spans more than the 2 devices of cluster 'pcie-work"):
        collective_seconds(cluster, "all_reduce", 8, Group(4))
    with pytest.raises(AutotpError, match=r"cannot price a collective of -8 bytes"):
        collective_seconds(cluster, "all_reduce", -8, Group(2))
    with pytest.raises(AutotpError, match=r"no group has 0 ranks of stride 1"):
        Group(0)


def written(tmp_path: Path, points: str | None) -> Cluster:
    """8 devices on one switch with, or without, a measured all-gather of 4."""
    text = (
        "accelerator: cpu\nlinks:\n  - {tier: switch, devices: 8, bandwidth_gb_per_s: 300, latency_us: 2, launch_us: 9"
    )
    if points:
        text += f", measured: [{{collective: all_gather, ranks: 4, time_us_by_bytes: {points}}}]"
    path = tmp_path / "written.yaml"
    path.write_text(text + "}\n")
    return load_cluster(path)
