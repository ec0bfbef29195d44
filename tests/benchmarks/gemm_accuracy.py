"""How well matrix products and attention are priced: products against OpenXLA's tables, on shapes that the fit did not see.

    python -m tests.benchmarks.gemm_accuracy --data FOLDER

FOLDER holds `openxla_gemm.csv` (arch, batch, m, n, k, dtype, tflops, time_us), extracted from OpenXLA's
`xla/service/gpu/model/default_matmul_perf_table.txtpb`, and, if there, `published_figures.yaml` with best measured
products (ml-engineering). Of the accelerators' files only peaks, bandwidth, units and tiles are used; the constants
are fitted anew without the shapes that are predicted. Products of equal output size and depth, which run alike, are
always left out together.

Attention's figures are published ones, named below; each accelerator's share of peak at long sequences is taken from
them, what short sequences, causal masks, head sizes and backward passes cost is the same for all.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated
from zlib import crc32

import numpy as np
import typer
import yaml
from rich.console import Console
from rich.table import Table

from autotp.price.accelerator import Accelerator, Gemm, read_accelerator
from autotp.price.cluster import Cluster
from autotp.price.compute import attention_seconds, gemm_seconds
from autotp.price.fit import fit_gemm
from autotp.price.sections import cost_models_dir, open_section

ARCHITECTURES = {"sm_90": "h100-sxm", "sm_100_B200": "b200", "gfx950": "mi355x"}
"""The table's names → accelerators."""
PUBLISHED = {
    "A100 SXM": "a100-80gb",
    "A100 PCIe": "a100-80gb-pcie",
    "H100 SXM": "h100-sxm",
    "H200": "h200",
    "B200 SXM": "b200",
    "GB200 SXM": "gb200",
    "MI300X": "mi300x",
    "MI355X": "mi355x",
}
"""How the published figures' names of hardware start → accelerators."""
DTYPE = "bf16xbf16->bf16"
FOLDS = 5


@dataclass(frozen=True)
class Attention:
    """A measured pass of fused attention, batch × heads of `length` queries and keys, in TFLOP/s.

    FLOPs are counted as in FlashAttention's papers: half as many with a causal mask, 2.5 times as many backward.
    """

    name: str
    heads: int
    length: int
    width: int
    rate: float
    source: str
    causal: bool = False
    backward: bool = False

    @property
    def predicted(self) -> float:
        """TFLOP/s of the accelerator's price."""
        shape = (self.heads, self.length, self.length, self.width, self.width, self.causal)
        seconds = attention_seconds(Cluster("", load(self.name), ()), *shape, "bfloat16", backward=self.backward)
        share = (0.5 if self.causal else 1) * (2.5 if self.backward else 1)
        return 4e-12 * self.heads * self.length**2 * self.width * share / seconds


FA2, FA3 = "FlashAttention-2, arXiv:2307.08691", "FlashAttention-3, pytorch/benchmark pull 2391"
FA4, CUDNN = "FlashAttention-4, Dao-AILab/flash-attention pull 2280", "cuDNN, Dao-AILab/flash-attention pull 2605"
ATTENTION = (
    *(
        Attention("h100-sxm", 2**18 // length, length, 128, rate, FA3)
        for length, rate in ((512, 430), (1024, 517), (2048, 566), (4096, 590), (8192, 614), (16384, 621))
    ),
    Attention("h100-sxm", 24, 4608, 128, 631, "cuDNN, pytorch/pytorch issue 142132"),
    Attention("h100-sxm", 8, 32768, 64, 514, "FlashAttention-3, Dao-AILab/flash-attention issue 1438"),
    Attention("b200", 64, 8192, 128, 1535, FA4),
    Attention("b200", 64, 8192, 128, 1418, FA4, causal=True),
    Attention("b200", 64, 8192, 128, 1360, FA4, backward=True),
    Attention("b200", 64, 8192, 128, 1209, FA4, causal=True, backward=True),
    *(
        Attention("b200", 2**20 // length, length, 64, rate, CUDNN)
        for length, rate in ((1024, 979), (2048, 1069), (4096, 1113), (8192, 1147), (16384, 1157))
    ),
    *(
        Attention("b200", 2**20 // length, length, 64, rate, CUDNN, causal=True)
        for length, rate in ((1024, 627), (2048, 827), (4096, 977), (8192, 1072), (16384, 1120))
    ),
    Attention("a100-80gb", 16, 16384, 128, 0.73 * 312, FA2),
    Attention("a100-80gb", 16, 16384, 128, 0.63 * 312, FA2, backward=True),
)


@dataclass(frozen=True)
class Product:
    """A measured product (batch, m, n, k) and its seconds."""

    shape: tuple[int, int, int, int]
    seconds: float

    @property
    def region(self) -> str:
        """Small below 2³¹ FLOPs; else short k, skinny (a side of the output), or large."""
        batch, m, n, k = self.shape
        if batch * m * n * k < 2**30:
            return "small"
        return "short k" if k <= 512 else "skinny" if min(m, n) <= 512 else "large"


def read_products(folder: Path, arch: str) -> list[Product]:
    """The table's products of one architecture, in `DTYPE`."""
    with (folder / "openxla_gemm.csv").open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["arch"] == arch and row["dtype"] == DTYPE]
    sizes = [(int(row["batch"]), int(row["m"]), int(row["n"]), int(row["k"])) for row in rows]
    return [Product(shape, 1e-6 * float(row["time_us"])) for shape, row in zip(sizes, rows, strict=True)]


def load(name: str) -> Accelerator:
    """The accelerator of this name."""
    return read_accelerator(open_section(cost_models_dir() / "accelerators" / f"{name}.yaml"))


def fit(device: Accelerator, products: Sequence[Product]) -> Gemm:
    """Constants from these products alone."""
    return fit_gemm(
        [product.shape for product in products],
        [product.seconds for product in products],
        device.peak_flops["bf16"],
        device.bandwidth * device.bandwidth_efficiency,
        units=device.gemm.units,
        launch_seconds=device.launch_seconds,
        tiles=device.gemm.tiles,
    )


def predict(device: Accelerator, gemm: Gemm, shape: tuple[int, int, int, int]) -> float:
    """Seconds of a bf16 product with these constants."""
    batch, m, n, k = shape
    return gemm_seconds(Cluster("", replace(device, gemm=gemm), ()), m, n, k, "bfloat16", batch)


def held_out(device: Accelerator, products: Sequence[Product], group: Callable[[Product], object]) -> Iterator[tuple[Product, float]]:
    """Each product with the relative error of a fit without its group."""
    for left_out in {group(product): None for product in products}:
        gemm = fit(device, [product for product in products if group(product) != left_out])
        for product in products:
            if group(product) == left_out:
                yield product, predict(device, gemm, product.shape) / product.seconds - 1


def by_hash(product: Product) -> object:
    """One of `FOLDS` parts, the same for products of equal output size and depth."""
    batch, m, n, k = product.shape
    return crc32(f"{batch * m * n} {k}".encode()) % FOLDS


def by_depth(product: Product) -> object:
    """All products of one k."""
    return product.shape[3]


def add_errors(table: Table, names: Sequence[str], errors: Sequence[float]) -> None:
    sizes = np.abs(errors)
    figures = (np.median(sizes), np.quantile(sizes, 0.9), sizes.max(), np.median(errors))
    table.add_row(*names, str(len(sizes)), *(f"{100 * figure:.1f} %" for figure in figures))


def main(data: Annotated[Path, typer.Option(help="Folder of openxla_gemm.csv.", exists=True, file_okay=False)]) -> None:
    """Print the errors of held-out products, and best measured products beside their predictions."""
    if not (data / "openxla_gemm.csv").is_file():
        raise typer.BadParameter(f"no openxla_gemm.csv in {data}", param_hint="--data")
    console = Console(width=160)
    table = Table("accelerator", "fitted without", "region", "shapes", "median", "p90", "worst", "bias", title="bf16 products")
    for arch, name in ARCHITECTURES.items():
        device, products = load(name), read_products(data, arch)
        if not products:
            raise SystemExit(f"no {DTYPE} rows of {arch} in {data / 'openxla_gemm.csv'}")
        found = list(held_out(device, products, by_hash))
        add_errors(table, (name, f"its fifth of the shapes ({FOLDS} folds)", "all"), [error for _, error in found])
        for region in ("small", "short k", "skinny", "large"):
            add_errors(table, ("", "", region), [error for product, error in found if product.region == region])
        add_errors(table, ("", "all products of its k", "all"), [error for _, error in held_out(device, products, by_depth)])
        shipped = [predict(device, device.gemm, product.shape) / product.seconds - 1 for product in products]
        add_errors(table, ("", "nothing: constants of the file", "all"), shipped)
        table.add_section()
    console.print(table)
    if (data / "published_figures.yaml").is_file():
        console.print(published(data))
    console.print(attention())


def published(folder: Path) -> Table:
    """Best measured products, of which none but the greatest rate (`max_efficiency`) is used in a file."""
    table = Table("accelerator", "m × n × k", "measured", "predicted", title="best products, bf16, TFLOP/s")
    figures = yaml.safe_load((folder / "published_figures.yaml").read_text())["rows"]
    for figure in figures:
        names = [name for start, name in PUBLISHED.items() if figure["hardware"].startswith(start)]
        if figure["kind"] not in ("gemm_peak", "gemm_shape") or "mnk" not in figure or not names:
            continue
        device = load(names[0])
        m, n, k = map(int, figure["mnk"].split("x"))
        rate = 2e-12 * m * n * k / predict(device, device.gemm, (1, m, n, k))
        value = figure["value"]
        measured = " to ".join(f"{number:.0f}" for number in (value if isinstance(value, list) else [value]))
        table.add_row(device.name, f"{m} × {n} × {k}", measured, f"{rate:.0f}")
    return table


def attention() -> Table:
    """Published rates of fused attention beside their predictions."""
    columns = ("accelerator", "heads × length × head size", "pass", "measured", "predicted", "source")
    table = Table(*columns, title="fused attention, bf16 or fp16, TFLOP/s")
    for row in ATTENTION:
        shape = f"{row.heads} × {row.length} × {row.width}"
        which = ("causal " if row.causal else "") + ("backward" if row.backward else "forward")
        table.add_row(row.name, shape, which, f"{row.rate:.0f}", f"{row.predicted:.0f}", row.source)
    errors = np.abs([row.predicted / row.rate - 1 for row in ATTENTION])
    table.caption = f"median error {100 * np.median(errors):.1f} %, worst {100 * errors.max():.1f} %"
    return table


if __name__ == "__main__":
    typer.run(main)
