"""`mobula keys`: the file of bearer keys. A running gateway notices changes by itself."""

import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from cluster.commands.arguments import MAX_DAYS, within
from cluster.commands.terminal import console, fail
from cluster.security.keys import Key, KeyFile, KeyFileError, Right, new_key, read_keys, utc_now, write_keys
from cluster.security.private_file import replace_file

app = typer.Typer(no_args_is_help=True, help="Add, list and revoke the keys that clients show.")
File = Annotated[Path, typer.Argument(help="The file that gateway.keys names.")]
DAYS = within(0.0, MAX_DAYS, "leave it out for a key that is valid for ever")
KeyId = Annotated[str, typer.Argument(metavar="ID", help="Names the key in logs and metrics; no secret.")]


@app.command()
def add(
    file: File,
    key_id: KeyId,
    right: Annotated[list[Right] | None, typer.Option(help="May be repeated; unset: generate.")] = None,
    days: Annotated[
        float | None, typer.Option(callback=DAYS, help="For how long it is valid; unset: for ever.")
    ] = None,
    max_concurrent_requests: Annotated[
        int | None, typer.Option(min=1, help="Generate calls in flight in each gateway.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the key here, readable for you alone; unset: print it.")
    ] = None,
) -> None:
    """Add a key and give it out, once: the file holds only its hash."""
    expires = utc_now() + datetime.timedelta(days=days) if days is not None else None
    if out is not None and out.exists():
        fail(f"{out} exists already, and may be a key in use; give another --out")
    try:
        keys = read_keys(file) if file.exists() else KeyFile()
        if key_id in keys.by_id():
            fail(f"{file} has a key {key_id} already; take another id, so that logs tell them apart")
        rights = frozenset(right or [Right.GENERATE])
        key, text = new_key(key_id, rights, expires=expires, max_concurrent_requests=max_concurrent_requests)
        if out is not None:
            _write_secret(out, text)
        write_keys(file, KeyFile(keys=(*keys.keys, key)))
    except KeyFileError as error:
        fail(str(error))
    if out is None:
        typer.echo(text)


@app.command("list")
def show(file: File) -> None:
    """Show every key but its secret."""
    table = Table("id", "rights", "expires", "requests", "state", box=None, pad_edge=False)
    for key in _read(file).keys:
        limit = "-" if key.max_concurrent_requests is None else str(key.max_concurrent_requests)
        expires = f"{key.expires:%Y-%m-%d %H:%M}" if key.expires else "-"
        table.add_row(key.id, ", ".join(sorted(key.rights)), expires, limit, _state(key))
    console.print(table)


@app.command()
def revoke(file: File, key_id: KeyId) -> None:
    """Have a key refused from now on."""
    keys = _read(file)
    if key_id not in keys.by_id():
        fail(f"{file} has no key {key_id}")
    changed = tuple(key.model_copy(update={"is_revoked": key.is_revoked or key.id == key_id}) for key in keys.keys)
    try:
        write_keys(file, KeyFile(keys=changed))
    except KeyFileError as error:
        fail(str(error))
    console.print(f"revoked {key_id}", highlight=False)


def _write_secret(out: Path, text: str) -> None:
    """Raises KeyFileError."""
    try:
        replace_file(out, f"{text}\n".encode())
    except OSError as error:
        raise KeyFileError(f"cannot write the key to {out}: {error.strerror}") from error


def _read(file: Path) -> KeyFile:
    try:
        return read_keys(file)
    except KeyFileError as error:
        fail(str(error))


def _state(key: Key) -> str:
    if key.is_revoked:
        return "revoked"
    return "expired" if key.is_expired(utc_now()) else "valid"
