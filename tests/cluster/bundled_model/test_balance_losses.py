import pytest
import torch

from cluster.bundled_model.balance_losses import (
    BalanceFactors,
    balance_loss,
    communication_loss,
    device_loss,
    expert_loss,
)

NUM_EXPERTS, NUM_DEVICES, TOP_K, MAX_DEVICES = 16, 8, 6, 3


def uniform_routing() -> tuple[torch.Tensor, torch.Tensor]:
    """Every token selects both experts of three neighbouring devices; over eight tokens each device has three."""
    devices = (torch.arange(NUM_DEVICES).unsqueeze(1) + torch.arange(MAX_DEVICES)) % NUM_DEVICES  # [tokens, 3]
    topk_ids = torch.stack((2 * devices, 2 * devices + 1), dim=-1).flatten(1).unsqueeze(0)
    scores = torch.full((1, NUM_DEVICES, NUM_EXPERTS), 1 / NUM_EXPERTS)
    return scores, topk_ids


def test_perfectly_uniform_routing_gives_each_loss_the_value_one() -> None:
    scores, topk_ids = uniform_routing()
    assert expert_loss(scores, topk_ids).item() == pytest.approx(1.0)
    assert device_loss(scores, topk_ids, NUM_DEVICES).item() == pytest.approx(1.0)
    assert communication_loss(scores, topk_ids, NUM_DEVICES, MAX_DEVICES).item() == pytest.approx(1.0)


def test_total_of_uniform_routing_is_the_sum_of_the_factors() -> None:
    scores, topk_ids = uniform_routing()
    factors = BalanceFactors(expert=0.003, device=0.05, communication=0.02)
    assert balance_loss(scores, topk_ids, NUM_DEVICES, MAX_DEVICES, factors).item() == pytest.approx(0.073)


def test_losses_equal_the_paper_equations_written_as_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 5, NUM_EXPERTS, generator=generator).softmax(dim=-1)
    topk_ids = scores.topk(TOP_K).indices
    per_device = NUM_EXPERTS // NUM_DEVICES
    expert, device, communication = 0.0, 0.0, 0.0
    for s, ids in zip(scores.tolist(), topk_ids.tolist(), strict=True):
        num_tokens = len(s)
        f = [NUM_EXPERTS / (TOP_K * num_tokens) * sum(i in row for row in ids) for i in range(NUM_EXPERTS)]
        p = [sum(row[i] for row in s) / num_tokens for i in range(NUM_EXPERTS)]
        expert += sum(a * b for a, b in zip(f, p, strict=True))
        for d in range(NUM_DEVICES):
            mine = range(d * per_device, (d + 1) * per_device)
            p_device = sum(p[i] for i in mine)
            device += sum(f[i] for i in mine) / per_device * p_device
            num_sent = sum(any(i in row for i in mine) for row in ids)
            communication += NUM_DEVICES / (MAX_DEVICES * num_tokens) * num_sent * p_device
    assert expert_loss(scores, topk_ids).item() == pytest.approx(expert / 2)
    assert device_loss(scores, topk_ids, NUM_DEVICES).item() == pytest.approx(device / 2)
    assert communication_loss(scores, topk_ids, NUM_DEVICES, MAX_DEVICES).item() == pytest.approx(communication / 2)


def test_a_device_that_holds_all_selected_experts_is_counted_once_for_communication() -> None:
    scores = torch.zeros(1, 4, 4)
    scores[..., :2] = 0.5  # all affinity on device 0 of two
    topk_ids = torch.tensor([0, 1]).expand(1, 4, 2)
    assert device_loss(scores, topk_ids, 2).item() == pytest.approx(2.0)
    assert communication_loss(scores, topk_ids, 2, max_devices_per_token=2).item() == pytest.approx(1.0)


def test_gradient_lowers_the_affinity_for_the_overloaded_experts() -> None:
    logits = torch.zeros(1, 8, 4, requires_grad=True)
    topk_ids = torch.tensor([0, 1]).expand(1, 8, 2)
    expert_loss(logits.softmax(dim=-1), topk_ids).backward()
    assert (logits.grad[..., :2] > 0).all()
    assert (logits.grad[..., 2:] < 0).all()
