"""Sample calls of pooling and resampling."""

from __future__ import annotations

import torch
from sampling import add, call, each, real

POOL = {1: (5, 7), 2: (5, 6, 4), 3: (3, 4, 5, 4)}
"""Dims of the kernel → channels and places."""

# fmt: off
for n, sizes in POOL.items():
    two = [2] * n
    add(each(
        f"max_pool{n}d.default max_pool{n}d_with_indices.default", call(real(3, *sizes), two, two),
        call(real(*sizes), [3] * n, two, [1] * n), call(real(2, *sizes), two, [1] * n, [0] * n, two, True),
    ))
    add(each(
        f"avg_pool{n}d.default", call(real(3, *sizes), two, two), call(real(*sizes), [3] * n, two, [1] * n, True, False),
    ))
    add(each(
        f"adaptive_avg_pool{n}d.default adaptive_max_pool{n}d.default", call(real(3, *sizes), [3] * n), call(real(*sizes), [1] * n),
    ))
    add(each(
        f"upsample_nearest{n}d.vec _upsample_nearest_exact{n}d.vec", call(real(3, *sizes), None, [2.0] * n),
        call(real(3, *sizes), [5] * n, None),
    ))
    add(each(
        f"reflection_pad{n}d.default replication_pad{n}d.default", call(real(3, *sizes), [1, 2] * n), call(real(*sizes), [0, 1] * n),
    ))
    add(each(f"upsample_nearest{n}d.default _upsample_nearest_exact{n}d.default", call(real(3, *sizes), [5] * n)))
MODES = ("reflect", "replicate", "circular")
add(each("pad.default", *(call(real(3, 5, 4, 3), [1, 0, 0, 2], mode) for mode in MODES), call(real(3, 5, 4), [1, 2], "circular")))
add(each("_adaptive_avg_pool2d.default", call(real(3, 5, 4, 6), [3, 2])))
add(each("_adaptive_avg_pool3d.default", call(real(3, 5, 4, 3, 6), [3, 1, 2])))
add(each("max_unpool2d.default", call(real(3, 5, 2, 2), torch.stack([torch.arange(4).view(2, 2) * 2] * 15).view(3, 5, 2, 2), [4, 4])))
add(each(
    "max_unpool3d.default",
    call(real(3, 5, 1, 2, 2), torch.stack([torch.arange(4).view(1, 2, 2) * 2] * 15).view(3, 5, 1, 2, 2), [2, 4, 4], [2] * 3, [0] * 3),
))
for name, n in {"linear1d": 1, "bilinear2d": 2, "trilinear3d": 3, "bicubic2d": 2}.items():
    for aligned in (False, True):
        add(each(
            f"upsample_{name}.vec", call(real(3, *POOL[n]), None, aligned, [2.0] * n), call(real(2, *POOL[n]), [3] * n, aligned, None),
        ))
        add(each(f"upsample_{name}.default", call(real(3, *POOL[n]), [3] * n, aligned)))
add(each("_upsample_bilinear2d_aa.vec _upsample_bicubic2d_aa.vec", call(real(3, 5, 6, 4), [3, 3], False, None)))
add(each("_upsample_bilinear2d_aa.default _upsample_bicubic2d_aa.default", call(real(3, 5, 6, 4), [3, 3], False)))
GRID = (
    call(real(3, 5, 4, 6), real(3, 3, 7, 2), 0, 0, False), call(real(2, 5, 4, 4), real(2, 5, 3, 2), 1, 1, True),
    call(real(2, 3, 4, 4), real(2, 5, 3, 2), 0, 2, False),
)
add(each("grid_sampler.default grid_sampler_2d.default", *GRID))
SPACE = call(real(2, 3, 3, 4, 2), real(2, 3, 2, 5, 3), 0, 0, False)
add(each("grid_sampler.default grid_sampler_3d.default", SPACE))
add(each(
    "affine_grid_generator.default", call(real(5, 2, 3), [5, 3, 4, 6], False), call(real(3, 3, 4), [3, 1, 2, 4, 3], True),
))
# fmt: on
