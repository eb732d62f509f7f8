"""Checks everything that can be checked before a process is started, and says what will be started.

The same configuration gives the same plan in every process. Reads headers, never weights.
"""

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from attention.engine_config import CacheTooSmall
from attention.latent_cache import LatentCacheConfig
from attention.tokenizer import BadTokenizer, Tokenizer
from cluster import bundled_model
from cluster.byte_count import format_bytes
from cluster.checkpoint.checkpoint import Checkpoint
from cluster.checkpoint.json_fields import UnsupportedModel
from cluster.checkpoint.model_config import DTYPES, ModelConfig
from cluster.checkpoint.quantization import IntQuantization
from cluster.config import BUNDLED_MODEL, ConfigError, DTypeName, MobulaConfig
from cluster.controller.memory_budget import MemoryBudget
from cluster.roles import cgroup
from cluster.roles.torch_device import check_device
from cluster.security.exposure import check_files
from experts.kernels.library import native
from experts.kernels.packed_matrix import GROUP_MULTIPLE, PANEL_OUTPUTS
from experts.quantized_matrix import MatrixFormat
from experts.weight_store import ExpertModel
from protos.rpc import MAX_FRAME_BYTES
from router.expert_map import ExpertMap
from router.placement import PlacementError, PlacementRequest
from router.placement.members import place_on
from router.placement.units import experts_held

TOKENIZER_FILE = "tokenizer.json"
OPTIONAL_TOKENIZER_FILES = ("tokenizer_config.json", "chat_template.jinja", "generation_config.json")
PROCESS_BYTES = 400 * 2**20  # of a process with torch and Ray before it has weights


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """The model as this configuration serves it."""

    model_id: str
    checkpoint: Checkpoint
    config: ModelConfig
    dtype: torch.dtype

    @property
    def expert_model(self) -> ExpertModel:
        """What an expert shard needs to know."""
        decoder = self.config.decoder
        return ExpertModel(
            moe_layer_ids=decoder.moe_layer_ids,
            n_routed_experts=decoder.gate.n_routed_experts,
            hidden_size=decoder.hidden_size,
            moe_intermediate_size=decoder.moe_intermediate_size,
            dtype=self.dtype,
        )

    @property
    def expert_format(self) -> MatrixFormat | None:
        """The form of the routed experts in the checkpoint; None for plain numbers. Reads a header if asked."""
        decoder = self.config.decoder
        if not isinstance(self.config.quantization, IntQuantization):
            return None
        return self.checkpoint.matrix_format(next(iter(decoder.expert_weight_shapes(decoder.moe_layer_ids[0], 0))))

    @property
    def expert_bytes(self) -> int:
        """Of one routed expert as a shard keeps it: integers where there are kernels for them, else multiplied out."""
        shapes = [(rows, columns) for rows, columns in self.config.decoder.expert_weight_shapes(0, 0).values()]
        return sum(self.matrix_bytes(rows, columns, self.expert_format) for rows, columns in shapes)

    def matrix_bytes(self, rows: int, columns: int, stored: MatrixFormat | None) -> int:
        """Of a matrix as it is kept: integers where there are kernels for them, else multiplied out.

        stored: its form in the checkpoint; None for plain numbers.
        """
        if native() is not None:  # packed in whole panels
            rows = -(-rows // PANEL_OUTPUTS) * PANEL_OUTPUTS
        if stored is None or native() is None or (stored.group_size or columns) % GROUP_MULTIPLE:
            return rows * columns * self.dtype.itemsize
        return stored.nbytes(rows, columns)

    def tokenizer_folder(self) -> Path:
        """The folder with the tokenizer's files, fetched if they are on a hub. Raises InvalidCheckpoint."""
        for name in OPTIONAL_TOKENIZER_FILES:
            self.checkpoint.optional_file(name)
        return self.checkpoint.file(TOKENIZER_FILE).parent


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingPlan:
    """What will be started. All sizes in bytes."""

    model: ServedModel
    expert_map: ExpertMap
    placement_request: PlacementRequest  # which `expert_map` satisfies, and later placements must
    worker_weight_bytes: int
    shard_weight_bytes: tuple[int, ...]  # by ep_rank
    cache_bytes: int  # of one worker
    spared_cache_bytes: int  # of what cache_gib allows: no request could use them
    num_workers: int
    max_model_len: int

    @property
    def num_processes(self) -> int:
        """With one gateway and the controller."""
        return self.num_workers + len(self.shard_weight_bytes) + 2

    @property
    def worker_bytes(self) -> int:
        """Of one worker with its libraries, on a machine whose memory it computes in."""
        return self.worker_weight_bytes + self.cache_bytes + PROCESS_BYTES

    @property
    def total_bytes(self) -> int:
        """Of all processes on one machine, each with its own libraries."""
        num_others = self.num_processes - self.num_workers
        return self.num_workers * self.worker_bytes + sum(self.shard_weight_bytes) + num_others * PROCESS_BYTES


def open_model(config: MobulaConfig) -> ServedModel:
    """The checkpoint and what its config.json says. Raises InvalidCheckpoint, UnsupportedModel."""
    is_bundled = config.model == BUNDLED_MODEL
    checkpoint = Checkpoint.open(bundled_model.path() if is_bundled else config.model, config.revision)
    model_config = checkpoint.model_config()
    decoder = model_config.decoder
    if not decoder.moe_layer_ids:
        raise UnsupportedModel(
            f"{checkpoint.location}: first_k_dense_replace is {decoder.first_k_dense_replace}, num_hidden_layers is "
            f"{decoder.num_hidden_layers} and moe_layer_freq is {decoder.moe_layer_freq}: no layer is a mixture of "
            "experts; Mobula serves models with at least one"
        )
    if config.dtype is not DTypeName.AUTO:
        dtype = DTYPES[config.dtype.value]
    else:  # the bundled model is small enough for float32, in which every CPU is fast
        dtype = torch.float32 if is_bundled else model_config.dtype
        if dtype is torch.float16:
            raise UnsupportedModel(
                f"{checkpoint.location}: dtype of config.json is float16, in which sums overflow; set `dtype: float32` "
                "or `dtype: bfloat16` in the configuration"
            )
    return ServedModel(model_id=config.model, checkpoint=checkpoint, config=model_config, dtype=dtype)


def cache_config(config: MobulaConfig, model: ServedModel) -> LatentCacheConfig:
    """The latent cache of one worker. Raises CacheTooSmall."""
    decoder, engine = model.config.decoder, config.attention_workers.engine
    shape = {
        "num_layers": decoder.num_hidden_layers,
        "block_size": engine.block_size,
        "kv_lora_rank": decoder.mla.kv_lora_rank,
        "qk_rope_head_dim": decoder.mla.qk_rope_head_dim,
    }
    device = config.attention_workers.device
    one_block = LatentCacheConfig(num_blocks=1, dtype=model.dtype, device=device, **shape)
    num_blocks = engine.num_cache_blocks(one_block.bytes_per_block, decoder.max_position_embeddings)
    return LatentCacheConfig(num_blocks=num_blocks, dtype=model.dtype, device=device, **shape)


def check(config: MobulaConfig) -> ServingPlan:
    """The plan. Raises ConfigError, InvalidCheckpoint, UnsupportedModel or PlacementError, naming what is wrong."""
    if config.ray.address is None:
        _refuse_labels(config)
        check_files(config)
        check_device(config.attention_workers.device, "attention_workers.device")
    if config.expert_shards.device != "cpu":
        raise ConfigError(
            f"expert_shards.device is {config.expert_shards.device!r}: experts are computed on the CPU alone in this "
            "version; set it to cpu"
        )
    model = open_model(config)
    decoder = model.config.decoder
    expert_bytes = model.expert_bytes
    shards = config.expert_shards
    request = PlacementRequest(
        moe_layer_ids=decoder.moe_layer_ids,
        gate=decoder.gate,
        ep_size=shards.count,
        units_per_layer=shards.units_per_layer,
        num_replicas=shards.num_replicas,
        redundancy=shards.redundancy,
        expert_bytes=expert_bytes,
    )
    traits = {ep_rank: shards.traits(ep_rank) for ep_rank in range(shards.count)}
    try:
        expert_map = place_on(request, traits, placement_version=1, policy=shards.placement_policy.value)
    except PlacementError as error:
        raise type(error)(f"expert_shards: {error}") from error
    try:
        cache = cache_config(config, model)
        max_model_len = config.attention_workers.engine.resolved_max_model_len(
            cache.num_blocks, decoder.max_position_embeddings
        )
        tokenizer = Tokenizer.read(model.tokenizer_folder(), decoder.vocab_size)
    except CacheTooSmall as error:
        raise ConfigError(f"attention_workers.engine: {error}") from error
    except BadTokenizer as error:
        raise ConfigError(str(error)) from error
    if tokenizer.vocab_size > decoder.vocab_size:
        raise ConfigError(
            f"{model.checkpoint.location}: the tokenizer has {tokenizer.vocab_size} tokens, the model "
            f"{decoder.vocab_size}: they are not of one checkpoint"
        )
    if model.checkpoint.is_local:
        _check_tensors(model)
    plan = ServingPlan(
        model=model,
        expert_map=expert_map,
        placement_request=request,
        worker_weight_bytes=_worker_weight_bytes(config, model),
        shard_weight_bytes=tuple((experts_held(expert_map, shards.count) * expert_bytes).tolist()),
        cache_bytes=cache.num_blocks * cache.bytes_per_block,
        spared_cache_bytes=_spared_cache_bytes(config, cache),
        num_workers=config.attention_workers.count,
        max_model_len=max_model_len,
    )
    _check_frames(config, plan)
    if _shares_one_memory(config):
        _check_memory(plan)
    return plan


def memory_budget(config: MobulaConfig, plan: ServingPlan) -> MemoryBudget | None:
    """What the memory here takes as it is now, before anything is started; None where others decide."""
    if not _shares_one_memory(config):
        return None
    num_shards = len(plan.shard_weight_bytes)
    for_both = plan.num_workers * plan.worker_bytes + num_shards * PROCESS_BYTES
    free = _free_memory() - (plan.total_bytes - for_both)  # the experts', controller's and gateway's
    return MemoryBudget(max(free, for_both), plan.worker_bytes, PROCESS_BYTES)


def _shares_one_memory(config: MobulaConfig) -> bool:
    return config.ray.address is None and config.attention_workers.device == "cpu"


def _refuse_labels(config: MobulaConfig) -> None:
    """Nodes carry the labels that they were started with: the one of a cluster that `mobula serve` starts has none."""
    parts = ("attention_workers", "expert_shards", "controller", "gateway")
    wanted = {name: getattr(config, name).labels for name in parts}
    wanted |= {f"expert_shards.groups.{i}": group.labels for i, group in enumerate(config.expert_shards.groups)}
    for key, labels in wanted.items():
        if labels:
            raise ConfigError(
                f"{key}.labels is {labels}: no node of a Ray cluster that starts with the command carries labels; "
                "leave them out, or set ray.address to a cluster whose nodes have them"
            )


def _spared_cache_bytes(config: MobulaConfig, cache: LatentCacheConfig) -> int:
    engine = config.attention_workers.engine
    affordable = int(engine.cache_gib * 2**30) // cache.bytes_per_block
    return (affordable - cache.num_blocks) * cache.bytes_per_block if engine.num_blocks is None else 0


def _check_tensors(model: ServedModel) -> None:
    decoder = model.config.decoder
    model.checkpoint.check_role(decoder.weight_shapes())
    for layer_id in decoder.moe_layer_ids:
        for expert_id in range(decoder.gate.n_routed_experts):
            model.checkpoint.check_role(decoder.expert_weight_shapes(layer_id, expert_id))


def _worker_weight_bytes(config: MobulaConfig, model: ServedModel) -> int:
    """What a worker keeps: the tensors it reads, and what the CPU kernels hold in a second layout."""
    decoder, mla = model.config.decoder, model.config.decoder.mla
    shapes, num_bytes = [], 0
    for name, shape in decoder.weight_shapes().items():
        stored = model.checkpoint.matrix_format(name) if model.checkpoint.is_local else None
        if stored is None:
            shapes.append(shape)
        else:
            rows, columns = shape
            num_bytes += model.matrix_bytes(rows, columns, stored)
    if config.attention_workers.device == "cpu" and native() is not None:
        # W_UK both absorbs queries and expands latents (attention/kernel_mla.py); a tied table is also the lm_head.
        shapes += [(mla.num_attention_heads, mla.qk_nope_head_dim, mla.kv_lora_rank)] * decoder.num_hidden_layers
        shapes += [(decoder.vocab_size, decoder.hidden_size)] * decoder.tie_word_embeddings
    return num_bytes + sum(_num_bytes(shape, model.dtype) for shape in shapes)


def _check_frames(config: MobulaConfig, plan: ServingPlan) -> None:
    """A step's rows must fit one message, there and back: at worst a shard holds every unit a token needs."""
    gate, tokens = plan.model.config.decoder.gate, config.attention_workers.engine.max_num_batched_tokens
    sums_per_row = min(plan.expert_map.num_units, gate.num_experts_per_tok, gate.max_groups_per_token)
    row_bytes = plan.model.config.decoder.hidden_size * plan.model.dtype.itemsize
    largest = tokens * (max(1, sums_per_row) * row_bytes + gate.num_experts_per_tok * 16) + 1024
    if largest > MAX_FRAME_BYTES:
        raise ConfigError(
            f"attention_workers.engine.max_num_batched_tokens is {tokens}: a message to a shard may need {largest} "
            f"bytes, limit is {MAX_FRAME_BYTES}; lower it to {tokens * MAX_FRAME_BYTES // largest}"
        )


def _free_memory() -> int:
    """Bytes that processes may still take on this machine, and in its container."""
    available, left = psutil.virtual_memory().available, cgroup.memory_left()
    return available if left is None else min(available, left)


def _check_memory(plan: ServingPlan) -> None:
    free = _free_memory()
    if plan.total_bytes > free:
        in_container = free < psutil.virtual_memory().available
        parts = {
            "weights of the workers": plan.num_workers * plan.worker_weight_bytes,
            "their latent caches": plan.num_workers * plan.cache_bytes,
            "weights of the shards": sum(plan.shard_weight_bytes),
            f"libraries of {plan.num_processes} processes": plan.num_processes * PROCESS_BYTES,
        }
        raise ConfigError(
            f"the system needs about {format_bytes(plan.total_bytes)} on this machine: "
            f"{' + '.join(f'{format_bytes(num_bytes)} {what}' for what, num_bytes in parts.items())}; "
            f"{format_bytes(free)} are free{' in its container' * in_container}; use fewer workers, "
            "a smaller attention_workers.engine.cache_gib, bfloat16, or more machines"
        )


def _num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return dtype.itemsize * torch.Size(shape).numel()
