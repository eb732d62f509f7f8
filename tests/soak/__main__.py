"""`python -m tests.soak`, or `make soak`: twenty minutes of load, a fault every twenty seconds."""

import argparse
import sys
import time

from tests.soak.soak import SoakConfig, soak


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Load a system while fault follows fault; nothing may be lost or left."
    )
    parser.add_argument("--seconds", type=float, default=1200.0)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--fault-every", type=float, default=20.0, help="seconds")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}")
    config = SoakConfig(
        seconds=arguments.seconds,
        num_requests=arguments.requests,
        fault_every_s=arguments.fault_every,
        seed=arguments.seed,
    )
    result = soak(config, lambda line: print(line, flush=True))
    for name, after in result.after.items():
        print(f"{name:12} before {result.before.get(name)}\n{'':12} after  {after}")
    print(f"{result.num_requests} requests, faults: {dict(result.num_faults)}")
    print("\n".join(result.findings) or "nothing was lost, nothing was left")
    return 1 if result.findings else 0


if __name__ == "__main__":
    sys.exit(main())
