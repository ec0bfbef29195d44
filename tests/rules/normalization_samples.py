"""Sample calls of batch, instance and group norms, and of the pieces of batch statistics."""

from __future__ import annotations

from sampling import add, call, each, positive, real

# fmt: off
add(each(
    "group_norm.default", call(real(3, 10, 3), 5, real(10), real(10)), call(real(2, 6, 2, 2), 3),
    call(real(5, 6), 6, weight=real(6)), call(real(2, 6, 3), 2, real(6), real(6), 1e-3, False),
))
add(each(
    "instance_norm.default", call(real(3, 5, 4), real(5), real(5), None, None, True, 0.1, 1e-5, False),
    call(real(2, 3, 3, 2), None, None, None, None, True, 0.1, 1e-5, False),
))
add(each(
    "native_layer_norm.default", call(real(3, 5), [5], real(5), real(5), 1e-5), call(real(2, 3, 5), [3, 5], None, None, 1e-5),
))
add(each("_fused_rms_norm.default", call(real(3, 5), [5], real(5), 1e-5), call(real(2, 7, 5), [5], None, None)))
add({
    "autotp.statistics.variance": [call(real(5, 3, 4), real(3), 20), call(real(7, 5), real(5), 7), call(real(1, 3, 2, 2), real(3), 9)],
    "autotp.statistics.normalize": [
        call(real(5, 3, 4), real(3), positive(3), real(3), real(3), 1e-5), call(real(7, 5), real(5), positive(5), None, None, 1e-3),
        call(real(2, 5, 3, 2), real(5), positive(5), None, real(5), 0.1), call(real(3, 5), real(5), positive(5), real(5), None, 0.1),
    ],
})
# fmt: on
