"""A published checkpoint: config.json and safetensors files, in a local folder or on the Hugging Face hub.

Gives tensors by their published names, one at a time; quantised ones under the name they had before. A role (attention
worker, expert shard) first has its tensors checked from the headers alone, then reads them; of a checkpoint on the hub
only the files that hold them are fetched. Knows no model, but for finding its config.
"""

from collections.abc import Mapping, Set
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import torch
from torch import Tensor

from attention.decoder_weights import DecoderConfig
from cluster.checkpoint.hub import HubFiles
from cluster.checkpoint.json_fields import JsonFields, naming, read_json_object
from cluster.checkpoint.model_config import ModelConfig
from cluster.checkpoint.quantization import Fp8Quantization, IntLayout, IntQuantization, Quantization, read_quantization
from cluster.checkpoint.quantized_tensors import (
    FP8_SCALE,
    PACKED,
    SCALE,
    SHAPE,
    PartHeader,
    dequantize_blocks,
    numbers_per_word,
    parts_of,
    unpack,
)
from cluster.checkpoint.safetensors_file import InvalidCheckpoint, SafetensorsFile, TensorEntry
from experts.quantized_matrix import MatrixFormat, QuantizedMatrix

__all__ = ["Checkpoint", "InvalidCheckpoint"]

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
LM_HEAD = "lm_head.weight"
SUFFIX, PICKLE_SUFFIXES = ".safetensors", (".bin", ".pt", ".pth", ".ckpt", ".pkl")
HUB_BLOBS = "blobs"  # REPOSITORY/snapshots/COMMIT/FILE links to REPOSITORY/blobs/HASH in the hub's cache
WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class CheckpointFiles(Protocol):
    """Where a checkpoint's files come from."""

    location: str

    def fetch(self, file_name: str) -> Path: ...

    def fetch_optional(self, file_name: str) -> Path | None: ...

    def has(self, file_name: str) -> bool: ...


class LocalFiles:
    """A folder on this machine."""

    def __init__(self, folder: Path) -> None:
        self.location = str(folder)
        self._folder = folder

    def fetch(self, file_name: str) -> Path:
        """Raises InvalidCheckpoint if the folder lacks the file."""
        path = self.fetch_optional(file_name)
        if path is None:
            raise InvalidCheckpoint(f"{self._folder}: has no file {file_name}{self._other_weights(file_name)}")
        return path

    def fetch_optional(self, file_name: str) -> Path | None:
        """Raises InvalidCheckpoint for a link out of the folder, but for those of the hub's cache."""
        path = self._folder / file_name
        if not path.is_file():
            return None
        folder, found = self._folder.resolve(), path.resolve()
        if not any(found.is_relative_to(home) for home in (folder, folder.parent.parent / HUB_BLOBS)):
            raise InvalidCheckpoint(
                f"{path}: is a link to {found}, outside the checkpoint; link the whole folder, or copy the file"
            )
        return path

    def has(self, file_name: str) -> bool:
        return (self._folder / file_name).is_file()

    def _other_weights(self, file_name: str) -> str:
        """What to say of weights in a format that can run code when it is read."""
        if not file_name.endswith(SUFFIX):
            return ""
        pickles = sorted(path.name for path in self._folder.glob("*") if path.suffix in PICKLE_SUFFIXES)
        return f", only {pickles[0]}: a pickle, which is a program; convert it to safetensors" if pickles else ""


class Checkpoint:
    """Implements the WeightReader of attention workers and expert shards. Headers are read once and kept."""

    def __init__(self, files: CheckpointFiles) -> None:
        """Reads the index if there is one that counts. Raises InvalidCheckpoint."""
        self._files = files
        self._opened: dict[str, SafetensorsFile] = {}
        self._quantization: Quantization | None = None
        self._has_read_quantization = False
        index_path = files.fetch_optional(INDEX_FILE)
        if index_path is not None and files.has(SINGLE_FILE):
            index_path = None  # left behind by an earlier save in shards; transformers takes the single file too
        self._file_names = None if index_path is None else _file_names(index_path)  # by tensor

    @classmethod
    def open(cls, location: str | Path, revision: str | None = None) -> "Checkpoint":
        """location: a folder, or the id of a repository on the hub. Raises InvalidCheckpoint."""
        folder = Path(location).expanduser()
        if folder.is_dir():
            return cls(LocalFiles(folder))
        if folder.is_absolute() or len(folder.parts) != 2 or str(location).startswith((".", "~")):
            raise InvalidCheckpoint(
                f"{location}: no such folder, and not a hub id such as deepseek-ai/DeepSeek-V2-Lite"
            )
        return cls(HubFiles(str(location), revision))

    @property
    def location(self) -> str:
        return self._files.location

    @property
    def is_local(self) -> bool:
        """Whether reading a header fetches nothing."""
        return isinstance(self._files, LocalFiles)

    @property
    def names(self) -> Set[str]:
        """All tensors, those of layers that are not used (multi-token prediction) included."""
        if self._file_names is not None:
            return self._file_names.keys()
        return self._open_file(SINGLE_FILE).entries.keys()

    def model_config(self) -> ModelConfig:
        """config.json, with the lm_head that is stored.

        Fetches the weights of a single file on the hub where config.json says tied or without shared experts. Raises
        InvalidCheckpoint or UnsupportedModel.
        """
        config = ModelConfig.read(self.file("config.json"))
        self._refuse_unread_shared_experts(config.decoder)
        # transformers writes no lm_head that is the embedding: one that is stored is meant, whatever config.json says.
        if config.decoder.tie_word_embeddings and self.has(LM_HEAD):
            return config.with_own_lm_head()
        return config

    def file(self, file_name: str) -> Path:
        """A file beside the weights, such as tokenizer.json. Raises InvalidCheckpoint if there is none."""
        return self._files.fetch(file_name)

    def optional_file(self, file_name: str) -> Path | None:
        return self._files.fetch_optional(file_name)

    def has(self, name: str) -> bool:
        """Whether this tensor is stored, plain or quantised. Of a single file on the hub this fetches it."""
        return name in self.names or name + PACKED in self.names

    def shape(self, name: str) -> tuple[int, ...]:
        """From the header; of a quantised matrix the shape it stands for. Raises InvalidCheckpoint if there is none."""
        quantization = self._quantization_of(name)
        if isinstance(quantization, IntQuantization) and quantization.layout is IntLayout.PACKED:
            *other_sizes, num_words = self._entry(name + PACKED).shape or (0,)
            return *other_sizes, num_words * numbers_per_word(quantization.matrix_format)
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """What `read` will give, from the header. Raises InvalidCheckpoint if there is no such tensor."""
        quantization = self._quantization_of(name)
        if quantization is None:
            return self._entry(name).dtype
        return torch.bfloat16 if isinstance(quantization, Fp8Quantization) else torch.float32

    def read(self, name: str) -> Tensor:
        """The tensor in the checkpoint's dtype, in memory of its own; a quantised matrix is multiplied out.

        Raises InvalidCheckpoint.
        """
        matrix = self.read_matrix(name)
        return matrix.dequantize() if isinstance(matrix, QuantizedMatrix) else matrix

    def read_matrix(self, name: str) -> Tensor | QuantizedMatrix:
        """The same, but what is stored as integers stays integers. Raises InvalidCheckpoint."""
        quantization = self._quantization_of(name)
        if quantization is None:
            return self._read(name)
        headers = self._check_parts(name, self.shape(name), quantization)
        parts = {suffix: self._read(name + suffix) for suffix in headers}
        if isinstance(quantization, Fp8Quantization):
            return dequantize_blocks(parts[""], parts[FP8_SCALE])
        if SHAPE in parts and tuple(parts[SHAPE].tolist()) != self.shape(name):
            raise InvalidCheckpoint(
                f"{self._file_of(name + SHAPE).path}: tensor {name}{SHAPE} says {parts[SHAPE].tolist()}, "
                f"{name}{PACKED} holds {list(self.shape(name))}"
            )
        return unpack(parts, quantization.matrix_format)

    def matrix_format(self, name: str) -> MatrixFormat | None:
        """The form in which read_matrix gives a matrix of integers, from headers; None for plain numbers."""
        quantization = self._quantization_of(name)
        return quantization.matrix_format if isinstance(quantization, IntQuantization) else None

    def check_role(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Checks from headers alone that every tensor a role reads is there, with this shape and a dtype we can use.

        Fetches the files that hold them. Raises InvalidCheckpoint for the first that is not.
        """
        quantizations = {name: self._quantization_of(name) for name in shapes}
        if self._file_names is not None:  # what is missing altogether is known before any file is fetched
            for name in shapes:
                if quantizations[name] is None:
                    self._file_name_of(name)
        for name, shape in shapes.items():
            quantization = quantizations[name]
            if quantization is None:
                self._check_header(name, PartHeader(shape=shape, dtypes=WEIGHT_DTYPES))
            else:
                self._check_parts(name, shape, quantization)

    def _refuse_unread_shared_experts(self, decoder: DecoderConfig) -> None:
        if decoder.n_shared_experts:
            return
        for layer_id in decoder.moe_layer_ids:
            name = f"model.layers.{layer_id}.mlp.shared_experts.gate_proj.weight"
            if self.has(name) and 0 not in self.shape(name):  # transformers writes none as empty ones
                raise InvalidCheckpoint(
                    f"{self.location}: holds {name}, though n_shared_experts of config.json says that there are none; "
                    "set it to how many are fused"
                )

    def _check_parts(self, name: str, shape: tuple[int, ...], quantization: Quantization) -> Mapping[str, PartHeader]:
        """The headers of a quantised matrix's tensors, by what follows its name."""
        try:
            parts = parts_of(shape, quantization)
        except ValueError as error:
            raise InvalidCheckpoint(f"{self.location}: tensor {name} cannot be quantised: {error}") from error
        for suffix, expected in parts.items():
            self._check_header(name + suffix, expected)
        return parts

    def _check_header(self, name: str, expected: PartHeader) -> None:
        entry, path = self._entry(name), self._file_of(name).path
        if entry.shape != expected.shape:
            raise InvalidCheckpoint(
                f"{path}: tensor {name} has shape {list(entry.shape)}, config.json implies {list(expected.shape)}"
            )
        if entry.dtype not in expected.dtypes:
            raise InvalidCheckpoint(
                f"{path}: tensor {name} has dtype {_dtype_name(entry.dtype)}, expected one of "
                f"{[_dtype_name(dtype) for dtype in expected.dtypes]}"
            )

    def _quantization_of(self, name: str) -> Quantization | None:
        """How this matrix is quantised: the names beside its own say whether, config.json says how."""
        names = self.names
        found = next((suffix for suffix in (PACKED, FP8_SCALE, SCALE) if name + suffix in names), None)
        if found is None:
            return None
        if not self._has_read_quantization:
            if (path := self.optional_file("config.json")) is not None:
                fields = JsonFields(read_json_object(path))
                with naming(path):
                    self._quantization = read_quantization(fields)
            self._has_read_quantization = True
        quantization = self._quantization
        expected = FP8_SCALE if isinstance(quantization, Fp8Quantization) else SCALE
        if isinstance(quantization, IntQuantization) and quantization.layout is IntLayout.PACKED:
            expected = PACKED
        if quantization is None or found != expected:
            raise InvalidCheckpoint(
                f"{self.location}: holds a tensor {name}{found}, which contradicts quantization_config of config.json"
            )
        return quantization

    def _read(self, name: str) -> Tensor:
        return self._file_of(name).read(name)

    def _entry(self, name: str) -> TensorEntry:
        return self._file_of(name).entries[name]

    def _file_of(self, name: str) -> SafetensorsFile:
        file = self._open_file(self._file_name_of(name))
        if name not in file.entries:
            raise InvalidCheckpoint(f"{file.path}: holds no tensor {name}, though it should")
        return file

    def _file_name_of(self, name: str) -> str:
        if self._file_names is None:
            return SINGLE_FILE
        if name not in self._file_names:
            raise InvalidCheckpoint(f"{self.location}: {INDEX_FILE} names no tensor {name}")
        return self._file_names[name]

    def _open_file(self, file_name: str) -> SafetensorsFile:
        if file_name not in self._opened:
            self._opened[file_name] = SafetensorsFile(self._files.fetch(file_name))
        return self._opened[file_name]


def _file_names(index_path: Path) -> dict[str, str]:
    """The index's weight_map. A name that leaves the folder is refused."""
    weight_map: Any = read_json_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise InvalidCheckpoint(f"{index_path}: has no weight_map object")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or PurePosixPath(file_name).name != file_name or file_name in ("", ".."):
            raise InvalidCheckpoint(f"{index_path}: tensor {name} lies in {file_name!r}, expected a plain file name")
        if not file_name.endswith(SUFFIX):
            raise InvalidCheckpoint(f"{index_path}: tensor {name} lies in {file_name!r}, only {SUFFIX} files are read")
    return weight_map


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
