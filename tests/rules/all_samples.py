"""All sample calls: importing a file of samples fills the table."""

import rule_samples  # noqa: F401
from sampling import SAMPLES

__all__ = ["SAMPLES"]
