"""Clients of a gateway, for a host from which it can be reached: argv is its host:port.

Prints a line of JSON for each answer that has ended, and what the controller says, until stdin ends.
"""

import json
import sys
import threading
import time

from cluster.chaos.load import Load, cases
from cluster.chaos.system import System
from cluster.client_access import ClientAccess

NUM_CLIENTS = 6
MAX_TOKENS = 48
POLL_S = 0.1


def main(address: str) -> None:
    load = Load(address, ClientAccess(), cases(MAX_TOKENS), NUM_CLIENTS, seed=0)
    load.start()
    is_over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), is_over.set()), daemon=True).start()
    reported: set[int] = set()
    with System(address, ClientAccess()) as system:
        while not is_over.wait(POLL_S):
            for number, answer in enumerate(load.answers):
                if answer.ended_s is not None and number not in reported:
                    reported.add(number)
                    fields = {"case": hash(answer.case), "sent_s": answer.sent_s, "ended_s": answer.ended_s}
                    print(json.dumps(fields | {"token_ids": answer.token_ids, "error": answer.error}), flush=True)
            status = system.status()
            print(
                json.dumps({"is_serving": status is not None and status.is_serving, "at_s": time.monotonic()}),
                flush=True,
            )
    load.close()


if __name__ == "__main__":
    main(sys.argv[1])
