"""Writes the checkpoint's README.md and its two pictures from training_log.json and config.json.

`python -m cluster.bundled_model.model_card DIR`, also run at the end of training. Needs matplotlib.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot

_KINDS = ("python", "english", "c")
_SAMPLE_NOTE = "Continuations by the exported checkpoint, at the given temperature, seed 0."

_CARD = """\
---
license: other
license_name: psf-2.0
license_link: https://docs.python.org/3/license.html
library_name: mobula
tags: [deepseek_v2, mixture-of-experts, multi-head-latent-attention]
---

# The bundled model

A DeepSeek-V2 model of {num_parameters:.1f} million parameters, small enough to come with the package
({megabytes:.1f} MB, bfloat16) and to run on a laptop's CPU. Its architecture is that of DeepSeek-V2 in every part that
matters for serving; its routing was learned, not drawn at random, and differs between kinds of text. It writes text
that looks like Python, like Python's documentation or like C. It knows nothing and is no assistant.

## Architecture

| | |
|---|---|
| layers | {num_hidden_layers}, of which {first_k_dense_replace} dense |
| hidden size, vocabulary | {hidden_size}, {vocab_size} (own byte-level BPE) |
| attention | MLA: {num_attention_heads} heads, q rank {q_lora_rank}, kv rank {kv_lora_rank}, head \
{qk_nope_head_dim} + {qk_rope_head_dim} (rope), value {v_head_dim} |
| experts | {n_routed_experts} routed in {n_group} groups, {num_experts_per_tok} a token from at most {topk_group} \
groups; {n_shared_experts} shared; inner size {moe_intermediate_size} |
| gate | softmax over all experts, `group_limited_greedy`, factor {routed_scaling_factor}, not renormalised |
| context | {max_position_embeddings} positions by YaRN, factor {yarn_factor:.0f}; trained on {context}, beyond which \
text is much worse |

The files are in the Hugging Face format of the published DeepSeek-V2 checkpoints, with the same tensor names.

## Data

{num_tokens:.1f} million tokens: the Python standard library (`python`, {python:.0%}), Python's documentation
(`english`, {english:.0%}), CPython's headers (`c`, {c:.0%}), and questions answered by docstrings in the chat
template's form (`chat`, {chat:.0%}). All of it, and so the model, is under the licence of the Python
Software Foundation (PSF-2.0), copyright the Python Software Foundation. Nothing else was used. One source in forty
was held out.

## Training

{num_steps} steps of {num_sequences} sequences of {context} tokens in {minutes:.0f} minutes on two CPU cores
({tokens_per_s:,.0f} tokens/s), Muon for the matrices in the layers and AdamW for the rest. Besides cross-entropy, the
three balance losses of DeepSeek-V2 (section 2.2.3; expert {expert}, device {device}, communication {communication};
a device is an expert group). No token is dropped.

![Loss curve](loss.png)

Held-out loss of the exported checkpoint, in nats per token:

| kind | loss | perplexity |
|---|---|---|
{loss_rows}

## Routing

![Expert load](expert_load.png)

Total variation distance between the expert loads of two kinds of held-out text (0: same load, 1: disjoint experts):

| MoE layer | {pair_names} |
|---|{pair_rule}
{distance_rows}

## Samples

{samples}
## Retrain

    apt-get install python3-doc           # the documentation's sources; without them the topics of help() are used
    pip install 'mobula-serve[train]'     # matplotlib, and a torch that has torch.nn.functional.grouped_mm
    python -m cluster.bundled_model.train --out DIR

Seeded, but a run ends at `--minutes` even if steps are left ({num_steps} of {planned_steps} were taken for this
checkpoint), so a faster machine gives a better model. The text is that of the running interpreter's version.
"""


def draw_loss(log: dict[str, Any], path: Path) -> None:
    """Training loss and held-out loss of each kind against steps."""
    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    axes.plot([e["step"] for e in log["steps"]], [e["loss"] for e in log["steps"]], color="0.7", label="training")
    for kind in (*_KINDS, "chat"):
        axes.plot([e["step"] for e in log["held_out"]], [e[kind] for e in log["held_out"]], label=f"held out: {kind}")
    axes.set(xlabel="step", ylabel="cross-entropy (nats per token)")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def draw_expert_load(log: dict[str, Any], path: Path) -> None:
    """A heat map for each kind: MoE layers by experts, load relative to the mean."""
    loads = log["exported"]["expert_load"]
    num_experts = len(loads["python"][0])
    figure, rows = pyplot.subplots(len(_KINDS), 1, figsize=(7, 4.2), layout="constrained", sharex=True)
    for axes, kind in zip(rows, _KINDS, strict=True):
        relative = [[share * num_experts for share in layer] for layer in loads[kind]]
        image = axes.imshow(relative, aspect="auto", vmin=0.0, vmax=3.0, cmap="viridis")
        axes.set(ylabel=kind, yticks=range(len(relative)), yticklabels=range(1, len(relative) + 1))
    rows[-1].set_xlabel("expert")
    figure.colorbar(image, ax=rows, label="load / mean load", extend="max")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def write_model_card(folder: Path) -> None:
    """README.md, loss.png and expert_load.png beside the checkpoint."""
    matplotlib.use("Agg")
    log = json.loads((folder / "training_log.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    draw_loss(log, folder / "loss.png")
    draw_expert_load(log, folder / "expert_load.png")
    exported, last = log["exported"], log["steps"][-1]
    distances = exported["total_variation"]
    num_layers, first = len(next(iter(distances.values()))), config["first_k_dense_replace"]
    num_bytes = (folder / "model.safetensors").stat().st_size
    context = config["rope_scaling"]["original_max_position_embeddings"]
    num_steps = last["step"] + 1
    card = _CARD.format(
        **config,
        **log["shares"],
        **log["config"]["balance"],
        num_parameters=num_bytes / 2e6,
        megabytes=num_bytes / 1e6,
        context=context,
        yarn_factor=config["rope_scaling"]["factor"],
        num_steps=num_steps,
        planned_steps=log["config"]["num_steps"],
        num_sequences=log["config"]["num_sequences"],
        num_tokens=num_steps * log["config"]["num_sequences"] * context / 1e6,
        minutes=last["elapsed_s"] / 60,
        tokens_per_s=last["tokens_per_s"],
        loss_rows="\n".join(
            f"| {kind} | {loss:.3f} | {math.exp(loss):.1f} |" for kind, loss in exported["held_out_loss"].items()
        ),
        pair_names=" | ".join(distances),
        pair_rule="---|" * len(distances),
        distance_rows="\n".join(
            f"| {first + row} | " + " | ".join(f"{values[row]:.2f}" for values in distances.values()) + " |"
            for row in range(num_layers)
        ),
        samples=_samples(exported["samples"]),
    )
    (folder / "README.md").write_text(card)


def _samples(samples: list[dict[str, Any]]) -> str:
    parts = [_SAMPLE_NOTE, ""]
    for sample in samples:
        parts += [f"{sample['kind']}, temperature {sample['temperature']}:", ""]
        parts += [f"    {line}".rstrip() for line in (sample["prompt"] + sample["continuation"]).splitlines()] + [""]
    return "\n".join(parts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the model card of a trained checkpoint.")
    parser.add_argument("folder", type=Path)
    write_model_card(parser.parse_args().folder)
