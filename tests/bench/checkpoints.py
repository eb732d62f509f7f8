"""Makes the checkpoints that the bench measures: random weights, published tensor names, a tokenizer that was trained.

Deterministic: the same shape gives the same bytes on every machine with the same torch and the same Python sources.
Streams: at most one tensor is in memory. What is made is kept in a folder and found there next time.

    python -m tests.bench.checkpoints lite4 [--folder FOLDER]
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from cluster import bundled_model
from protos.codec import raw_bytes
from tests.bench.row import FORMATS, PLAIN, Unmeasurable

FOLDER_VARIABLE = "MOBULA_BENCH_DIR"
BUNDLED = "bundled"
SPECIAL_TOKENS = ("<|begin|>", "<|end|>", "<|pad|>")
TOKENIZER_CHARACTERS = 12_000_000  # of Python's own sources; enough for 16,384 tokens
SPARE_BYTES = 2 * 2**30  # left free on the disk
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
COMMON: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 163840,
    "moe_layer_freq": 1,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
    "scoring_func": "softmax",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
SHAPES: dict[str, dict[str, Any]] = {
    # DeepSeek-V2-Lite's dimensions with 4 of its 27 layers and a small vocabulary.
    "lite4": {
        "vocab_size": 16384,
        "hidden_size": 2048,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "routed_scaling_factor": 1.0,
    },
    # DeepSeek-V2's dimensions with one dense and one mixture layer.
    "v2slice": {
        "vocab_size": 16384,
        "hidden_size": 5120,
        "num_hidden_layers": 2,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "n_routed_experts": 160,
        "num_experts_per_tok": 6,
        "n_group": 8,
        "topk_group": 3,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 16.0,
    },
    # Small enough for every test of the bench itself: what is measured on it is overhead.
    "tiny": {
        "vocab_size": 2048,
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 96,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "intermediate_size": 512,
        "moe_intermediate_size": 128,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 4.0,
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """A random bf16 tensor: normal with `deviation` around `mean`."""

    name: str
    shape: tuple[int, ...]
    deviation: float
    mean: float = 0.0

    @property
    def num_bytes(self) -> int:
        return 2 * math.prod(self.shape)

    def make(self) -> torch.Tensor:
        """The same every time: the seed is the name's."""
        seed = int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:7], "little")
        numbers = torch.randn(self.shape, generator=torch.Generator().manual_seed(seed))
        return numbers.mul_(self.deviation).add_(self.mean).to(torch.bfloat16)


def default_folder() -> Path:
    """Where checkpoints are kept."""
    named = os.environ.get(FOLDER_VARIABLE)
    return Path(named) if named else Path.home() / ".cache" / "mobula-bench"


def is_known(folder: Path, name: str) -> bool:
    """Whether `find` has or makes it."""
    return name in (BUNDLED, *SHAPES) or any((path / "config.json").exists() for path in (Path(name), folder / name))


def unknown(name: str) -> str:
    """What to say of one that is not known."""
    return f"no checkpoint {name}: not a folder with config.json, not one of {[BUNDLED, *SHAPES]}"


def find(folder: Path, name: str, kind: str, console: Console) -> Path:
    """The checkpoint `name` in the format `kind`, made if it is not there. Raises Unmeasurable."""
    plain = _find_plain(folder, name, console)
    if kind == PLAIN:
        return plain
    converted = folder / f"{plain.name}-{kind}"
    if not (converted / "config.json").exists():
        _convert(plain, converted, kind, console)
    return converted


def make(folder: Path, shape: str, console: Console) -> Path:
    """Writes the checkpoint into `folder`/`shape`. Raises Unmeasurable when the disk has no room."""
    config = COMMON | SHAPES[shape]
    specs = tensor_specs(config)
    num_bytes = sum(spec.num_bytes for spec in specs)
    _check_disk(folder, num_bytes)
    target, unfinished = folder / shape, folder / f"{shape}.unfinished"
    console.print(f"making {shape}: {num_bytes / 1e9:.2f} GB of random weights into {target}", markup=False)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    _write_tokenizer(unfinished, int(config["vocab_size"]))
    _write_json(unfinished / "config.json", config)
    _write_json(unfinished / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2})
    _write_tensors(unfinished / "model.safetensors", specs, console)
    unfinished.rename(target)
    return target


def tensor_specs(config: dict[str, Any]) -> list[TensorSpec]:
    """Every tensor of the checkpoint. Scales keep activations near 1 and let the gate and the logits choose."""
    return list(_model(config))


def _model(config: dict[str, Any]) -> Iterator[TensorSpec]:
    vocab, hidden = config["vocab_size"], config["hidden_size"]
    yield TensorSpec(name="model.embed_tokens.weight", shape=(vocab, hidden), deviation=0.5)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield _norm(f"{prefix}.input_layernorm", hidden)
        yield _norm(f"{prefix}.post_attention_layernorm", hidden)
        yield from _attention(f"{prefix}.self_attn", config)
        if layer < config["first_k_dense_replace"]:
            yield from _mlp(f"{prefix}.mlp", hidden, config["intermediate_size"])
        else:
            yield from _mixture(f"{prefix}.mlp", config)
    yield _norm("model.norm", hidden)
    yield _matrix("lm_head", vocab, hidden, gain=3.0)


def _attention(prefix: str, config: dict[str, Any]) -> Iterator[TensorSpec]:
    hidden, heads, rank, latent = (
        config[name] for name in ("hidden_size", "num_attention_heads", "q_lora_rank", "kv_lora_rank")
    )
    nope, rope, value = (config[name] for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    if rank:
        yield _matrix(f"{prefix}.q_a_proj", rank, hidden)
        yield _norm(f"{prefix}.q_a_layernorm", rank)
        yield _matrix(f"{prefix}.q_b_proj", heads * (nope + rope), rank)
    else:
        yield _matrix(f"{prefix}.q_proj", heads * (nope + rope), hidden)
    yield _matrix(f"{prefix}.kv_a_proj_with_mqa", latent + rope, hidden)
    yield _norm(f"{prefix}.kv_a_layernorm", latent)
    yield _matrix(f"{prefix}.kv_b_proj", heads * (nope + value), latent)
    yield _matrix(f"{prefix}.o_proj", hidden, heads * value)


def _mixture(prefix: str, config: dict[str, Any]) -> Iterator[TensorSpec]:
    hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
    yield _matrix(f"{prefix}.gate", config["n_routed_experts"], hidden)
    for expert in range(config["n_routed_experts"]):
        yield from _mlp(f"{prefix}.experts.{expert}", hidden, inner)
    yield from _mlp(f"{prefix}.shared_experts", hidden, inner * config["n_shared_experts"])


def _mlp(prefix: str, hidden: int, inner: int) -> Iterator[TensorSpec]:
    yield _matrix(f"{prefix}.gate_proj", inner, hidden)
    yield _matrix(f"{prefix}.up_proj", inner, hidden)
    yield _matrix(f"{prefix}.down_proj", hidden, inner)


def _matrix(name: str, rows: int, columns: int, gain: float = 1.0) -> TensorSpec:
    return TensorSpec(name=f"{name}.weight", shape=(rows, columns), deviation=gain / math.sqrt(columns))


def _norm(name: str, size: int) -> TensorSpec:
    return TensorSpec(name=f"{name}.weight", shape=(size,), deviation=0.1, mean=1.0)


def _find_plain(folder: Path, name: str, console: Console) -> Path:
    if name == BUNDLED:
        return bundled_model.path()
    if (Path(name) / "config.json").exists():
        return Path(name)
    if (folder / name / "config.json").exists():
        return folder / name
    if name not in SHAPES:
        raise Unmeasurable(unknown(name))
    return make(folder, name, console)


def _convert(source: Path, target: Path, kind: str, console: Console) -> None:
    """With the command that a user has."""
    _check_disk(target.parent, sum(path.stat().st_size for path in source.glob("*.safetensors")))
    console.print(f"converting the linear layers of {source} to {kind}, into {target}", markup=False)
    command = [sys.executable, "-m", "cluster.commands.cli", "checkpoint", "convert", str(source), str(target)]
    result = subprocess.run(
        [*command, "--experts", kind, "--all-linear", "--no-compare"], capture_output=True, text=True, check=False
    )
    if result.returncode:
        shutil.rmtree(target, ignore_errors=True)
        last = [line for line in (result.stderr or result.stdout).splitlines() if line.strip(" │╭╮╰╯─")][-1:]
        raise Unmeasurable(
            f"mobula checkpoint convert --experts {kind} --all-linear failed: {' '.join(last).strip(' │')}"
        )


def _check_disk(folder: Path, num_bytes: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < num_bytes + SPARE_BYTES:
        raise Unmeasurable(
            f"{folder} has {free / 1e9:.1f} GB free, {(num_bytes + SPARE_BYTES) / 1e9:.1f} GB are needed; "
            f"set {FOLDER_VARIABLE} to another folder"
        )


def _write_tensors(path: Path, specs: list[TensorSpec], console: Console) -> None:
    """The safetensors format: length of the header, header, tensors one after the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        header[spec.name] = {"dtype": "BF16", "shape": spec.shape, "data_offsets": (end, end + spec.num_bytes)}
        end += spec.num_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for spec in track(specs, description="weights", console=console, transient=True):
            file.write(raw_bytes(spec.make()))


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A byte-level BPE of exactly `vocab_size` tokens, trained on the sources of Python's standard library."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(text, special=True) for text in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_python_sources(), trainer)
    if tokenizer.get_vocab_size() < vocab_size:  # a Python without its sources: any further tokens will do
        missing = vocab_size - tokenizer.get_vocab_size()
        tokenizer.add_tokens([f"<|filler-{number}|>" for number in range(missing)])
    tokenizer.save(str(folder / "tokenizer.json"))
    begin, end, pad = SPECIAL_TOKENS
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": begin,
            "eos_token": end,
            "pad_token": pad,
            "add_bos_token": True,
            "model_max_length": COMMON["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def _python_sources() -> Iterator[str]:
    """Text of the standard library, in the order of the file names, TOKENIZER_CHARACTERS at most."""
    num_characters = 0
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if "site-packages" in path.parts:
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        yield text
        num_characters += len(text)
        if num_characters > TOKENIZER_CHARACTERS:
            return


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=tuple(SHAPES))
    parser.add_argument("--folder", type=Path, default=default_folder())
    parser.add_argument("--format", choices=FORMATS, default=PLAIN)
    arguments = parser.parse_args()
    try:
        print(find(arguments.folder, arguments.name, arguments.format, Console(stderr=True)))
    except Unmeasurable as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
