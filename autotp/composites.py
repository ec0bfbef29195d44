"""Operators that PyTorch itself composes of simpler ones, written out before clean-up.

The long tail (`triplet_margin_loss`, `diff`, `tensordot`, `kl_div`, …) needs no rules of its own: what it consists of has them.
Only operators whose composition is the same at all sizes stand in the list, so that free sizes stay free.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from autotp import _torch
from autotp.functional import MARK

NAMES = """
    absolute adjoint alpha_dropout arccos arccosh arcsin arcsinh arctan arctan2 arctanh atleast_1d atleast_2d
    atleast_3d bilinear broadcast_tensors cartesian_prod cdist chain_matmul clip column_stack cosine_embedding_loss
    cosine_similarity cross cumulative_trapezoid diag diagflat diff divide dsplit dstack expand_as feature_alpha_dropout
    feature_dropout fft_fft fft_fft2 fft_fftn fft_fftshift fft_hfft fft_ifft fft_ifft2 fft_ifftn fft_ifftshift fft_ihfft
    fft_irfft fft_irfft2 fft_irfftn fft_rfft fft_rfft2 fft_rfftn fix fliplr flipud float_power frobenius_norm ger gradient
    greater greater_equal hinge_embedding_loss hsplit hstack imag inner isclose isfinite isreal kl_div kron l1_loss ldexp less
    less_equal linalg_diagonal linalg_matmul linalg_matrix_norm linalg_multi_dot linalg_norm linalg_vecdot margin_ranking_loss
    matrix_H matrix_power meshgrid mH moveaxis movedim msort mT nanmean nanquantile negative not_equal nuclear_norm
    pairwise_distance poisson_nll_loss quantile ravel row_stack special_digamma special_erf special_erfc special_erfinv
    special_exp2 special_expit special_expm1 special_gammainc special_gammaincc special_gammaln special_i0 special_log1p
    special_log_softmax special_logit special_logsumexp special_multigammaln special_polygamma special_psi special_round
    special_sinc special_softmax special_xlogy std_mean subtract sum_to_size swapaxes swapdims take_along_dim tensordot tile
    trapezoid trapz triplet_margin_loss true_divide vander var_mean vsplit vstack
"""


def _composites() -> frozenset[torch._ops.OpOverload]:
    packets = [getattr(torch.ops.aten, name) for name in NAMES.split()]
    overloads = [getattr(packet, overload) for packet in packets for overload in packet.overloads()]
    return frozenset(overload for overload in overloads if _torch.is_composite(overload))


COMPOSITES = _composites()
"""The overloads of `NAMES` that PyTorch composes of other operators."""


def write_out(graph: fx.Graph) -> None:
    """Replace every composite of an exported graph, which is changed, by the operators it consists of.

    One whose composition depends on values or on strides stays as it is.
    """
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in COMPOSITES:
            _write_out(graph, node)


def _write_out(graph: fx.Graph, node: fx.Node) -> None:
    target: Any = node.target
    operands = list(node.all_input_nodes)
    number = {operand: index for index, operand in enumerate(operands)}

    def call(*values: Any) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda operand: values[number[operand]])
        return target.decompose(*args, **kwargs)

    try:
        inside = _torch.traced_call(call, [operand.meta["val"] for operand in operands])
    except (RuntimeError, NotImplementedError, AssertionError):
        return
    calls = [item for item in inside.nodes if item.op == "call_function"]
    if any("val" not in item.meta or item.target is torch.ops.aten.as_strided.default for item in calls):
        return
    inner: dict[fx.Node, Any] = {}
    given = iter(operands)
    result: Any = None
    with graph.inserting_before(node):
        for item in inside.nodes:
            if item.op == "placeholder":
                inner[item] = next(given)
            elif item.op == "output":
                result = fx.map_arg(item.args[0], lambda arg: inner[arg])
            else:
                copy = inner[item] = graph.node_copy(item, lambda arg: inner[arg])
                copy.meta = {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}
                copy.meta["val"] = item.meta["val"]
    if MARK in node.meta and isinstance(result, fx.Node):
        result.meta[MARK] = [*result.meta.get(MARK, ()), *node.meta[MARK]]
    if isinstance(result, (tuple, list)):
        for user in list(node.users):
            place: Any = user.args[1]
            user.replace_all_uses_with(result[place])
            graph.erase_node(user)
    else:
        node.replace_all_uses_with(result)
    graph.erase_node(node)
