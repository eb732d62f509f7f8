"""The `mobula` command. The commands that start the system are in serve.py and demo.py, imported only by them: a client
should not wait for torch and Ray.
"""

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import grpc
import typer

from cluster import client_access
from cluster.client import DEFAULT_ADDRESS, InferenceClient
from cluster.commands import (
    admin_command,
    certs_command,
    chaos_command,
    checkpoint_command,
    generate_command,
    keys_command,
    leave_command,
    restart_command,
    scale_command,
    trace_command,
)
from cluster.commands.arguments import Address
from cluster.commands.own_group import continue_in_own_group
from cluster.commands.terminal import console, fail, fail_call
from cluster.commands.views import experts_view
from cluster.version import VERSION

if TYPE_CHECKING:
    from cluster.config import MobulaConfig

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(chaos_command.app, name="chaos")
app.add_typer(checkpoint_command.app, name="checkpoint")
app.add_typer(certs_command.app, name="certs")
app.add_typer(keys_command.app, name="keys")
app.add_typer(trace_command.app, name="trace")
app.add_typer(scale_command.scale_app, name="scale")
app.add_typer(scale_command.drain_app, name="drain")
ConfigFile = Annotated[
    Path | None, typer.Option("--config", "-c", help="YAML file; unset: the bundled model on this machine.")
]
Model = Annotated[str | None, typer.Option(help="Folder or Hugging Face id; overrides the configuration.")]

AuthorityFile = Annotated[
    Path | None, typer.Option(envvar=client_access.TLS_CA, help="PEM of the authorities that may vouch for a gateway.")
]
CertificateFile = Annotated[Path | None, typer.Option(envvar=client_access.TLS_CERT, help="PEM, shown to a gateway.")]
KeyFile = Annotated[Path | None, typer.Option(envvar=client_access.TLS_KEY, help="PEM, the certificate's key.")]
ApiKeyFile = Annotated[
    Path | None, typer.Option(envvar=client_access.API_KEY_FILE, help="Holds the key to show; or set MOBULA_API_KEY.")
]
Tls = Annotated[bool, typer.Option("--tls", envvar=client_access.TLS, help="Protect the connection to a gateway.")]


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        console.print(f"mobula {VERSION}", highlight=False)
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
]


@app.callback()
def main(
    tls: Tls = False,
    tls_ca: AuthorityFile = None,
    cert: CertificateFile = None,
    key: KeyFile = None,
    api_key_file: ApiKeyFile = None,
    version: Version = False,
) -> None:
    """Serves DeepSeek-V2-class models with attention and experts in separate processes.

    Options before the command say how clients reach a gateway; --tls-ca and --cert imply --tls.
    """
    given = {
        client_access.TLS: "1" if tls else None,
        client_access.TLS_CA: tls_ca,
        client_access.TLS_CERT: cert,
        client_access.TLS_KEY: key,
        client_access.API_KEY_FILE: api_key_file,
    }
    os.environ.update({name: str(value) for name, value in given.items() if value is not None})
    try:
        client_access.ClientAccess.from_environment()
    except client_access.AccessError as error:
        fail(str(error))


@app.command()
def serve(config: ConfigFile = None, model: Model = None) -> None:
    """Start the system and serve until Ctrl-C or SIGTERM."""
    settings = _settings(config, model)
    continue_in_own_group()
    from cluster.commands.serve import serve_until_stopped

    raise typer.Exit(serve_until_stopped(settings, console))


@app.command()
def demo(config: ConfigFile = None, model: Model = None) -> None:
    """Start everything on this machine, stream several prompts, show where every token went, stop."""
    settings = _settings(config, model)
    continue_in_own_group()
    from cluster.commands.demo import run_demo

    raise typer.Exit(run_demo(settings, console))


@app.command()
def experts(address: Address = DEFAULT_ADDRESS) -> None:
    """Show the expert load of a running system and how far its tokens travelled."""
    try:
        with InferenceClient(address) as client:
            console.print(experts_view(client.expert_load(), client.placement(), console.width))
    except grpc.RpcError as error:
        fail_call(error, address)


app.command()(generate_command.generate)
app.command()(admin_command.status)
app.command()(admin_command.rebalance)
app.command()(restart_command.restart)
app.command()(leave_command.leave)


def _settings(path: Path | None, model: str | None) -> "MobulaConfig":
    """The file's configuration, or the default one, with the model replaced if one is given.

    A Ray cluster that we start gets a key of its own: no other user of the machine can run code in it. Ray reads this
    when it is imported, so it is settled here.
    """
    from cluster.config import ConfigError, parse_config, read_config

    try:
        config = read_config(path) if path else parse_config(None)
    except ConfigError as error:
        fail(str(error))
    if config.ray.address is None and "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    return config.model_copy(update={"model": model}) if model else config


if __name__ == "__main__":
    app()
