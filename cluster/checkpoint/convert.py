"""Quantises the routed experts of a checkpoint, or all its linear layers, into a new folder, one matrix at a time.

1. `plan` checks the source and decides, from headers alone, every tensor of the result.
2. `Conversion.write` fills a folder: matrices quantised, all else as it is, and the files that belong to the weights.

Memory is bounded by a few tensors. Where the folder lies is in destination.py. Knows nothing of the terminal.
"""

import json
import math
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Collection, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cluster.checkpoint.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint
from cluster.checkpoint.json_fields import read_json_object
from cluster.checkpoint.quantization import (
    NOT_EXPERTS,
    NOT_LINEAR,
    IntLayout,
    IntQuantization,
    packed_quantization_config,
)
from cluster.checkpoint.quantized_tensors import pack, parts_of
from cluster.checkpoint.safetensors_writer import SafetensorsWriter, TensorHeader, split_into_files
from experts.quantized_matrix import CannotQuantize, MatrixFormat, QuantizedMatrix

GROUP_SIZES = (128, 64, 32, 16)  # the first that divides the inputs of all that is quantised is taken
MAX_FILE_BYTES = 4 * 10**9
MAX_THREADS = 16  # each holds a tensor; more would write no faster
FILES_BESIDE = (  # whatever of these the source has is copied
    *(
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
    ),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "LICENSE"),
    *("configuration_deepseek.py", "modeling_deepseek.py", "tokenization_deepseek_fast.py"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which matrices are quantised: those whose published name matches; `ignored` says the same the other way round."""

    names: re.Pattern[str]
    ignored: tuple[str, ...]


EXPERTS = Selection(
    names=re.compile(r"model\.layers\.\d+\.mlp\.experts\.\d+\.(gate|up|down)_proj\.weight"), ignored=NOT_EXPERTS
)
ALL_LINEAR = Selection(  # all but the gate, which chooses, and kv_b_proj, see NOT_LINEAR
    names=re.compile(
        r"(lm_head|model\.layers\.\d+\.(self_attn\.(q_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|o_proj)"
        r"|mlp\.((experts\.\d+|shared_experts)\.)?(gate|up|down)_proj))\.weight"
    ),
    ignored=NOT_LINEAR,
)


class CannotConvert(Exception):
    """The source or the destination does not allow what was asked; the message says what would."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """A checkpoint and what will become of it."""

    source: Checkpoint
    selection: Selection
    matrix_format: MatrixFormat
    groups: Mapping[str, Mapping[str, TensorHeader]]  # by the source's tensor: those that are written for it

    @property
    def num_bytes(self) -> int:
        """Of all tensors of the result."""
        return sum(header.num_bytes for tensors in self.groups.values() for header in tensors.values())

    def write(self, folder: Path, on_written: Callable[[int], None], num_threads: int | None = None) -> None:
        """Fills an empty folder. on_written is told the bytes of each tensor.

        num_threads: tensors that are in memory at a time are few more; unset: as many as there are cores, at most 16.

        Raises InvalidCheckpoint, CannotConvert or OSError; what is in the folder is then of no use.
        """
        files = split_into_files(self.groups, MAX_FILE_BYTES)
        file_names = [
            SINGLE_FILE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
            for number in range(1, len(files) + 1)
        ]
        file_of = {name: index for index, tensors in enumerate(files) for name in tensors}
        with ExitStack() as stack:
            writers = [
                stack.enter_context(SafetensorsWriter(folder / file_name, tensors))
                for file_name, tensors in zip(file_names, files, strict=True)
            ]
            parts = self._parts(num_threads or min(MAX_THREADS, os.cpu_count() or 1))
            for written in stack.enter_context(closing(parts)):
                for name, tensor in written.items():
                    writers[file_of[name]].write(name, tensor)
                on_written(sum(tensor.nbytes for tensor in written.values()))
        if len(files) > 1:
            weight_map = {name: file_names[index] for name, index in sorted(file_of.items())}
            _write_json(folder / INDEX_FILE, {"metadata": {"total_size": self.num_bytes}, "weight_map": weight_map})
        self._write_files_beside(folder)

    def _parts(self, num_threads: int) -> Generator[dict[str, Tensor], None, None]:
        """What is written for each tensor of the source, in order. A thread each: torch's own would share out every
        small operation and wait for one another more than they compute.
        """
        pool = ThreadPoolExecutor(num_threads, "convert", torch.set_num_threads, (1,))
        coming: deque[Future[dict[str, Tensor]]] = deque()
        try:
            for name, tensors in self.groups.items():
                coming.append(pool.submit(self._read if name in tensors else self._quantize, name))
                if len(coming) > num_threads:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _read(self, name: str) -> dict[str, Tensor]:
        return {name: self.source.read(name)}

    def _quantize(self, name: str) -> dict[str, Tensor]:
        group_size = self.matrix_format.group_size
        assert group_size is not None, "plan chooses one"
        try:
            matrix = QuantizedMatrix.quantize(self.source.read(name), self.matrix_format.num_bits, group_size)
        except CannotQuantize as error:
            raise CannotConvert(f"{self.source.location}: tensor {name}: {error}") from error
        return {name + suffix: tensor for suffix, tensor in pack(matrix).items()}

    def _write_files_beside(self, folder: Path) -> None:
        config = read_json_object(self.source.file("config.json"))
        config["quantization_config"] = packed_quantization_config(self.matrix_format, self.selection.ignored)
        _write_json(folder / "config.json", config)
        for file_name in FILES_BESIDE:
            path = self.source.optional_file(file_name)
            if path is not None:
                shutil.copyfile(path, folder / file_name)


def plan(
    source: Checkpoint, num_bits: int, group_size: int | None = None, selection: Selection = EXPERTS
) -> Conversion:
    """group_size: columns that share a scale; None for the largest usual one that fits.

    Of a checkpoint on the hub this fetches the files that hold weights. Raises CannotConvert, InvalidCheckpoint or
    UnsupportedModel.
    """
    model = source.model_config()
    if model.quantization is not None:
        raise CannotConvert(f"{source.location} is quantised already; convert the checkpoint it was made from")
    decoder = model.decoder
    source.check_role(decoder.weight_shapes())
    for layer_id in decoder.moe_layer_ids:
        for expert_id in range(decoder.gate.n_routed_experts):
            source.check_role(decoder.expert_weight_shapes(layer_id, expert_id))
    matching = (name for name in source.names if selection.names.fullmatch(name))
    chosen = {name for name in matching if 0 not in source.shape(name)}  # no shared experts may be empty ones
    matrix_format = MatrixFormat(num_bits=num_bits, group_size=_group_size(source, chosen, group_size))
    quantization = IntQuantization(matrix_format=matrix_format, layout=IntLayout.PACKED)
    groups = {}
    for name in source.names:
        shape = source.shape(name)
        if name not in chosen:
            groups[name] = {name: TensorHeader(dtype=source.dtype(name), shape=shape)}
            continue
        try:
            parts = parts_of(shape, quantization)
        except ValueError as error:
            raise CannotConvert(f"{source.location}: tensor {name}: {error}") from error
        groups[name] = {
            name + suffix: TensorHeader(dtype=part.dtypes[0], shape=part.shape) for suffix, part in parts.items()
        }
    return Conversion(source=source, selection=selection, matrix_format=matrix_format, groups=groups)


def _group_size(source: Checkpoint, chosen: Collection[str], asked: int | None) -> int:
    """A size that divides the columns of every chosen matrix."""
    widths = sorted({source.shape(name)[-1] for name in chosen if len(source.shape(name)) == 2})
    for group_size in GROUP_SIZES if asked is None else (asked,):
        if group_size > 0 and all(width % group_size == 0 for width in widths):
            return group_size
    tried = f"one of {list(GROUP_SIZES)}" if asked is None else f"which is {asked}"
    raise CannotConvert(
        f"the matrices to quantise have {' and '.join(map(str, widths))} columns, which must be multiples of the group "
        f"size, {tried}; give --group-size {math.gcd(*widths)} or a divisor of it"
    )


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
