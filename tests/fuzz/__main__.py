"""`python -m tests.fuzz`, or `make fuzz`: feeds hostile input to every port and file format.

Memory is bounded while it runs: input that makes a parser ask for much more than it is worth is found as MemoryError.
"""

import argparse
import logging
import resource
import sys
import time

import psutil

from tests.fuzz import files, frames, ports
from tests.fuzz.target import Target, feed

HEADROOM_BYTES = 6 * 2**30  # of addresses, beyond those at the start; threads' stacks and arenas take some


def all_targets() -> list[Target]:
    """Everything that is fed."""
    return [*frames.targets(), *files.targets(), *ports.targets()]


def main() -> int:
    parser = argparse.ArgumentParser(description="Feed hostile input to every port and file format.")
    parser.add_argument("--cases", type=int, default=100_000, help="in all, at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="names of targets, by comma")
    arguments = parser.parse_args()
    wanted = [target for target in all_targets() if not arguments.only or target.name in arguments.only.split(",")]
    logging.disable(logging.WARNING)  # refusals are expected, thousands of them
    limit = psutil.Process().memory_info().vms + HEADROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    total, started_s = 0, time.monotonic()
    shares = sum(target.share for target in wanted)
    for target in wanted:
        outcome = feed(target, -(-arguments.cases * target.share // shares), arguments.seed)
        total += outcome.num_cases
        print(
            f"{target.name:18} {outcome.num_cases:7} cases {outcome.seconds:6.1f} s  "
            f"{outcome.grown_bytes / 2**20:+6.1f} MiB",
            flush=True,
        )
    print(f"{total} cases in {time.monotonic() - started_s:.0f} s, seed {arguments.seed}: no finding")
    return 0


if __name__ == "__main__":
    sys.exit(main())
