import pytest
import torch
import torch.nn.functional as F

from attention.layers import WeightTarget, rms_norm, torch_rms_norm
from experts.kernels.library import native
from experts.quantized_matrix import QuantizedMatrix


class DictReader:
    """A WeightReader over tensors in memory."""

    def __init__(self, tensors: dict[str, torch.Tensor | QuantizedMatrix]) -> None:
        self.tensors = tensors

    def read(self, name: str) -> torch.Tensor:
        matrix = self.read_matrix(name)
        return matrix.dequantize() if isinstance(matrix, QuantizedMatrix) else matrix

    def read_matrix(self, name: str) -> torch.Tensor | QuantizedMatrix:
        matrix = self.tensors[name]
        return matrix if isinstance(matrix, QuantizedMatrix) else matrix.clone()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)


def test_rms_norm_divides_by_the_root_of_the_mean_square() -> None:
    found = rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0]), eps=0.0)
    torch.testing.assert_close(found, torch.tensor([[3.0, 8.0]]) / 12.5**0.5)


def test_rms_norm_in_bf16_is_rounded_before_the_weight() -> None:
    x, weight = torch.randn(9, 64).bfloat16(), torch.rand(64).bfloat16()
    wide = x.float()
    normed = (wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()).bfloat16()
    found = rms_norm(x, weight, eps=1e-6)
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found, normed * weight, rtol=2**-8, atol=0)


@pytest.mark.skipif(native() is None, reason="the CPU kernels are not built; torch rounds rows otherwise beside others")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(64, 32), (2048, 96), (24, 320)])
def test_a_row_of_a_projection_does_not_depend_on_the_number_of_rows(
    dtype: torch.dtype, sizes: tuple[int, int], num_threads: int
) -> None:
    project = target({"w": torch.randn(sizes[1], sizes[0])}, dtype).projection("w")
    x = torch.randn(70, sizes[0]).to(dtype)
    whole = project(x)
    for num_rows in range(1, 70):
        assert torch.equal(project(x[:num_rows]), whole[:num_rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_columns", [8, 100, 512])
def test_the_norm_of_the_kernels_is_that_of_torch(dtype: torch.dtype, num_columns: int) -> None:
    x, weight = torch.randn(9, num_columns).to(dtype), torch.rand(num_columns).to(dtype)
    tolerance = 2**-7 if dtype is torch.bfloat16 else 1e-6
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), torch_rms_norm(x, weight, 1e-6), rtol=tolerance, atol=0)


def test_a_row_of_a_norm_does_not_depend_on_the_number_of_rows() -> None:
    x, weight = torch.randn(70, 100), torch.randn(100)
    whole = rms_norm(x, weight, 1e-6)
    for num_rows in range(1, 70):
        assert torch.equal(rms_norm(x[:num_rows], weight, 1e-6), whole[:num_rows])


@pytest.mark.parametrize("use_kernels", [False, True])
def test_a_mlp_is_read_by_its_published_names(use_kernels: bool) -> None:
    tensors = {
        "m.gate_proj.weight": torch.randn(6, 4),
        "m.up_proj.weight": torch.randn(6, 4),
        "m.down_proj.weight": torch.randn(4, 6),
    }
    if use_kernels and native() is None:
        pytest.skip("the CPU kernels are not built")
    mlp = target(tensors, torch.float32, use_kernels=use_kernels).mlp("m")
    x = torch.randn(3, 4)
    gate, up, down = tensors.values()
    expected = (F.silu(x @ gate.T) * (x @ up.T)) @ down.T
    torch.testing.assert_close(mlp(x, torch.float32), expected)
    torch.testing.assert_close(mlp(x, torch.float32, residual=x), expected + x)


@pytest.mark.parametrize("use_kernels", [False, True])
@pytest.mark.parametrize("num_bits", [4, 8])
def test_quantised_matrices_are_used_as_they_are_stored(num_bits: int, use_kernels: bool) -> None:
    if use_kernels and native() is None:
        pytest.skip("the CPU kernels are not built")
    names = [f"m.{name}_proj.weight" for name in ("gate", "up", "down")]
    matrices = {name: QuantizedMatrix.quantize(torch.randn(64, 64), num_bits, 32) for name in names}
    weights = target(dict(matrices), torch.float32, use_kernels=use_kernels)
    mlp, linear = weights.mlp("m"), weights.projection(*names[:2])
    kept = sum(matrix.nbytes for matrix in matrices.values())
    assert mlp.nbytes == (kept if use_kernels else 3 * 64 * 64 * 4)
    gate, up, down = (matrix.dequantize() for matrix in matrices.values())
    x = torch.randn(5, 64)
    error = 0.02 if use_kernels else 1e-5  # the kernels round activations to 8 bits
    for found, expected in (
        (mlp(x, torch.float32), (F.silu(x @ gate.T) * (x @ up.T)) @ down.T),
        (linear(x), x @ torch.cat((gate, up)).T),
    ):
        assert float((found - expected).norm() / expected.norm()) < error


def test_parts_of_several_kinds_are_multiplied_out() -> None:
    plain, quantised = torch.randn(64, 64), QuantizedMatrix.quantize(torch.randn(64, 64), 4, 32)
    linear = target({"a": plain, "b": quantised}, torch.float32).projection("a", "b")
    x = torch.randn(5, 64)
    torch.testing.assert_close(linear(x), x @ torch.cat((plain, quantised.dequantize())).T, rtol=1e-4, atol=1e-4)


def target(
    tensors: dict[str, torch.Tensor | QuantizedMatrix], dtype: torch.dtype, *, use_kernels: bool = True
) -> WeightTarget:
    return WeightTarget(reader=DictReader(tensors), dtype=dtype, device=torch.device("cpu"), use_kernels=use_kernels)
