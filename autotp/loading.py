"""What both ways of building a model share: the result, its options, and errors of other people's code as one sentence."""

from __future__ import annotations

import contextlib
import difflib
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from autotp.errors import AutotpError

if TYPE_CHECKING:  # options are checked before torch is loaded, which takes seconds
    import torch
    from torch import nn

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")
"""The steps of generation."""
MODES = ("train", "inference")
DTYPES = {
    "bfloat16": ("bf16",),
    "float16": ("fp16", "half"),
    "float32": ("fp32", "float"),
    "float64": ("fp64", "double"),
}
DEFAULT_SEQ = 4096
FORMS = "write hf:ID, a config.json, file.py:callable or package.module:callable"
EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "configs"


@dataclass(frozen=True)
class LoadedModel:
    """A model with the example inputs of one step: `model(*args, **kwargs)`.

    Attributes:
        model: the module, in train or eval mode; its tensors are fake unless real weights were asked for.
        args, kwargs: example inputs, fake where the model is.
        name: what reports call it.
        batch: sequences (or images, or recordings) in one step; None when a callable chose its own inputs.
        seq: tokens per sequence; None when a callable chose its own inputs, or there are no tokens.
        notes: sentences about what was assumed, for the user.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    name: str
    batch: int | None
    seq: int | None
    notes: tuple[str, ...] = ()


def check_options(*, batch: int | None, seq: int | None, mode: str) -> None:
    """Raise AutotpError for an unknown mode, or a batch or sequence length below 1."""
    if mode not in MODES:
        raise AutotpError(f"unknown mode `{mode}`; choose {' or '.join(MODES)}.")
    for key, value in {"batch": batch, "seq": seq}.items():
        if value is not None and value < 1:
            raise AutotpError(f"{key} is {value}, but must be at least 1.")


def check_phase(phase: str | None, *, mode: str | None, seq: int | None, context: int | None) -> None:
    """Raise AutotpError for options of a phase that contradict each other; without a phase only `context` is out of place."""
    if phase is None:
        if context is not None:
            raise AutotpError("--context is the length of a key/value cache; give --phase prefill or --phase decode with it")
    elif phase not in PHASES:
        raise AutotpError(f"unknown phase {phase!r}; choose {' or '.join(PHASES)}")
    elif mode == "train":
        raise AutotpError(f"--phase {phase} is a step of generation, which has no training; leave --mode out, or give --mode inference")
    elif context is not None and context < 1:
        raise AutotpError(f"context is {context}, but must be at least 1")
    elif phase == "decode" and seq is not None:
        raise AutotpError("--phase decode reads one token of each sequence; leave --seq out: --context is what the cache holds")
    elif seq is not None and context is not None and seq > context:
        raise AutotpError(f"a prompt of {seq} tokens does not fit into a key/value cache of {context}; raise --context")


def dtype_name(name: str) -> str:
    """`bfloat16` for `bfloat16`, `bf16` or `torch.bfloat16`; AutotpError for anything else."""
    word = name.lower().removeprefix("torch.")
    found = next((full for full, short in DTYPES.items() if word == full or word in short), None)
    if found is None:
        raise AutotpError(f"unknown dtype `{name}`; choose bfloat16, float16, float32 or float64.")
    return found


def parse_dtype(name: str | None) -> torch.dtype | None:
    """`torch.bfloat16` for any name that `dtype_name` knows; None for None; AutotpError for anything else."""
    if name is None:
        return None
    import torch

    found: torch.dtype = getattr(torch, dtype_name(name))
    return found


def is_callable_spec(spec: str) -> bool:
    """Whether `spec` names Python code (`file.py:callable`, `package.module:callable`) rather than a configuration."""
    return not spec.startswith("hf:") and not Path(spec).exists() and ":" in spec


def config_path(spec: str) -> Path:
    """The file of a Hugging Face configuration: `spec` itself, or the `config.json` in that directory.

    Raises:
        AutotpError: there is no such file, or it is Python code.
    """
    path = Path(spec)
    if not path.exists():
        raise AutotpError(f"no such model `{spec}`; {FORMS}{nearest_example(spec)}.")
    path = path / "config.json" if path.is_dir() else path
    if not path.exists():
        raise AutotpError(f"the directory `{spec}` has no config.json; {FORMS}{nearest_example(spec)}.")
    if path.suffix == ".py":
        raise AutotpError(f"`{spec}` names a file but no callable in it; write {spec}:NAME.")
    return path


def map_tensors(model: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Put `change(tensor)` in place of every tensor of `model`; tied stay one tensor, parameters stay parameters."""
    import torch
    from torch import nn

    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # the old tensors too, so that no id is used twice
    for module in model.modules():
        stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, vars(module))
        for key, old in [item for store in stores for item in store.items() if isinstance(item[1], torch.Tensor)]:
            if id(old) not in made:
                new = change(old.detach())
                made[id(old)] = old, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
            setattr(module, key, made[id(old)][1])


@contextlib.contextmanager
def tensors(fake: bool) -> Iterator[None]:
    """Fake tensors inside, or real ones whose random values start at seed 0 and leave the caller's generator alone."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    if fake:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield


@contextlib.contextmanager
def explained(sentence: str, file: Path | None = None) -> Iterator[None]:
    """Raise what goes wrong inside as AutotpError(sentence), ERROR replaced by the exception and its line in `file`."""
    try:
        yield
    except AutotpError:
        raise
    except Exception as error:  # errors of other people's code become one sentence
        where = line_in(error, file) if file else ""
        raise AutotpError(sentence.replace("ERROR", brief(error) + where)) from None


def brief(error: BaseException) -> str:
    """`ValueError: what it said`: its first sentence, on one line, at most 200 characters and without a full stop."""
    message = " ".join(str(error).split()).split(". ")[0].rstrip(".")
    text = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return text if len(text) <= 200 else text[:199] + "…"


def line_in(error: BaseException, file: Path) -> str:
    """` (file.py, line 12)`: the last line of `file` that ran before `error`, or nothing if none did."""
    if isinstance(error, SyntaxError) and error.lineno is not None and error.filename == str(file):
        return f" ({file.name}, line {error.lineno})"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return f" ({file.name}, line {frames[-1].lineno})" if frames else ""


def did_you_mean(name: str, known: list[str]) -> str:
    """` (did you mean a or b?)` for names near `name`, or nothing."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def nearest_example(name: str) -> str:
    """`, e.g. examples/configs/gpt2` for the shipped configuration nearest to a model's name, or nothing."""
    shipped = sorted(path.parent.name for path in EXAMPLES.glob("*/config.json"))
    near = difflib.get_close_matches(Path(name.lower().removesuffix("/config.json")).name, shipped, n=1, cutoff=0.5)
    return f", e.g. examples/configs/{near[0]}" if near else ""
