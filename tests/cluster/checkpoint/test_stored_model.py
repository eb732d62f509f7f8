"""What the stored tensors say of a model that its config.json does not, or says otherwise."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from attention.decoder_weights import DecoderWeights
from cluster.checkpoint.checkpoint import Checkpoint, InvalidCheckpoint
from cluster.checkpoint.convert import ALL_LINEAR, plan
from cluster.config import parse_config
from cluster.roles.preflight import check
from tests.checkpoints import write_checkpoint


def write_tied(folder: Path, *, has_lm_head: bool, **changes: object) -> Path:
    """config.json says that lm_head is the embedding; the file has a matrix of its own all the same, or not."""
    write_checkpoint(folder, "v2", tie_word_embeddings=True, **changes)
    if has_lm_head:
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
        save_file(tensors, folder / "model.safetensors")
    return folder


def rewrite_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("has_lm_head", [False, True])
def test_lm_head_is_the_embedding_only_where_the_checkpoint_has_none(tmp_path: Path, has_lm_head: bool) -> None:
    checkpoint = Checkpoint.open(write_tied(tmp_path, has_lm_head=has_lm_head))
    decoder = checkpoint.model_config().decoder
    assert decoder.tie_word_embeddings is not has_lm_head
    assert ("lm_head.weight" in decoder.weight_shapes()) is has_lm_head
    head = DecoderWeights.read(checkpoint, decoder, torch.float32).lm_head
    rows = torch.randn(3, decoder.hidden_size, generator=torch.Generator().manual_seed(1))
    name = "lm_head.weight" if has_lm_head else "model.embed_tokens.weight"
    torch.testing.assert_close(head(rows), rows @ checkpoint.read(name).T)


@pytest.mark.usefixtures("without_kernels")  # which keep a tied table twice
def test_the_plan_counts_a_stored_lm_head_whatever_config_json_says_of_it(tmp_path: Path) -> None:
    untied = check(parse_config({"model": str(write_checkpoint(tmp_path / "untied", "v2"))}))
    tied = check(parse_config({"model": str(write_tied(tmp_path / "tied", has_lm_head=True))}))
    assert tied.worker_weight_bytes == untied.worker_weight_bytes


def test_a_quantised_lm_head_is_not_tied_either(tmp_path: Path) -> None:
    source = Checkpoint.open(write_tied(tmp_path / "source", has_lm_head=True, q_lora_rank=32))
    conversion = plan(source, 8, selection=ALL_LINEAR)
    (tmp_path / "made").mkdir()
    conversion.write(tmp_path / "made", lambda _: None)
    made = Checkpoint.open(tmp_path / "made")
    decoder = made.model_config().decoder
    assert not decoder.tie_word_embeddings
    made.check_role(decoder.weight_shapes())
    torch.testing.assert_close(made.read("lm_head.weight"), source.read("lm_head.weight"), rtol=0.1, atol=0.05)


@pytest.mark.parametrize("says", [0, None])
def test_shared_experts_that_config_json_denies_are_not_left_out_in_silence(tmp_path: Path, says: int | None) -> None:
    folder = write_checkpoint(tmp_path, "v2")
    rewrite_config(folder, n_shared_experts=says)
    with pytest.raises(
        InvalidCheckpoint, match=r"holds model\.layers\.1\.mlp\.shared_experts\.gate_proj\.weight, .* n_shared_experts"
    ):
        Checkpoint.open(folder).model_config()


def test_a_checkpoint_without_shared_experts_is_opened(tmp_path: Path) -> None:
    assert Checkpoint.open(write_checkpoint(tmp_path, "v2", n_shared_experts=0)).model_config()


def test_a_model_stored_in_float16_is_read_as_float32_to_the_bit(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, "v2", dtype=torch.float16))
    decoder = checkpoint.model_config().decoder
    checkpoint.check_role(decoder.weight_shapes())
    embedding = DecoderWeights.read(checkpoint, decoder, torch.float32).embedding
    assert torch.equal(embedding.half(), checkpoint.read("model.embed_tokens.weight"))


def test_empty_shared_experts_are_none_as_transformers_writes_them(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "source", "v2", n_shared_experts=0, q_lora_rank=32)
    tensors = load_file(folder / "model.safetensors")
    for layer_id in (1, 2):
        for name, shape in (("gate", (0, 64)), ("up", (0, 64)), ("down", (64, 0))):
            tensors[f"model.layers.{layer_id}.mlp.shared_experts.{name}_proj.weight"] = torch.zeros(shape)
    save_file(tensors, folder / "model.safetensors")
    assert check(parse_config({"model": str(folder)}))
    (tmp_path / "made").mkdir()
    plan(Checkpoint.open(folder), 4, selection=ALL_LINEAR).write(tmp_path / "made", lambda _: None)
    assert check(parse_config({"model": str(tmp_path / "made")}))
    assert Checkpoint.open(tmp_path / "made").shape("model.layers.1.mlp.shared_experts.down_proj.weight") == (64, 0)
