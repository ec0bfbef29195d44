"""Sample calls of the pieces of a mixture of experts: 5 tokens, 2 slots for each, 4 experts of which one has no rows."""

from __future__ import annotations

import torch
import transformers.integrations.moe  # noqa: F401  (registers the kernel, which has float64)
from sampling import add, call, real

from autotp import experts

KEYS = torch.tensor([3, 0, 0, 1, 3, 1, 0, 3, 1, 0])
ORDER = experts.sort_by_key(KEYS)


KERNEL = torch.ops.transformers.grouped_mm_fallback.default

add({
    "autotp.experts.sort_by_key": [call(KEYS)],
    "autotp.experts.dispatch": [call(real(5, 3), ORDER, 2, 4), call(real(10), ORDER, 1, 4)],
    "autotp.experts.combine": [call(real(10, 3), ORDER, 4)],
    "autotp.experts.collect": [call(real(10, 3), ORDER, 2, 4), call(real(10), ORDER, 1, 4)],
    "autotp.experts.grouped_product": [call(real(10, 3), real(4, 3, 5), ORDER, KERNEL)],
})  # fmt: skip
