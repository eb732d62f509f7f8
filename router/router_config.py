"""The router's settings, apart from what computes with them: who only reads a configuration needs no torch."""

from typing import Annotated

from pydantic import BaseModel, Field


class RouterConfig(BaseModel, frozen=True, strict=True, extra="forbid"):
    """How long the router waits for shards."""

    forward_timeout_s: Annotated[float, Field(gt=0)] = 120.0  # per layer, retries included; covers a shard's restart
    attempt_timeout_s: Annotated[float, Field(gt=0)] = 20.0  # without an answer for so long, ask again or elsewhere
    shared_memory_mib: Annotated[int, Field(ge=0, le=65536)] = (
        256  # with each shard of this host; used as needed; 0: none
    )
