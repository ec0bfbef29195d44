"""Meshes worth trying on a cluster: which sizes of which axes, on which links. No torch.

Axes are named by what they may do. `dp` and `fsdp` split the batch and nothing else; `cp` and `tp` split anything but the batch. Meshes
are written outermost axis first: the last axis has neighbouring devices, and with them the fastest link.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from autotp.errors import AutotpError
from autotp.price.cluster import Cluster

DATA = ("dp", "fsdp")
"""Axes that split the batch and nothing else. Whether state is split over them too is the planner's choice for each tensor."""

NODES = 2
"""Tensor parallelism is tried over at most this many nodes: it communicates in every layer, over the slowest link it crosses."""

LARGE = 16
"""From this size on, `dp` is also tried in two axes inside one tier: rings over fewer ranks have fewer hops."""


def check_devices(cluster: Cluster, gpus: int) -> None:
    """Refuse a number of devices that the cluster does not have, or that is no whole number of its nodes.

    Raises:
        AutotpError: so it is.
    """
    if not isinstance(gpus, int) or isinstance(gpus, bool) or gpus < 1:
        raise AutotpError(f"the number of GPUs is {gpus!r}, but must be a whole number of at least 1")
    if cluster.max_devices is not None and gpus > cluster.max_devices:
        raise AutotpError(
            f"{gpus} GPUs are more than the {cluster.max_devices} of {cluster.name}: take fewer, or another cluster (`autotp clusters`)"
        )
    node = node_size(cluster, gpus)
    if gpus > node and gpus % node:
        near = gpus // node * node
        raise AutotpError(
            f"{gpus} GPUs are no whole number of nodes: {cluster.name} has {node} in each; take {near} or {near + node}, or at most {node}"
        )


def node_size(cluster: Cluster, gpus: int) -> int:
    """Devices of a node; all of them where the innermost link joins any number."""
    return cluster.node or cluster.links[0].devices or gpus


def divisors(number: int) -> list[int]:
    """All divisors, in ascending order."""
    return [size for size in range(1, number + 1) if number % size == 0]


def meshes_of(gpus: int, node: int, batch: int | None) -> list[dict[str, int]]:
    """Every mesh dp × tp of a divisor of `gpus`, the most promising first: many devices, tensor parallelism inside a node.

    Args:
        node: devices that the fastest link joins; `tp` divides a node, or is whole nodes (at most `NODES`).
        batch: samples per step, which `dp` divides; None: no batch to split.
    """
    found = []
    for count in divisors(gpus):
        for tp in divisors(min(count, NODES * node)):
            inside = node % tp == 0 or count <= node
            if count % tp == 0 and (inside or tp % node == 0) and (batch or 1) % (count // tp) == 0:
                found.append((count, tp))
    order = sorted(found, key=lambda item: (-item[0], item[1] > node, -item[1]))
    return [{"dp": count // tp} | ({"tp": tp} if tp > 1 else {}) if count > tp else {"tp": tp} for count, tp in order]


def meshes_on(gpus: int, node: int, batch: int | None) -> list[dict[str, int]]:
    """Those of `meshes_of` that use all devices; never empty: what neither the batch nor a node can split is left to an axis `cp`."""
    found = [mesh for mesh in meshes_of(gpus, node, batch) if prod(mesh.values()) == gpus]
    if found:
        return found
    tp = max(size for size in divisors(node) if gpus % size == 0)
    dp = max(size for size in divisors(gpus // tp) if (batch or 1) % size == 0)
    return [{name: size for name, size in (("dp", dp), ("cp", gpus // tp // dp), ("tp", tp)) if size > 1}]


def variants(mesh: Mapping[str, int], cluster: Cluster) -> list[dict[str, int]]:
    """The same dp × tp with its axes bound to the cluster's tiers in other ways.

    - `dp` in two axes, `fsdp` inside and `dp` across (hybrid sharding, HSDP), cut where a tier ends, or near the root where it is large;
    - `tp` in two axes, `tp` inside a node and `cp` across nodes, where it is larger than a node;
    - the two the other way round: neighbouring devices share the weights' pieces, not the layers.

    Where all devices are in one domain of the innermost tier there are none: all links are equal.
    """
    dp, tp, gpus = mesh.get("dp", 1), mesh.get("tp", 1), prod(mesh.values())
    inner = cluster.links[0].devices
    if inner is None or gpus <= inner or len(mesh.keys() - {"dp", "tp"}) > 0:
        return []
    tiers = sorted({link.devices for link in cluster.links if link.devices} | {node_size(cluster, gpus)})
    found = []
    for tier in tiers:
        if tp < tier < gpus and tier % tp == 0 and gpus % tier == 0:
            found.append({"dp": gpus // tier, "fsdp": tier // tp, "tp": tp})
        if tier < tp and tp % tier == 0:
            found.append({"dp": dp, "cp": tp // tier, "tp": tier})
    if dp >= LARGE:
        inside = min(divisors(dp), key=lambda size: abs(size * size - dp))
        found.append({"dp": dp // inside, "fsdp": inside, "tp": tp})
    if dp > 1 and tp > 1:
        found.append({"tp": tp, "dp": dp})
    found = [one for place, one in enumerate(found) if one not in found[:place]]
    return [{name: size for name, size in one.items() if size > 1} for one in found]


def data_axes(mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes of a mesh that split the batch."""
    return tuple(name for name in mesh if name in DATA)


def data_parallel(mesh: Mapping[str, int]) -> int:
    """Over how many parts a mesh splits the batch."""
    return prod(mesh[name] for name in data_axes(mesh))


def mesh_name(mesh: Mapping[str, int]) -> str:
    """`1 GPU`, `tp=4` or `dp=2 × tp=4`."""
    return " × ".join(f"{name}={size}" for name, size in mesh.items()) if prod(mesh.values()) > 1 else "1 GPU"


def mesh_option(mesh: Mapping[str, int]) -> str:
    """A mesh as `--mesh` takes it, e.g. `dp=2,tp=4`."""
    return ",".join(f"{name}={size}" for name, size in mesh.items())
