"""A host's own proxy: what gRPC sends from it goes through here. A line of JSON on stdin is a new weather."""

import json
import sys

from cluster.chaos.proxy import LinkProxy, Weather

PORT = 3128


def main() -> None:
    proxy = LinkProxy(port=PORT)
    print("up", flush=True)
    for line in sys.stdin:
        proxy.set_weather(None, Weather(**json.loads(line)))
    proxy.close()


if __name__ == "__main__":
    main()
