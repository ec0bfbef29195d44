"""Sample calls of attention: causal with the queries split, masks of every shape, grouped heads."""

from __future__ import annotations

from sampling import add, booleans, call, each, real

SELF = real(2, 3, 5, 4)
GROUPED = real(2, 6, 7, 4), real(2, 2, 7, 4), real(2, 2, 7, 4)

# fmt: off
add(each(
    "scaled_dot_product_attention.default",
    call(SELF, SELF, real(2, 3, 5, 6), is_causal=True, scale=0.3),
    call(real(1, 2, 3, 4), real(1, 2, 3, 4), real(1, 2, 3, 4), is_causal=True),
    call(real(2, 3, 7, 4), real(2, 3, 5, 4), real(2, 3, 5, 4), is_causal=True),
    call(real(2, 3, 5, 4), real(2, 3, 8, 4), real(2, 3, 8, 4), is_causal=True),
    call(*GROUPED, is_causal=True, enable_gqa=True), call(real(7, 4), real(7, 4), real(7, 4), is_causal=True),
    call(real(3, 8, 4), real(3, 8, 4), real(3, 8, 4), None, 0.0, True),
    call(SELF, SELF, SELF, is_causal=True, dropout_p=0.5),
    call(*GROUPED, booleans(2, 1, 1, 7) | (real(7) > -9), enable_gqa=True), call(*GROUPED, real(1, 1, 7, 7), enable_gqa=True),
    call(SELF, SELF, SELF, real(5, 1)), call(SELF, SELF, SELF, real(1, 5)), call(SELF, SELF, SELF, real(3, 1, 5)),
))
# fmt: on
