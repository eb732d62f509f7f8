"""Writes tiny random checkpoints as Hugging Face publishes them: config, index, shards, tokenizer, chat template.

Seeded. Scales are chosen so that the gate really chooses and logits differ, unlike those of a fresh initialisation.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
VOCAB_SIZE = 320
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ 'User: ' + message['content'] + '\n\n' }}{% elif message['role'] == 'assistant' %}"
    "{{ 'Assistant: ' + message['content'] + eos_token }}{% elif message['role'] == 'system' %}"
    "{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
TOKENIZER_TEXT = [
    "The manta and the mobula glide over the reef. They are rays, and the rays are many.",
    "Each token visits the experts that the gate chooses; the experts answer, and the answers are added.",
    "User: what is the answer?\n\nAssistant: the answer is that there is another question.\n\n",
]
COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "hidden_act": "silu",
    "max_position_embeddings": 16384,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 512,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
SHAPES: dict[str, dict[str, Any]] = {
    "v2": COMMON
    | {
        "model_type": "deepseek_v2",
        "architectures": ["DeepseekV2ForCausalLM"],
        "q_lora_rank": 24,
        "n_routed_experts": 32,
        "n_shared_experts": 2,
        "n_group": 8,
        "topk_group": 3,
        "topk_method": "group_limited_greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 8.0,
    },
    "v2_lite": COMMON
    | {
        "model_type": "deepseek_v2",
        "architectures": ["DeepseekV2ForCausalLM"],
        "num_hidden_layers": 3,
        "q_lora_rank": None,
        "n_routed_experts": 16,
        "n_shared_experts": 2,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
    },
    "v3": COMMON
    | {
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "q_lora_rank": 24,
        "n_routed_experts": 32,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 1,
        "rope_scaling": COMMON["rope_scaling"] | {"mscale": 1.0, "mscale_all_dim": 1.0},  # type: ignore[operator]
    },
}


def write_checkpoint(
    folder: Path,
    shape: str = "v2",
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    num_shards: int = 1,
    **changes: Any,
) -> Path:
    """Writes the checkpoint and returns the folder.

    shape: a key of SHAPES; num_shards: 1 gives model.safetensors without an index; changes: fields of config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = SHAPES[shape] | {"torch_dtype": str(dtype).removeprefix("torch.")} | changes
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1, "temperature": 0.3})
    _write_tensors(folder, random_tensors(config, dtype, seed), num_shards)
    _write_tokenizer(folder, int(config["vocab_size"]))
    return folder


def random_tensors(config: dict[str, Any], dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Every tensor of the checkpoint, by name, in the order of the layers."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) * gain / math.sqrt(columns)).to(dtype)

    def norm(size: int) -> Tensor:
        return (1.0 + 0.1 * torch.randn(size, generator=generator)).to(dtype)

    def mlp(prefix: str, inner: int) -> dict[str, Tensor]:
        return {
            f"{prefix}.gate_proj.weight": matrix(inner, hidden, 1.5),
            f"{prefix}.up_proj.weight": matrix(inner, hidden, 1.5),
            f"{prefix}.down_proj.weight": matrix(hidden, inner),
        }

    def attention(prefix: str) -> dict[str, Tensor]:
        heads, latent = config["num_attention_heads"], config["kv_lora_rank"]
        nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
        rank = config["q_lora_rank"]
        query = (
            {f"{prefix}.q_proj.weight": matrix(heads * (nope + rope), hidden, 1.5)}
            if not rank
            else {
                f"{prefix}.q_a_proj.weight": matrix(rank, hidden),
                f"{prefix}.q_a_layernorm.weight": norm(rank),
                f"{prefix}.q_b_proj.weight": matrix(heads * (nope + rope), rank, 1.5),
            }
        )
        return query | {
            f"{prefix}.kv_a_proj_with_mqa.weight": matrix(latent + rope, hidden),
            f"{prefix}.kv_a_layernorm.weight": norm(latent),
            f"{prefix}.kv_b_proj.weight": matrix(heads * (nope + value), latent, 1.5),
            f"{prefix}.o_proj.weight": matrix(hidden, heads * value),
        }

    def mixture(prefix: str) -> dict[str, Tensor]:
        experts, inner = config["n_routed_experts"], config["moe_intermediate_size"]
        tensors = {f"{prefix}.gate.weight": matrix(experts, hidden, 2.0)}
        if config["model_type"] == "deepseek_v3":
            bias = 0.1 * torch.randn(experts, generator=generator)
            tensors[f"{prefix}.gate.e_score_correction_bias"] = bias
        for expert in range(experts):
            tensors |= mlp(f"{prefix}.experts.{expert}", inner)
        if config["n_shared_experts"]:
            tensors |= mlp(f"{prefix}.shared_experts", inner * config["n_shared_experts"])
        return tensors

    def layer(layer_id: int) -> dict[str, Tensor]:
        prefix = f"model.layers.{layer_id}"
        is_dense = layer_id < config["first_k_dense_replace"] or layer_id % config["moe_layer_freq"]
        return (
            {f"{prefix}.input_layernorm.weight": norm(hidden)}
            | attention(f"{prefix}.self_attn")
            | {f"{prefix}.post_attention_layernorm.weight": norm(hidden)}
            | (mlp(f"{prefix}.mlp", config["intermediate_size"]) if is_dense else mixture(f"{prefix}.mlp"))
        )

    hidden, vocab = config["hidden_size"], config["vocab_size"]
    tensors = {"model.embed_tokens.weight": torch.randn(vocab, hidden, generator=generator).to(dtype)}
    num_layers = config["num_hidden_layers"]
    for layer_id in range(num_layers):
        tensors |= layer(layer_id)
    tensors["model.norm.weight"] = norm(hidden)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(vocab, hidden, 2.0)
    for layer_id in range(num_layers, num_layers + config.get("num_nextn_predict_layers", 0)):
        prefix = f"model.layers.{layer_id}"
        tensors |= layer(layer_id)
        tensors |= {f"{prefix}.{name}.weight": norm(hidden) for name in ("enorm", "hnorm", "shared_head.norm")}
        tensors[f"{prefix}.eh_proj.weight"] = matrix(hidden, 2 * hidden)
        tensors[f"{prefix}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[f"{prefix}.shared_head.head.weight"] = matrix(vocab, hidden)
    return tensors


def _write_tensors(folder: Path, tensors: dict[str, Tensor], num_shards: int) -> None:
    metadata = {"format": "pt"}
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata)
        return
    names = list(tensors)
    per_shard = -(-len(names) // num_shards)
    weight_map = {}
    for shard in range(num_shards):
        file_name = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        held = names[shard * per_shard : (shard + 1) * per_shard]
        save_file({name: tensors[name] for name in held}, folder / file_name, metadata)
        weight_map |= dict.fromkeys(held, file_name)
    total_size = sum(tensor.nbytes for tensor in tensors.values())
    _write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    )


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Byte-level: every text has tokens and every token has bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(text, special=True) for text in (BOS, EOS, PAD)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TOKENIZER_TEXT, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "add_bos_token": False,
            "add_eos_token": False,
            "model_max_length": 16384,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
