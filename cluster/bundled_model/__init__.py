"""The small DeepSeek-V2 checkpoint that comes with the package, and the scripts that trained it.

Importing this package loads neither torch nor the weights; `path()` only says where the checkpoint lies.
"""

from pathlib import Path


def path() -> Path:
    """The folder that holds config.json, model.safetensors and the tokenizer files."""
    return Path(__file__).parent
