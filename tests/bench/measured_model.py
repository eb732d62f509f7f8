"""A checkpoint in one format, with all that a part needs to judge what it measures on it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from tests.bench import checkpoints
from tests.bench.limits import ModelShape
from tests.bench.load_client import LoadClient
from tests.bench.peers.peer import Peer, installed_peers
from tests.bench.row import PLAIN, Options, Param, Unmeasurable
from tests.bench.served_system import ServedSystem


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredModel:
    """kind: the format of the experts, or float32 for the bundled model, which is served so."""

    name: str
    folder: Path
    kind: str
    shape: ModelShape

    @property
    def params(self) -> dict[str, Param]:
        """For rows."""
        return {"model": self.name, "format": self.kind}

    @property
    def checkpoint_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))

    def peers(self, options: Options) -> list[Peer]:
        """Those that can be measured on it."""
        return installed_peers(options, self.folder, self.kind)

    def read_into_page_cache(self) -> None:
        """Reads every file once."""
        for path in self.folder.glob("*.safetensors"):
            with path.open("rb", buffering=0) as file:
                while file.read(1 << 24):
                    pass

    @contextmanager
    def served(self, options: Options, **settings: Any) -> Iterator[tuple[ServedSystem, LoadClient]]:
        """The system up and a client connected. settings: ServedSystem's. Raises Unmeasurable."""
        options.show(f"{self.name} {self.kind}: starting the system")
        with ServedSystem(self.folder, num_threads=options.num_threads, **settings) as system:
            client = LoadClient(system.address)
            try:
                yield system, client
            finally:
                client.close()


def measured_models(options: Options, kinds: tuple[str, ...]) -> Iterator[MeasuredModel | tuple[str, str, str]]:
    """Each checkpoint asked for, in each format; (name, format, why) in the place of one that is not to be had."""
    for name in options.models:
        for kind in kinds if name != checkpoints.BUNDLED else kinds[:1]:
            try:
                options.show(f"{name} {kind}: looking for the checkpoint")
                yield _open(options, name, kind)
            except Unmeasurable as error:
                yield name, kind, str(error)


def _open(options: Options, name: str, kind: str) -> MeasuredModel:
    folder = checkpoints.find(options.folder, name, kind, Console(stderr=True))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    is_float32 = name == checkpoints.BUNDLED or config.get("torch_dtype", config.get("dtype")) == "float32"
    return MeasuredModel(
        name=Path(name).name,
        folder=folder,
        kind="float32" if is_float32 and kind == PLAIN else kind,
        shape=ModelShape.read(config),
    )
