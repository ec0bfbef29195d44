"""Trace a model: `torch.export` it with fake tensors and hand the graph to clean-up.

Every failure of the export comes out as one sentence that names the module and the line of the user's code.
"""

from __future__ import annotations

import gc
import inspect
import io
import linecache
import logging
import os
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram, ShapesCollection

from autotp import _torch
from autotp.autograd_functions import FunctionCalls
from autotp.cleanup import to_program
from autotp.errors import AutotpError
from autotp.expand import Cut, Inexact
from autotp.functional import TORCH_DIRECTORY
from autotp.interpret import run
from autotp.program import Program
from autotp.trace_checks import passed_checks
from autotp.trace_helpers import prepared
from autotp.trace_once import Repeats
from autotp.trace_watch import refuse_frozen_draws, told_eager, watched

__all__ = ["run", "trace"]


def trace(
    model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None, *, dynamic: bool = True, whole: bool = False
) -> Program:
    """Trace one forward of a model into a `Program`.

    Args:
        model: any module, on any device, with real or fake parameters (built under `FakeTensorMode` or on `meta`), in
            the mode (train or eval) and dtype in which it will run. It is left as it was.
        args, kwargs: example inputs, real or fake: `model(*args, **kwargs)`. Without any, the model's own
            `dummy_inputs` serve.
        dynamic: let all dims of the input tensors vary that can (sizes 0 and 1, and heights and widths of images, cannot). If
            the model does not allow that, sizes are those of the example and a note says why. False: sizes are those of the
            example.
        whole: trace every copy of repeated blocks, not two of each kind (`trace_once`). The result is the same.

    Raises:
        AutotpError: missing or wrong example inputs; a model that cannot be traced.
    """
    notes: list[str] = []
    if not isinstance(model, nn.Module):
        raise AutotpError(f"the model is {model!r}, which is no torch.nn.Module; pass the module itself.")
    args, named = _example(model, args, kwargs, notes)
    functions = FunctionCalls()
    with ExitStack() as stack:
        stack.enter_context(prepared(model, notes))
        state = [*model.parameters(), *model.buffers()]
        args, named = _without_aliases(args, named)
        mode = _torch.fake_mode_of(state)
        on_meta = any(tensor.device.type == "meta" for tensor in state)
        if mode is not None or on_meta:
            args, named = _fake((args, named), fakes := mode or _torch.new_fake_mode())
            if on_meta:
                stack.enter_context(_torch.with_state(model, _off_meta(model, fakes)))
        for context in (torch.inference_mode(False), torch.enable_grad(), _quiet(), _without_collector(), functions.intercepted()):
            stack.enter_context(context)
        drew, places = stack.enter_context(watched(model, notes))
        stack.enter_context(passed_checks(notes))
        library = stack.enter_context(_torch.operator_library())

        def traced(whole: bool) -> tuple[Program, list[str]]:
            said: list[str] = []
            exported, cut = export(said, whole)
            if drew():
                refuse_frozen_draws(exported, lambda: export([], whole)[0], places)
            ordered, names = _named_leaves(model, exported, args, named)
            return to_program(exported, model, ordered, names, functions, cut), said

        def export(said: list[str], whole: bool) -> tuple[ExportedProgram, Cut]:
            return _export(model, args, named, dynamic, said, lambda: Repeats(functions, library, whole))

        try:
            program, said = traced(whole)
        except Inexact:
            program, said = traced(True)
        notes += said
    return replace(program, notes=(*notes, *functions.inlined, *program.notes))


def _example(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, notes: list[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example inputs, checked against the forward's signature."""
    signature, kind = inspect.signature(model.forward), type(model).__name__
    if not isinstance(args, (tuple, list)):
        raise AutotpError(
            f"args must be a tuple of example inputs for {kind}.forward{signature}, not {type(args).__name__}."
        )
    if not args and kwargs is None:
        kwargs = getattr(model, "dummy_inputs", None)
        if isinstance(kwargs, Mapping) and kwargs:
            shown = ", ".join(f"{key} {list(getattr(value, 'shape', ()))}" for key, value in kwargs.items())
            notes.append(f"No example inputs were given; traced with the model's own dummy_inputs ({shown}).")
        else:
            kwargs = {}
    named = dict(kwargs or {})
    try:
        signature.bind(*args, **named)
    except TypeError as error:
        needed = ", ".join(str(parameter) for parameter in signature.parameters.values())
        raise AutotpError(
            f"{kind}.forward({needed}) cannot be called with the example inputs ({error}); "
            "pass args=(...) or kwargs={...} with a tensor of the right shape and dtype for each input."
        ) from None
    return tuple(args), named


def _without_aliases(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs as objects of their own: export takes equal objects for one input, and leaves marks on them."""
    seen: set[int] = set()

    def fresh(leaf: torch.Tensor) -> torch.Tensor:
        repeated = id(leaf) in seen
        seen.add(id(leaf))
        return (leaf.detach().clone() if repeated else leaf.detach()).requires_grad_(leaf.requires_grad)

    result: tuple[tuple[Any, ...], dict[str, Any]] = _torch.tree_map_only(torch.Tensor, fresh, (args, kwargs))
    return result


def _fake(tree: Any, mode: Any) -> Any:
    """The nested inputs with fake tensors of `mode`."""
    return _torch.tree_map_only(torch.Tensor, lambda leaf: _torch.to_fake(leaf, mode), tree)


def _off_meta(model: nn.Module, mode: Any) -> dict[str, torch.Tensor]:
    """Fake CPU tensors for all parameters and buffers of a model on `meta`; tied names share one."""
    fakes: dict[int, torch.Tensor] = {}
    state: dict[str, torch.Tensor] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        if id(tensor) not in fakes:
            fake = _torch.to_fake(tensor, mode)
            is_parameter = isinstance(tensor, nn.Parameter)
            fakes[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
        state[name] = fakes[id(tensor)]
    return state


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: bool, notes: list[str], repeats: Callable[[], Repeats]
) -> tuple[ExportedProgram, Cut]:
    """Export the model as it runs eagerly: with all dims free or, where that fails, with the example's.

    Only where neither works is code that asks told that it is being exported. Also gives what was cut short.
    """
    failures: list[Exception] = []
    for truth in (False, True):
        with told_eager(truth) as asked:
            reason = ""
            for free in (True, False) if dynamic else (False,):
                try:
                    exported = _cut_short(model, args, kwargs, free, found := repeats())
                except Exception as error:
                    failures.append(error)
                    reason = f"{_where(error, model)}: {_first_line(error)}"
                    continue
                if reason:
                    notes.append(f"Sizes are fixed at those of the example inputs, because they could not be left free ({reason}).")
                if free and _fixed(args, kwargs):
                    notes.append("Heights and widths of images are fixed at those of the example inputs.")
                if truth:
                    files = {frame.f_code.co_filename for item in _chain(failures[0]) for frame, _ in traceback.walk_tb(item.__traceback__)}
                    culprit = next((place for place in asked if place.rpartition(":")[0] in files), asked[0])
                    notes.append(
                        f"The model asks at {culprit} whether it is being exported and cannot be traced unless it is told so: what "
                        "it computes then may differ from what it computes in eager mode."
                    )
                return exported, found.cut
        if not asked:
            break
    raise _explained(failures[1 if dynamic else 0], model) from None


def _cut_short(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], free: bool, repeats: Repeats) -> ExportedProgram:
    """One export, in which calls of repeated blocks are cut short; if it fails for that, a whole one."""
    try:
        with repeats.of(model):
            return _exported(model, args, kwargs, free)
    except Exception:
        if not repeats.calls:
            raise
    repeats.calls.clear()
    return _exported(model, args, kwargs, free)


def _exported(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], free: bool) -> ExportedProgram:
    """One export, with all dims of the inputs free or none."""
    if not free:
        return torch.export.export(model, args, kwargs, strict=False)
    marked, named = _without_aliases(args, kwargs)
    shapes: Any = ShapesCollection()  # type: ignore[no-untyped-call]
    tensors = [leaf for leaf in _torch.tree_flatten((marked, named))[0] if isinstance(leaf, torch.Tensor) and leaf.ndim]
    for leaf in tensors:
        shapes[leaf] = dict.fromkeys(_free_dims(leaf, tensors), Dim.AUTO)
    return torch.export.export(model, marked, named, dynamic_shapes=shapes.dynamic_shapes(model, marked, named), strict=False)


def _fixed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether dims of the inputs are kept from varying."""
    tensors = [leaf for leaf in _torch.tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
    return any(len(_free_dims(leaf, tensors)) < leaf.ndim for leaf in tensors)


def _free_dims(leaf: torch.Tensor, inputs: list[torch.Tensor]) -> list[int]:
    """The dims that may vary: all of a sequence; of images and masks the first two, and what is as long as some sequence.

    Free heights and widths can make an export take minutes, in which PyTorch reasons about windows of pixels.
    """
    lengths = {other.shape[1] for other in inputs if other.ndim in (2, 3)}
    return [dim for dim, size in enumerate(leaf.shape) if leaf.ndim < 4 or dim < 2 or size in lengths]


def _named_leaves(
    model: nn.Module, exported: ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Any], tuple[str, ...]]:
    """The example's leaves in the order of the exported program's inputs, and a name for each (`mask`, `batch.0`)."""
    ordered = {key: kwargs[key] for key in exported.call_spec.in_spec.child(1).context}
    positional = [
        parameter.name
        for parameter in inspect.signature(model.forward).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    leaves, names = [], []
    for (group, first, *rest), leaf in _torch.tree_flatten_with_path((args, ordered))[0]:
        key = _key(first)
        in_args = _key(group) == "0"
        name = key if not in_args else positional[int(key)] if int(key) < len(positional) else f"args.{key}"
        names.append(".".join([name, *map(_key, rest)]))
        leaves.append(leaf)
    return leaves, tuple(names)


def _key(entry: Any) -> str:
    """One step of a pytree path, as text."""
    return str(next(getattr(entry, field) for field in ("idx", "key", "name") if hasattr(entry, field)))


# Failures


OUR_DIRECTORY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "")

DATA_DEPENDENT = ("GuardOnDataDependentSymNode", "DataDependentOutputException", "PendingUnbackedSymbolNotFound")


def _explained(error: BaseException, model: nn.Module) -> AutotpError:
    """The sentence for a failed export."""
    for item in _chain(error):
        if isinstance(item, AutotpError):
            return item
    place, reason = _where(error, model), _first_line(error)
    if any(type(item).__name__ in DATA_DEPENDENT for item in _chain(error)) or "data-dependent" in str(error).lower():
        cure = "choose with torch.where instead, or make it a plain Python value"
        if any(hasattr(module, "running_mean") and getattr(module, "momentum", 0.1) is None for module in model.modules()):
            cure = "give batch norms a number for `momentum`, since None counts the batches"
        if any("expert" in kind.lower() for kind in (place, *_modules(error))):
            cure = (
                "compute every expert and weigh the results, or use grouped matrix products "
                '(in transformers: experts_implementation="grouped_mm")'
            )
        return AutotpError(
            f"the model cannot be traced because {place} needs the value of a tensor (in an `if`, a loop bound, `int` or `item`); {cure}."
        )
    advice = next(
        (advice for sign, advice in ADVICE.items() if any(sign in str(item) for item in _chain(error))),
        "check that the example inputs have the right shapes and dtypes and that `model(*args, **kwargs)` runs",
    )
    return AutotpError(f"the model cannot be traced: {place} raised {type(_chain(error)[-1]).__name__} ({reason}); {advice}.")


ADVICE = {
    "Expected inputs of BF16 type": "PyTorch traces its grouped matrix product in bfloat16 alone, so call model.bfloat16() first",
    "need to register a pytree": "return a tensor, tuple, list or dict, or register the class with torch.export.register_dataclass",
}
"""What stands in a failure of PyTorch's → what to do about it."""


def _chain(error: BaseException) -> list[BaseException]:
    """The error and what caused it, the first cause last."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    return chain


def _where(error: BaseException, model: nn.Module) -> str:
    """`file:line` (`code`) in module `path`: the innermost frame of the failure that is neither PyTorch's nor ours."""
    names = {id(module): name for name, module in model.named_modules()}
    inside = f"the forward of {type(model).__name__}"
    for item in reversed(_chain(error)):
        line, path = "", None
        for frame, number in traceback.walk_tb(item.__traceback__):
            file = frame.f_code.co_filename
            owner = frame.f_locals.get("self")
            if id(owner) in names:
                path = names[id(owner)]
            if path is not None and not file.startswith((TORCH_DIRECTORY, OUR_DIRECTORY, "<")):
                code = linecache.getline(file, number).strip()
                line = f"{file}:{number}" + (f" (`{code}`)" if code else "")
        if path is not None and line:
            return f"{line} in module `{path or '(root)'}`"
        if path:
            inside = f"the {type(model.get_submodule(path)).__name__} module `{path}`"
    return inside


def _modules(error: BaseException) -> list[str]:
    """The class names of the modules whose code was running."""
    frames = [frame for item in _chain(error) for frame, _ in traceback.walk_tb(item.__traceback__)]
    return [type(owner).__name__ for frame in frames if isinstance(owner := frame.f_locals.get("self"), nn.Module)]


def _first_line(error: BaseException) -> str:
    """The first line of what went wrong first."""
    text = str(_chain(error)[-1]).strip() or type(_chain(error)[-1]).__name__
    return text.splitlines()[0].rstrip(".")


# Contexts around every export


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing on stderr (PyTorch logs stack traces and prints half-made graphs): what fails is said in one sentence."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@contextmanager
def _without_collector() -> Iterator[None]:
    """No garbage collection, which finds nothing during an export and takes a seventh of its time."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()

