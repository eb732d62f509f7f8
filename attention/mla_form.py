"""The two forms of multi-head latent attention, and which rows take which."""

from enum import Enum


class MlaForm(Enum):
    """How attention over latents is computed; the results agree but for rounding.

    Naive costs less for many rows (for DeepSeek-V2 and a long context from 170 rows on), absorbed for few.
    """

    BY_POSITION = "by_position"  # prompt tokens naive, generated ones absorbed: what else is in a step changes nothing
    ABSORBED = "absorbed"  # always
    NAIVE = "naive"  # always
