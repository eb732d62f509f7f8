"""The configuration: defaults, and what is refused with which words."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from cluster.config import ConfigError, DTypeName, MobulaConfig, parse_config, read_config
from cluster.yaml_file import MAX_FILE_BYTES
from router.router_config import CapacityPolicy


def test_a_number_that_yaml_takes_for_text_is_told_with_the_form_that_it_needs(tmp_path: Path) -> None:
    path = tmp_path / "text.yaml"
    path.write_text("drain_timeout_s: 1e3\ngateway: {port: '50051'}\nmodel: 3\n")
    with pytest.raises(ConfigError) as error:
        read_config(path)
    way_out = "which is text: a number has no quotes, and as YAML has it 1e3 is 1.0e+3"
    _, *faults = sorted(str(error.value).splitlines())
    assert faults[0] == f"drain_timeout_s: input should be a valid number, got '1e3', {way_out}"
    assert faults[1] == f"gateway.port: input should be a valid integer, got '50051', {way_out}"
    assert faults[2] == "model: input should be a valid string, got 3"
    path.write_text("drain_timeout_s: 1.0e+3")
    assert read_config(path).drain_timeout_s == 1000.0


def test_an_empty_file_is_the_bundled_model_with_two_workers_and_four_shards(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing\n")
    config = read_config(path)
    assert config.model == "bundled"
    assert (config.attention_workers.count, config.expert_shards.count) == (2, 4)
    assert config.ray.address is None
    assert config.attention_workers.router.capacity_policy is CapacityPolicy.DROPLESS


def test_values_reach_the_part_that_reads_them() -> None:
    config = parse_config({"dtype": "bfloat16", "attention_workers": {"engine": {"max_num_seqs": 7}}})
    assert config.dtype is DTypeName.BFLOAT16
    assert config.attention_workers.engine.max_num_seqs == 7


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"modle": "x"}, "modle: unknown key"),
        ({"attention_workers": {"engine": {"max_seqs": 1}}}, "attention_workers.engine.max_seqs: unknown key"),
        ({"attention_workers": {"count": "2"}}, "attention_workers.count: input should be a valid integer, got '2'"),
        ({"attention_workers": {"count": True}}, "attention_workers.count: input should be a valid integer, got True"),
        ({"expert_shards": {"count": 0}}, "expert_shards.count: input should be greater than or equal to 1, got 0"),
        (
            {"expert_shards": {"count": 2, "num_replicas": 3}},
            "expert_shards: num_replicas is 3, count is 2: a shard holds a unit once; raise count or lower",
        ),
        ({"gateway": {"port": 70000}}, "gateway.port: input should be less than or equal to 65535, got 70000"),
        ({"attention_workers": [1]}, "attention_workers: must be a mapping of keys to values, got [1]"),
        ({"dtype": "float16"}, "dtype: input should be 'auto', 'float32' or 'bfloat16', got 'float16'"),
        ({"drain_timeout_s": float("nan")}, "drain_timeout_s: input should be a finite number, got nan"),
        ({"drain_timeout_s": 1e300}, "drain_timeout_s: input should be less than or equal to 31622400, got 1e+300"),
        (
            {"expert_shards": {"rebalancing": {"half_life_s": float("inf")}}},
            "expert_shards.rebalancing.half_life_s: input should be a finite number, got inf",
        ),
        (
            {"attention_workers": {"engine": {"cache_gib": float("inf")}}},
            "attention_workers.engine.cache_gib: input should be a finite number, got inf",
        ),
        (
            {"attention_workers": {"engine": {"cache_gib": 1e300}}},
            "attention_workers.engine.cache_gib: input should be less than or equal to 1048576, got 1e+300",
        ),
        ({"attention_workers": {"router": {"forward_timeout_s": -1.0}}}, "attention_workers.router.forward_timeout_s"),
        ({"attention_workers": {"strategy": "NEAR"}}, "attention_workers.strategy"),
        (
            {"attention_workers": {"router": {"capacity_policy": "drop"}}},
            "router.capacity_policy: input should be 'dropless', 'switch', 'gshard' or 'device_drop', got 'drop'",
        ),
        ({"attention_workers": {"router": {"capacity_factor": 0.0}}}, "attention_workers.router.capacity_factor"),
        (
            {"expert_shards": {"count": 2, "port": 50061}},
            "expert_shards has fixed ports {'expert_shards.port': 50061}, but 2 processes may share a node",
        ),
        ({"expert_shards": {"groups": 2}}, "expert_shards.groups: must be a list, got 2"),
        ({"expert_shards": {"groups": {"count": 2}}}, "expert_shards.groups: must be a list, got {'count': 2}"),
        ({"expert_shards": {"groups": [{"count": "2"}]}}, "expert_shards.groups.0.count: input should be a valid int"),
        ({"expert_shards": {"groups": [{"sped": 2.0}]}}, "expert_shards.groups.0.sped: unknown key"),
        ({"expert_shards": {"groups": [3]}}, "expert_shards.groups.0: must be a mapping of keys to values, got 3"),
        ({"ray": {"address": "foo"}}, "ray.address: must be auto, HOST:PORT or ray://HOST:PORT, got 'foo'; leave it"),
        ({"ray": {"address": ""}}, "ray.address: must be auto, HOST:PORT or ray://HOST:PORT, got ''"),
        ({"ray": {"address": "http://head:6379"}}, "ray.address: must be auto, HOST:PORT or"),
        ({"ray": {"address": "head:99999"}}, "ray.address: must be auto, HOST:PORT or"),
        ({"ray": {"address": "head:99999"}}, "a PORT of 1 to 65535"),
        ({"ray": {"address": 6379}}, "ray.address: input should be a valid string, got 6379"),
        ([1, 2], "the document"),
        ("bundled", "the document"),
    ],
)
def test_what_is_wrong_is_named_with_its_path_and_value(data: object, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(data)
    assert message in str(error.value)


@pytest.mark.parametrize("address", ["auto", "10.0.0.1:6379", "head.example:6379", "[::1]:6379", "ray://head:10001"])
def test_an_address_of_ray_is_taken_as_it_is(address: str) -> None:
    assert parse_config({"ray": {"address": address}}).ray.address == address


def test_a_local_ray_is_the_one_that_is_started_without_an_address() -> None:
    assert parse_config({"ray": {"address": "local"}}).ray.address is None


def every_field(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Of a configuration and its parts: each form that a value may have, as JSON Schema says it."""
    schema = model.model_json_schema()

    def forms(path: str, part: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        part = schema["$defs"][part["$ref"].rpartition("/")[2]] if "$ref" in part else part
        yield path, part
        for name, inner in part.get("properties", {}).items():
            yield from forms(f"{path}.{name}", inner)
        for inner in (*part.get("anyOf", ()), *([part["items"]] if "items" in part else [])):
            yield from forms(path, inner)

    return forms(path, schema)


def test_every_number_with_a_fraction_has_an_upper_limit() -> None:
    numbers = {path: form for path, form in every_field(MobulaConfig) if form.get("type") == "number"}
    assert ".expert_shards.groups.speed" in numbers
    assert [path for path, form in numbers.items() if "maximum" not in form and "exclusiveMaximum" not in form] == []


def test_every_fault_is_reported_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        parse_config({"modle": "x", "expert_shards": {"count": -1}})
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize("content", [b"model: [", b"\xff\xfe", b"a: b: c", b"model: a\nmodel: b"])
def test_a_file_that_is_not_yaml_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        read_config(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.yaml"):
        read_config(tmp_path / "missing.yaml")


def test_a_fixed_port_is_for_processes_that_have_nodes_of_their_own() -> None:
    shards = {"count": 2, "port": 50061, "metrics_port": 9401}
    assert parse_config({"expert_shards": shards | {"strategy": "STRICT_SPREAD"}}).expert_shards.port == 50061
    assert parse_config({"expert_shards": shards | {"count": 1}}).expert_shards.metrics_port == 9401


ALONE = {"count": 1, "port": 50061}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"gateway": {"port": 9400}}, "gateway.port and gateway.metrics_port are both 9400; set another port for one"),
        ({"gateway": {"health_port": 50051}}, "gateway.port and gateway.health_port are both 50051"),
        ({"gateway": {"port": 9400}, "ray": {"address": "auto"}}, "gateway.port and gateway.metrics_port are both"),
        (
            {"gateway": {"count": 2, "metrics_port": 50050}},
            "gateway.port and gateway.metrics_port of gateway-1 are both 50051",
        ),
        ({"controller": {"port": 7000, "metrics_port": 7000}}, "controller.port and controller.metrics_port are both"),
        ({"controller": {"port": 50051}}, "gateway.port and controller.port are both 50051"),
        ({"attention_workers": ALONE, "expert_shards": ALONE}, "attention_workers.port and expert_shards.port are bo"),
        (
            {"expert_shards": {"count": 2, "strategy": "STRICT_SPREAD", "port": 7000, "health_port": 7000}},
            "expert_shards.port and expert_shards.health_port are both 7000",
        ),
    ],
)
def test_two_servers_of_one_machine_cannot_have_one_port(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(data)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    "data",
    [
        {"gateway": {"port": 0, "metrics_port": 0}},
        {"attention_workers": ALONE, "expert_shards": ALONE, "ray": {"address": "auto"}},
        {"gateway": {"host": "10.0.0.1"}, "controller": {"port": 50051}},
        {"gateway": {"count": 2, "metrics_port": 50050}, "ray": {"address": "auto"}},
    ],
)
def test_servers_that_may_be_on_different_machines_or_addresses_may_have_one_port(data: dict[str, Any]) -> None:
    parse_config(data)


HOSTILE_YAML = {
    "a bomb of aliases": (
        "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(f"b{n}: &b{n} [{', '.join(['*a'] * 9)}]\n" for n in range(9)),
        "aliases are not supported",
    ),
    "nested for ever": ("[" * 20_000, "cannot read the configuration"),
    "an object": ("model: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
    "no UTF-8": ("model: \udcff", "cannot read the configuration"),
    "too long": ("# " + "x" * MAX_FILE_BYTES, f"more than {MAX_FILE_BYTES} bytes"),
    "a list as a key": ("[a, b]: 1", "unhashable"),
    "a key twice": ("model: a\nmodel: b", "keys stand twice: ['model']"),
    "many keys": ("".join(f"k{n}: 1\n" for n in range(4_000)), "and 3950 more"),
    "a long value": ("gateway: " + "x" * 500_000, "gateway"),
}


@pytest.mark.parametrize("case", HOSTILE_YAML)
def test_a_hostile_file_is_refused_at_once(tmp_path: Path, case: str) -> None:
    text, words = HOSTILE_YAML[case]
    path = tmp_path / "hostile.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    started_s = time.monotonic()
    with pytest.raises(ConfigError) as raised:
        read_config(path)
    assert words in str(raised.value)
    assert len(str(raised.value)) < 5000
    assert time.monotonic() - started_s < 10.0
