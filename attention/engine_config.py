"""The engine's settings, apart from the engine: who only reads a configuration needs no torch."""

import math
from typing import Annotated, Self

from pydantic import BaseModel, Field, model_validator

Gib = Annotated[float, Field(gt=0, le=1024 * 1024)]  # of any memory that is configured: no machine has more


class CacheTooSmall(ValueError):
    """The latent cache cannot hold what the configuration promises."""


class EngineConfig(BaseModel, frozen=True, strict=True, extra="forbid", allow_inf_nan=False):
    """Limits of one attention worker."""

    max_num_seqs: Annotated[int, Field(ge=1, le=4096)] = 64  # sequences in a step; more raise throughput and latency
    max_num_batched_tokens: Annotated[int, Field(ge=1, le=65536)] = 1024  # tokens in a step; longer prompts are cut
    max_model_len: Annotated[int, Field(ge=2)] | None = (
        None  # prompt and output, tokens; unset: what model and cache can
    )
    block_size: Annotated[int, Field(ge=1, le=1024)] = 64  # tokens; smaller wastes less, larger is read faster
    num_blocks: Annotated[int, Field(ge=1)] | None = None  # blocks of the latent cache; unset: as cache_gib allows
    cache_gib: Gib = 2.0  # GiB of latent cache; less is taken if less is enough
    max_num_waiting: Annotated[int, Field(ge=1)] = 1024  # requests no step has seen yet; more get RESOURCE_EXHAUSTED

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}, must be at least max_num_seqs "
                f"({self.max_num_seqs}), so that every sequence can advance in each step"
            )
        return self

    def num_cache_blocks(self, bytes_per_block: int, max_position_embeddings: int) -> int:
        """Blocks of the latent cache: `num_blocks`, or what `cache_gib` holds but never more than can be used.

        Raises CacheTooSmall when not even one block fits.
        """
        if self.num_blocks is not None:
            return self.num_blocks
        affordable = int(self.cache_gib * 2**30) // bytes_per_block
        if affordable < 1:
            needed_gib = math.ceil(bytes_per_block / 2**30 * 1e6) / 1e6  # rounded up, so that it is enough
            raise CacheTooSmall(
                f"cache_gib is {self.cache_gib}, one block of {self.block_size} tokens needs {needed_gib:.6f} "
                f"({bytes_per_block} bytes); raise cache_gib or lower block_size"
            )
        longest = min(self.max_model_len or max_position_embeddings, max_position_embeddings)
        return min(affordable, self.max_num_seqs * -(-longest // self.block_size))

    def resolved_max_model_len(self, num_blocks: int, max_position_embeddings: int) -> int:
        """Tokens that a request may have: as configured, else as many as both the model and the cache can hold.

        Raises CacheTooSmall when the configured length fits neither.
        """
        capacity = num_blocks * self.block_size
        limit = min(capacity, max_position_embeddings)
        if self.max_model_len is not None and self.max_model_len > limit:
            way_out = " or raise cache_gib" if self.max_model_len <= max_position_embeddings else ""
            raise CacheTooSmall(
                f"max_model_len is {self.max_model_len}, the model allows {max_position_embeddings} tokens and the "
                f"cache holds {capacity}; lower max_model_len{way_out}"
            )
        return self.max_model_len or limit
