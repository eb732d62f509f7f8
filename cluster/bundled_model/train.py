"""Trains the checkpoint from nothing: `python -m cluster.bundled_model.train --out DIR`.

1. collect the text and hold some out; 2. train the tokenizer; 3. pack sequences; 4. train, exporting now and then;
5. measure the exported checkpoint on held-out text; 6. write the model card. Two CPU cores, under an hour.
"""

import argparse
import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from torch import Tensor
from torch.optim import Optimizer

from cluster.bundled_model.balance_losses import BalanceFactors, balance_loss
from cluster.bundled_model.checkpoint import read_checkpoint, write_checkpoint
from cluster.bundled_model.corpus import SHARES, Kind, collect
from cluster.bundled_model.evaluation import expert_load, held_out_loss, samples, total_variation
from cluster.bundled_model.model_card import write_model_card
from cluster.bundled_model.muon import Muon
from cluster.bundled_model.sequences import mixture, pack
from cluster.bundled_model.tokenizer import train_tokenizer, write_tokenizer
from cluster.bundled_model.training_model import ModelConfig, TrainingModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """How long and how fast to learn."""

    num_steps: int = 1900
    max_minutes: float = 44.0  # a slow machine takes fewer steps, and its learning rate still falls to zero
    num_sequences: int = 12  # a step
    peak_learning_rate: float = 6e-3
    num_warmup_steps: int = 40
    weight_decay: float = 0.1  # matrices only
    max_gradient_norm: float = 1.0
    num_steps_between_exports: int = 200
    # Weaker than V2's between devices: sequences are short and of one kind, and experts should specialise by kind.
    balance: BalanceFactors = field(default_factory=lambda: BalanceFactors(device=0.02, communication=0.01))
    seed: int = 0

    def progress(self, step: int, elapsed_s: float) -> float:
        """0.0 at the start, 1.0 at the end, by steps or by time, whichever is further."""
        return max(step / self.num_steps, elapsed_s / (60 * self.max_minutes))

    def learning_rate(self, step: int, progress: float) -> float:
        """Linear warmup, then a straight line to zero."""
        return self.peak_learning_rate * min((step + 1) / self.num_warmup_steps, max(1.0 - progress, 0.0))


def make_optimizers(model: TrainingModel, config: TrainingConfig) -> list[Optimizer]:
    """Muon for the matrices inside the layers, in two halves that two threads step at once; AdamW for the rest."""
    hidden: list[Tensor] = []
    plain: list[Tensor] = []
    for name, weight in model.named_parameters():
        is_hidden = weight.dim() >= 2 and "layers" in name and "mlp.gate.weight" not in name
        (hidden if is_hidden else plain).append(weight)
    adamw = torch.optim.AdamW(plain, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    hidden.sort(key=torch.numel, reverse=True)
    halves = (hidden[::2], hidden[1::2])
    return [*(Muon(half, lr=0.0, weight_decay=config.weight_decay) for half in halves), adamw]


def losses_and_gradients(
    model: TrainingModel, batch: Tensor, factors: BalanceFactors
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The cross-entropy and the balance loss, [2], and the gradient of their sum for each parameter.

    batch: [num_sequences, num_tokens + 1] int64. A device is an expert group; layers add up.
    """
    logits, routings = model(batch[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    shape = model.config
    per_layer = [balance_loss(r.scores, r.topk_ids, shape.n_group, shape.topk_group, factors) for r in routings]
    losses = torch.stack((loss, torch.stack(per_layer).sum()))
    return losses.detach(), torch.autograd.grad(losses.sum(), list(model.parameters()))


def update(
    model: TrainingModel, batch: Tensor, optimizers: list[Optimizer], config: TrainingConfig, pool: ThreadPoolExecutor
) -> tuple[float, float]:
    """One step: modifies the parameters, returns the cross-entropy and the balance loss of the batch.

    Each of two threads computes half of the batch with one core: faster than both cores inside each small operation.
    """
    halves = list(pool.map(lambda half: losses_and_gradients(model, half, config.balance), batch.tensor_split(2)))
    gradients = zip(*(gradients for _, gradients in halves), strict=True)
    for weight, pair in zip(model.parameters(), gradients, strict=True):
        weight.grad = torch.stack(pair).mean(dim=0)
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_gradient_norm)
    list(pool.map(lambda optimizer: optimizer.step(), optimizers))
    loss, balance = torch.stack([losses for losses, _ in halves]).mean(dim=0).tolist()
    return loss, balance


def train(
    model: TrainingModel, packed: dict[Kind, Tensor], held_out: dict[Kind, Tensor], config: TrainingConfig, out: Path
) -> dict[str, Any]:
    """Modifies `model`, exports it to `out` every few hundred steps, and returns the training log."""
    sequences = mixture(packed, config.num_steps * config.num_sequences, config.seed)
    steps = sequences.tensor_split(config.num_steps)
    log: dict[str, Any] = {"steps": [], "held_out": []}
    optimizers = make_optimizers(model, config)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(2, "train", torch.set_num_threads, (1,))
    started = time.perf_counter()
    with Progress(*columns) as progress, pool:
        task = progress.add_task("training", total=len(steps))
        for step, batch in enumerate(steps):
            fraction = config.progress(step, time.perf_counter() - started)
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = config.learning_rate(step, fraction)
            loss, balance = update(model, batch, optimizers, config, pool)
            elapsed_s = time.perf_counter() - started
            tokens_per_s = (step + 1) * batch[:, 1:].numel() / elapsed_s
            text = f"loss {loss:.3f} balance {balance:.3f} {tokens_per_s:,.0f} tokens/s"
            progress.update(task, advance=1, description=text)
            is_last = step + 1 == len(steps) or fraction >= 1.0
            if step % 10 == 0 or is_last:
                entry = {"step": step, "loss": loss, "balance": balance, "elapsed_s": round(elapsed_s, 1)}
                log["steps"].append(entry | {"tokens_per_s": round(tokens_per_s)})
            if (step + 1) % config.num_steps_between_exports == 0 or is_last:
                log["held_out"].append({"step": step, **held_out_loss(model, held_out, max_sequences=16)})
                write_checkpoint(model, out)
                (out / "training_log.json").write_text(json.dumps(log))
                logger.info("step %d: %s, held out %s", step + 1, text, log["held_out"][-1])
            if is_last:
                break
    return log


def measure(model: TrainingModel, held_out: dict[Kind, Tensor], tokenizer: Tokenizer) -> dict[str, Any]:
    """What the model card says of the exported checkpoint, ready for JSON."""
    loads = expert_load(model, held_out, max_sequences=96)
    return {
        "held_out_loss": held_out_loss(model, held_out, max_sequences=256),
        "expert_load": {kind: load.tolist() for kind, load in loads.items()},
        "total_variation": total_variation(loads, (Kind.PYTHON, Kind.ENGLISH, Kind.C)),
        "samples": samples(model, tokenizer),
    }


def main() -> None:
    defaults = TrainingConfig()
    parser = argparse.ArgumentParser(description="Train the bundled DeepSeek-V2 checkpoint.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=defaults.num_steps)
    parser.add_argument("--minutes", type=float, default=defaults.max_minutes, help="end by then, steps left or not")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--documentation", type=Path, help="folder of Python's documentation sources (.rst)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    config = TrainingConfig(num_steps=arguments.steps, max_minutes=arguments.minutes, seed=arguments.seed)
    model_config = ModelConfig()
    torch.manual_seed(config.seed)
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)

    documents = collect(arguments.documentation, config.seed)
    trained_on = [document for document in documents if not document.is_held_out]
    logger.info("%d documents, %d held out", len(documents), len(documents) - len(trained_on))
    tokenizer = train_tokenizer((document.text for document in trained_on), model_config.vocab_size)
    write_tokenizer(tokenizer, out, model_config.max_position_embeddings)
    num_tokens = model_config.yarn.original_max_position_embeddings
    packed = pack(trained_on, tokenizer, num_tokens)
    held_out = pack([document for document in documents if document.is_held_out], tokenizer, num_tokens)
    for name, sequences in (("train on", packed), ("held out", held_out)):
        logger.info("%s: %s sequences", name, {kind.value: len(rows) for kind, rows in sequences.items()})

    log = train(TrainingModel(model_config), packed, held_out, config, out)
    log["config"], log["shares"] = asdict(config), SHARES
    log["exported"] = measure(read_checkpoint(out), held_out, tokenizer)
    (out / "training_log.json").write_text(json.dumps(log))
    write_model_card(out)


if __name__ == "__main__":
    main()
