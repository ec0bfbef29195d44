"""Text generation on many devices: prefill and decode as two parallel modules on the same parameters and key/value cache."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autotp.api import Mesh, cluster_of
from autotp.errors import AutotpError
from autotp.initial import Model, Source, agree_on_values, begin, state_values
from autotp.key_value_cache import NAME, cache_shapes, step_inputs, with_cache
from autotp.loading import PHASES, Phase
from autotp.mesh import parse_mesh
from autotp.modes import layouts_at_rest
from autotp.planning import Request, adopt, make_plan
from autotp.plans import Plan
from autotp.price.cluster import Cluster
from autotp.program import Program
from autotp.ranks import device_mesh_of, facts, mode_of_graph, ranks_of
from autotp.rewrite import rewrite
from autotp.runtime.agreement import Group, agree_on, broadcast, once, together
from autotp.runtime.module import ParallelModule
from autotp.runtime.weights import StoredTensor
from autotp.sampling import Sampling, next_tokens
from autotp.trace import trace


@dataclass(frozen=True)
class GenerationPlans:
    """The plans of the two steps of generation, in which parameters and cache rest in the same layouts."""

    prefill: Plan
    decode: Plan


def plan_generation(
    model: nn.Module,
    *,
    batch: int,
    context: int,
    mesh: Mesh,
    prompt: int | None = None,
    cluster: str | Path | Cluster | None = None,
    memory: float | None = None,
    pins: Mapping[str, str] | None = None,
) -> GenerationPlans:
    """Decide how to split both steps of generation. Needs no GPU, no process group and no real weights.

    Decode, which runs once for every token, is planned first; prefill then takes parameters and cache as they rest.

    Args:
        model: a decoder of transformers in eval mode; its parameters may be fake or on `meta`.
        batch: sequences; context: tokens of each that the key/value cache holds, prompt and generated ones together.
        prompt: tokens of the prompt that prefill is priced for; by default half the context.
        mesh, cluster, memory, pins: as for `autotp.plan`.

    Raises:
        AutotpError: the model cannot be traced so, or a request cannot be met; the message says what to do.
    """
    request = Request(parse_mesh(mesh), "inference", memory, pins)
    return _plans(_programs(_modules(model, batch, context), batch, context, prompt), request, cluster_of(cluster, "cuda"), model)


def parallelize_generation(
    model: Model,
    *,
    batch: int,
    context: int,
    mesh: Mesh | None = None,
    prompt: int | None = None,
    cluster: str | Path | Cluster | None = None,
    memory: float | None = None,
    pins: Mapping[str, str] | None = None,
    weights: str | Path | None = None,
) -> Generator:
    """A decoder that generates text on all ranks of `mesh`. Every rank calls this with the same model and arguments.

    Args:
        model: a decoder of transformers with real weights, equal on all ranks, in eval mode, which is left as it was; or a function without
            arguments that builds it.
        batch, context, prompt, cluster, memory, pins: as for `plan_generation`.
        mesh: by default all ranks of the (torchrun) process group on one axis.
        weights: a checkpoint whose pieces each rank reads, as for `autotp.parallelize`.

    Raises:
        AutotpError: on every rank alike, so that none is left waiting.
    """
    group = ranks_of(mesh)
    model, stored = begin(model, weights, None, group)
    agree_on(facts(model, (), {"batch": batch, "context": context, "prompt": prompt}, mesh), group)
    device_mesh = device_mesh_of(mesh)
    device = torch.device(device_mesh.device_type)
    request = together(lambda: Request(parse_mesh(device_mesh), "inference", memory, pins), group)
    modules = together(lambda: _modules(model, batch, context), group)
    programs = together(lambda: _programs(modules, batch, context, prompt), group)
    priced = together(lambda: cluster_of(cluster, device.type), group)
    plans = once(lambda: _plans(programs, request, priced, model), group)
    agree_on_values(model, stored, group)

    def module(phase: Phase, plan: Plan, request: Request, beside: ParallelModule | None) -> tuple[ParallelModule, Request]:
        """One step, and a request for others whose parameters and cache rest as here."""
        space, decisions = adopt(programs[phase], request, plan)
        sharded = rewrite(space, decisions, tuple(device_mesh.get_coordinate() or ()), gradient=False, device=device)
        built = ParallelModule(
            sharded,
            device_mesh,
            _values(model, programs[phase], stored),
            programs[phase].aliases,
            programs[phase].persistent,
            device,
            signature=inspect.signature(modules[phase].forward),
            trained_mode=mode_of_graph(model, programs[phase]),
            beside=beside,
        )
        return built, replace(request, rest=layouts_at_rest(space, decisions))

    decode, resting = together(lambda: module("decode", plans.decode, request, None), group)
    prefill, _ = together(lambda: module("prefill", plans.prefill, resting, decode), group)
    return Generator(prefill, decode, plans, batch, context, device, group)


class Generator:
    """Generates text; made by `parallelize_generation`.

    Attributes:
        prefill, decode: the parallel modules of the two steps, which share parameters and cache; their `state_dict` is the model's.
        plans: what both run.
        batch, context: sequences, and tokens of each that the cache holds.
    """

    def __init__(
        self,
        prefill: ParallelModule,
        decode: ParallelModule,
        plans: GenerationPlans,
        batch: int,
        context: int,
        device: torch.device,
        group: Group = None,
    ) -> None:
        self.prefill, self.decode, self.plans = prefill, decode, plans
        self.batch, self.context, self.device, self.group = batch, context, device, group

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        *,
        max_new_tokens: int,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
    ) -> Tensor:
        """The prompts with what follows them. Every rank calls this with the same arguments, and gets the same tokens.

        Args:
            input_ids: (batch, tokens) int64: prompts of one length, without padding.
            max_new_tokens: how many tokens to add at most.
            do_sample, temperature, top_k, top_p: how they are chosen: see `autotp.sampling.Sampling`.
            seed: of the draws; by default another one in each call.
            eos_token_id: ends a sequence; generation stops when all have ended. None: they never end.
            pad_token_id: fills up sequences that have ended; by default `eos_token_id`.

        Returns:
            (batch, tokens + at most max_new_tokens) int64, on this rank's device.

        Raises:
            AutotpError: the prompts do not fit the batch, or prompt and new tokens do not fit the context.
        """
        sampling = Sampling(do_sample, temperature, top_k, top_p)
        self._check(input_ids, max_new_tokens)
        random = torch.Generator(self.device)
        random.manual_seed(seed) if seed is not None else random.seed()
        pad = eos_token_id if pad_token_id is None else pad_token_id
        tokens = input_ids.to(self.device)
        ended = torch.zeros(self.batch, dtype=torch.bool, device=self.device)
        for _ in range(max_new_tokens):
            found = next_tokens(self._logits(tokens, first=tokens.shape[1] == input_ids.shape[1]), sampling, random)
            broadcast(found, self.group)  # rounding may differ between ranks, and a token that did would part them for good
            found = found if pad is None else found.masked_fill(ended, pad)
            tokens = torch.cat([tokens, found[:, None]], 1)
            ended = ended if eos_token_id is None else ended | (found == eos_token_id)
            if ended.all():
                break
        return tokens

    def _logits(self, tokens: Tensor, first: bool) -> Tensor:
        """(batch, vocabulary) after the last of these tokens; all before it are in the cache unless this is the `first` step."""
        last = tokens.shape[1] - 1
        if first and last > 0:
            logits: Tensor = self.prefill(input_ids=tokens)
        else:
            logits = self.decode(input_ids=tokens[:, -1:], position=torch.tensor([last], device=self.device))
        return logits

    def _check(self, input_ids: Tensor, new: int) -> None:
        if input_ids.ndim != 2 or input_ids.shape[0] != self.batch or input_ids.shape[1] < 1:
            raise AutotpError(f"the prompts have shape {tuple(input_ids.shape)}; this generator takes ({self.batch}, tokens >= 1)")
        if new < 0 or input_ids.shape[1] + new > self.context:
            raise AutotpError(
                f"a prompt of {input_ids.shape[1]} tokens and {new} new ones do not fit into a key/value cache of {self.context}; "
                "generate fewer, or make a generator with more context"
            )


# ---- how both steps are made ----------------------------------------------------------------------------------------


def _modules(model: nn.Module, batch: int, context: int) -> dict[str, nn.Module]:
    """The two steps of a model."""
    if model.training:
        raise AutotpError(f"{type(model).__name__} is in train mode, in which generation would drop activations at random; call .eval()")
    shapes = cache_shapes(model)
    return {phase: with_cache(model, phase, batch=batch, context=context, shapes=shapes) for phase in PHASES}


def _programs(modules: Mapping[str, nn.Module], batch: int, context: int, prompt: int | None) -> dict[str, Program]:
    """Both, traced: prefill with a prompt whose length may change."""
    if prompt is not None and not 2 <= prompt <= context:
        raise AutotpError(f"prompt is {prompt}; give the tokens that prefill is priced for, at least 2 and at most the context ({context})")
    tokens = prompt or max(2, context // 2)
    return {phase: trace(modules[phase], (), step_inputs(phase, batch, tokens)) for phase in PHASES}


def _plans(programs: Mapping[str, Program], request: Request, cluster: Cluster, model: nn.Module) -> GenerationPlans:
    """Decode as it is best, and prefill on its layouts at rest."""
    name = type(model).__name__
    decode = make_plan(programs["decode"], request, cluster, name)
    rest = layouts_at_rest(*adopt(programs["decode"], request, decode))
    return GenerationPlans(make_plan(programs["prefill"], replace(request, rest=rest), cluster, name), decode)


def _values(model: nn.Module, program: Program, stored: Source) -> dict[str, Tensor | StoredTensor]:
    """The model's parameters and buffers, and an empty cache that takes no memory: a rank copies its piece."""
    types: dict[Any, Any] = {node.target: node.outputs[0] for node in program.nodes if node.kind == "buffer"}
    caches = [name for name in types if name.startswith(f"{NAME}.")]
    empty = {name: torch.zeros((), dtype=types[name].dtype).expand(types[name].hint) for name in caches}
    return state_values(model, program, stored) | empty
