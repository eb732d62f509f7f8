"""Where a conversion's result comes to lie, and what it may replace."""

import errno
import json
import os
import shutil
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from cluster.checkpoint import destination as destination_module
from cluster.checkpoint.convert import CannotConvert
from cluster.checkpoint.destination import InterruptedWhenMade, new_folder


def folder_for(destination: Path, *, num_bytes: int = 1, is_forced: bool = True) -> AbstractContextManager[Path]:
    return new_folder(destination, source=destination.parents[1] / "read", num_bytes=num_bytes, is_forced=is_forced)


def checkpoint(folder: Path, name: str = "old") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": name}))
    return folder


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError])
def test_what_is_half_written_vanishes_and_what_was_there_stays(tmp_path: Path, failure: type[BaseException]) -> None:
    destination = checkpoint(tmp_path / "made")

    def fail_half_way() -> None:
        with folder_for(destination) as folder:
            (folder / "model.safetensors").write_text("half")
            raise failure

    with pytest.raises(failure):
        fail_half_way()
    assert os.listdir(tmp_path) == ["made"]
    assert os.listdir(destination) == ["config.json"]


def test_ctrl_c_after_the_new_checkpoint_is_in_its_place_says_so_and_leaves_nothing_of_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    destination = checkpoint(tmp_path / "made")
    interrupt, rmtree = KeyboardInterrupt(), shutil.rmtree

    def interrupted(path: Path, *, ignore_errors: bool) -> None:
        monkeypatch.setattr(shutil, "rmtree", rmtree)
        raise interrupt

    def convert() -> None:
        with folder_for(destination) as folder:
            (folder / "config.json").write_text('{"model_type": "new"}')
            monkeypatch.setattr(shutil, "rmtree", interrupted)

    with pytest.raises(InterruptedWhenMade) as raised:
        convert()
    assert raised.value.interrupt is interrupt
    assert json.loads((destination / "config.json").read_text()) == {"model_type": "new"}
    assert os.listdir(tmp_path) == ["made"]


def test_what_is_there_is_replaced_only_by_force_and_only_if_it_is_a_checkpoint(tmp_path: Path) -> None:
    destination = checkpoint(tmp_path / "made")
    with pytest.raises(CannotConvert, match="exists; name another folder or give --force"):
        folder_for(destination, is_forced=False).__enter__()
    with folder_for(destination) as folder:
        (folder / "config.json").write_text('{"model_type": "new"}')
    assert json.loads((destination / "config.json").read_text()) == {"model_type": "new"}
    assert os.listdir(tmp_path) == ["made"]
    (destination / "config.json").rename(destination / "holiday.txt")
    with pytest.raises(CannotConvert, match="is no folder with a checkpoint"):
        folder_for(destination).__enter__()


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(CannotConvert, match="bytes free, the checkpoint needs"):
        folder_for(tmp_path / "made", num_bytes=2**60, is_forced=False).__enter__()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("read", ["source", "link", "elsewhere/source"])
@pytest.mark.parametrize("to", ["source", "link", "elsewhere/source"])
def test_the_source_is_never_the_destination_whatever_links_lead_to_it(tmp_path: Path, read: str, to: str) -> None:
    checkpoint(tmp_path / "source")
    (tmp_path / "link").symlink_to("source")
    (tmp_path / "elsewhere").symlink_to(".")
    with pytest.raises(CannotConvert, match="is the source itself; name another folder"):
        new_folder(tmp_path / to, source=tmp_path / read, num_bytes=1, is_forced=True).__enter__()


def test_a_folder_around_the_source_or_within_it_is_no_destination(tmp_path: Path) -> None:
    outer = checkpoint(tmp_path / "outer")
    source = checkpoint(outer / "source")
    with pytest.raises(CannotConvert, match=r"the source lies inside .*outer; name another folder"):
        new_folder(outer, source=source, num_bytes=1, is_forced=True).__enter__()
    with pytest.raises(CannotConvert, match=r"int4 lies inside the source; name a folder outside it"):
        new_folder(source / "int4", source=source, num_bytes=1, is_forced=False).__enter__()


@pytest.mark.parametrize("foreign", ["thesis.tex", "runs/notes", "model.bin"])
def test_a_folder_that_holds_more_than_a_checkpoint_is_not_replaced(tmp_path: Path, foreign: str) -> None:
    destination = checkpoint(tmp_path / "made")
    for name in ("README.md", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"):
        (destination / name).touch()
    path = destination / foreign
    path.parent.mkdir(exist_ok=True)
    path.write_text("a year of work")
    first = foreign.split("/")[0]
    with pytest.raises(CannotConvert, match=f"made holds {first}, which is no file of a checkpoint and would be lost"):
        folder_for(destination).__enter__()
    assert path.read_text() == "a year of work"


@pytest.mark.parametrize("config", ["{}", "[]", "not JSON", '{"compilerOptions": {}}'])
def test_a_config_that_is_no_models_makes_no_checkpoint(tmp_path: Path, config: str) -> None:
    destination = tmp_path / "made"
    destination.mkdir()
    (destination / "config.json").write_text(config)
    with pytest.raises(CannotConvert, match="is no folder with a checkpoint"):
        folder_for(destination).__enter__()


@pytest.mark.parametrize("is_forced", [False, True])
def test_what_others_put_there_during_the_conversion_is_not_replaced(tmp_path: Path, is_forced: bool) -> None:
    destination = tmp_path / "made"

    def convert_while_others_write() -> None:
        with folder_for(destination, is_forced=is_forced):
            checkpoint(destination)
            (destination / "thesis.tex").touch()

    with pytest.raises(CannotConvert, match="exists" if not is_forced else r"holds thesis\.tex"):
        convert_while_others_write()
    assert os.listdir(tmp_path) == ["made"]
    assert (destination / "thesis.tex").exists()


def test_what_a_killed_run_left_is_removed_by_the_next_to_the_same_place(tmp_path: Path) -> None:
    destination = checkpoint(tmp_path / "made[1]")
    for name in (".made[1].partial-2", ".made[1].replaced-3", ".made1.partial-3"):
        checkpoint(tmp_path / name)
    checkpoint(tmp_path / f".made[1].partial-{os.getpid()}")  # of a container before, where it had the same pid
    (tmp_path / ".made[1].lock").touch()
    with folder_for(destination):
        pass
    assert sorted(os.listdir(tmp_path)) == [".made1.partial-3", "made[1]"]


def test_a_run_under_way_is_left_alone_by_another_one_to_the_same_place(tmp_path: Path) -> None:
    destination = checkpoint(tmp_path / "made")
    with folder_for(destination) as folder:
        (folder / "config.json").write_text('{"model_type": "new"}')
        with pytest.raises(CannotConvert, match=r"another run converts to .*made; wait for it or name"):
            folder_for(destination).__enter__()
        assert os.listdir(folder) == ["config.json"]
    assert json.loads((destination / "config.json").read_text()) == {"model_type": "new"}
    assert os.listdir(tmp_path) == ["made"]


def test_a_lock_whose_file_its_owner_removed_meanwhile_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / ".made.lock"
    monkeypatch.setattr(destination_module, "flock", lambda file, how: lock.unlink())
    with pytest.raises(CannotConvert, match="another run converts to"):
        folder_for(tmp_path / "made").__enter__()


def test_nothing_is_removed_where_no_file_can_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: object, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(destination_module, "flock", flock)
    checkpoint(tmp_path / ".made.partial-3")
    with folder_for(tmp_path / "made"):
        pass
    assert ".made.partial-3" in os.listdir(tmp_path)
    assert (tmp_path / "made").is_dir()


def test_what_was_set_aside_stays_where_nothing_has_taken_its_place(tmp_path: Path) -> None:
    checkpoint(tmp_path / ".made.replaced-3")
    with folder_for(tmp_path / "made"):
        pass
    assert sorted(os.listdir(tmp_path)) == [".made.replaced-3", "made"]


@pytest.mark.parametrize("place", ["file/made", "file/deeper/made"])
def test_a_place_within_a_file_is_refused_in_words(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CannotConvert, match="is no folder; name another place for made"):
        folder_for(tmp_path / place).__enter__()
