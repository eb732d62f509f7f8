"""Arguments that no request can carry."""

import pytest
from typer.testing import CliRunner

from cluster.client_access import API_KEY_FILE, TLS_CA
from cluster.commands.cli import app


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("generate x --max-tokens 99999999999", "--max-tokens is 99999999999, must be 1 to 4294967295; the model's"),
        ("generate x --max-tokens 0", "--max-tokens is 0, must be 1 to 4294967295"),
        ("generate x --seed 99999999999999999999999", "is 99999999999999999999999, must be 0 to 18446744073709551615"),
        ("scale shards 5000000000", "count is 5000000000, must be 1 to 4096; `mobula status`"),
        ("scale workers 0", "count is 0, must be 1 to 4096"),
        ("scale shards -1", "count is -1, must be 1 to 4096"),
        ("scale workers -12", "count is -12, must be 1 to 4096"),
        ("drain shard -1", "ep_rank is -1, must be 0 to 4294967295"),
        ("drain worker -1", "dp_rank is -1, must be 0 to 4294967295"),
        ("drain shard 5000000000", "ep_rank is 5000000000, must be 0 to 4294967295; `mobula status`"),
        ("drain worker 5000000000", "dp_rank is 5000000000, must be 0 to 4294967295"),
        ("generate x --wait nan", "--wait is nan, must be 0.0 to 86400.0; 0 fails at once"),
        ("generate x --wait inf", "--wait is inf, must be 0.0 to 86400.0; 0 fails at once"),
        ("generate x --wait=-1", "--wait is -1.0, must be 0.0 to 86400.0; 0 fails at once"),
        (
            "keys add /dev/null/keys.json a --days 1e12",
            "--days is 1000000000000.0, must be 0.0 to 36500.0; leave it out for",
        ),
        ("keys add /dev/null/keys.json a --days 3000000", "--days is 3000000.0, must be 0.0 to 36500.0"),
        ("keys add /dev/null/keys.json a --days nan", "--days is nan, must be 0.0 to 36500.0"),
        (
            "certs make /dev/null/tls --days 1e9",
            "--days is 1000000000.0, must be 0.0 to 36500.0; make them again before",
        ),
        ("restart --timeout-s nan", "--timeout-s is nan, must be 0.0 to 86400.0; large"),
        (
            "status --address http://127.0.0.1:50051",
            "--address is 'http://127.0.0.1:50051', must be host:port; leave out http://",
        ),
        (
            "generate x --address grpc://host:1/",
            "--address is 'grpc://host:1/', must be host:port; leave out grpc:// and what follows host:port",
        ),
        ("experts --address=", "--address is '', must be host:port, for example 127.0.0.1:50051"),
        ("generate a\udcff", "prompt has byte 0xff at character 2, which is not UTF-8; convert"),
    ],
)
def test_an_argument_that_a_request_cannot_carry_is_one_line_with_the_limit(arguments: str, message: str) -> None:
    result = CliRunner().invoke(app, arguments.split())
    assert result.exit_code == 1
    assert len(result.output.splitlines()) == 1
    assert result.output.startswith("error: ")
    assert message in result.output


def test_so_is_a_negative_one() -> None:
    result = CliRunner().invoke(app, ["generate", "x", "--seed", "-1"])
    assert (result.exit_code, result.output.splitlines()[1:]) == (1, [])
    assert "--seed is -1, must be 0 to" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--tls-ca /no/such status", "cannot read /no/such: No such file or directory"),
        ("--api-key-file /no/such status", "cannot read /no/such: No such file or directory"),
        ("serve -c /no/such", "cannot read the configuration /no/such: No such file or directory"),
        ("serve -c /", "cannot read the configuration /: Is a directory"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_once_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, arguments: str, message: str
) -> None:
    for name in (TLS_CA, API_KEY_FILE):
        monkeypatch.setenv(name, "")  # put back after the test: the command writes to its environment
    result = CliRunner().invoke(app, arguments.split())
    assert (result.exit_code, result.output) == (1, f"error: {message}\n")
