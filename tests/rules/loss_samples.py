"""Sample calls of the losses."""

from __future__ import annotations

import torch
from sampling import SAMPLES, add, booleans, call, each, integers, positive, real

TARGET = torch.tensor([0, 6, 3, -100, 4])
SIGNS = booleans(3, 5) * 2 - 1

# fmt: off
SAMPLES.setdefault("autotp.losses.row_maximum", []).extend([call(real(3, 5, 2)), call(real(7))])
SAMPLES.setdefault("autotp.losses.sum_exp", []).extend([call(real(2, 3, 5), real(2, 3) + 2), call(real(7), real())])
SAMPLES.setdefault("autotp.losses.pick", []).extend([
    call(real(2, 3, 7), integers(2, 3, below=7)), call(real(7), integers(below=7)),
    call(real(3, 7).index_fill(1, torch.tensor([0, 3]), -torch.inf), torch.tensor([2, 4, 6])),
])
SAMPLES.setdefault("autotp.losses.rows_of_loss", []).append(
    call(positive(2, 5), real(2, 5), real(2, 5), TARGET.expand(2, 5).clone(), -100, 7)
)
SAMPLES["autotp.losses.log_of_sum"] = [call(positive(5), real(5)), call(positive(3, 5) * booleans(3, 5), real(3, 5))]
SAMPLES["autotp.losses.kept_rows"] = [call(real(5), TARGET, -100, 7), call(real(3, 5), integers(3, 5, below=7), 3, 7)]
SAMPLES["autotp.losses.weight_of_rows"] = [call(real(7), TARGET, -100), call(real(7), integers(3, 5, below=7), 3)]

for reduction in range(3):
    add(each(
        "mse_loss.default smooth_l1_loss.default huber_loss.default",
        call(real(3, 5), real(3, 5), reduction), call(real(7), real(7), reduction),
    ))
    add(each("soft_margin_loss.default", call(real(3, 5), SIGNS, reduction), call(real(5), SIGNS[0], reduction)))
    add(each("smooth_l1_loss.default huber_loss.default", call(real(3, 5), real(3, 5), reduction, 0.3)))
    add(each(
        "binary_cross_entropy.default", call(positive(3, 5), positive(3, 5), None, reduction),
        call(positive(3, 5), positive(3, 5), real(5), reduction, gradient=False),
        call(positive(2, 3, 5), positive(2, 3, 5), real(3, 1), reduction, gradient=False),
    ))
    add(each(
        "binary_cross_entropy_with_logits.default", call(real(3, 5), positive(3, 5), None, None, reduction),
        call(real(3, 5), positive(3, 5), real(5), None, reduction, gradient=False),
        call(real(3, 5), positive(3, 5), None, positive(5), reduction, gradient=False),
        call(real(2, 3, 5), positive(2, 3, 5), real(3, 1), positive(5), reduction, gradient=False),
    ))
    add(each(
        "multi_margin_loss.default", call(real(5, 7), integers(5, below=7), 1, 1, None, reduction),
        call(real(5, 7), integers(5, below=7), 2, 0.5, positive(7), reduction, gradient=False),
    ))
    add(each("multilabel_margin_loss.default", call(real(5, 3), torch.tensor([[0, 2, -1]] * 5), reduction)))
add(each("mse_loss.default", call(real(3, 5), real(3, 5))))
# fmt: on
