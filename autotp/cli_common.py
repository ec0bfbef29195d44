"""What the commands share: options as users write them, progress on stderr, and a border around the model's own code."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from autotp.errors import AutotpError

FORMATS = ("table", "yaml", "json")
QUIET = 15.0
"""Seconds between two lines of progress on a stderr that is no terminal; what takes less time says nothing."""
SUFFIXES = {".yaml": "yaml", ".yml": "yaml", ".json": "json"}
UNITS = {"": 1, "b": 1} | {
    prefix + unit: base**power
    for power, prefix in enumerate("kmgt", start=1)
    for unit, base in (("b", 1000), ("ib", 1024), ("", 1000))
}


def parse_size(text: str) -> float:
    """Bytes of `80GB`, `80GiB`, `512MB`, `1.5g` or a plain number of bytes; without `i` the units are decimal.

    Raises:
        AutotpError: it is none of these, or not above 0.
    """
    found = re.fullmatch(r"\s*(-?(?:\d+(?:\.\d+)?|\.\d+))\s*([a-z]*)\s*", text.lower())
    if found is None or found[2] not in UNITS:
        raise AutotpError(f"the memory size {text!r} is not understood: write such as 80GB, 80GiB, 512MB, or bytes")
    count: float = float(found[1]) * UNITS[found[2]]
    if count <= 0:
        raise AutotpError(f"the memory size {text!r} must be positive, such as 80GB; leave --memory out for no limit")
    return count


def unit_of(text: str) -> str:
    """The unit in which a memory size was written, `GB` or `GiB`, for the answer to be told in it too."""
    return "GiB" if text.lower().rstrip().endswith("ib") else "GB"


def parse_pins(pins: Sequence[str]) -> dict[str, str]:
    """`{"*.q_proj": "column"}` for `*.q_proj=column`.

    Raises:
        AutotpError: there is no `=`, or a pattern is pinned twice to different words.
    """
    found: dict[str, str] = {}
    for pin in pins:
        pattern, equals, word = pin.rpartition("=")
        if not equals or not pattern or not word:
            raise AutotpError(f"the pin {pin!r} is not understood: write PATTERN=WORD, such as '*.q_proj=column'")
        if found.setdefault(pattern.strip(), word.strip()) != word.strip():
            raise AutotpError(f"{pattern!r} is pinned to both {found[pattern.strip()]!r} and {word!r}; keep one")
    return found


def check_writable(path: Path) -> None:
    """Refuse an output file that cannot be written, before minutes are spent on its contents.

    Raises:
        AutotpError: it is a directory, or its directory is missing or not writable.
    """
    folder = path.parent
    if path.is_dir():
        reason = "it is a directory"
    elif not folder.is_dir():
        reason = f"there is no directory {folder}"
    elif not os.access(folder, os.W_OK):
        reason = f"the directory {folder} is not writable"
    else:
        return
    raise AutotpError(f"cannot write {path}: {reason}; give another --output")


def screen() -> tuple[int, bool]:
    """Columns of the terminal (140 without one), and whether stdout shows colours."""
    from shutil import get_terminal_size

    return get_terminal_size((140, 0)).columns, sys.stdout.isatty() and "NO_COLOR" not in os.environ


@contextmanager
def progress() -> Iterator[Any]:
    """A function that says on stderr what is being done: a line that changes on a terminal, else a plain line now and then."""
    if sys.stderr.isatty():
        from rich.console import Console

        with Console(stderr=True).status("") as status:
            yield lambda words: status.update(f"{words} …")
        return
    stream, last = sys.stderr, time.monotonic()

    def say(words: str) -> None:
        nonlocal last
        if time.monotonic() - last >= QUIET:
            last = time.monotonic()
            print(f"autotp: {words} …", file=stream, flush=True)

    yield say


@contextmanager
def guest(model: str) -> Iterator[None]:
    """The model's own code runs inside: what it prints goes to stderr, and it cannot end the process.

    Raises:
        AutotpError: it called `sys.exit`.
    """
    try:
        with redirect_stdout(sys.stderr):
            yield
    except SystemExit as error:
        code = "" if error.code is None else repr(error.code)
        raise AutotpError(f"the code of {model} called sys.exit({code}); it must return a model, or raise an error") from None


@contextmanager
def calm_collector() -> Iterator[None]:
    """No garbage collection: a plan keeps nearly all that it makes, and looking through it all takes a tenth of the time.

    What was made inside is left out of later collections too, since the process ends soon after.
    """
    import gc

    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if running:
            gc.enable()
