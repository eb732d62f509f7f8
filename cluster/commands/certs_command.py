"""`mobula certs`: certificates for a test or a deployment on bare machines. Run it again to renew them: processes that
run notice by themselves.
"""

import ipaddress
import re
from pathlib import Path
from typing import Annotated

import typer
from cryptography import x509

from cluster.commands.arguments import MAX_DAYS, within
from cluster.commands.terminal import console, fail
from cluster.security.authority import AUTHORITY_FOLDER, CLIENTS_FOLDER, PUBLIC_FOLDER, Authority
from protos.bounded_file import why_unreadable
from protos.certificates import AUTHORITY, CertificateError

app = typer.Typer(no_args_is_help=True, help="Make and revoke certificates.")
HOST_NAME = re.compile(r"(\*\.)?[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*")  # Docker resolves names with underscores
MAX_HOST_CHARS = 253
DAYS = within(0.0, MAX_DAYS, "make them again before they end")
Folder = Annotated[Path, typer.Argument(help="Folder with the authority and all that it signs.")]


def host_names(names: list[str] | None) -> list[str] | None:
    """Ends the command for a name by which nobody can reach a gateway."""
    for name in names or ():
        if not (HOST_NAME.fullmatch(name) and len(name) <= MAX_HOST_CHARS) and not _is_address(name):
            fail(
                f"--name is {name!r}, must be an address or a host's name: letters, digits, hyphens and underscores "
                f"between dots, 1 to 63 each, {MAX_HOST_CHARS} in all"
            )
    return names


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


@app.command()
def make(
    folder: Folder,
    name: Annotated[
        list[str] | None,
        typer.Option(
            callback=host_names,
            help="Host or address by which clients reach the gateway, beside localhost; may be repeated.",
        ),
    ] = None,
    client: Annotated[list[str] | None, typer.Option(help="A client to make one for; may be repeated.")] = None,
    days: Annotated[float, typer.Option(callback=DAYS, help="For how long they are valid.")] = 90.0,
) -> None:
    """Make an authority, if there is none, and new certificates for every role, the gateway's port and clients."""
    try:
        authority = Authority.open(folder)
        authority.issue_roles(days)
        names = list(dict.fromkeys([*(name or ()), "localhost", "127.0.0.1"]))  # the machine's own commands
        authority.issue(folder / PUBLIC_FOLDER, "gateway", names, days)
        for client_name in client or ():
            authority.issue(folder / CLIENTS_FOLDER / client_name, client_name, (), days)
    except OSError as error:
        fail(f"cannot write certificates to {folder}: {why_unreadable(error)}")
    except (CertificateError, ValueError) as error:
        fail(str(error))
    console.print(f"certificates in {folder}, valid for {days:g} days", highlight=False, markup=False)
    hint = f"clients need {folder / AUTHORITY}, in which there is no key: give it to them"
    console.print(hint, style="dim", markup=False)
    console.print(f"keep {folder / AUTHORITY_FOLDER} away from the machines that serve", style="dim", markup=False)


@app.command()
def revoke(folder: Folder, certificate: Annotated[Path, typer.Argument(help="Its tls.crt.")]) -> None:
    """Have a certificate believed no more: renews ca.crl in every folder; copy it to the machines that serve."""
    try:
        revoked = x509.load_pem_x509_certificate(certificate.read_bytes())
    except OSError as error:
        fail(f"cannot read the certificate {certificate}: {why_unreadable(error)}")
    except ValueError:
        fail(f"{certificate} holds no certificate in PEM form")
    try:
        Authority.open(folder).revoke(revoked)
    except OSError as error:
        fail(f"cannot write to {folder}: {why_unreadable(error)}")
    except (CertificateError, ValueError) as error:
        fail(str(error))
    console.print(f"revoked {certificate}", highlight=False, markup=False)
