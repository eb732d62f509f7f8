"""Rotary position embedding, plain or YaRN, in DeepSeek's interleaved layout.

Pairs (x0, x1), (x2, x3), ... are rotated in place, as the published weights are laid out; a cache written here
therefore differs in the order of its numbers from one written by code that de-interleaves first. Knows nothing of
attention.
YaRN: arXiv 2309.00071; the magnitude factors: DeepSeek-V2 (arXiv 2405.04434) section 3.1.4.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnConfig:
    """How the frequencies of a short context are stretched to a long one."""

    factor: float  # length of the long context over that of the short one
    original_max_position_embeddings: int  # tokens, the short context
    beta_fast: float = 32.0  # rotations over the short context above which a frequency is kept
    beta_slow: float = 1.0  # rotations below which it is divided by `factor`
    mscale: float = 1.0  # magnitude of the rotated half; only its ratio to mscale_all_dim counts
    mscale_all_dim: float = 0.0  # sharpness of the whole softmax; 0 leaves it alone

    def __post_init__(self) -> None:
        for name, minimum, maximum in (
            ("factor", 1.0, 1e6),
            ("beta_fast", 1e-3, 1e6),
            ("beta_slow", 1e-3, 1e6),
            ("mscale", 0.0, 100.0),
            ("mscale_all_dim", 0.0, 100.0),
        ):
            if not minimum <= getattr(self, name) <= maximum:
                raise ValueError(f"yarn {name} is {getattr(self, name)}, must be {minimum:g} to {maximum:g}")
        if self.original_max_position_embeddings < 1:
            raise ValueError(
                f"original_max_position_embeddings is {self.original_max_position_embeddings}, must be 1 or more"
            )
        if self.beta_fast < self.beta_slow:
            raise ValueError(f"yarn beta_fast {self.beta_fast} must be at least beta_slow {self.beta_slow}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RotaryConfig:
    """The rotary embedding as the checkpoint defines it."""

    head_dim: int  # qk_rope_head_dim
    theta: float = 10000.0  # base of the wavelengths
    yarn: YarnConfig | None = None  # None: plain rotary embedding

    def __post_init__(self) -> None:
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"qk_rope_head_dim is {self.head_dim}, must be even and positive")
        if not (math.isfinite(self.theta) and self.theta > 1.0):
            raise ValueError(f"rope_theta is {self.theta}, must be greater than 1")

    @property
    def magnitude(self) -> float:
        """What cos and sin are multiplied by; 1.0 for every published checkpoint."""
        if self.yarn is None:
            return 1.0
        return _yarn_mscale(self.yarn.factor, self.yarn.mscale) / _yarn_mscale(
            self.yarn.factor, self.yarn.mscale_all_dim
        )

    @property
    def softmax_scale_factor(self) -> float:
        """What 1/sqrt(qk_head_dim) is multiplied by: mscale squared, 1.5896 for DeepSeek-V2."""
        if self.yarn is None:
            return 1.0
        return _yarn_mscale(self.yarn.factor, self.yarn.mscale_all_dim) ** 2

    def inverse_frequencies(self) -> Tensor:
        """Radians a token of each pair: [head_dim / 2] fp32."""
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
        kept = 1.0 / self.theta**exponents  # [head_dim / 2]
        if self.yarn is None:
            return kept
        low, high = self._correction_range(self.yarn)
        ramp = ((torch.arange(self.head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0.0, 1.0)
        return kept / self.yarn.factor * ramp + kept * (1.0 - ramp)

    def _correction_range(self, yarn: YarnConfig) -> tuple[float, float]:
        """The pairs between which the ramp runs from kept to stretched."""

        def pair_of(num_rotations: float) -> float:
            wavelengths = yarn.original_max_position_embeddings / (num_rotations * 2.0 * math.pi)
            return self.head_dim * math.log(wavelengths) / (2.0 * math.log(self.theta))

        low = max(math.floor(pair_of(yarn.beta_fast)), 0)
        high = min(math.ceil(pair_of(yarn.beta_slow)), self.head_dim - 1)
        return low, high if high != low else high + 0.001  # the published code's way out of a division by zero


@dataclass(frozen=True, slots=True)
class Rotation:
    """The angles of one step's rows, the same for every layer; computed once a step."""

    cos: Tensor  # [num_tokens, head_dim / 2] fp32, times the magnitude
    sin: Tensor  # [num_tokens, head_dim / 2] fp32, times the magnitude

    def apply(self, x: Tensor) -> Tensor:
        """x rotated, in x's dtype. x: [num_tokens, head_dim] or [num_tokens, num_heads, head_dim]; not modified."""
        cos, sin = (self.cos, self.sin) if x.dim() == 2 else (self.cos.unsqueeze(1), self.sin.unsqueeze(1))
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(dim=-1)  # [..., head_dim / 2]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


class RotaryEmbedding:
    """Turns positions into rotations. Holds head_dim / 2 frequencies, no table, so any position is allowed."""

    def __init__(self, config: RotaryConfig, device: torch.device | str = "cpu") -> None:
        self._magnitude = config.magnitude
        self._inverse_frequencies = config.inverse_frequencies().to(device)

    def at(self, positions: Tensor) -> Rotation:
        """positions: [num_tokens] int64."""
        angles = positions.to(torch.float32).unsqueeze(-1) * self._inverse_frequencies  # [num_tokens, head_dim / 2]
        if self._magnitude == 1.0:
            return Rotation(angles.cos(), angles.sin())
        return Rotation(angles.cos() * self._magnitude, angles.sin() * self._magnitude)


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0
