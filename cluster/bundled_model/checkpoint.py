"""Writes and reads the checkpoint in the published format: config.json, generation_config.json, model.safetensors."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from cluster.bundled_model.tokenizer import BOS_ID, EOS_ID, PAD_ID
from cluster.bundled_model.training_model import ModelConfig, TrainingModel, YarnConfig


def published_config(config: ModelConfig) -> dict[str, Any]:
    """The content of config.json."""
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name != "yarn"}
    return {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "aux_loss_alpha": 0.003,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
        "ep_size": 1,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": config.max_position_embeddings,
        "moe_layer_freq": 1,
        "norm_topk_prob": False,
        "num_key_value_heads": config.num_attention_heads,
        "pretraining_tp": 1,
        "rope_scaling": {"type": "yarn", **dataclasses.asdict(config.yarn)},
        "scoring_func": "softmax",
        "seq_aux": True,
        "tie_word_embeddings": False,
        "topk_method": "group_limited_greedy",
        "torch_dtype": "bfloat16",
        "use_cache": True,
    } | fields


def write_checkpoint(model: TrainingModel, folder: Path) -> None:
    """Weights in bfloat16. Each file is replaced as a whole, never left half written."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.bfloat16() for name, weight in model.published_state_dict().items()}
    unfinished = folder / "model.safetensors.unfinished"
    save_file(weights, unfinished, metadata={"format": "pt"})
    unfinished.replace(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(published_config(model.config), indent=2) + "\n")
    generation = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def read_checkpoint(folder: Path) -> TrainingModel:
    """The model as exported, its bfloat16 weights widened to fp32."""
    published = json.loads((folder / "config.json").read_text())
    yarn_fields = {field.name for field in dataclasses.fields(YarnConfig)}
    yarn = YarnConfig(**{name: value for name, value in published["rope_scaling"].items() if name in yarn_fields})
    fields = {field.name for field in dataclasses.fields(ModelConfig)} - {"yarn"}
    model = TrainingModel(ModelConfig(yarn=yarn, **{name: published[name] for name in fields}))
    weights = load_file(folder / "model.safetensors")
    model.load_published_state_dict({name: weight.to(torch.float32) for name, weight in weights.items()})
    return model
