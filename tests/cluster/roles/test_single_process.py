"""Worker and shards in one process."""

from pathlib import Path
from typing import Any

import pytest

from cluster.config import parse_config
from cluster.roles.single_process import SequenceTooLong, SingleProcess
from tests.checkpoints import write_checkpoint

ENGINE = "attention_workers.engine"


@pytest.mark.parametrize(
    ("model", "engine", "limit"),
    [
        ({"max_position_embeddings": 32}, {}, "32, the model's max_position_embeddings; shorten it"),
        ({"max_position_embeddings": 32}, {"max_model_len": 32}, "32, the model's max_position_embeddings; shorten it"),
        ({}, {"max_model_len": 32}, f"32, {ENGINE}.max_model_len; shorten it or raise that"),
        ({}, {"block_size": 16, "num_blocks": 2}, f"32, what {ENGINE}.num_blocks holds; shorten it or raise that"),
        ({}, {"block_size": 16, "cache_gib": 1.3e-5}, f"16, what {ENGINE}.cache_gib holds; shorten it or raise that"),
    ],
)
def test_a_text_that_is_too_long_is_refused_by_the_limit_that_binds(
    tmp_path: Path, model: dict[str, Any], engine: dict[str, Any], limit: str
) -> None:
    settings = {"engine": engine | {"max_num_seqs": 1}, "num_threads": 1}
    config = parse_config({"model": str(write_checkpoint(tmp_path, "v2_lite", **model)), "attention_workers": settings})
    with SingleProcess(config) as process, pytest.raises(SequenceTooLong, match=f"has 33 tokens, limit is {limit}$"):
        process.logits([5] * 33)
