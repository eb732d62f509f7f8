from tests.bench.process import parse_pss_bytes, process_kind
from tests.bench.served_system import merge


def test_proportional_set_size_is_read_in_bytes() -> None:
    assert parse_pss_bytes(
        "55d0-7ffc ---p 00000000 00:00 0 [rollup]\nRss:  2048 kB\nPss:  1024 kB\nPss_Dirty: 1 kB\n"
    ) == (1024 * 1024)


def test_processes_are_told_apart_by_their_title() -> None:
    assert process_kind(["ray::ShardRole"]) == "shard"
    assert process_kind(["ray::ControllerActor.status"]) == "controller"
    assert process_kind(["ray::DashboardAgent"]) == "ray"
    assert process_kind(["/usr/bin/python", "-m", "cluster.commands.cli", "serve"]) == "serve"
    assert process_kind(["/usr/bin/llama", "model.gguf"]) == "llama"


def test_settings_are_merged_at_every_depth() -> None:
    config = {"attention_workers": {"count": 1, "engine": {"max_num_seqs": 128}}}
    merge(config, {"attention_workers": {"engine": {"block_size": 16}}})
    assert config == {"attention_workers": {"count": 1, "engine": {"max_num_seqs": 128, "block_size": 16}}}
