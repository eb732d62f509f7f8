"""An asyncio event loop in a thread of its own, for processes whose main thread computes or belongs to Ray."""

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

STOP_TIMEOUT_S = 5.0  # for what is cancelled to end


class LoopEnded(RuntimeError):
    """The event loop has ended, or ended while it was waited for."""


class LoopThread:
    """Owns one event loop. `run` may be called from any other thread."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._executor = ThreadPoolExecutor(thread_name_prefix=name)  # of asyncio.to_thread
        self.loop.set_default_executor(self._executor)
        self._lock = threading.Lock()  # so that nothing is given to a loop that has ended
        self._is_stopped = False
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    def _main(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
            tasks = asyncio.all_tasks(self.loop)
            for task in tasks:
                task.cancel()
            self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        finally:
            self.loop.close()  # or it would take calls, and never make them

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Starts the coroutine on the loop; its future is cancelled when the loop ends first.

        Raises LoopEnded: nobody would ever answer.
        """
        with self._lock:
            if self._is_stopped:
                coroutine.close()
                raise LoopEnded(f"the event loop of thread {self._thread.name} has ended")
            return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def run(self, coroutine: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        """The coroutine's result.

        Raises TimeoutError after `timeout_s`, having cancelled it; concurrent.futures.CancelledError where something on
        the loop cancelled it; LoopEnded.
        """
        future = self.submit(coroutine)
        try:
            return future.result(timeout_s)
        except TimeoutError:
            future.cancel()
            raise
        except CancelledError:
            if not self._is_stopped:
                raise
            raise LoopEnded(f"the event loop of thread {self._thread.name} has ended") from None

    def stop(self) -> None:
        """Cancels what still runs, and ends the loop and its thread. Another call does nothing."""
        with self._lock:
            if self._is_stopped:
                return
            self._is_stopped = True
            self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(STOP_TIMEOUT_S)
        self._executor.shutdown(wait=False, cancel_futures=True)
