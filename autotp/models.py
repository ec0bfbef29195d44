"""The model that a command names: `hf:ID`, a Hugging Face `config.json`, or a Python callable.

A model is built for planning with fake tensors (shapes and dtypes, no memory), or for running with real random weights.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from autotp.errors import AutotpError
from autotp.huggingface import build_from_config, max_positions, read_config
from autotp.huggingface_inputs import example_inputs
from autotp.loading import (
    DEFAULT_SEQ,
    FORMS,
    LoadedModel,
    brief,
    check_options,
    did_you_mean,
    explained,
    is_callable_spec,
    map_tensors,
    nearest_example,
    parse_dtype,
    tensors,
)

__all__ = ["LoadedModel", "load_model"]


def load_model(
    spec: str,
    *,
    batch: int | None = None,
    seq: int | None = None,
    dtype: str | None = None,
    mode: str = "train",
    fake: bool = True,
    overrides: dict[str, Any] | None = None,
) -> LoadedModel:
    """Build the model that `spec` names, with example inputs.

    Args:
        spec: `hf:ID` (the configuration of a Hugging Face model, from the hub or its local cache), a directory with a
            `config.json` or such a file, or `file.py:callable` / `package.module:callable`. The callable returns a
            model, `(model, args)` or `(model, args, kwargs)`, and may take arguments named `batch` and `seq`.
        batch: sequences per step, default 1.
        seq: tokens per sequence, default the model's maximum positions, at most 4096.
        dtype: dtype of weights and floating inputs, e.g. `bfloat16` or `bf16`; default that of the configuration, else
            bfloat16 when fake and float32 when real. A callable's model keeps its own unless one is given.
        mode: `train` or `inference`: calls `model.train()` or `model.eval()`; `train` adds labels for a language model.
        fake: build under fake tensors, without memory or initialisation; else with random weights of seed 0.
        overrides: configuration fields, or keyword arguments of the callable, that replace its own; a dotted name
            reaches into a nested configuration, e.g. `text_config.num_hidden_layers`.

    Raises:
        AutotpError: the model cannot be found or built as asked.
    """
    check_options(batch=batch, seq=seq, mode=mode)
    target = parse_dtype(dtype)
    if not is_callable_spec(spec):
        name, config = read_config(spec, overrides)
        return build_from_config(config, name, batch=batch, seq=seq, dtype=target, mode=mode, fake=fake)
    function = find_callable(spec)
    arguments = dict(overrides or {})
    for key, value in {"batch": batch, "seq": seq}.items():
        if value is None:
            continue
        if not accepts(function, key):
            raise AutotpError(
                f"{spec} takes no argument `{key}`, so {key} {value} cannot be set; add it to the callable."
            )
        arguments[key] = value
    return build_from_callable(function, spec, arguments, dtype=target, mode=mode, fake=fake)


def takes_batch(spec: str) -> bool:
    """Whether a batch can be set for the model that `spec` names: a callable may lack the argument.

    Raises:
        AutotpError: there is no such callable.
    """
    return not is_callable_spec(spec) or accepts(find_callable(spec), "batch")


# Python callables


def find_callable(spec: str) -> Callable[..., Any]:
    """The callable of `file.py:callable` or `package.module:callable`; AutotpError if either half is missing."""
    place, _, name = spec.rpartition(":")
    path = Path(place)
    if path.suffix == ".py" and not path.is_file():
        raise AutotpError(f"no such file `{place}`; {FORMS}.")
    if path.suffix != ".py" and not all(part.isidentifier() for part in place.split(".")):
        raise AutotpError(f"no such model `{spec}`; {FORMS}{nearest_example(spec)}.")
    module = import_file(path) if path.suffix == ".py" else import_module(place)
    found: Callable[..., Any] | None = getattr(module, name, None)
    if found is None or not callable(found):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise AutotpError(f"`{place}` has no callable `{name}`{did_you_mean(name, known)}.")
    return found


def import_file(path: Path) -> ModuleType:
    """The module of a Python file, which may import its neighbours."""
    name = f"autotp_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise AutotpError(f"`{path}` is no Python file; {FORMS}.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look modules up here
    with explained(f"`{path}` cannot be imported: ERROR.", path.resolve()), importing_from(path.resolve().parent):
        spec.loader.exec_module(module)
    return module


def import_module(name: str) -> ModuleType:
    """The module of a dotted name, sought in the current directory first."""
    advice = "install it or give file.py:callable"
    with explained(f"the module `{name}` cannot be imported: ERROR; {advice}."), importing_from(Path.cwd()):
        return importlib.import_module(name)


def build_from_callable(
    function: Callable[..., Any],
    spec: str,
    arguments: dict[str, Any],
    *,
    dtype: torch.dtype | None,
    mode: str,
    fake: bool,
) -> LoadedModel:
    """The model and inputs that `function(**arguments)` returns; see `load_model`."""
    notes: list[str] = []
    if fake:
        try:
            with tensors(True):
                return accept(function(**arguments), spec, arguments, dtype, mode, notes)
        except AutotpError:
            raise
        except Exception as error:  # any error of the user's code
            notes.append(f"{spec} was built with real weights, because under fake tensors it raised {brief(error)}.")
    file = getattr(sys.modules.get(function.__module__ or ""), "__file__", None)
    with tensors(False):
        with explained(f"{spec} raised ERROR.", Path(file) if file else None):
            result = function(**arguments)
        return accept(result, spec, arguments, dtype, mode, notes)


def accept(
    result: Any, spec: str, arguments: dict[str, Any], dtype: torch.dtype | None, mode: str, notes: list[str]
) -> LoadedModel:
    """What a callable returned, checked, in the dtype and mode asked for."""
    parts: tuple[Any, ...] = result if isinstance(result, tuple) else (result,)
    if not 1 <= len(parts) <= 3 or not isinstance(parts[0], nn.Module):
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise AutotpError(
            f"{spec} returned ({kinds}); return a torch.nn.Module, (model, args) or (model, args, kwargs)."
        )
    defaults: tuple[Any, ...] = ((), {})
    model, args, kwargs = parts + defaults[len(parts) - 1 :]
    if not isinstance(args, (tuple, list)) or not isinstance(kwargs, dict):
        raise AutotpError(
            f"{spec} returned args of type {type(args).__name__} and kwargs of type {type(kwargs).__name__}; "
            "return a tuple and a dict, e.g. (model, (x,))."
        )
    batch, seq = arguments.get("batch"), arguments.get("seq")
    model.train(mode == "train")
    args = tuple(args)
    if dtype is not None:

        def cast(leaf: torch.Tensor) -> torch.Tensor:
            return leaf.to(dtype) if leaf.is_floating_point() else leaf

        map_tensors(model, cast)
        args, kwargs = torch.utils._pytree.tree_map_only(torch.Tensor, cast, (args, kwargs))
    name = spec.rpartition(":")[2]
    required = [
        parameter.name
        for parameter in inspect.signature(model.forward).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    if not args and not kwargs and hasattr(model, "main_input_name") and hasattr(model, "config"):
        batch, seq = batch or 1, seq or min(max_positions(model) or DEFAULT_SEQ, DEFAULT_SEQ)
        own = next((parameter.dtype for parameter in model.parameters()), torch.float32)
        kwargs, more = example_inputs(model, spec, batch, seq, own, mode)
        notes = [*notes, *more]
    elif not args and not kwargs and required:
        raise AutotpError(
            f"{spec} returned a model without inputs, but its forward needs `{required[0]}`; return (model, args)."
        )
    return LoadedModel(model, args, kwargs, name, batch, seq, tuple(notes))


def accepts(function: Callable[..., Any], name: str) -> bool:
    """Whether `function` can be called with the keyword argument `name`."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
    return name in parameters or any(item.kind is item.VAR_KEYWORD for item in parameters.values())


@contextlib.contextmanager
def importing_from(directory: Path) -> Iterator[None]:
    """`directory` first on the import path inside."""
    sys.path.insert(0, str(directory))
    try:
        yield
    finally:
        sys.path.remove(str(directory))
