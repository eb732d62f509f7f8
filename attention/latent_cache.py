"""The paged latent cache: a row kv_c | k_pe for each token of each layer, in blocks.

Says where numbers lie and in which format; who owns which block is the block manager's business.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ROW_MULTIPLE = 32  # numbers; 576 is one, so the published models lose nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentCacheConfig:
    """The cache's shape and format."""

    num_layers: int
    num_blocks: int
    block_size: int  # tokens
    kv_lora_rank: int
    qk_rope_head_dim: int
    dtype: torch.dtype
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_blocks", "block_size", "kv_lora_rank", "qk_rope_head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"latent cache: {name} is {getattr(self, name)}, must be 1 or more")

    @property
    def latent_dim(self) -> int:
        """Numbers in a row: 576 for the published models."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def row_width(self) -> int:
        """Numbers from one row to the next: rows are padded with zeros to whole vectors of the kernels."""
        return -(-self.latent_dim // ROW_MULTIPLE) * ROW_MULTIPLE

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block over all layers."""
        return self.num_layers * self.block_size * self.row_width * self.dtype.itemsize


class LatentCache:
    """One owner: the engine thread writes and reads it."""

    def __init__(self, config: LatentCacheConfig) -> None:
        self.config = config
        self.tensor = _zeros(
            (config.num_layers, config.num_blocks, config.block_size, config.row_width), config.dtype, config.device
        )

    def write(self, layer_id: int, slot_mapping: Tensor, kv_c: Tensor, k_pe: Tensor) -> None:
        """Writes one latent row a slot, in place.

        slot_mapping: [num_tokens] int64; kv_c: [num_tokens, kv_lora_rank], normed; k_pe: [num_tokens,
        qk_rope_head_dim], rotated.
        """
        rows = torch.cat((kv_c, k_pe), dim=-1).to(self.config.dtype)  # [num_tokens, latent_dim]
        self.tensor[layer_id].view(-1, self.config.row_width)[:, : self.config.latent_dim].index_copy_(
            0, slot_mapping, rows
        )

    def gather(self, layer_id: int, block_ids: Tensor) -> Tensor:
        """The latents of whole blocks, in the order of the ids.

        block_ids: [..., num_blocks] int. Returns a copy [..., num_blocks * block_size, latent_dim].
        """
        blocks = self.tensor[layer_id].index_select(0, block_ids.reshape(-1))
        return blocks.view(*block_ids.shape[:-1], -1, self.config.row_width)[..., : self.config.latent_dim]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """On the CPU the system's zero pages, which take no memory until they are written; torch.zeros writes them all."""
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)
