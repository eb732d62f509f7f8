"""The layers every decoder has: linear, RMS norm, SwiGLU MLP, and how their weights are read.

A row's result depends on that row alone: other rows in the batch change no bit of it (see `pad_rows`).
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class WeightReader(Protocol):
    """Gives the tensors of a checkpoint by their published names; raises a named exception for one it lacks."""

    def read(self, name: str) -> Tensor: ...

    def shape(self, name: str) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightTarget:
    """Reads weights into one dtype on one device."""

    reader: WeightReader
    dtype: torch.dtype
    device: torch.device

    def read(self, name: str) -> Tensor:
        return self.reader.read(name).to(device=self.device, dtype=self.dtype)

    def read_fp32(self, name: str) -> Tensor:
        return self.reader.read(name).to(device=self.device, dtype=torch.float32)


def min_gemm_rows() -> int:
    """Rows from which on a fp32 matrix product of the CPU sums every row alike.

    MKL takes another kernel where a thread would get fewer than 4 rows. Measured for 1, 2, 3, 4, 8 and 16 threads: rows
    of one thread agree from 4 on, of several from 12 or 28 on at the latest. bf16 products do not have this trait.
    """
    num_threads = torch.get_num_threads()
    return 4 if num_threads == 1 else max(16, 2 * num_threads)


def pad_rows(x: Tensor) -> Tensor:
    """x with zero rows added below where its row count would change a row's bits. x: [..., num_tokens, n]."""
    if x.dtype is not torch.float32 or x.device.type != "cpu":
        return x
    missing = min_gemm_rows() - x.shape[-2]
    return F.pad(x, (0, 0, 0, missing)) if missing > 0 else x


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x: [num_tokens, n]; weight: [m, n]. Returns [num_tokens, m]."""
    return F.linear(pad_rows(x), weight)[: x.shape[0]]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalised in fp32, cast to x's dtype, then times the weight. x: [num_tokens, n]; weight: [n]."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


@dataclass(frozen=True, slots=True, kw_only=True)
class SwiGlu:
    """A gated MLP: down(silu(gate(x)) * up(x)). Dense layers and shared experts are this."""

    w13: Tensor  # [2 * intermediate_size, hidden_size], gate_proj over up_proj
    w2: Tensor  # [hidden_size, intermediate_size], down_proj

    @classmethod
    def read(cls, target: WeightTarget, prefix: str) -> "SwiGlu":
        """prefix: "model.layers.0.mlp" and the like. One tensor is read at a time, into its place."""
        intermediate_size, hidden_size = target.reader.shape(f"{prefix}.gate_proj.weight")
        w13 = torch.empty(2 * intermediate_size, hidden_size, dtype=target.dtype, device=target.device)
        w13[:intermediate_size].copy_(target.reader.read(f"{prefix}.gate_proj.weight"))
        w13[intermediate_size:].copy_(target.reader.read(f"{prefix}.up_proj.weight"))
        return cls(w13=w13, w2=target.read(f"{prefix}.down_proj.weight"))

    def forward(self, x: Tensor) -> Tensor:
        """x: [num_tokens, hidden_size]; returns the same shape and dtype."""
        gate, up = linear(x, self.w13).chunk(2, dim=-1)  # [num_tokens, intermediate_size] each
        return linear(F.silu(gate) * up, self.w2)
