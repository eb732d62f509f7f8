"""Converting a checkpoint, and reading what came out of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cluster.checkpoint import convert
from cluster.checkpoint.checkpoint import Checkpoint, InvalidCheckpoint
from cluster.checkpoint.convert import ALL_LINEAR, CannotConvert, plan
from cluster.checkpoint.quantization import NOT_EXPERTS, NOT_LINEAR, packed_quantization_config
from experts.quantized_matrix import MatrixFormat, QuantizedMatrix
from tests.checkpoints import write_checkpoint
from tests.quantized_checkpoints import write_fp8_checkpoint

MATRIX = "model.layers.1.mlp.experts.3.down_proj.weight"


def converted(source: Path, folder: Path, num_bits: int = 4, group_size: int | None = None) -> Checkpoint:
    conversion = plan(Checkpoint.open(source), num_bits, group_size)
    written: list[int] = []
    folder.mkdir()
    conversion.write(folder, written.append)
    assert sum(written) == conversion.num_bytes
    return Checkpoint.open(folder)


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize(("shape", "num_shards"), [("v2", 1), ("v3", 3)])
def test_experts_are_quantised_and_everything_else_is_as_it_was(
    tmp_path: Path, num_bits: int, shape: str, num_shards: int
) -> None:
    source = write_checkpoint(tmp_path / "source", shape, dtype=torch.bfloat16, num_shards=num_shards)
    reference, candidate = Checkpoint.open(source), converted(source, tmp_path / "made", num_bits)
    num_quantised = 0
    for name in reference.names:
        if ".mlp.experts." not in name:
            assert torch.equal(candidate.read(name), reference.read(name))
            assert candidate.dtype(name) is torch.bfloat16 or "bias" in name
            continue
        num_quantised += 1
        expected = QuantizedMatrix.quantize(reference.read(name), num_bits, 32)
        found = candidate.read_matrix(name)
        assert isinstance(found, QuantizedMatrix)
        assert torch.equal(found.values, expected.values)
        assert torch.equal(found.scales, expected.scales)
        assert torch.equal(candidate.read(name), expected.dequantize())
        assert candidate.shape(name) == reference.shape(name)
        assert candidate.matrix_format(name) == MatrixFormat(num_bits=num_bits, group_size=32)
    assert num_quantised == 3 * 3 * reference.model_config().decoder.gate.n_routed_experts + (
        96 if shape == "v3" else 0  # multi-token prediction has experts of its own
    )
    decoder = candidate.model_config().decoder
    candidate.check_role(decoder.weight_shapes())
    candidate.check_role(decoder.expert_weight_shapes(1, 3))


@pytest.mark.parametrize("shape", ["v2", "v2_lite"])
def test_all_linear_layers_but_gate_and_latent_expansion_may_be_quantised(tmp_path: Path, shape: str) -> None:
    lora = {"q_lora_rank": 32} if shape == "v2" else {}
    source = write_checkpoint(tmp_path / "source", shape, dtype=torch.bfloat16, **lora)
    conversion = plan(Checkpoint.open(source), 4, selection=ALL_LINEAR)
    (tmp_path / "made").mkdir()
    conversion.write(tmp_path / "made", lambda _: None)
    made = Checkpoint.open(tmp_path / "made")
    kept = {name for name in Checkpoint.open(source).names if made.matrix_format(name) is None}
    assert {name.split(".")[-2] for name in kept if len(made.shape(name)) == 2} == {"embed_tokens", "gate", "kv_b_proj"}
    assert made.matrix_format("lm_head.weight") == conversion.matrix_format
    made.check_role(made.model_config().decoder.weight_shapes())
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == list(NOT_LINEAR)


def test_the_safetensors_library_reads_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "MAX_FILE_BYTES", 100_000)
    source = write_checkpoint(tmp_path / "source", "v2")
    candidate = converted(source, tmp_path / "made")
    paths = sorted((tmp_path / "made").glob("*.safetensors"))
    assert len(paths) > 3
    index = json.loads((tmp_path / "made" / "model.safetensors.index.json").read_text())
    held = {name: path.name for path in paths for name in load_file(path)}
    assert held == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.nbytes for path in paths for t in load_file(path).values())
    assert isinstance(candidate.read_matrix(MATRIX), QuantizedMatrix)


def test_tokenizer_and_configuration_come_along(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", "v2")
    converted(source, tmp_path / "made")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "made" / name).read_bytes() == (source / name).read_bytes()
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert config.pop("quantization_config") == packed_quantization_config(
        MatrixFormat(num_bits=4, group_size=32), NOT_EXPERTS
    )
    assert config == json.loads((source / "config.json").read_text())


def test_the_largest_usual_group_that_divides_both_sizes_is_taken(tmp_path: Path) -> None:
    source = Checkpoint.open(write_checkpoint(tmp_path, "v2", moe_intermediate_size=48))
    assert plan(source, 4).matrix_format.group_size == 16
    assert plan(source, 4, 8).matrix_format.group_size == 8
    with pytest.raises(
        CannotConvert,
        match=r"48 and 64 columns, which must be multiples .* is 32; give --group-size 16 or a divisor of it",
    ):
        plan(source, 4, 32)
    odd = Checkpoint.open(write_checkpoint(tmp_path / "odd", "v2", moe_intermediate_size=40))
    with pytest.raises(CannotConvert, match=r"one of \[128, 64, 32, 16\]; give --group-size 8 or a divisor of it"):
        plan(odd, 4)


def test_a_checkpoint_that_is_quantised_already_is_refused(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", "v2")
    again = converted(source, tmp_path / "made")
    for checkpoint in (again, Checkpoint.open(write_fp8_checkpoint(tmp_path / "fp8"))):
        with pytest.raises(CannotConvert, match="is quantised already"):
            plan(checkpoint, 8)


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", "v2", dtype=torch.bfloat16)
    conversion = plan(Checkpoint.open(source), 4)
    path = source / "model.safetensors"
    entry = Checkpoint.open(source)._entry(MATRIX)
    data = bytearray(path.read_bytes())
    data[entry.start : entry.start + 2] = b"\xc0\x7f"  # a NaN in bfloat16
    path.write_bytes(data)
    (tmp_path / "made").mkdir()
    with pytest.raises(CannotConvert, match=r"experts\.3\.down_proj\.weight: some of its numbers are NaN"):
        conversion.write(tmp_path / "made", lambda _: None)


@pytest.mark.parametrize("suffix", ["_packed", "_scale", "_shape"])
def test_a_part_of_a_quantised_matrix_that_is_missing_is_named(tmp_path: Path, suffix: str) -> None:
    source = write_checkpoint(tmp_path / "source", "v2")
    converted(source, tmp_path / "made")
    path = tmp_path / "made" / "model.safetensors"
    path.write_bytes(
        path.read_bytes().replace(f'"{MATRIX}{suffix}"'.encode(), f'"{"x" * len(MATRIX + suffix)}"'.encode())
    )
    broken = Checkpoint.open(tmp_path / "made")
    with pytest.raises(InvalidCheckpoint, match=r"experts\.3\.down_proj\.weight"):
        broken.check_role(broken.model_config().decoder.expert_weight_shapes(1, 3))


def test_quantised_tensors_that_the_configuration_does_not_mention_are_refused(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", "v2")
    converted(source, tmp_path / "made")
    (tmp_path / "made" / "config.json").write_bytes((source / "config.json").read_bytes())
    broken = Checkpoint.open(tmp_path / "made")
    with pytest.raises(InvalidCheckpoint, match="_packed, which contradicts quantization_config"):
        broken.check_role(broken.model_config().decoder.expert_weight_shapes(1, 3))


def test_another_group_size_than_the_configuration_says_is_a_wrong_shape(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", "v2")
    converted(source, tmp_path / "made")
    path = tmp_path / "made" / "config.json"
    path.write_text(path.read_text().replace('"group_size": 32', '"group_size": 16'))
    broken = Checkpoint.open(tmp_path / "made")
    with pytest.raises(InvalidCheckpoint, match=r"weight_scale has shape \[32, 2\], config.json implies \[32, 4\]"):
        broken.check_role(broken.model_config().decoder.expert_weight_shapes(1, 3))
    with pytest.raises(InvalidCheckpoint, match=r"weight_scale has shape"):
        broken.read_matrix("model.layers.1.mlp.experts.3.gate_proj.weight")


CONVERT = """
import sys
from pathlib import Path
import torch
from cluster.checkpoint.checkpoint import Checkpoint
from cluster.checkpoint.convert import plan
from experts.quantized_matrix import QuantizedMatrix

def resident_bytes(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

torch.set_num_threads(1)
QuantizedMatrix.quantize(torch.ones(64, 64), 4, 32)
conversion = plan(Checkpoint.open(sys.argv[1]), 4)
baseline = resident_bytes("VmRSS:")
conversion.write(Path(sys.argv[2]), lambda num_bytes: None, num_threads=2)
print(resident_bytes("VmHWM:") - baseline)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_bounded_by_the_largest_tensor_and_not_by_the_checkpoint(tmp_path: Path) -> None:
    sizes = {"vocab_size": 2048, "hidden_size": 512, "moe_intermediate_size": 512, "num_hidden_layers": 4}
    source = write_checkpoint(tmp_path / "source", "v2_lite", dtype=torch.bfloat16, **sizes)
    assert (source / "model.safetensors").stat().st_size > 80e6
    (tmp_path / "made").mkdir()
    command = [sys.executable, "-c", CONVERT, str(source), str(tmp_path / "made")]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(answer.stdout) < 30e6
