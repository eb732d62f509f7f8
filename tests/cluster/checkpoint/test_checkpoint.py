import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.checkpoint.checkpoint import Checkpoint, InvalidCheckpoint
from tests.checkpoints import write_checkpoint

LOAD = """
import sys
import torch
from attention.decoder import DecoderWeights
from cluster.checkpoint.checkpoint import Checkpoint

def resident_bytes(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

torch.set_num_threads(1)
checkpoint = Checkpoint.open(sys.argv[1])
config = checkpoint.model_config()
checkpoint.check_role(config.decoder.weight_shapes())
(torch.ones(64, 64) @ torch.ones(64, 64)).bfloat16()
baseline = resident_bytes("VmRSS:")
weights = DecoderWeights.read(checkpoint, config.decoder, config.dtype)
print(baseline, resident_bytes("VmHWM:"))
"""


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_is_read_as_the_safetensors_library_reads_it(
    tmp_path: Path, num_shards: int, dtype: torch.dtype
) -> None:
    folder = write_checkpoint(tmp_path, "v3", dtype=dtype, num_shards=num_shards)
    checkpoint = Checkpoint.open(folder)
    expected = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert set(checkpoint.names) == set(expected)
    for name, tensor in expected.items():
        found = checkpoint.read(name)
        assert checkpoint.shape(name) == tuple(tensor.shape) == tuple(found.shape)
        assert checkpoint.dtype(name) is tensor.dtype is found.dtype
        assert torch.equal(found, tensor)


def test_scalars_and_empty_tensors_are_read(tmp_path: Path) -> None:
    tensors = {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "ids": torch.tensor([1, 2])}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.read(name), tensor)


def test_a_role_is_checked_and_layers_that_are_not_used_do_not_matter(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, "v3"))
    decoder = checkpoint.model_config().decoder
    checkpoint.check_role(decoder.weight_shapes())
    checkpoint.check_role(decoder.expert_weight_shapes(3, 31))
    assert any(name.startswith("model.layers.4.") for name in checkpoint.names)
    assert not any(name.startswith("model.layers.4.") for name in decoder.weight_shapes())


def test_a_wrong_shape_names_file_tensor_expected_and_found(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, "v2"))
    with pytest.raises(
        InvalidCheckpoint,
        match=r"model\.safetensors: tensor lm_head\.weight has shape \[320, 64\], config\.json implies \[320, 65\]",
    ):
        checkpoint.check_role({"lm_head.weight": (320, 65)})


def test_a_wrong_dtype_names_file_tensor_expected_and_found(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2, 3, dtype=torch.float64)}, tmp_path / "model.safetensors")
    with pytest.raises(InvalidCheckpoint, match=r"tensor w has dtype float64, expected one of .*bfloat16"):
        Checkpoint.open(tmp_path).check_role({"w": (2, 3)})


@pytest.mark.parametrize("num_shards", [1, 2])
def test_a_missing_tensor_is_named(tmp_path: Path, num_shards: int) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, "v2", num_shards=num_shards))
    with pytest.raises(InvalidCheckpoint, match=r"model\.layers\.9\.x\.weight"):
        checkpoint.check_role({"model.layers.9.x.weight": (1,)})
    with pytest.raises(InvalidCheckpoint, match=r"model\.layers\.9\.x\.weight"):
        checkpoint.read("model.layers.9.x.weight")


def test_a_tensor_that_the_index_promises_and_the_file_lacks_is_named_with_the_file(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "v2", num_shards=2)
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    index["weight_map"]["lm_head.weight"] = "model-00001-of-00002.safetensors"
    index_path.write_text(json.dumps(index))
    with pytest.raises(InvalidCheckpoint, match=r"model-00001-of-00002\.safetensors: holds no tensor lm_head\.weight"):
        Checkpoint.open(folder).shape("lm_head.weight")


def test_a_file_that_the_index_names_and_the_folder_lacks_is_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "v2", num_shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InvalidCheckpoint, match=r"has no file model-00002-of-00002\.safetensors"):
        Checkpoint.open(folder).check_role({"lm_head.weight": (320, 64)})


@pytest.mark.parametrize("keeps_shards", [False, True])
def test_a_single_file_is_the_model_whatever_an_index_beside_it_says(tmp_path: Path, keeps_shards: bool) -> None:
    folder = write_checkpoint(tmp_path, "v2", num_shards=3, seed=1)  # saved in shards once, in one file since
    if not keeps_shards:
        for path in folder.glob("model-*.safetensors"):
            path.unlink()
    write_checkpoint(folder, "v2", seed=2)
    assert (folder / "model.safetensors.index.json").exists()
    checkpoint, expected = Checkpoint.open(folder), load_file(folder / "model.safetensors")
    assert set(checkpoint.names) == set(expected)
    checkpoint.check_role(checkpoint.model_config().decoder.weight_shapes())
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("file_name", ["../model.safetensors", "/etc/passwd", "a/b", "..", "", 3, None])
def test_an_index_that_points_outside_the_folder_is_refused(tmp_path: Path, file_name: object) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": file_name}}))
    with pytest.raises(InvalidCheckpoint, match="tensor w lies in"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("kept", [0, 5, 100, 20_000, -1])
def test_a_truncated_file_is_refused_before_anything_is_read(tmp_path: Path, kept: int) -> None:
    folder = write_checkpoint(tmp_path, "v2")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InvalidCheckpoint, match=r"model\.safetensors: .*(truncated|not JSON)"):
        Checkpoint.open(folder).check_role({"lm_head.weight": (320, 64)})


def test_a_file_that_shrinks_after_its_header_was_read_is_an_error_and_not_zeros(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1000)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.shape("w") == (1000,)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-4])
    with pytest.raises(InvalidCheckpoint, match="tensor w ends after 3996 of 4000 bytes"):
        checkpoint.read("w")


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"w": 3},
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [4, -4]}},
        {"w": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
        {"w": {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}},
        {"w": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}},
        {"w": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}},
        {"w": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}},
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 16]}},
        {"w": {"shape": [2], "data_offsets": [0, 8]}},
        {"w": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}},
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: object) -> None:
    encoded = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(encoded).to_bytes(8, "little") + encoded + bytes(64))
    with pytest.raises(InvalidCheckpoint, match=r"model\.safetensors: (tensor w|header)"):
        Checkpoint.open(tmp_path).shape("w")


@pytest.mark.parametrize("location", ["/no/such/folder", "./nothing", "nothing", "a/b/c", "~/nothing-here"])
def test_a_folder_that_is_not_there_is_refused_without_asking_the_hub(location: str) -> None:
    with pytest.raises(InvalidCheckpoint, match="no such folder, and not a hub id"):
        Checkpoint.open(location)


def test_an_empty_folder_has_no_model(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(InvalidCheckpoint, match=r"has no file config\.json"):
        checkpoint.model_config()
    with pytest.raises(InvalidCheckpoint, match=r"has no file model\.safetensors"):
        checkpoint.shape("w")


def test_loading_needs_hardly_more_memory_than_what_is_kept(tmp_path: Path) -> None:
    sizes = {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 6, "num_shards": 2}
    folder = write_checkpoint(tmp_path, "v2_lite", dtype=torch.bfloat16, moe_intermediate_size=1536, **sizes)
    checkpoint = Checkpoint.open(folder)
    shapes = checkpoint.model_config().decoder.weight_shapes()
    kept = sum(2 * torch.Size(shape).numel() for shape in shapes.values())
    assert kept > 60e6
    answer = subprocess.run([sys.executable, "-c", LOAD, str(folder)], capture_output=True, text=True, check=True)
    baseline, peak = map(int, answer.stdout.split())
    assert peak - baseline < 1.15 * kept + 8e6
