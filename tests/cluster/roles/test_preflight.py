"""What is refused before anything is started, by name."""

import json
import re
from importlib.machinery import EXTENSION_SUFFIXES
from io import StringIO
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from attention.decoder_weights import DecoderWeights
from cluster.checkpoint import convert
from cluster.checkpoint.checkpoint import Checkpoint, InvalidCheckpoint
from cluster.checkpoint.json_fields import UnsupportedModel
from cluster.commands.plan_view import plan_view
from cluster.config import ConfigError, parse_config
from cluster.controller.process import RoleName
from cluster.roles import preflight
from cluster.roles.preflight import check, memory_budget
from experts.kernels import library as kernels
from experts.kernels import packed_matrix
from router import compiled
from router.placement import PlacementError
from tests.checkpoints import write_checkpoint
from tests.quantized_checkpoints import write_fp8_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", "v2", seed=1)


def plan_of(folder: Path, **settings: Any) -> preflight.ServingPlan:
    return check(parse_config({"model": str(folder)} | settings))


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_device_that_experts_cannot_use_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"expert_shards\.device is 'cuda': .* set it to cpu"):
        plan_of(folder, expert_shards={"device": "cuda"})


def test_the_workers_device_is_looked_for_where_they_run_on_this_machine(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"^attention_workers\.device is 'gpu': .* set it to cpu"):
        plan_of(folder, attention_workers={"device": "gpu"})
    plan_of(folder, attention_workers={"device": "cuda"}, ray={"address": "auto"})  # nodes may have what is not here


def test_the_plan_counts_weights_by_role(folder: Path) -> None:
    plan = plan_of(folder, expert_shards={"count": 3})
    file_bytes = (folder / "model.safetensors").stat().st_size
    weights = plan.worker_weight_bytes + sum(plan.shard_weight_bytes)
    assert 0.9 * file_bytes < weights <= file_bytes
    assert plan.expert_map.ep_size == len(plan.shard_weight_bytes) == 3


def test_a_placement_that_does_not_fit_names_the_shard_and_the_limit(folder: Path) -> None:
    shards = {"count": 1, "max_weight_gib": 0.0001}
    with pytest.raises(PlacementError, match=r"shard 0 needs .* limit is"):
        plan_of(folder, expert_shards=shards | {"placement_policy": "static"})
    with pytest.raises(PlacementError, match=r"24 units .* need .* bytes, the limits of the 1 shards are .* bytes"):
        plan_of(folder, expert_shards=shards)


def test_policy_and_redundancy_of_the_configuration_decide_the_placement(folder: Path) -> None:
    plan = plan_of(folder, expert_shards={"count": 6, "redundancy": 0.25})
    assert (plan.expert_map.unit_to_ep_ranks >= 0).sum() == 24 + 6
    assert plan.expert_map.num_units == 8
    single = plan_of(folder, expert_shards={"count": 4, "placement_policy": "eplb"})
    assert single.expert_map.num_units == single.model.config.decoder.gate.n_routed_experts
    assert max(plan.shard_weight_bytes) == plan.model.expert_bytes * 5 * 4  # of 30 units of 4 experts on 6 shards


def test_labels_are_refused_where_no_node_can_carry_them(folder: Path) -> None:
    groups = [{"count": 1}, {"count": 2, "labels": {"accelerator": "h100"}}]
    with pytest.raises(
        ConfigError, match=r"expert_shards\.groups\.1\.labels is .*h100.*: no node of a Ray cluster that"
    ):
        plan_of(folder, expert_shards={"count": 3, "groups": groups})
    check(parse_config({"model": str(folder), "expert_shards": {"groups": groups}, "ray": {"address": "auto"}}))


def test_more_shards_than_units_are_refused_with_the_numbers(folder: Path) -> None:
    with pytest.raises(PlacementError, match="ep_size is 25, but there are only 24 units"):
        plan_of(folder, expert_shards={"count": 25})


def test_a_machine_with_too_little_memory_is_told_what_needs_how_much(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "PROCESS_BYTES", 2**50)
    monkeypatch.setattr(preflight.cgroup, "memory_left", lambda: None)
    with pytest.raises(ConfigError, match=r"the system needs about .* are free; use fewer workers") as refused:
        plan_of(folder)
    needed, *parts = [float(number) for number in re.findall(r"([\d.]+) GiB", str(refused.value).partition(";")[0])]
    assert sum(parts) == pytest.approx(needed, abs=0.2)  # each is rounded


def test_a_containers_limit_counts_where_the_machine_has_more(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.cgroup, "memory_left", lambda: 2**28)
    with pytest.raises(ConfigError, match=r"256.0 MiB are free in its container; use fewer workers"):
        plan_of(folder)


def test_one_machines_memory_limits_its_workers_and_a_clusters_or_a_gpus_does_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"model": str(folder), "attention_workers": {"count": 2}}
    config = parse_config(settings)
    plan = check(config)
    memory = SimpleNamespace(available=plan.total_bytes + 3 * plan.worker_bytes - 1)
    monkeypatch.setattr(preflight.psutil, "virtual_memory", lambda: memory)
    budget, num_shards = memory_budget(config, plan), len(plan.shard_weight_bytes)
    assert budget is not None
    assert budget.max_count(RoleName.WORKER, num_shards) == 4
    memory.available = 0  # taken by somebody since it was checked
    budget = memory_budget(config, plan)
    assert budget is not None
    assert budget.max_count(RoleName.WORKER, num_shards) == 2
    assert budget.max_count(RoleName.SHARD, 2) == num_shards
    assert memory_budget(parse_config(settings | {"ray": {"address": "auto"}}), plan) is None
    assert memory_budget(parse_config(settings | {"attention_workers": {"device": "cuda"}}), plan) is None


def test_a_cache_that_no_request_could_fill_is_not_taken_and_the_plan_says_so(folder: Path) -> None:
    plan = plan_of(folder, attention_workers={"engine": {"cache_gib": 500.0}})
    assert plan.cache_bytes + plan.spared_cache_bytes == pytest.approx(500 * 2**30, rel=1e-6)
    console = Console(file=StringIO(), width=200)
    console.print(plan_view(plan))
    assert "less than cache_gib: no request could use them" in console.file.getvalue()  # type: ignore[attr-defined]
    exact = plan_of(folder, attention_workers={"engine": {"num_blocks": 7}})
    assert exact.spared_cache_bytes == 0


def test_a_step_that_does_not_fit_a_message_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "MAX_FRAME_BYTES", 100_000)
    with pytest.raises(ConfigError, match=r"max_num_batched_tokens is 1024: .* lower it to"):
        plan_of(folder)


def test_an_unknown_model_type_is_refused_by_name(folder: Path) -> None:
    rewrite(folder / "config.json", model_type="llama")
    with pytest.raises(UnsupportedModel, match="model_type is 'llama'"):
        plan_of(folder)


@pytest.mark.parametrize(
    ("changes", "values"),
    [
        ({"first_k_dense_replace": 4}, "first_k_dense_replace is 4, num_hidden_layers is 4 and moe_layer_freq is 1"),
        ({"first_k_dense_replace": 99}, "first_k_dense_replace is 99, num_hidden_layers is 4 and moe_layer_freq is 1"),
        ({"moe_layer_freq": 7}, "first_k_dense_replace is 1, num_hidden_layers is 4 and moe_layer_freq is 7"),
    ],
)
def test_a_model_without_a_mixture_layer_is_refused_by_the_fields_that_say_so(
    folder: Path, changes: dict[str, int], values: str
) -> None:
    rewrite(folder / "config.json", **changes)
    with pytest.raises(UnsupportedModel, match=f"{values}: no layer is a mixture .* at least one"):
        plan_of(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_float16_model_is_served_in_the_dtype_that_the_configuration_says(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = write_checkpoint(tmp_path, "v2", dtype=torch.float16)
    assert plan_of(folder, dtype=str(dtype).removeprefix("torch.")).model.dtype is dtype
    with pytest.raises(UnsupportedModel, match=r"float16, .* set `dtype: float32` or `dtype: bfloat16`"):
        plan_of(folder)


def test_a_context_longer_than_the_cache_is_refused(folder: Path) -> None:
    engine = {"max_model_len": 1000, "num_blocks": 2}
    with pytest.raises(
        ConfigError,
        match=r"^attention_workers\.engine: max_model_len is 1000, .*; lower max_model_len or raise cache_gib",
    ):
        plan_of(folder, attention_workers={"engine": engine})


def test_a_context_longer_than_the_models_is_refused_without_talk_of_the_cache(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"the model allows 16384 tokens .*; lower max_model_len$"):
        plan_of(folder, attention_workers={"engine": {"max_model_len": 20_000}})


def test_a_truncated_weight_file_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InvalidCheckpoint, match=r"model\.safetensors"):
        plan_of(folder)


def test_a_missing_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InvalidCheckpoint, match=r"tokenizer\.json"):
        plan_of(folder)


def test_a_tokenizer_of_another_model_is_refused(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    size = 2 + max(tokenizer["model"]["vocab"].values(), default=0)
    tokenizer["model"]["vocab"] |= {f"extra{number}": size + number for number in range(4096)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match="not of one checkpoint"):
        plan_of(folder)


def test_quantised_experts_are_counted_as_they_are_kept_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_checkpoint(tmp_path / "plain", "v2", dtype=torch.bfloat16)
    plain = plan_of(folder)
    (tmp_path / "int4").mkdir()
    convert.plan(Checkpoint.open(folder), 4).write(tmp_path / "int4", lambda _: None)
    monkeypatch.setattr(preflight, "native", lambda: None)
    assert plan_of(tmp_path / "int4").shard_weight_bytes == plain.shard_weight_bytes, "without kernels: multiplied out"
    monkeypatch.setattr(preflight, "native", lambda: "kernels")
    plan = plan_of(tmp_path / "int4")
    per_number = 0.5 + 4 / 32  # bytes: four bits and a share of the group's scale
    assert sum(plan.shard_weight_bytes) == sum(plain.shard_weight_bytes) / 2 * per_number
    assert plan.worker_weight_bytes == plan_of(folder).worker_weight_bytes
    console = Console(file=StringIO(), width=200)
    console.print(plan_view(plan))
    assert "bfloat16, experts int4 (groups of 32)" in console.file.getvalue()  # type: ignore[attr-defined]


def test_what_a_worker_keeps_as_integers_is_counted_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_matrix, "instruction_set", lambda: "portable")  # bfloat16 in 16 bits, as plans count it
    folder = write_checkpoint(tmp_path / "plain", "v2", dtype=torch.bfloat16, q_lora_rank=32)
    (tmp_path / "int8").mkdir()
    convert.plan(Checkpoint.open(folder), 8, selection=convert.ALL_LINEAR).write(tmp_path / "int8", lambda _: None)
    plans = [plan_of(folder), plan_of(tmp_path / "int8")]
    read = [DecoderWeights.read(plan.model.checkpoint, plan.model.config.decoder, torch.bfloat16) for plan in plans]
    saved = plans[0].worker_weight_bytes - plans[1].worker_weight_bytes
    assert saved == pytest.approx(read[0].weight_bytes - read[1].weight_bytes, rel=0.15)  # the kernels pad small ones


def test_what_the_kernels_hold_in_a_second_layout_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(tmp_path, "v2", dtype=torch.bfloat16, tie_word_embeddings=True)
    decoder = plan_of(folder).model.config.decoder
    monkeypatch.setattr(preflight, "native", lambda: None)
    once = plan_of(folder).worker_weight_bytes
    monkeypatch.setattr(preflight, "native", lambda: "kernels")
    keys = decoder.mla.num_attention_heads * decoder.mla.qk_nope_head_dim * decoder.mla.kv_lora_rank
    twice = decoder.num_hidden_layers * keys + decoder.vocab_size * decoder.hidden_size
    assert plan_of(folder).worker_weight_bytes == once + 2 * twice


@pytest.mark.usefixtures("without_kernels")
def test_without_the_kernels_the_plan_says_so(tmp_path: Path) -> None:
    console = Console(file=StringIO(), width=200)
    console.print(plan_view(plan_of(write_checkpoint(tmp_path, "v2"))))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "torch (slower: the CPU kernels are not built" in text
    assert "routing by numpy, slower: the router's library is not built" in text


@pytest.mark.parametrize("module", [kernels, compiled])
def test_the_plan_says_why_a_library_that_is_there_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType
) -> None:
    broken = tmp_path / f"library{EXTENSION_SUFFIXES[0]}"
    broken.write_text("no library")
    monkeypatch.setattr(module, "NATIVE", (tmp_path, *module.NATIVE[1:]))
    module.native.cache_clear()
    try:
        console = Console(file=StringIO(), width=1000)
        console.print(plan_view(plan_of(write_checkpoint(tmp_path / "model", "v2"))))
    finally:
        module.native.cache_clear()
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"there but cannot be loaded ({broken}: file too short); install again" in text


@pytest.mark.parametrize(
    ("sizes", "why"),
    [
        ({}, ""),
        (
            {"hidden_size": 65, "kv_lora_rank": 33},
            "; attention by torch, slower: hidden_size (65) and kv_lora_rank (33) are odd, the kernels take even ones",
        ),
        (
            {"num_attention_heads": 3, "num_key_value_heads": 3, "v_head_dim": 15},
            "; attention by torch, slower: num_attention_heads x v_head_dim (45) is odd, the kernels take even ones",
        ),
    ],
)
def test_the_plan_says_when_sizes_keep_attention_from_the_kernels(
    tmp_path: Path, sizes: dict[str, int], why: str
) -> None:
    if preflight.native() is None:
        pytest.skip("needs the CPU kernels")
    console = Console(file=StringIO(), width=400)
    console.print(plan_view(plan_of(write_checkpoint(tmp_path, "v2", **sizes))))
    line = next(line for line in console.file.getvalue().splitlines() if "kernels" in line)  # type: ignore[attr-defined]
    assert line.rstrip().endswith(f", chosen for this processor{why}")


def test_a_quantised_part_that_is_missing_is_found_before_the_start(tmp_path: Path) -> None:
    folder = write_fp8_checkpoint(tmp_path, "v3")
    assert plan_of(folder).model.expert_format is None
    path = folder / "model.safetensors"
    name = b"model.layers.3.mlp.experts.31.up_proj.weight_scale_inv"
    path.write_bytes(path.read_bytes().replace(name, b"x" * len(name)))
    with pytest.raises(InvalidCheckpoint, match=r"experts\.31\.up_proj\.weight has dtype float8_e4m3fn"):
        plan_of(folder)
