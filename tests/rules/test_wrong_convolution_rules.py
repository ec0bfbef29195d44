"""Wrong rules of convolutions, pooling and norms, planted one by one in place of the right one: each makes the proof fail."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from all_samples import SAMPLES
from sampling import Sample, call, positive, real, target_of

from autotp.errors import AutotpError
from autotp.prove import prove_rule
from autotp.rules import RULES, bind
from autotp.rules.convolution import convolution
from autotp.rules.empty import unless_empty
from autotp.rules.language import Call, Rule
from autotp.rules.normalization import group_norm
from autotp.rules.registry import RuleFunction


def pattern(text: str, **options: Any) -> RuleFunction:
    """A rule that is one pattern; empty pieces are no problem."""
    return lambda call: bind(text, call, **{"local": unless_empty, **options})


def without_local(function: RuleFunction) -> RuleFunction:
    """The right rule, run with the arguments of the unsplit call."""

    def rule(call: Call) -> Rule | None:
        found = function(call)
        assert found is not None
        return replace(found, local=None)

    return rule


def like_convolution(text: str, **options: Any) -> RuleFunction:
    """A pattern run as the right rule of convolutions runs it."""
    return lambda call: bind(text, call, **{"local": convolution(call).local, **options})


CONV = call(real(3, 5, 7), real(4, 5, 3), real(4))
GROUPED = call(real(2, 6, 6), real(4, 3, 3), real(4), [1], [1], [1], 2)
STATISTICS = real(5, 3, 4), real(3), positive(3)

WRONG: dict[str, tuple[str, RuleFunction, Sample]] = {
    "places of a kernel of 3 split": (
        "aten.conv1d.default", like_convolution("n i s, o i k^, +o -> n o s"), call(real(3, 4, 7), real(4, 4, 3), None, [1], [1]),
    ),
    "kernel split": ("aten.conv1d.default", like_convolution("n i s^, o i k, +o -> n o t^"), CONV),
    "bias is no summand": ("aten.conv1d.default", like_convolution("n i s^, o i k^, o -> n o t^"), CONV),
    "linear in x without the bias": (
        "aten.conv1d.default", like_convolution("n i^ s^, o i^ k^, o -> n o t^", linear=((0,),)), CONV,
    ),
    "linear in both factors at once": (
        "aten.conv1d.default", like_convolution("n i s^, o i k^, +o -> n o t^", linear=((0, 1),)), CONV,
    ),
    "groups taken for input channels": (
        "aten.conv1d.default", like_convolution("n i s^, o j^ k^, +o -> n o t^"), GROUPED,
    ),
    "groups innermost": (
        "aten.conv1d.default", like_convolution("n (i g) s^, (o g) i k^, +(o g) -> n (o g) t^", sizes={"g": 2}), GROUPED,
    ),
    "number of groups of the unsplit call": ("aten.conv1d.default", without_local(convolution), GROUPED),
    "patches taken for a kernel with gaps": (
        "aten.conv1d.default",
        like_convolution("n i (s k^), o i k^, +o -> n o s"),
        call(real(2, 3, 8), real(5, 3, 2), real(5), [2], [1], [3]),
    ),
    "transposed: channels the other way": (
        "aten.conv_transpose1d.default", like_convolution("n i s^, o i k^, +o -> n o t^"), call(real(3, 5, 7), real(5, 5, 3), real(5)),
    ),
    "transposed: overlapping blocks": (
        "aten.conv_transpose1d.default",
        like_convolution("n i s, i o k^, +o -> n o (s j^)"),
        call(real(2, 3, 4), real(3, 5, 4), real(5), [2], [1]),
    ),
    "norm of some slices": ("aten._weight_norm.default", pattern("d0 d1, d0 1 -> d0 d1"), call(real(5, 6), real(5, 1), 0)),
    "direction as summands": (
        "aten._weight_norm.default", pattern("d0 d1^, d0 1 -> d0 d1^", linear=((0,),)), call(real(5, 6), real(5, 1), 0),
    ),
    "columns inside out": (
        "aten.im2col.default", pattern("n c h^ w^ -> n (k^ c) l^", sizes={"k": 4}), call(real(2, 3, 4, 4), [2, 2], [1, 1], [0, 0], [1, 1]),
    ),
    "shuffled channels outermost": (
        "aten.pixel_shuffle.default", pattern("n (a^ b^ c) h w -> n c (h a^) (w b^)", sizes={"a": 2, "b": 2}), call(real(2, 12, 3, 5), 2),
    ),
    "places of a block first": (
        "aten.pixel_unshuffle.default", pattern("n c (a^ h) w^ -> n (c b^) h v^", sizes={"a": 2, "b": 4}), call(real(2, 3, 6, 4), 2),
    ),
    "shuffled groups in place": ("aten.channel_shuffle.default", pattern("n c s -> n c s"), call(real(3, 10, 4), 2)),
    "pooled places split": ("aten.max_pool1d.default", pattern("n c (s k^) -> n c s", sizes={"k": 2}), call(real(3, 2, 8), [3], [2], [1])),
    "maxima of summands": ("aten.max_pool1d.default", pattern("n c s^ -> n c t^", linear=((0,),)), call(real(3, 5, 8), [2])),
    "means of uneven windows": ("aten.adaptive_avg_pool1d.default", pattern("n c s -> n c s"), call(real(2, 3, 5), [5])),
    "interpolated places split": (
        "aten.upsample_linear1d.vec", pattern("n c s -> n c (s k^)", sizes={"k": 2}), call(real(3, 5, 4), None, False, [2.0]),
    ),
    "places of the grid as summands": (
        "aten.grid_sampler.default",
        pattern("n c s0^ s1^, n t0 t1 x^ -> n c t0 t1", linear=((1,),)),
        call(real(2, 5, 4, 4), real(2, 5, 3, 2), 0, 0, False),
    ),
    "one grid for all": (
        "aten.affine_grid_generator.default", pattern("n x^ y^ -> n t0^ t1^ x^", linear=((0,),)), call(real(5, 2, 3), [5, 3, 4, 6], False),
    ),
    "mirrored places split": ("aten.reflection_pad1d.default", pattern("n c s -> n c s"), call(real(3, 5, 4), [-1, 1])),
    "channels of a group split": (
        "aten.group_norm.default", lambda call: bind("n (g^ c) s^, (g^ c), (g^ c) -> n (g^ c) s^", call, sizes={"g": 2}),
        call(real(3, 8, 3), 2, real(8), real(8)),
    ),
    "number of groups of the unsplit norm": ("aten.group_norm.default", without_local(group_norm), call(real(3, 12, 3), 4, real(12))),
    "places of an instance split": (
        "aten.instance_norm.default", pattern("n c s, c, c, c, c -> n c s"),
        call(real(3, 5, 8), None, None, None, None, True, 0.1, 1e-5, False),
    ),
    "variance of summands": (
        "autotp.statistics.variance", lambda call: bind("n c s, c -> c", call, linear=((0, 1),)), SAMPLES["autotp.statistics.variance"][0],
    ),
    "variance kept by rows": ("autotp.statistics.variance", lambda call: bind("n c s, n -> n", call), call(real(3, 3, 4), real(3), 12)),
    "variances as summands": (
        "autotp.statistics.normalize",
        lambda call: bind("n c s, c, c, c, c -> n c s", call, linear=((2,),)),
        call(*STATISTICS, real(3), real(3), 1e-5),
    ),
    "weight without bias as summands": (
        "autotp.statistics.normalize",
        lambda call: bind("n c s, c, c, c, c -> n c s", call, linear=((3,),)),
        call(*STATISTICS, real(3), real(3), 1e-5),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_rule(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, wrong, sample = WRONG[case]
    prove_rule(target_of(name), *sample.args, limit=4, meshes=[(2,)], **sample.kwargs)
    monkeypatch.setitem(RULES, name, wrong)
    with pytest.raises(AutotpError, match=r"the rule of .* is wrong: on mesh"):
        prove_rule(target_of(name), *sample.args, **sample.kwargs)
