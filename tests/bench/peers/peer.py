"""What a user would pick instead, measured on the same checkpoint in the same minutes.

A peer is used if an environment variable says where it is; it runs in its own interpreter or binary and answers lines
on its standard input. README.md beside this file says how to install each. Knows nothing of our own system.
"""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.bench.process import BenchProcess
from tests.bench.row import PLAIN, Options, Unmeasurable

TRANSFORMERS, VLLM, LLAMA = "transformers", "vLLM", "llama.cpp"
VARIABLES = {
    TRANSFORMERS: "MOBULA_PEER_TRANSFORMERS",
    VLLM: "MOBULA_PEER_VLLM",
    LLAMA: "MOBULA_PEER_LLAMA",
}
START_TIMEOUT_S = 180.0
ANSWER_TIMEOUT_S = 240.0
SETTLE_TIMEOUT_S = 5.0
ANSWER = "@@ "
GGUF_NAMES = {PLAIN: "bf16", "int8": "Q8_0", "int4": "Q4_0"}
FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One that is installed. location: its interpreter, or for llama.cpp the folder that README.md describes."""

    name: str
    location: Path

    def can_serve(self, model: Path, kind: str) -> bool:
        """Whether it knows the format and the model's dimensions, and has what it needs."""
        if self.name == LLAMA:
            return self._gguf(model, kind).exists()
        if kind != PLAIN:
            return False
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        # vLLM's latent attention on CPU has one size.
        return self.name != VLLM or (config["kv_lora_rank"], config["qk_rope_head_dim"]) == (512, 64)

    @property
    def environment(self) -> dict[str, str]:
        """llama.cpp's libraries look for one another in its build folder, which may be gone."""
        return {"LD_LIBRARY_PATH": str(_library_folder(self.location))} if self.name == LLAMA else {}

    def command(self, model: Path, kind: str, options: Options) -> list[str]:
        """To start it on a checkpoint that it can serve. Raises Unmeasurable."""
        threads = str(options.num_threads)
        if self.name == LLAMA:
            binary = _compiled(self.location, options.folder)
            return [str(binary), str(self._gguf(model, kind)), threads]
        script = {TRANSFORMERS: "serve_transformers.py", VLLM: "serve_vllm.py"}[self.name]
        return [str(self.location), str(FOLDER / script), str(model), threads]

    def _gguf(self, model: Path, kind: str) -> Path:
        return self.location / "gguf" / f"{model.name.removesuffix(f'-{kind}')}-{GGUF_NAMES[kind]}.gguf"


class RunningPeer:
    """A peer that has loaded a checkpoint and waits. Leaving the block ends it.

    start_s: seconds from its start until it was ready.
    """

    def __init__(self, peer: Peer, model: Path, kind: str, options: Options) -> None:
        self.name = peer.name
        self._command = peer.command(model, kind, options)
        self._environment = {"OMP_NUM_THREADS": str(options.num_threads), "HF_HUB_OFFLINE": "1", **peer.environment}
        self.start_s = 0.0
        self.version = ""

    def __enter__(self) -> Self:
        """Raises Unmeasurable with its last words when it does not start."""
        self._process = BenchProcess(self._command, **self._environment)
        try:
            self.version = str(self._answer(START_TIMEOUT_S).get("version", ""))
        except BaseException:
            self._process.stop()
            raise
        self.start_s = time.monotonic() - self._process.started_s
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.stop()

    def prefill(self, num_tokens: int, seed: int) -> float:
        """Tokens/s of one prompt."""
        return self._ask(f"prefill {num_tokens} {seed}")

    def decode(self, batch: int, context: int, num_steps: int, seed: int) -> float:
        """Tokens/s of all sequences together."""
        return self._ask(f"decode {batch} {context} {num_steps} {seed}")

    def settle(self) -> None:
        """Waits until it leaves the cores to the next turn: vLLM's threads spin for a second after an answer.

        Raises Unmeasurable when it never does.
        """
        if not self._process.wait_until_idle(SETTLE_TIMEOUT_S):
            raise Unmeasurable(f"{self.name} still keeps a core busy {SETTLE_TIMEOUT_S:.0f} s after its answer")

    def memory_bytes(self) -> int:
        """Proportional set size of all its processes."""
        return sum(self._process.memory_bytes().values())

    def _ask(self, line: str) -> float:
        try:
            self._process.write_line(line)
        except OSError as error:
            raise Unmeasurable(f"{self.name} has ended: {self._process.last_words}") from error
        return float(self._answer(ANSWER_TIMEOUT_S)["tokens_per_s"])

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        deadline_s = time.monotonic() + timeout_s
        while (line := self._process.read_line(deadline_s)) is not None:
            if line.startswith(ANSWER):
                answer: dict[str, Any] = json.loads(line.removeprefix(ANSWER))
                return answer
        raise Unmeasurable(f"{self.name} ended or was silent for {timeout_s:.0f} s: {self._process.last_words}")


def installed_peers(options: Options, model: Path, kind: str) -> list[Peer]:
    """Those to measure the checkpoint on. transformers needs no variable where our own interpreter has it."""
    if not options.has_peers:
        return []
    peers = []
    for name, variable in VARIABLES.items():
        location = os.environ.get(variable)
        if location is None and name == TRANSFORMERS and importlib.util.find_spec("transformers"):
            location = sys.executable
        if location:
            peers.append(Peer(name=name, location=Path(location)))
    return [peer for peer in peers if peer.can_serve(model, kind)]


def _library_folder(location: Path) -> Path:
    for path in (location / "lib", location / "lib64", location):
        if any(path.glob("libllama*")):
            return path
    raise Unmeasurable(f"llama.cpp: no libllama under {location}")


def _compiled(location: Path, folder: Path) -> Path:
    """Our small server, built against the peer's headers and library. Raises Unmeasurable."""
    source = FOLDER / "serve_llama.cpp"
    digest = hashlib.sha256(source.read_bytes() + str(location).encode()).hexdigest()[:12]
    binary = folder / f"serve_llama-{digest}"
    if binary.exists():
        return binary
    library = _library_folder(location)
    command = [
        *("g++", "-O2", "-std=c++17", f"-I{location / 'include'}", str(source), "-o", str(binary)),
        *(f"-L{library}", f"-Wl,-rpath,{library}", "-lllama", "-lggml", "-lggml-base"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise Unmeasurable(f"llama.cpp: {result.stderr.strip().splitlines()[-1]}")
    return binary
