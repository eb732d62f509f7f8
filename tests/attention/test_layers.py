import pytest
import torch
import torch.nn.functional as F

from attention.layers import SwiGlu, WeightTarget, linear, rms_norm


class DictReader:
    """A WeightReader over tensors in memory; remembers what was read."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name].clone()

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(64, 32), (2048, 96), (24, 320)])
def test_a_row_of_a_matrix_product_does_not_depend_on_the_number_of_rows(
    dtype: torch.dtype, sizes: tuple[int, int], num_threads: int
) -> None:
    weight, x = torch.randn(sizes[1], sizes[0]).to(dtype), torch.randn(70, sizes[0]).to(dtype)
    whole = linear(x, weight)
    for num_rows in range(1, 70):
        assert torch.equal(linear(x[:num_rows], weight), whole[:num_rows])


def test_a_row_of_a_norm_does_not_depend_on_the_number_of_rows() -> None:
    x, weight = torch.randn(70, 100), torch.randn(100)
    whole = rms_norm(x, weight, 1e-6)
    for num_rows in range(1, 70):
        assert torch.equal(rms_norm(x[:num_rows], weight, 1e-6), whole[:num_rows])


def test_swiglu_is_read_by_published_names_into_one_matrix() -> None:
    reader = DictReader(
        {
            "m.gate_proj.weight": torch.randn(6, 4),
            "m.up_proj.weight": torch.randn(6, 4),
            "m.down_proj.weight": torch.randn(4, 6),
        }
    )
    target = WeightTarget(reader=reader, dtype=torch.float32, device=torch.device("cpu"))
    mlp = SwiGlu.read(target, "m")
    x = torch.randn(3, 4)
    gate, up, down = reader.tensors.values()
    torch.testing.assert_close(mlp.forward(x), (F.silu(x @ gate.T) * (x @ up.T)) @ down.T)
