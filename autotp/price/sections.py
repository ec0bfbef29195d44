"""The YAML files of `cost_models/`, read key by key, so that every mistake is reported with file, line and key."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import yaml

from autotp.errors import AutotpError

BYTES = {"bytes": 1.0, "gb": 1e9, "gib": 2.0**30}
BYTES_PER_SECOND = {"gb_per_s": 1e9, "tb_per_s": 1e12, "gbit_per_s": 1e9 / 8}
SECONDS = {"us": 1e-6, "ns": 1e-9, "ms": 1e-3}
NOISE = 4.0
"""A sweep in which more bytes take less time by this factor is refused; published sweeps of sound machines reach 2.4."""
T = TypeVar("T")


def cost_models_dir() -> Path:
    """The folder of the YAML files: `autotp/cost_models` in a wheel, `cost_models` at the top of a source checkout.

    Raises:
        AutotpError: neither exists.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "cost_models", package.parent / "cost_models"):
        if (folder / "clusters").is_dir():
            return folder
    raise AutotpError(f"no cost_models folder beside {package}: reinstall autotp")


def names_in(folder: str) -> list[str]:
    """The names of the files in a folder of `cost_models/`, sorted."""
    return sorted(path.stem for path in (cost_models_dir() / folder).glob("*.yaml"))


def nearest(word: str, known: Iterable[str]) -> str:
    """", did you mean …?" if something known is written almost like `word`; else nothing."""
    found = difflib.get_close_matches(word.lower(), list(known), n=3, cutoff=0.5)
    return f", did you mean {' or '.join(found)}?" if found else ""


def open_section(path: Path) -> Section:
    """The file's top mapping."""
    try:
        with path.open(encoding="utf-8") as stream:
            node = yaml.compose(stream, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise AutotpError(f"{path}, line {line}: not valid YAML, {error.problem}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise AutotpError(f"cannot read {path}: {error}") from error
    if not isinstance(node, yaml.MappingNode):
        raise AutotpError(f"{path}, line 1: must be a mapping of keys, such as `accelerator: h100-sxm`")
    return Section(node, path, path.stem)


class Section:
    """One mapping of a file, read key by key; `finish` refuses the keys that nobody read."""

    def __init__(self, node: yaml.MappingNode, path: Path, name: str) -> None:
        self.node, self.path, self.name = node, path, name
        self.entries: dict[str, yaml.Node] = {}
        self.expected: set[str] = {"source"}
        for key, value in node.value:
            word = str(key.value)
            if word in self.entries:
                raise AutotpError(f"{path}, line {key.start_mark.line + 1}: {word!r} stands here a second time")
            self.entries[word] = value

    def error(self, key: str, message: str) -> AutotpError:
        mark = self.entries.get(key, self.node).start_mark
        return AutotpError(f"{mark.name}, line {mark.line + 1}: {key!r} {message}")

    def finish(self) -> None:
        for key in self.entries:
            if key not in self.expected:
                hint = nearest(key, self.expected) or f"; known keys: {', '.join(sorted(self.expected))}"
                raise self.error(key, f"is no known key{hint}")

    def scalar(self, key: str, wanted: str, default: str | None = None) -> str:
        self.expected.add(key)
        node = self.entries.get(key)
        if node is None and default is not None:
            return default
        if node is None:
            raise self.error(key, f"is missing: add it as {wanted}")
        if not isinstance(node, yaml.ScalarNode):
            raise self.error(key, f"must be {wanted}")
        return str(node.value)

    def text(self, key: str, default: str | None = None) -> str:
        return self.scalar(key, "text", default)

    def choice(self, key: str, values: dict[str, T], default: str | None = None) -> T:
        wanted = " or ".join(values)
        word = self.scalar(key, wanted, default)
        if word not in values:
            raise self.error(key, f"is {word!r} but must be {wanted}")
        return values[word]

    def number(self, key: str, default: float | None = None, positive: bool = False, unit: str = "number") -> float:
        wanted = f"a {unit}{' greater than 0' if positive else ', at least 0'}"
        text = self.scalar(key, wanted, None if default is None else repr(default))
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < 0 or (positive and value == 0):
            raise self.error(key, f"is {text!r} but must be {wanted}")
        return value

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self.number(key, default)
        if value != int(value) or value < least:
            raise self.error(key, f"is {value:g} but must be a whole number, at least {least}")
        return int(value)

    def fraction(self, key: str, default: float | None = None) -> float:
        value = self.number(key, default, positive=True)
        if value > 1:
            raise self.error(key, f"is {value:g} but must be a fraction between 0 and 1")
        return value

    def quantity(self, stem: str, units: dict[str, float], default: float | None = None) -> float:
        """A number whose key ends in its unit, e.g. `memory_gb`, in base units; `default` where no such key is given."""
        keys = [f"{stem}_{unit}" for unit in units]
        self.expected.update(keys)
        found = [key for key in keys if key in self.entries]
        wrong = [key for key in self.entries if key not in self.expected and key.startswith(stem)]
        if default is not None and not found and not wrong:
            return default
        if len(found) != 1:
            problem = "is given twice" if found else "has no known unit" if wrong else "is missing"
            raise self.error((found + wrong + keys)[0], f"{problem}: give exactly one of {', '.join(keys)}")
        unit = found[0].removeprefix(f"{stem}_")
        return self.number(found[0], positive=units is not SECONDS, unit=f"number of {unit}") * units[unit]

    def section(self, key: str) -> Section:
        """The mapping under `key`."""
        self.expected.add(key)
        node = self.entries.get(key)
        if not isinstance(node, yaml.MappingNode):
            raise self.error(key, "must be a mapping of keys" if node else "is missing: add it as a mapping of keys")
        return Section(node, self.path, self.name)

    def sections(self, key: str, required: bool = True) -> list[Section]:
        """The list of mappings under `key`."""
        self.expected.add(key)
        node = self.entries.get(key)
        if node is None and not required:
            return []
        items = node.value if isinstance(node, yaml.SequenceNode) else []
        if not items or not all(isinstance(item, yaml.MappingNode) for item in items):
            raise self.error(key, "must be a list of mappings" if node else "is missing: add it as a list of mappings")
        return [Section(item, self.path, self.name) for item in items]

    def reference(self, key: str) -> Section:
        """The mapping under `key`, or that of the accelerator file that it names."""
        if isinstance(self.entries.get(key), yaml.MappingNode):
            return self.section(key)
        word = self.scalar(key, "the name of an accelerator, a YAML file, or a mapping")
        if word.endswith((".yaml", ".yml")) and (self.path.parent / word).is_file():
            return open_section(self.path.parent / word)
        known = names_in("accelerators")
        if word not in known:
            raise self.error(key, f"names no known accelerator {word!r}{nearest(word, known)}")
        return open_section(cost_models_dir() / "accelerators" / f"{word}.yaml")

    def pairs(self, key: str) -> tuple[tuple[int, int], ...]:
        """A list of pairs of whole numbers, such as `[[128, 256], [64, 64]]`."""
        self.expected.add(key)
        node = self.entries.get(key)
        try:
            rows = yaml.safe_load(yaml.serialize(node)) if node else None
            found = tuple((int(first), int(second)) for first, second in rows or ())
        except (TypeError, ValueError, yaml.YAMLError):
            found = ()
        if not found or min(map(min, found)) < 1:
            raise self.error(key, "must be a list of pairs of whole numbers, such as [[128, 256], [64, 64]]")
        return found

    def points(self, key: str) -> tuple[tuple[float, float], ...]:
        """A mapping of bytes to microseconds, as ((bytes, seconds), …) with growing bytes."""
        table = self.section(key)
        points: list[tuple[float, float]] = []
        for size in table.entries:
            if not size.isdigit() or int(size) == 0:
                raise table.error(size, "must be a whole number of bytes, at least 1")
            nbytes, seconds = float(size), 1e-6 * table.number(size, positive=True, unit="number of us")
            if points and nbytes <= points[-1][0]:
                raise table.error(size, f"stands after {points[-1][0]:.0f}: write the bytes in rising order")
            longest = max((known for _, known in points), default=0.0)
            if seconds < longest / NOISE:
                less = f"takes {1e6 * seconds:g} us, but fewer bytes take {1e6 * longest:g} us"
                raise table.error(size, f"{less}, which is more than noise: check both rows")
            points.append((nbytes, seconds))
        if not points:
            raise self.error(key, "is empty: give bytes and microseconds, such as {65536: 15.2, 131072: 16.8}")
        return tuple(points)
