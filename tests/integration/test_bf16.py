"""bf16 against the fp32 reference on the same weights, beside what transformers' bf16 does.

A bf16 model differs from the fp32 one in two ways: by rounding, and because a rounded hidden state makes the gate
choose another expert near a tie. Without the second the first has a bound; with it, ours should be no worse than
transformers'.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from cluster import bundled_model
from tests.attention.steps import StepRunner
from tests.checkpoints import write_checkpoint
from tests.reference import Reference

NUM_TOKENS = 300
ROUNDING = 2.0**-8  # of one bf16 operation, relative
PROMPT = list(range(3, 35))


class Comparison:
    """Logits of one checkpoint along the reference's own greedy continuation: [NUM_TOKENS, vocab_size] each.

    Teacher forcing: a near tie at one position does not hide the rest.
    """

    def __init__(self, folder: Path) -> None:
        reference = Reference(folder)
        self.name = folder.name
        self.num_layers = reference.config.decoder.num_hidden_layers
        token_ids = PROMPT + reference.generate(PROMPT, NUM_TOKENS)
        self.expected = reference.logits(token_ids)[len(PROMPT) :]
        runner = StepRunner(folder, dtype=torch.bfloat16)
        sequence = runner.sequence(token_ids)
        for start in range(0, len(token_ids), 128):
            runner.step([(sequence, min(128, len(token_ids) - start))])
        self.ours = torch.cat(sequence.logits)[len(PROMPT) :]
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        with torch.inference_mode():
            self.theirs = model(torch.tensor([token_ids])).logits[0, len(PROMPT) :].float()

    def differs(self, logits: Tensor) -> Tensor:
        """[NUM_TOKENS] bool: the greedy token is not the reference's."""
        return logits.argmax(dim=-1) != self.expected.argmax(dim=-1)

    def gap(self, logits: Tensor) -> Tensor:
        """[NUM_TOKENS]: how much less the reference likes this greedy token than its own, of its largest logit."""
        best = self.expected.amax(dim=-1)
        chosen = self.expected.gather(-1, logits.argmax(dim=-1, keepdim=True)).squeeze(-1)
        return (best - chosen) / self.expected.abs().amax(dim=-1)

    def error(self, logits: Tensor) -> float:
        """Median distance from the reference, of its largest logit."""
        return float(((logits - self.expected).abs().amax(dim=-1) / self.expected.abs().amax(dim=-1)).median())


def test_without_a_choice_of_experts_a_differing_token_is_within_rounding(tmp_path: Path) -> None:
    every_expert = {"num_experts_per_tok": 32, "topk_group": 8, "routed_scaling_factor": 1.0}
    folder = write_checkpoint(tmp_path / "model", "v2", seed=5, dtype=torch.bfloat16, **every_expert)
    comparison = Comparison(folder)
    # Each layer adds a few rounded terms to the residual; their errors add up like a random walk.
    bound = 4 * ROUNDING * (4 * comparison.num_layers) ** 0.5
    assert float(comparison.gap(comparison.ours).max()) <= bound


@pytest.mark.parametrize("shape", ["v2", "v2_lite", "v3", "bundled"])
def test_bf16_is_as_near_to_the_reference_as_transformers(
    tmp_path: Path, shape: str, capsys: pytest.CaptureFixture[str]
) -> None:
    is_bundled = shape == "bundled"
    folder = (
        bundled_model.path() if is_bundled else write_checkpoint(tmp_path / shape, shape, dtype=torch.bfloat16, seed=5)
    )
    comparison = Comparison(folder)
    ours, theirs = comparison.differs(comparison.ours), comparison.differs(comparison.theirs)
    with capsys.disabled():  # the counts are results
        print(
            f"\n{comparison.name}: of {NUM_TOKENS} greedy tokens bf16 changes {int(ours.sum())} here and "
            f"{int(theirs.sum())} in transformers; error {comparison.error(comparison.ours):.4f} and "
            f"{comparison.error(comparison.theirs):.4f} of the largest logit"
        )
    assert comparison.error(comparison.ours) <= 1.2 * comparison.error(comparison.theirs)
    assert int(ours.sum()) <= 1.5 * int(theirs.sum()) + 5
