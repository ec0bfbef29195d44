"""Collectives: measured points are met, prices grow with bytes, and no link is outrun."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from autotp.errors import AutotpError
from autotp.price.cluster import KINDS, Cluster, cluster_names, load_cluster
from autotp.price.communication import Group, collective_seconds, floor_seconds, latency_seconds, tier_of

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
    """Up to noise: a measured time above that of a bigger message is lowered to it."""
    cluster = load_cluster(name)
    for sweep in (sweep for link in cluster.links for sweep in link.sweeps):
        group = Group(sweep.ranks, sweep.stride)
        for i, (nbytes, _) in enumerate(sweep.points):
            least = min(seconds for _, seconds in sweep.points[i:])
            floor = floor_seconds(cluster, sweep.kind, nbytes, group)
            assert collective_seconds(cluster, sweep.kind, nbytes, group) == pytest.approx(max(least, floor))


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
    assert collective_seconds(cluster, "all_gather", 4 << 30, Group(4)) == pytest.approx(36e-3, rel=0.02)
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
