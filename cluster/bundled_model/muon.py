"""Muon (Keller Jordan et al., 2024): momentum whose matrix is made orthogonal before the step.

It learns more from a token than AdamW does, and tokens are what two CPU cores have few of. Stacked matrices are
treated one by one. Embeddings, the output head, gates and norms stay with AdamW.
"""

import torch
from torch import Tensor


def orthogonalise(matrices: Tensor, num_iterations: int = 5) -> Tensor:
    """Roughly the nearest orthogonal matrices, by Newton-Schulz iteration. matrices: [..., rows, columns] fp32."""
    a, b, c = 3.4445, -4.7750, 2.0315  # steepest at zero while singular values stay in about 0.7 to 1.2
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x: Tensor = matrices.mT if is_tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(num_iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, scaled to the step size AdamW would have (arXiv 2502.16982 section 2.2)."""

    def __init__(self, params: list[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates every parameter in place from its gradient. closure: unused, part of torch's interface."""
        for group in self.param_groups:
            for weight in group["params"]:
                velocity = self.state[weight].setdefault("velocity", torch.zeros_like(weight))
                velocity.lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonalise(weight.grad.lerp(velocity, group["momentum"]))
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * 0.2 * max(weight.shape[-2:]) ** 0.5)
