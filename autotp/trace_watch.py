"""Watching an export: what the model's own code asks and does that a graph cannot show.

A graph repeats the numbers that Python computed once. So code must not notice that it is traced, numbers drawn in Python must not
reach the graph, and attributes that a forward changes are set back.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy
import torch
from torch import fx, nn
from torch.export import ExportedProgram

from autotp import _torch
from autotp.errors import AutotpError
from autotp.functional import TORCH_DIRECTORY
from autotp.trace_helpers import changed

# ---- "am I being exported?" -----------------------------------------------------------------------------------------


@contextmanager
def told_eager(truth: bool) -> Iterator[list[str]]:
    """Answer code outside PyTorch that asks whether it is traced: with `truth`, or that it is not.

    Yields:
        the places (`file:line`) that asked, filled in as they do.
    """
    asked: list[str] = []

    def answer(original: Callable[[], bool]) -> Callable[[], bool]:
        def replacement() -> bool:
            frame = sys._getframe(1)
            while frame.f_back is not None and frame.f_code.co_name.startswith("is_"):  # a wrapper asks for its caller
                frame = frame.f_back
            if not original() or frame.f_code.co_filename.startswith(TORCH_DIRECTORY):
                return original()
            place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
            if place not in asked:
                asked.append(place)
            return truth

        return replacement

    _torch.fill_compiler_tables()
    questions = (torch.compiler.is_exporting, torch.compiler.is_compiling)
    with changed([(module, question.__name__, answer(question)) for question in questions for module in _importers(question)]):
        yield asked


def _importers(function: Callable[..., Any]) -> list[Any]:
    """The module that defines the function, and those outside PyTorch that imported it under its own name."""
    holders = [module for module in list(sys.modules.values()) if vars(module).get(function.__name__) is function]
    return [module for module in holders if module.__name__ == function.__module__ or not module.__name__.startswith("torch.")]


# ---- random numbers drawn in Python ---------------------------------------------------------------------------------

DRAWS = {
    random: ("random", "uniform", "randint", "randrange", "choice", "choices", "sample", "shuffle", "gauss", "normalvariate"),
    numpy.random: (
        *("rand", "randn", "randint", "random", "random_sample", "uniform", "normal", "choice", "permutation", "shuffle"),
        *("binomial", "beta", "standard_normal", "default_rng"),
    ),
}
"""Functions that draw from the generators of Python and numpy: by their callers a refusal names the place."""


@contextmanager
def recorded_draws() -> Iterator[list[str]]:
    """Yields the places (`call at file:line`) that draw random numbers in Python, filled in as they do."""
    places: list[str] = []

    def record(module: Any, name: str) -> Callable[..., Any]:
        original = getattr(module, name)

        def draw(*args: Any, **kwargs: Any) -> Any:
            frame = sys._getframe(1)
            if not frame.f_code.co_filename.startswith((TORCH_DIRECTORY, random.__file__)):
                places.append(f"{module.__name__}.{name} at {frame.f_code.co_filename}:{frame.f_lineno}")
            return original(*args, **kwargs)

        return draw

    with changed([(module, name, record(module, name)) for module, names in DRAWS.items() for name in names]):
        yield places


@contextmanager
def kept_generators() -> Iterator[Callable[[], bool]]:
    """Yields whether Python's or numpy's global generator has moved; sets both back at the end."""
    python, arrays = random.getstate(), numpy.random.get_state()

    def moved() -> bool:
        now = numpy.random.get_state()
        return random.getstate() != python or str(now) != str(arrays) or now[1].tobytes() != arrays[1].tobytes()  # type: ignore

    try:
        yield moved
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)


REPEATS = 2
"""How often a model that draws random numbers in Python is exported again, to see whether they reach the graph."""


def refuse_frozen_draws(first: ExportedProgram, export: Callable[[], ExportedProgram], places: list[str]) -> None:
    """Refuse a model of which two exports differ, since random numbers drawn in Python would be frozen.

    Raises:
        AutotpError: they differ.
    """
    drawn = list(dict.fromkeys(places))
    for _ in range(REPEATS):
        if not same_graph(first, export()):
            where = f"{drawn[0]} draws" if drawn else "the model draws"
            raise AutotpError(
                f"{where} a random number in Python, which a trace would repeat in every step; switch that off (a rate of 0, "
                "or eval mode), or draw it with torch (torch.rand) and choose with torch.where."
            )


def same_graph(one: ExportedProgram, other: ExportedProgram) -> bool:
    """Whether two exports have the same operators, arguments and constants."""
    if _text(one) != _text(other) or one.constants.keys() != other.constants.keys():
        return False
    pairs = [(one.constants[name], other.constants[name]) for name in one.constants]
    return all(not isinstance(a, torch.Tensor) or _torch.fake_mode_of([a]) is not None or torch.equal(a, b) for a, b in pairs)


def _text(exported: ExportedProgram) -> str:
    code = "\n".join(str(module.code) for module in exported.graph_module.modules() if isinstance(module, fx.GraphModule))
    return re.sub(r"\bcall_\d+_\d+\b", "call", code)


# ---- attributes that a forward changes ------------------------------------------------------------------------------

PLAIN = (bool, int, float, str, type(None))


@contextmanager
def kept_attributes(model: nn.Module, notes: list[str]) -> Iterator[None]:
    """Set back the plain attributes that the forward changes, and say so: the parallel model will not change them."""
    before = [(name, module, dict(vars(module))) for name, module in model.named_modules()]
    found: dict[str, tuple[nn.Module, str, Any]] = {}

    def look(*_: Any) -> None:
        for path, module, held in before:
            for key, value in held.items():
                now = vars(module).get(key, value)
                if type(value) in PLAIN and now is not value and (type(now) is not type(value) or now != value):
                    found[f"{path}.{key}".lstrip(".")] = module, key, value

    handle = model.register_forward_hook(look)  # while the changes are there: the export itself sets some back
    try:
        yield
    finally:
        handle.remove()
        for module, key, value in found.values():
            setattr(module, key, value)
    names = [name for name, (_, _, value) in found.items() if value is not None]  # what was None is a cache that is filled
    if names:
        shown = ", ".join(f"`{name}`" for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        notes.append(f"The forward changes {shown} in Python; the parallel model always computes as in the first call.")


@contextmanager
def watched(model: nn.Module, notes: list[str]) -> Iterator[tuple[Callable[[], bool], list[str]]]:
    """Everything that is watched around all exports of a model. Yields `moved` and the places that drew."""
    with ExitStack() as stack:
        stack.enter_context(kept_attributes(model, notes))
        moved = stack.enter_context(kept_generators())
        places = stack.enter_context(recorded_draws())
        yield (lambda: moved() or bool(places)), places
