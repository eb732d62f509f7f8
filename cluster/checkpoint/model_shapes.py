"""The shape of a model whose traffic is to be drawn or recorded: a published one, or that of a config.json."""

from pathlib import Path

from cluster.checkpoint.json_fields import UnsupportedModel
from cluster.checkpoint.model_config import ModelConfig
from cluster.checkpoint.safetensors_file import InvalidCheckpoint
from router.trace.model_shape import ModelShape
from router.trace.trace import TraceError


def model_shape(name: str, config: ModelConfig, itemsize: int) -> ModelShape:
    """itemsize: bytes a number, of rows and weights as they are served. Raises TraceError."""
    decoder = config.decoder
    try:
        return ModelShape(
            name=name,
            moe_layer_ids=decoder.moe_layer_ids,
            gate=decoder.gate,
            hidden_size=decoder.hidden_size,
            moe_intermediate_size=decoder.moe_intermediate_size,
            itemsize=itemsize,
        )
    except ValueError as error:
        raise TraceError(str(error)) from error


def read_model_shape(path: Path) -> ModelShape:
    """path: a config.json, or the folder that holds one. Raises TraceError."""
    file = path / "config.json" if path.is_dir() else path
    try:
        config = ModelConfig.read(file)
    except (InvalidCheckpoint, UnsupportedModel) as error:
        raise TraceError(str(error)) from error
    name = file.parent.name if file.name == "config.json" else file.stem
    return model_shape(name, config, config.dtype.itemsize)
