"""All sample calls: importing a file of samples fills the table."""

import attention_samples  # noqa: F401
import convolution_samples  # noqa: F401
import experts_samples  # noqa: F401
import indexing_samples  # noqa: F401
import loss_samples  # noqa: F401
import normalization_samples  # noqa: F401
import pooling_samples  # noqa: F401
import recurrent_samples  # noqa: F401
import rule_samples  # noqa: F401
import shape_samples  # noqa: F401
import tail_samples  # noqa: F401
from sampling import SAMPLES

__all__ = ["SAMPLES"]
