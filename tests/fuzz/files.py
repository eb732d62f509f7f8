"""Files that users give: configurations, checkpoints, traces. Each is refused with an error of ours, or read."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import strategies as st

from attention.request import GenerationDefaults
from attention.tokenizer import BadTokenizer, Tokenizer
from cluster.checkpoint.checkpoint import INDEX_FILE, Checkpoint
from cluster.checkpoint.json_fields import UnsupportedModel
from cluster.checkpoint.model_config import ModelConfig
from cluster.checkpoint.safetensors_file import InvalidCheckpoint, SafetensorsFile
from cluster.config import ConfigError, read_config
from cluster.security.keys import KeyFileError, read_keys
from tests.checkpoints import SHAPES
from tests.fuzz.hostile import almost, spoiled
from tests.fuzz.target import Target

QUANTIZED = SHAPES["v2"] | {
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
            }
        },
    }
}
INDEX = {"metadata": {"total_size": 8}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]},
}
CONFIG = """\
model: bundled
attention_workers: {count: 2, engine: {max_num_seqs: 64}, router: {shared_memory_mib: 256}}
expert_shards:
  count: 4
  rebalancing: {enabled: true, min_gain: 0.05}
gateway: {host: 127.0.0.1, port: 0}
"""
TOKENIZER = {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}, "added_tokens": []}


KEYS = {
    "keys": [
        {"id": "team-a", "secret_sha256": "0" * 64, "rights": ["generate"], "expires": "2027-01-01T00:00:00Z"},
        {"id": "team-b", "secret_sha256": "f" * 64, "rights": ["admin"], "max_concurrent_requests": 4},
    ]
}


def targets() -> list[Target]:
    """One for each kind of file."""
    return [
        Target(name="config.json", share=8, cases=_config_json(), open=lambda: _plain(_take_model_config)),
        Target(name="index", share=4, cases=_json_bytes(INDEX), open=lambda: _in_folder(INDEX_FILE, _take_checkpoint)),
        Target(
            name="safetensors",
            share=8,
            cases=_safetensors(),
            open=lambda: _in_folder("model.safetensors", _take_tensors),
        ),
        Target(name="yaml", share=2, cases=_yaml(), open=lambda: _in_folder("mobula.yaml", _take_config)),
        Target(
            name="tokenizer",
            share=2,
            cases=_json_bytes(TOKENIZER),
            open=lambda: _in_folder("tokenizer.json", _take_tokenizer),
        ),
        Target(name="keys", share=2, cases=_json_bytes(KEYS), open=lambda: _in_folder("keys.json", _take_keys)),
        Target(
            name="generation_config",
            share=2,
            cases=_json_bytes({"temperature": 0.6, "top_p": 0.9, "do_sample": True}),
            open=lambda: _in_folder("generation_config.json", _take_defaults),
        ),
    ]


def _config_json() -> st.SearchStrategy[Any]:
    return st.one_of(*(spoiled(sample) for sample in (*SHAPES.values(), QUANTIZED)))


def _json_bytes(sample: Any) -> st.SearchStrategy[bytes]:
    text = json.dumps(sample).encode()
    return st.one_of(
        almost(text), spoiled(sample).map(lambda value: json.dumps(value).encode()), st.binary(max_size=64)
    )


def _safetensors() -> st.SearchStrategy[bytes]:
    def file(header: bytes, length: int | None) -> bytes:
        return (len(header) if length is None else length).to_bytes(8, "little") + header + bytes(24)

    headers = _json_bytes(HEADER)
    lengths = st.one_of(st.none(), st.integers(0, 2**64 - 1), st.sampled_from((0, 1, 2**27, 2**63)))
    return st.one_of(st.builds(file, headers, lengths), almost(file(json.dumps(HEADER).encode(), None)))


def _yaml() -> st.SearchStrategy[bytes]:
    anchors = b"a: &a [1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b]\n"
    return st.one_of(almost(CONFIG.encode()), almost(anchors), st.binary(max_size=64))


def _take_model_config(case: Any) -> None:
    with suppress(InvalidCheckpoint, UnsupportedModel):
        ModelConfig.from_json(case)


def _take_checkpoint(path: Path) -> None:
    with suppress(InvalidCheckpoint):
        checkpoint = Checkpoint.open(path.parent)
        for name in list(checkpoint.names)[:4]:
            checkpoint.read(name)


def _take_tensors(path: Path) -> None:
    with suppress(InvalidCheckpoint):
        file = SafetensorsFile(path)
        for name in list(file.entries)[:4]:
            file.read(name)


def _take_config(path: Path) -> None:
    with suppress(ConfigError):
        read_config(path)


def _take_tokenizer(path: Path) -> None:
    with suppress(BadTokenizer):
        Tokenizer.read(path.parent)


def _take_keys(path: Path) -> None:
    with suppress(KeyFileError):
        read_keys(path)


def _take_defaults(path: Path) -> None:
    with suppress(BadTokenizer):
        GenerationDefaults.read(path.parent)


@contextmanager
def _plain(take: Callable[[Any], None]) -> Iterator[Callable[[Any], None]]:
    yield take


@contextmanager
def _in_folder(file_name: str, take: Callable[[Path], None]) -> Iterator[Callable[[bytes], None]]:
    """A folder with this file alone."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / file_name

        def write_and_take(case: bytes) -> None:
            path.write_bytes(case)
            take(path)

        yield write_and_take
