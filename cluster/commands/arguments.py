"""What arguments must be so that a request can carry them: else the command ends with one line that says so.

Knows neither the commands nor what a server makes of the values.
"""

from collections.abc import Callable
from typing import Annotated, TypeVar

import typer
from typer import CallbackParam

from cluster.client import DEFAULT_ADDRESS
from cluster.commands.terminal import fail

MAX_UINT32 = 2**32 - 1  # of a proto's uint32
MAX_UINT64 = 2**64 - 1
MAX_DAYS = 36_500.0  # that a key or certificate is valid; dates end with the year 9999
WEB_SCHEMES = ("http", "https", "grpc", "grpcs")


NumberT = TypeVar("NumberT", int, float)


def within(
    minimum: NumberT, maximum: NumberT, way_out: str
) -> Callable[[CallbackParam, NumberT | None], NumberT | None]:
    """Ends the command where the number is not `minimum` to `maximum`, or none; way_out: what to do then."""

    def checked(param: CallbackParam, value: NumberT | None) -> NumberT | None:
        if value is not None and not minimum <= value <= maximum:
            fail(f"{param.opts[0]} is {value}, must be {minimum} to {maximum}; {way_out}")
        return value

    return checked


def unicode_text(param: CallbackParam, value: str) -> str:
    """Ends the command where the argument has bytes that are no UTF-8, which Python keeps as surrogates."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        byte = ord(value[error.start]) & 0xFF
        fail(
            f"{param.opts[0]} has byte 0x{byte:02x} at character {error.start + 1}, which is not UTF-8; "
            "convert the text, for example with iconv"
        )
    return value


def some_address(value: str | None) -> str | None:
    """Ends the command for none, and for a page's. What else is wrong is told by who calls it (reachability.py)."""
    if value is None:
        return None
    if not value.strip():
        fail(f"--address is {value!r}, must be host:port, for example {DEFAULT_ADDRESS}")
    scheme, is_url, rest = value.partition("://")
    if is_url and scheme.lower() in WEB_SCHEMES:  # gRPC has others of its own: dns:///host:port
        path = " and what follows host:port" if "/" in rest else ""
        fail(f"--address is {value!r}, must be host:port; leave out {scheme}://{path}")
    return value


Address = Annotated[str, typer.Option(callback=some_address, help="The gateway's host:port.")]
