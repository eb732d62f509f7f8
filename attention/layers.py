"""The layers every decoder has: projections, RMS norm, SwiGLU MLP, and how their weights are read.

Each has two forms with one interface: the CPU kernels of experts/kernels where they are built, torch everywhere else.
In the kernels a row's result depends on that row alone, to the bit; torch may round it otherwise beside others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from experts.kernels.expert_set import ExpertSet, PackedExpert
from experts.kernels.library import native
from experts.kernels.linear import KernelLinear, kernel_rms_norm
from experts.kernels.packed_matrix import can_pack, pack
from experts.quantized_matrix import QuantizedMatrix, kind_of


class WeightReader(Protocol):
    """Gives the tensors of a checkpoint by their published names; raises a named exception for one it lacks."""

    def read(self, name: str) -> Tensor: ...

    def read_matrix(self, name: str) -> Tensor | QuantizedMatrix: ...

    def shape(self, name: str) -> tuple[int, ...]: ...


class Projection(Protocol):
    """x @ weight.T"""

    @property
    def nbytes(self) -> int:
        """Of the weight."""

    def __call__(self, x: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
        """x: [num_tokens, n]. Returns [num_tokens, m] in `out_dtype` or x's."""
        ...


class Mlp(Protocol):
    """A gated MLP: down(silu(gate(x)) * up(x)). Dense layers and shared experts are this."""

    @property
    def nbytes(self) -> int:
        """Of the weights."""

    def __call__(self, x: Tensor, out_dtype: torch.dtype, residual: Tensor | None = None) -> Tensor:
        """x: [num_tokens, hidden_size]; returns the same shape. residual: like x; added in fp32, before rounding."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockNorms:
    """The RMS norms of one decoder layer."""

    attention: Tensor  # [hidden_size], input_layernorm
    mlp: Tensor  # [hidden_size], post_attention_layernorm
    eps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightTarget:
    """Reads weights into one dtype on one device, in the form in which they will be used."""

    reader: WeightReader
    dtype: torch.dtype
    device: torch.device
    use_kernels: bool = False

    @classmethod
    def best(cls, reader: WeightReader, dtype: torch.dtype, device: torch.device | str) -> "WeightTarget":
        """With the CPU kernels where the device is the CPU and they are built."""
        device = torch.device(device)
        return cls(reader=reader, dtype=dtype, device=device, use_kernels=device.type == "cpu" and native() is not None)

    def read(self, name: str) -> Tensor:
        return self.reader.read(name).to(device=self.device, dtype=self.dtype)

    def read_fp32(self, name: str) -> Tensor:
        return self.reader.read(name).to(device=self.device, dtype=torch.float32)

    def projection(self, *names: str) -> Projection:
        """The matrices one above the other; in the kernels' form each starts at a multiple of PANEL_OUTPUTS."""
        return self.project(self._matrices(names))

    def project(self, parts: Sequence[Tensor | QuantizedMatrix]) -> Projection:
        """The same for matrices [m, n] that were read."""
        if self._can_pack(parts):
            return KernelLinear(pack(parts))
        plain = [self._plain(part) for part in parts]
        return TorchProjection(plain[0] if len(plain) == 1 else torch.cat(plain))

    def kernel_projection(self, *names: str) -> KernelLinear:
        """The same where `use_kernels`, of matrices whose inputs are even."""
        projection = self.projection(*names)
        assert isinstance(projection, KernelLinear)
        return projection

    def mlp(self, prefix: str) -> Mlp:
        """prefix: "model.layers.0.mlp" and the like."""
        matrices = self._matrices([f"{prefix}.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")])
        if self._can_pack(matrices):
            gate, up, down = matrices
            return KernelMlp(PackedExpert(w13=pack([gate, up]), w2=pack([down])), intermediate_size=gate.shape[0])
        gate, up, down = (self._plain(matrix) for matrix in matrices)
        return TorchMlp(w13=torch.cat((gate, up)), w2=down)

    def _matrices(self, names: Sequence[str]) -> list[Tensor | QuantizedMatrix]:
        """Integers stay integers where all are of one kind and there are kernels for them."""
        matrices: list[Tensor | QuantizedMatrix] = []
        for name in names:
            matrix = self.reader.read_matrix(name)
            is_kept = isinstance(matrix, QuantizedMatrix) and self._can_pack([matrix])
            matrices.append(matrix if is_kept else self._plain(matrix))
        if len({kind_of(matrix) for matrix in matrices}) > 1:  # the kernels take parts of one kind
            return [self._plain(matrix) for matrix in matrices]
        return matrices

    def _can_pack(self, matrices: Sequence[Tensor | QuantizedMatrix]) -> bool:
        return self.use_kernels and all(can_pack(matrix) for matrix in matrices)

    def _plain(self, matrix: Tensor | QuantizedMatrix) -> Tensor:
        """In the dtype and on the device in which it will be used."""
        if isinstance(matrix, QuantizedMatrix):
            matrix = matrix.dequantize()
        return matrix.to(device=self.device, dtype=self.dtype)


@dataclass(frozen=True, slots=True)
class TorchProjection:
    """Projection by torch."""

    weight: Tensor  # [m, n]

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def __call__(self, x: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight).to(out_dtype or x.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchMlp:
    """Mlp by torch."""

    w13: Tensor  # [2 * intermediate_size, hidden_size], gate_proj over up_proj
    w2: Tensor  # [hidden_size, intermediate_size], down_proj

    @property
    def nbytes(self) -> int:
        return self.w13.nbytes + self.w2.nbytes

    def __call__(self, x: Tensor, out_dtype: torch.dtype, residual: Tensor | None = None) -> Tensor:
        gate, up = F.linear(x, self.w13).chunk(2, dim=-1)  # [num_tokens, intermediate_size] each
        product = F.linear(F.silu(gate) * up, self.w2)
        return product.to(out_dtype) if residual is None else (product.float() + residual.float()).to(out_dtype)


class KernelMlp:
    """Mlp by the CPU kernels: the feed-forward of a set of one expert."""

    def __init__(self, weights: PackedExpert, intermediate_size: int) -> None:
        self._weights = weights
        self._experts = ExpertSet({0: weights}, intermediate_size)

    @property
    def nbytes(self) -> int:
        return self._weights.nbytes

    def __call__(self, x: Tensor, out_dtype: torch.dtype, residual: Tensor | None = None) -> Tensor:
        return self._experts.forward_dense(x.contiguous(), out_dtype, residual)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalised in fp32, cast to x's dtype, then times the weight. x: [num_tokens, n]; weight: [n]."""
    if native() is not None and x.device.type == "cpu" and x.stride(-1) == 1:
        return kernel_rms_norm(x, weight, eps)
    return torch_rms_norm(x, weight, eps)


def torch_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """rms_norm by torch."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight
