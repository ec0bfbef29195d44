"""Plan for a cluster of your own, which autotp has never seen: `python examples/08_own_cluster.py`. Needs no GPU and no weights.

A YAML file says what a device can do and how devices are joined; docs/cost_models.md explains every key. `autotp calibrate` writes such
a file by measuring the machine it runs on. Here the same model gets other plans where the nodes are joined by other links.
"""

import tempfile
from pathlib import Path

import torch
from torch import nn

import autotp

FILE = """
description: "4 L40S in a node on PCIe, {name} between nodes"
accelerator: l40s
links:
  - tier: PCIe
    devices: 4
    bandwidth_gb_per_s: 24
    latency_us: 5
    launch_us: 20
  - tier: {name}
    devices: any
    bandwidth_gbit_per_s: {gbit}
    latency_us: {latency}
    launch_us: 20
"""

with torch.device("meta"):
    model = nn.Sequential(nn.Linear(2048, 8192), nn.GELU(), nn.Linear(8192, 2048))
    x = torch.empty(512, 2048)

with tempfile.TemporaryDirectory() as folder:
    for name, gbit, latency in (("InfiniBand", 400, 2.7), ("Ethernet", 10, 20)):
        file = Path(folder) / f"{name.lower()}.yaml"
        file.write_text(FILE.format(name=name, gbit=gbit, latency=latency))
        found = autotp.plan(model, (x,), mesh={"nodes": 2, "inside": 4}, cluster=file)
        print(found)
        print(f"{name}: {found.time.step_s * 1e3:.2f} ms per step, {found.time.communication_s * 1e3:.2f} ms of them communication\n")
