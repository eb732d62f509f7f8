"""`mobula generate`: one answer of a running system, streamed to the terminal."""

import socket
import time
from collections.abc import Callable, Iterator
from typing import Annotated

import grpc
import typer
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from cluster.client import DEFAULT_ADDRESS, RESUME_S, Generation, InferenceClient
from cluster.commands.arguments import MAX_UINT32, MAX_UINT64, Address, unicode_text, within
from cluster.commands.terminal import console, errors, fail_call
from cluster.host_port import host_and_port
from protos import generation_pb2

MAX_TOKENS = within(1, MAX_UINT32, "the model's context ends an answer in any case")
WAIT = within(0.0, 86400.0, "0 fails at once where nothing is there yet")
SEED = within(0, MAX_UINT64, "leave it out for one that is drawn")
MIN_RETRY_S = 0.1  # whatever a gateway hints at
MAX_REFUSED_S = 30.0  # a system that starts listens by then; nothing may be starting at all
LOOK_S = 0.25  # between two looks whether somebody listens
CONNECT_TIMEOUT_S = 3.0


def generate(
    prompt: Annotated[str, typer.Argument(callback=unicode_text, help="Text to continue.")],
    address: Address = DEFAULT_ADDRESS,
    chat: Annotated[
        bool, typer.Option("--chat", help="Send the prompt as a user's message, through the chat template.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(callback=MAX_TOKENS, help="Of the answer, at most.")] = 128,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; unset: the model's own.")] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    seed: Annotated[int | None, typer.Option(callback=SEED, help="The same one gives the same answer.")] = None,
    wait: Annotated[
        float,
        typer.Option(
            callback=WAIT,
            help="Seconds to wait for a system that is starting; at most 30 while nobody listens at the address.",
        ),
    ] = 60.0,
) -> None:
    """Stream one answer of a running system."""
    params = generation_pb2.SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    shown, has_begun, generation, start = 0, False, None, time.monotonic()
    wait_until_listening(address, wait, _say_waiting)
    wait = max(0.0, wait - (time.monotonic() - start))
    try:
        with InferenceClient(address) as client:
            answers = when_up(
                lambda: client.generate(prompt, params, is_chat=chat, on_break=_say_broken), wait, _say_waiting
            )
            for generation in answers:
                if not has_begun and not chat:
                    console.print(prompt, end="", style="bold cyan", markup=False, highlight=False, soft_wrap=True)
                has_begun = True
                console.print(generation.text[shown:], end="", markup=False, highlight=False, soft_wrap=True)
                shown = len(generation.text)
    except grpc.RpcError as error:
        if generation:
            console.print()
            _say_unfinished(generation)
        fail_call(error, address)
    console.print()
    if generation:
        _print_summary(generation)


def wait_until_listening(
    address: str,
    wait_s: float,
    say_waiting: Callable[[float, str], None],
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Returns also when the time is over, and at once where more is wrong than that a connection is refused: the call
    tells it then.

    say_waiting: told once, for how long and why.
    """
    wait_s = min(wait_s, MAX_REFUSED_S)
    give_up_s, has_said = clock() + wait_s, False
    while _is_refused(address) and clock() + LOOK_S <= give_up_s:
        if not has_said:
            say_waiting(wait_s, f"nobody listens at {address} yet, as while `mobula serve` starts")
            has_said = True
        sleep(LOOK_S)


def _is_refused(address: str) -> bool:
    where = host_and_port(address.removeprefix("dns:"))
    if where is None:
        return False
    try:
        with socket.create_connection(where, CONNECT_TIMEOUT_S):
            return False
    except ConnectionRefusedError:
        return True
    except OSError:
        return False


def when_up(
    call: Callable[[], Iterator[Generation]],
    wait_s: float,
    say_waiting: Callable[[float, str], None],
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Generation]:
    """The answer of the first call that is not refused because nobody can take it yet.

    say_waiting: told once, for how long and why. Raises grpc.RpcError: of another reason, after the first token, when
    the time is over, and when nobody at the address answered at all.
    """
    give_up_s, has_said = clock() + wait_s, False
    while True:
        try:
            answers = call()
            first = next(answers)
        except StopIteration:
            return
        except grpc.RpcError as error:
            delay_s = _retry_delay_s(error)
            if delay_s is None or clock() + delay_s > give_up_s:
                raise
            if not has_said:
                say_waiting(wait_s, error.details() or "")
                has_said = True
            sleep(delay_s)
            continue
        yield first
        yield from answers
        return


def _retry_delay_s(error: grpc.RpcError) -> float | None:
    """After which a gateway that has no worker says to try again; None for other errors."""
    if error.code() is not grpc.StatusCode.UNAVAILABLE:
        return None
    status = rpc_status.from_call(error)
    hint = error_details_pb2.RetryInfo()
    if status is None or not any(detail.Unpack(hint) for detail in status.details):
        return None
    return max(MIN_RETRY_S, float(hint.retry_delay.ToNanoseconds()) / 1e9)


def _say_waiting(wait_s: float, why: str) -> None:
    errors.print(f"waiting up to {wait_s:.3g} s: {why}", style="dim", markup=False, highlight=False, soft_wrap=True)


def _say_broken() -> None:
    errors.print(
        f"\nthe connection broke: asking for the rest, for up to {RESUME_S:.0f} s", style="dim", highlight=False
    )


def _say_unfinished(generation: Generation) -> None:
    errors.print(
        f"the answer is not complete: it breaks off after {generation.num_tokens} tokens",
        style="bold red",
        highlight=False,
    )


def _print_summary(generation: Generation) -> None:
    rate = generation.num_tokens / generation.total_s
    errors.print(
        f"[dim]{generation.usage.num_prompt_tokens} prompt + {generation.num_tokens} new tokens, "
        f"{rate:.1f} tokens/s, first after {(generation.first_token_s or 0) * 1000:.0f} ms, "
        f"ended by {generation.finish_reason}[/dim]"
    )
    if generation.usage.num_dropped_assignments:
        errors.print(
            f"[bold red]not quite the model's answer:[/bold red] the overload valve left out "
            f"{generation.usage.num_dropped_assignments} expert computations"
        )
    if generation.usage.num_degraded_steps:
        errors.print(
            f"[bold red]not quite the model's answer:[/bold red] experts could not be reached in "
            f"{generation.usage.num_degraded_steps} steps"
        )
