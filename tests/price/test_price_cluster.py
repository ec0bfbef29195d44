"""Every shipped YAML file loads; every mistake in one is named with file, line and key."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from autotp.errors import AutotpError
from autotp.price import cluster as module
from autotp.price import sections
from autotp.price.accelerator import accelerator_names
from autotp.price.cluster import Cluster, cluster_names, load_cluster
from autotp.price.sections import cost_models_dir

GOOD = """\
description: test
accelerator: a100-40gb
links:
  - tier: NVLink
    devices: 4
    bandwidth_gb_per_s: 300
    efficiency: 0.8
    latency_us: 2
    launch_us: 9
    measured:
      - collective: all_reduce
        ranks: 4
        time_us_by_bytes: {65536: 20, 1048576: 40}
  - tier: network
    devices: any
    bandwidth_gbit_per_s: 200
    latency_us: 14
    launch_us: 9
"""
SWEEP = "    measured:\n      - {collective: all_reduce, ranks: 4, time_us_by_bytes: {65536: 20}}\n"


def load(tmp_path: Path, text: str) -> Cluster:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return load_cluster(path)


@pytest.mark.parametrize("name", cluster_names())
def test_shipped_clusters_load(name: str) -> None:
    cluster = load_cluster(name)
    assert cluster.name == name
    assert cluster.description
    assert cluster.devices_per_node >= 2
    assert {"fp32", "fp64"} <= set(cluster.accelerator.peak_flops)


@pytest.mark.parametrize("name", accelerator_names())
def test_shipped_accelerators_load(name: str, tmp_path: Path) -> None:
    device = load(tmp_path, GOOD.replace("a100-40gb", name)).accelerator
    assert device.name == name
    assert device.peak_flops and device.gemm.tiles
    assert "source:" in (cost_models_dir() / "accelerators" / f"{name}.yaml").read_text()


def test_expected_names_are_there() -> None:
    assert {"dgx-h100", "dgx-a100", "hgx-h200", "hgx-b200", "nvl72", "mi300x-8", "derecho", "cpu"} <= set(
        cluster_names()
    )
    assert {"dgx-2", "dgx-a100-40gb", "a100-pcie-8", "h100-pcie-8", "l4-8", "l40s-8", "rtx4090-8", "mi355x-8"} <= set(cluster_names())
    assert {"frontier", "dgx-h100-superpod", "pcie-workstation"} <= set(cluster_names())
    assert {"v100-32gb", "l4", "l40s", "rtx4090", "mi250x-gcd", "gb200", "cpu"} <= set(accelerator_names())


def test_units_are_converted(tmp_path: Path) -> None:
    cluster = load(tmp_path, GOOD)
    inner, outer = cluster.links
    assert (inner.bandwidth, outer.bandwidth) == (300e9, 25e9)
    assert (inner.latency, outer.devices, outer.efficiency) == (2e-6, None, 0.8)
    assert inner.sweeps[0].points == ((65536.0, pytest.approx(20e-6)), (1048576.0, pytest.approx(40e-6)))
    assert cluster.accelerator.memory_bytes == 40 * 2**30
    assert cluster.accelerator.bandwidth == 1555e9
    assert (cluster.devices_per_node, cluster.max_devices) == (4, None)


def test_base_replaces_whole_keys(tmp_path: Path) -> None:
    ours, theirs = load_cluster("hgx-h200"), load_cluster("dgx-h100")
    assert ours.links == theirs.links
    assert ours.accelerator.memory_bytes > theirs.accelerator.memory_bytes
    path = tmp_path / "loop.yaml"
    path.write_text(f"base: {path}\n")
    with pytest.raises(AutotpError, match=r"line 1: 'base' leads back to loop.yaml"):
        load_cluster(path)


def test_bases_that_lead_in_a_circle_or_nowhere(tmp_path: Path) -> None:
    """A base is a name, or a file beside the file that names it."""
    (tmp_path / "a.yaml").write_text("description: a\nbase: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(AutotpError, match=r"b\.yaml, line 1: 'base' leads back to a\.yaml: start from a cluster that has no"):
        load_cluster(tmp_path / "a.yaml")
    with pytest.raises(AutotpError, match=r"mine\.yaml, line 1: 'base' names no cluster: unknown cluster 'dgx-h10'"):
        load(tmp_path, "base: dgx-h10\n")


def test_a_tier_of_the_base_keeps_the_keys_that_are_not_given(tmp_path: Path) -> None:
    text = "base: dgx-h100\nlinks:\n  - tier: NVLink\n    launch_us: 7\n  - {tier: Ethernet, devices: any, bandwidth_gbit_per_s: 400"
    cluster = load(tmp_path, text + ", latency_us: 5, launch_us: 20}\n")
    ours, theirs = cluster.links[0], load_cluster("dgx-h100").links[0]
    assert ours == replace(theirs, launch=pytest.approx(7e-6)) and ours.sweeps
    assert [link.tier for link in cluster.links] == ["NVLink", "Ethernet"]
    with pytest.raises(AutotpError, match=r"mine\.yaml, line 3: 'bandwidth_gb_per_s' is missing"):
        load(tmp_path, "base: dgx-h100\nlinks:\n  - {tier: Ethernet, devices: any, latency_us: 5, launch_us: 20}\n")
    with pytest.raises(AutotpError, match=r"dgx-h100\.yaml, line \d+: 'ranks' measures all_reduce of 8 ranks"):
        load(tmp_path, "base: dgx-h100\nlinks:\n  - {tier: NVLink, devices: 4}\n")


def test_a_node_may_be_an_outer_tier() -> None:
    assert load_cluster("a100-pcie-8").devices_per_node == 8 == load_cluster("frontier").devices_per_node


def test_every_shipped_link_names_its_source() -> None:
    """Or says that it is assumed; so does every sweep."""
    for path in sorted((cost_models_dir() / "clusters").glob("*.yaml")):
        for link in yaml.safe_load(path.read_text()).get("links", []):
            assert "source" in link or set(link) == {"tier"}, (path.name, link["tier"])
            assert all("source" in sweep for sweep in link.get("measured", [])), (path.name, link["tier"])


def test_accelerator_inline_or_beside(tmp_path: Path) -> None:
    text = (cost_models_dir() / "accelerators" / "a100-40gb.yaml").read_text()
    (tmp_path / "own.yaml").write_text(text.replace("memory_bytes: 42949672960", "memory_gib: 39.5"))
    assert load(tmp_path, GOOD.replace("a100-40gb", "own.yaml")).accelerator.memory_bytes == 39.5 * 2**30
    inline = "accelerator:\n" + "".join(f"  {line}\n" for line in text.splitlines())
    device = load(tmp_path, GOOD.replace("accelerator: a100-40gb\n", inline)).accelerator
    assert (device.name, device.memory_bytes) == ("mine", 40 * 2**30)


def test_cluster_is_compared_by_identity() -> None:
    first, second = load_cluster("cpu"), load_cluster("cpu")
    assert first == first and first != second and len({first, second}) == 2


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("efficiency: 0.8", "eficiency: 0.8", r"line 7: 'eficiency' is no known key, did you mean efficiency"),
        ("efficiency: 0.8", "efficiency: 80", r"line 7: 'efficiency' is 80 but must be a fraction between 0 and 1"),
        ("latency_us: 2", "latency_s: 2", r"line 8: 'latency_s' has no known unit: give exactly one of latency_us, "),
        ("latency_us: 2", "latency_us: 2 us", r"line 8: 'latency_us' is '2 us' but must be a number of us"),
        ("latency_us: 2", "latency_us: -2", r"line 8: 'latency_us' is '-2' but must be a number of us, at least 0"),
        ("latency_us: 2", "latency_us: [2]", r"line 8: 'latency_us' must be a number of us"),
        ("    latency_us: 2\n", "", r"line 4: 'latency_us' is missing: give exactly one of latency_us, latency_ns"),
        ("latency_us: 2", "latency_us: 2\n    latency_ns: 3", r"line 8: 'latency_us' is given twice"),
        ("latency_us: 2", "latency_us: 2\n    latency_us: 3", r"line 9: 'latency_us' stands here a second time"),
        ("_gb_per_s: 300", "_gb_per_s: 0", r"line 6: 'bandwidth_gb_per_s' is '0' but must be a number of gb_per_s gr"),
        ("devices: 4", "devices: 4.5", r"line 5: 'devices' is 4.5 but must be a whole number, at least 2"),
        ("devices: 4", "devices: four", r"line 5: 'devices' is 'four' but must be a number"),
        ("devices: 4", "devices: any", r"line 14: 'tier' stands after 'NVLink', which joins any number of devices"),
        ("devices: any", "devices: 4", r"line 15: 'devices' is 4 but must be a multiple of 4, .*tiers stand innermost first"),
        ("devices: any", "devices: 2", r"line 15: 'devices' is 2 but must be a multiple of 4, the devices of one 'NVLink'"),
        ("devices: any", "devices: 10", r"line 15: 'devices' is 10 but must be a multiple of 4"),
        ("tier: network", "tier: NVLink", r"line 14: 'tier' is 'NVLink' a second time: give every tier its own name"),
        ("tier: NVLink\n", "topology: star\n    tier: x\n", r"line 4: 'topology' is 'star' but must be switch or mesh or"),
        ("devices: any", "devices: any\n    topology: ring", r"line 16: 'topology' is ring, which needs a number of dev"),
        ("efficiency: 0.8", "topology: pcie_tree", r"line 4: 'root_bandwidth_gb_per_s' is missing: give exactly one of"),
        ("efficiency: 0.8", "root_bandwidth_gb_per_s: 9", r"line 7: 'root_bandwidth_gb_per_s' belongs to the topology"),
        ("efficiency: 0.8", "shared_ports: 2", r"line 7: 'shared_ports' is of no use at the innermost tier"),
        ("devices: any", "devices: any\n    shared_ports: 0", r"line 16: 'shared_ports' is 0 but must be a whole number, at"),
        ("efficiency: 0.8", "topology: mesh\n    in_switch_reduction: true", r"line 8: 'in_switch_reduction' needs a switch"),
        ("all_reduce", "allreduce", r"line 11: 'collective' is 'allreduce' but must be all_reduce or all_gather"),
        ("ranks: 4", "ranks: 8", r"line 12: 'ranks' measures all_reduce of 8 ranks, stride 1, more than the 4 devices"),
        ("ranks: 4", "ranks: 2\n        stride: 4", r"line 12: 'ranks' measures all_reduce of 2 ranks, stride 4, more th"),
        ("devices: any", f"devices: any\n{SWEEP}", r"line 17: 'ranks' measures all_reduce of 4 .* inside one domain of 4"),
        ("    measured:\n", SWEEP, r"line 13: 'ranks' measures all_reduce of 4 ranks, stride 1, a second time"),
        ("{65536: 20, 1048576: 40}", "{1048576: 40, 65536: 20}", r"line 13: '65536' stands after 1048576: write the bytes"),
        ("{65536: 20, 1048576: 40}", "{65536: 20, 065536: 40}", r"line 13: '065536' stands after 65536"),
        ("1048576: 40", "1048576: 4", r"line 13: '1048576' takes 4 us, but fewer bytes take 20 us, which is more than no"),
        ("65536: 20", "65536: 20, 65536: 21", r"line 13: '65536' stands here a second time"),
        ("65536: 20", "64k: 20", r"line 13: '64k' must be a whole number of bytes"),
        ("65536: 20", "65536: fast", r"line 13: '65536' is 'fast' but must be a number of us greater than 0"),
        ("a100-40gb", "a100", r"line 2: 'accelerator' names no known accelerator 'a100', did you mean .*a100-40gb"),
        ("accelerator: a100-40gb\n", "", r"line 1: 'accelerator' is missing"),
        ("description: test", "links: {}\ndescription: test", r"line 4: 'links' stands here a second time"),
        ("accelerator: a", "devices_per_node: 3\naccelerator: a", r"line 2: 'devices_per_node' is 3, but the tiers join 4: gi"),
        ("accelerator:", "accelerator: [", r"line \d+: not valid YAML"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(AutotpError, match=message) as error:
        load(tmp_path, GOOD.replace(old, new, 1))
    assert "mine.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_mistake_in_an_accelerator(tmp_path: Path) -> None:
    text = (cost_models_dir() / "accelerators" / "a100-40gb.yaml").read_text()
    for old, new, message in (
        ("  bf16: 312", "  bfloat16: 312", r"line \d+: 'bfloat16' is no known key, did you mean bf16"),
        ("  fp32: 19.5\n", "", r"'fp32' is missing: add it as a number greater than 0"),
        ("memory_bytes", "memory_mb", r"'memory_mb' has no known unit: give exactly one of memory_bytes, memory_gb"),
        ("tiles: [", "tiles: [7, ", r"'tiles' must be a list of pairs of whole numbers"),
    ):
        assert old in text
        (tmp_path / "own.yaml").write_text(text.replace(old, new, 1))
        with pytest.raises(AutotpError, match=message) as error:
            load(tmp_path, GOOD.replace("a100-40gb", "own.yaml"))
        assert "own.yaml, line" in str(error.value)


def test_unknown_names() -> None:
    with pytest.raises(
        AutotpError, match=r"unknown cluster 'dgx-h10', did you mean .*dgx-h100.*; run `autotp clusters`"
    ):
        load_cluster("dgx-h10")
    with pytest.raises(AutotpError, match=r"no cluster file .*nowhere.yaml"):
        load_cluster("nowhere.yaml")


def test_not_a_mapping(tmp_path: Path) -> None:
    for text in ("", "- a\n"):
        with pytest.raises(AutotpError, match=r"mine.yaml, line 1: must be a mapping of keys"):
            load(tmp_path, text)


def test_cost_models_are_found_in_a_wheel_and_in_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "autotp" / "price").mkdir(parents=True)
    monkeypatch.setattr(sections, "__file__", str(tmp_path / "autotp" / "price" / "sections.py"))
    with pytest.raises(AutotpError, match="reinstall"):
        cost_models_dir()
    (tmp_path / "cost_models" / "clusters").mkdir(parents=True)
    assert cost_models_dir() == tmp_path / "cost_models"
    (tmp_path / "autotp" / "cost_models" / "clusters").mkdir(parents=True)
    assert cost_models_dir() == tmp_path / "autotp" / "cost_models"


def test_the_guide_s_example_loads(tmp_path: Path) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "cost_models.md").read_text()
    base, whole, sweep = re.findall(r"```yaml\n(.*?)```", guide, flags=re.DOTALL)
    assert load(tmp_path, base).accelerator.name == "h200"
    assert load(tmp_path, whole).links[1].bandwidth == 12.5e9
    assert load(tmp_path, whole.replace("  - tier: Inf", sweep + "  - tier: Inf")).links[0].sweeps[0].ranks == 4


def test_no_torch_in_the_price_of_numbers() -> None:
    for name in ("sections", "accelerator", "cluster", "compute", "communication"):
        tree = ast.parse((Path(module.__file__).parent / f"{name}.py").read_text())
        imported = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        imported += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        assert not [word for word in imported if word.split(".")[0] == "torch"]
