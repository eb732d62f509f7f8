"""The trace file: what is written is read, and what was cut or forged is refused."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from router.gate_config import DEEPSEEK_METHODS, GateConfig, ScoringFunc
from router.trace import trace_file
from router.trace.model_shape import PUBLISHED, V2, ModelShape
from router.trace.trace import TraceError, TraceHeader, TraceWindow
from router.trace.trace_file import TraceFile, TraceWriter
from tests.router.trace.traces import random_ids, tiny_model


@st.composite
def shapes(draw: st.DrawFn) -> ModelShape:
    groups, per_group = draw(st.integers(1, 4)), draw(st.integers(1, 80))
    topk_group = draw(st.integers(1, groups))
    return ModelShape(
        name=draw(st.text(max_size=5)),
        moe_layer_ids=tuple(sorted(draw(st.sets(st.integers(0, 99), min_size=1, max_size=4)))),
        gate=GateConfig(
            n_routed_experts=groups * per_group,
            num_experts_per_tok=draw(st.integers(1, min(6, topk_group * per_group))),
            n_group=groups,
            topk_group=topk_group,
            topk_method=draw(st.sampled_from(sorted(DEEPSEEK_METHODS))),
            scoring_func=draw(st.sampled_from(ScoringFunc)),
            norm_topk_prob=draw(st.booleans()),
            routed_scaling_factor=draw(st.floats(0.1, 100)),
        ),
        hidden_size=draw(st.integers(1, 9)),
        moe_intermediate_size=draw(st.integers(1, 9)),
        itemsize=draw(st.sampled_from((1, 2, 4))),
    )


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    model=shapes(),
    sizes=st.lists(st.integers(0, 20), max_size=4),
    source=st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    seed=st.none() | st.integers(0, 2**63),
    label=st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
)
def test_what_is_written_is_read(
    tmp_path: Path, model: ModelShape, sizes: list[int], source: str, seed: int | None, label: str
) -> None:
    header = TraceHeader(model=model, source=source, seed=seed, started_at="2026-01-01T00:00:00+00:00")
    windows = [
        TraceWindow(topk_ids=random_ids(model, size, seed=number), start_s=number / 4, seconds=0.25, label=label)
        for number, size in enumerate(sizes)
    ]
    with TraceWriter(tmp_path / "trace.npz", header) as writer:
        for window in windows:
            writer.add(window)
    trace = TraceFile(tmp_path / "trace.npz")
    assert trace.header == header
    assert trace.num_tokens == writer.num_tokens == sum(sizes)
    kept = [window for window in windows if window.num_tokens]
    for read, written in zip(trace.windows(), kept, strict=True):
        np.testing.assert_array_equal(read.topk_ids, written.topk_ids)
        assert read.topk_ids.dtype == written.topk_ids.dtype
        assert (read.start_s, read.seconds, read.label) == (written.start_s, written.seconds, label)


def write(path: Path, model: ModelShape | None = None, sizes: tuple[int, ...] = (30, 20)) -> Path:
    model = model or tiny_model()
    with TraceWriter(path, TraceHeader(model=model, source="test")) as writer:
        for number, size in enumerate(sizes):
            writer.add(TraceWindow(topk_ids=random_ids(model, size, seed=number)))
    return path


def test_numpy_alone_reads_it_without_pickle(tmp_path: Path) -> None:
    with np.load(write(tmp_path / "trace.npz"), allow_pickle=False) as archive:
        np.testing.assert_array_equal(archive["window_000001"], random_ids(tiny_model(), 20, seed=1))
        assert json.loads(archive["trace.json"])["model"]["name"] == "tiny"


def test_the_same_trace_is_the_same_bytes(tmp_path: Path) -> None:
    assert write(tmp_path / "a.npz").read_bytes() == write(tmp_path / "b.npz").read_bytes()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_ids_of_the_smallest_size(tmp_path: Path, name: str) -> None:
    model = PUBLISHED[name]
    window = next(TraceFile(write(tmp_path / "trace.npz", model, sizes=(10,))).windows())
    assert window.topk_ids.dtype == np.uint8


def test_a_recording_that_fails_leaves_no_file_and_the_old_one_as_it_was(tmp_path: Path) -> None:
    path = write(tmp_path / "trace.npz")
    before = path.read_bytes()
    with pytest.raises(RuntimeError), TraceWriter(path, TraceHeader(model=V2, source="")):
        raise RuntimeError
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["trace.npz"]


def test_every_truncation_is_refused_clearly(tmp_path: Path) -> None:
    content = write(tmp_path / "trace.npz").read_bytes()
    cut = tmp_path / "cut.npz"
    for length in range(0, len(content), 7):
        cut.write_bytes(content[:length])
        with pytest.raises(TraceError, match=r"cut\.npz: .*record it again"):
            TraceFile(cut)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.floats(0, 1, exclude_max=True), value=st.integers(1, 255))
def test_a_changed_byte_is_refused_or_changes_nothing(tmp_path: Path, position: float, value: int) -> None:
    content = bytearray(write(tmp_path / "trace.npz").read_bytes())
    content[int(position * len(content))] ^= value
    changed = tmp_path / "changed.npz"
    changed.write_bytes(content)
    try:
        windows = list(TraceFile(changed).windows())
    except TraceError:
        return
    for number, window in enumerate(windows):
        np.testing.assert_array_equal(window.topk_ids, random_ids(tiny_model(), (30, 20)[number], seed=number))


def rewrite(path: Path, members: dict[str, bytes | None]) -> Path:
    """The same archive with members replaced, or left out."""
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in (content | members).items():
            if data is not None:
                archive.writestr(name, data)
    return path


def npy(array: Any, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **settings)
    return buffer.getvalue()


IDS = random_ids(tiny_model(), 30, seed=0)
OUT_OF_RANGE = np.full_like(IDS, 7)
OUT_OF_RANGE[..., 0], OUT_OF_RANGE[..., 1] = 7, 8
FORGED = {
    "expert that is not there": (npy(OUT_OF_RANGE), "chose expert 8, tiny has 8"),
    "same expert twice": (npy(np.full_like(IDS, 7)), "do not ascend"),
    "pickle": (npy(np.full(IDS.shape, None, dtype=object), allow_pickle=True), "header is .*O.*the index says"),
    "other type": (npy(IDS.astype(np.int64)), "header is .*i8"),
    "other shape": (npy(IDS[:, :29]), r"\(2, 29, 2\).*the index says .*\(2, 30, 2\)"),
    "column order": (npy(np.asfortranarray(IDS)), "the index says"),
    "too short": (npy(IDS)[:-1], "bytes or more"),
    "too long": (npy(IDS) + b"x", "bytes or more"),
    "no array": (b"hello", "not an npy array"),
    "version 3": (b"\x93NUMPY\x03\x00" + b"\x00" * 40, "version 1.0"),
    "header without end": (npy(IDS).replace(b"{'descr'", b"{{{{{{{{{"), "header"),
    "gone": (None, "no item named"),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_window_is_refused(tmp_path: Path, name: str) -> None:
    content, message = FORGED[name]
    trace = TraceFile(rewrite(write(tmp_path / "trace.npz"), {"window_000000.npy": content}))
    with pytest.raises(TraceError, match=message):
        list(trace.windows())


def test_a_window_that_unpacks_to_far_more_than_it_says_takes_no_memory(tmp_path: Path) -> None:
    bomb = npy(IDS) + bytes(50_000_000)
    path = rewrite(write(tmp_path / "trace.npz"), {"window_000000.npy": bomb})
    assert path.stat().st_size < 100_000
    with pytest.raises(TraceError, match="bytes or more"):
        list(TraceFile(path).windows())


HEADER = {"format": "mobula-trace", "version": 1, "source": "", "seed": None, "started_at": None}
MODEL = {"name": "t", "moe_layer_ids": [1, 2], "hidden_size": 1, "moe_intermediate_size": 1, "itemsize": 2}
GATE = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "group_limited_greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1,
}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"format": "zip"}, "not a trace"),
        ({"version": 2}, "version is 2, this program reads 1"),
        ({"model": None}, "model has the fields None, expected"),
        ({"model": MODEL | {"extra": 1}}, "model has the fields"),
        ({"model": MODEL | {"hidden_size": True}}, "model.hidden_size is True, expected int"),
        ({"model": MODEL | {"hidden_size": 0}}, "hidden_size of t is 0, must be 1 to"),
        ({"model": MODEL | {"moe_layer_ids": ["1"]}}, "something else than integers"),
        ({"model": MODEL | {"moe_layer_ids": []}}, "has 0 layers"),
        ({"model": MODEL | {"moe_layer_ids": [2, 1]}}, "do not ascend"),
        ({"gate": GATE | {"topk_method": "best"}}, "'best' is not a valid TopkMethod"),
        ({"gate": GATE | {"num_experts_per_tok": 9}}, "num_experts_per_tok is 9, must be 1 to"),
        ({"gate": GATE | {"n_routed_experts": 2**20, "n_group": 1, "topk_group": 1}}, "limit is 65536"),
        ({"seed": "1"}, "seed is '1', expected an integer or null"),
        ({"source": 5}, "source is '5', expected a text"),
        ({"started_at": "x" * 5000}, "expected a text of up to 4096"),
    ],
)
def test_a_header_that_cannot_be_is_refused(tmp_path: Path, header: dict[str, object], message: str) -> None:
    content = json.dumps(HEADER | {"model": MODEL, "gate": GATE} | header).encode()
    with pytest.raises(TraceError, match=message):
        TraceFile(rewrite(write(tmp_path / "trace.npz"), {"trace.json": content}))


WINDOW = {"num_tokens": 30, "start_s": 0, "seconds": 0, "label": ""}


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"[]", "holds a list, expected a JSON object"),
        (b"{" * 100_000, "is not JSON"),
        (b'{"windows": 3}', "has no list"),
        ({"windows": [3]}, "num_tokens None"),
        ({"windows": [WINDOW | {"num_tokens": -1}]}, "num_tokens -1"),
        ({"windows": [WINDOW | {"num_tokens": 2**62}]}, "limit is 268435456"),
        ({"windows": [WINDOW | {"label": None}]}, "label None"),
        ({"windows": [WINDOW | {"seconds": "1"}]}, "the index is broken"),
        ({"windows": [WINDOW | {"seconds": -1}]}, "takes -1.0 s"),
        (b'{"windows": [{"num_tokens": 30, "start_s": NaN, "seconds": 0, "label": ""}]}', "starts at nan s"),
        ({"windows": [WINDOW] * 3}, "index says|no item named"),
    ],
)
def test_an_index_that_cannot_be_is_refused(tmp_path: Path, index: object, message: str) -> None:
    content = index if isinstance(index, bytes) else json.dumps(index).encode()
    with pytest.raises(TraceError, match=message):
        list(TraceFile(rewrite(write(tmp_path / "trace.npz"), {"windows.json": content})).windows())


def test_json_without_end_and_members_that_are_missing_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace_file, "MAX_JSON_BYTES", 100)
    with pytest.raises(TraceError, match=r"trace\.json has \d+ bytes, limit is 100"):
        TraceFile(write(tmp_path / "trace.npz"))
    with pytest.raises(TraceError, match=r"the archive has no trace\.json: not a trace"):
        TraceFile(rewrite(write(tmp_path / "trace.npz"), {"trace.json": None}))
    with pytest.raises(TraceError, match=r"nothing\.npz: No such file"):
        TraceFile(tmp_path / "nothing.npz")
    with pytest.raises(TraceError, match="directory"):
        TraceFile(tmp_path)


def test_a_writer_refuses_what_the_model_cannot_have_chosen(tmp_path: Path) -> None:
    model = tiny_model()
    with TraceWriter(tmp_path / "trace.npz", TraceHeader(model=model, source="")) as writer:
        for ids, message in (
            (IDS.astype(np.uint16), "of uint16, tiny needs"),
            (IDS[:1], r"are \[1, 30, 2\]"),
            (OUT_OF_RANGE, "chose expert 8"),
            (IDS[..., ::-1], "do not ascend"),
        ):
            with pytest.raises(TraceError, match=message):
                writer.add(TraceWindow(topk_ids=ids))
        with pytest.raises(TraceError, match=r"starts at -1\.0 s"):
            writer.add(TraceWindow(topk_ids=IDS, start_s=-1.0))
        with pytest.raises(TraceError, match="limit is 4096"):
            writer.add(TraceWindow(topk_ids=IDS, label="x" * 5000))
    assert TraceFile(tmp_path / "trace.npz").num_windows == 0
