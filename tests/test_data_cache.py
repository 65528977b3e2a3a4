"""The cache: where it is, that files appear whole or not at all, and that downloads are what was published."""

import gzip
import hashlib
import io
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

from sde.data import cache, prepared
from sde.data.base import DataInfo
from sde.data.download import fetch
from sde.errors import UserError


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SDE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache.cache_dir() == tmp_path / ".cache" / "sde"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_dir() == tmp_path / "xdg" / "sde"
    monkeypatch.setenv("SDE_CACHE", "~/mine")
    assert cache.cache_dir() == tmp_path / "mine"


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/below.*cannot be written.*SDE_CACHE"):
        cache.make_folder(tmp_path / "file" / "below")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the administrator may write anywhere")
def test_a_folder_without_permission_is_a_sentence(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"permission.*SDE_CACHE"):
        cache.make_folder(tmp_path / "below")


def test_a_file_that_fails_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file"
    with pytest.raises(ZeroDivisionError), cache.new_file(target) as temporary:
        temporary.write_text(f"half {1 / 0}")
    assert list(target.parent.iterdir()) == []
    with cache.new_file(target) as temporary:
        temporary.write_text("whole")
        assert not target.exists()
    assert target.read_text() == "whole"
    assert list(target.parent.iterdir()) == [target]


def test_a_full_disk_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be written \(No space left"), cache.new_file(tmp_path / "file"):
        raise OSError(28, "No space left on device")
    with pytest.raises(UserError, match=r"cannot be written \(No space left"), cache.new_folder(tmp_path / "folder"):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_the_first_of_two_folders_wins(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    with cache.new_folder(target) as late:
        (late / "who").write_text("late")
        with cache.new_folder(target) as early:
            (early / "who").write_text("early")
    assert (target / "who").read_text() == "early"
    assert list(tmp_path.iterdir()) == [target]


def test_keys_tell_values_apart() -> None:
    assert cache.key([1, None], "a") == cache.key([1, None], "a")
    keys = {cache.key(*parts) for parts in ([1], ["1"], [1.0], [True], [None], [[1]], [1, 1], ["Ж"], ["й"])}
    assert len(keys) == 9
    assert cache.key("glyphs", 1) == hashlib.sha256(b'["glyphs", 1]').hexdigest()[:16]


def _prepare(folder: Path) -> DataInfo:
    labels = np.arange(5)
    writer = prepared.SplitWriter(folder, np.array([False, True, False, True, False]), (1, 2, 2), labels)
    for i in reversed(range(5)):
        writer.write(i, np.full((1, 2, 2), i, dtype=np.uint8))
    writer.close()
    return DataInfo("five", (1, 2, 2), 5)


def test_prepared_data_is_made_once_and_again_when_damaged(tmp_path: Path) -> None:
    folder = tmp_path / "five"
    data = prepared.load_or_prepare(folder, _prepare)
    train, test = data.split("train", ""), data.split("test", "")
    assert train.labels is not None
    assert test.labels is not None
    assert (train.values[:, 0, 0, 0].tolist(), train.labels.tolist()) == ([0, 2, 4], [0, 2, 4])
    assert (test.values[:, 0, 1, 1].tolist(), test.labels.tolist()) == ([1, 3], [1, 3])

    def never(_: Path) -> DataInfo:
        raise AssertionError

    assert prepared.load_or_prepare(folder, never).info == data.info
    train.values.zero_()  # writing to what a split gives never reaches the file
    assert prepared.load_or_prepare(folder, never).split("train", "").values.max() == 4
    (folder / "train.npy").write_bytes(b"damaged")
    assert prepared.load_or_prepare(folder, _prepare).split("train", "").values.max() == 4
    (folder / "index.json").write_text("[]")
    assert prepared.load_or_prepare(folder, _prepare).split("train", "").values.max() == 4


def test_a_shared_cache_may_be_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared.load_or_prepare(tmp_path / "five", _prepare)

    def refuse(_: Path) -> None:
        raise UserError("read-only")

    monkeypatch.setattr(prepared, "locked", refuse)
    assert len(prepared.load_or_prepare(tmp_path / "five", _prepare).split("test", "")) == 2


def test_a_split_that_is_missing_is_a_sentence(tmp_path: Path) -> None:
    def prepare(folder: Path) -> DataInfo:
        writer = prepared.SplitWriter(folder, np.array([False]), (1, 1, 1), None)
        writer.write(0, np.zeros((1, 1, 1), dtype=np.uint8))
        return DataInfo("one", (1, 1, 1))

    data = prepared.load_or_prepare(tmp_path / "one", prepare)
    assert data.split("train", "").labels is None
    with pytest.raises(UserError, match="'one' has no test split: do this"):
        data.split("test", "do this")
    with pytest.raises(UserError, match="did you mean 'train'"):
        data.split("training", "")


def _prepare_in_process(folder: Path) -> int:
    return int(prepared.load_or_prepare(folder, _prepare).split("train", "").values.sum())


def test_processes_that_prepare_the_same_data_agree(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        sums = pool.map(_prepare_in_process, [tmp_path / "five"] * 6, chunksize=1)
    assert sums == [4 * 6] * 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["five", "five.lock"]


@pytest.mark.parametrize(
    ("n", "fraction", "count"), [(100, 0.1, 10), (100, 0.0, 0), (3, 0.1, 1), (3, 0.9, 2), (1, 0.5, 0)]
)
def test_held_out_examples(n: int, fraction: float, count: int) -> None:
    names = [f"{i}.png" for i in range(n)]
    chosen = prepared.held_out(names, fraction, 0)
    assert chosen.sum() == count
    # the choice goes with the name, not with the place
    assert (prepared.held_out(names[::-1], fraction, 0) == chosen[::-1]).all()


def test_held_out_examples_depend_on_the_seed_and_hardly_on_the_others() -> None:
    names = [f"{i}.png" for i in range(1000)]
    chosen = prepared.held_out(names, 0.1, 0)
    assert (prepared.held_out(names, 0.1, 1) != chosen).any()
    # 900 of the 1000: their threshold moves by the noise of 100 draws
    assert (prepared.held_out(names[:900], 0.1, 0) != chosen[:900]).sum() < 20
    expected = sorted(names, key=lambda name: hashlib.sha256(f"0:{name}".encode()).digest())[:100]
    assert {name for name, held in zip(names, chosen, strict=True) if held} == set(expected)


CONTENT = b"what was published" * 1000


def _gunzip(path: Path) -> io.BytesIO:
    return io.BytesIO(gzip.decompress(path.read_bytes()))


def _url(path: Path) -> str:
    return path.as_uri()


def test_fetch_takes_the_first_mirror_with_the_right_content(tmp_path: Path) -> None:
    wrong, right, target = tmp_path / "wrong", tmp_path / "right", tmp_path / "new" / "file"
    wrong.write_bytes(CONTENT[:-1])
    right.write_bytes(CONTENT)
    urls = [_url(tmp_path / "absent"), _url(wrong), _url(right)]
    assert fetch(target, urls, hashlib.sha256(CONTENT).hexdigest()).read_bytes() == CONTENT
    assert sorted(path.name for path in target.parent.iterdir()) == ["file", "file.lock"]
    target.write_bytes(b"mine")
    assert fetch(target, [], "").read_bytes() == b"mine"  # what is there is not replaced


def test_fetch_checks_what_is_in_a_compressed_file(tmp_path: Path) -> None:
    source, damaged = tmp_path / "source.gz", tmp_path / "damaged.gz"
    source.write_bytes(gzip.compress(CONTENT, 1))
    damaged.write_bytes(gzip.compress(CONTENT, 9)[:-9])
    target = tmp_path / "target.gz"
    digest = hashlib.sha256(CONTENT).hexdigest()
    fetch(target, [_url(damaged), _url(source)], digest, _gunzip)
    assert target.read_bytes() == source.read_bytes()


def test_fetch_that_fails_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_bytes(b"an error page")
    target = tmp_path / "new" / "file"
    with pytest.raises(UserError, match=r"No such file.*wrong checksum.*by hand.*new") as caught:
        fetch(target, [_url(tmp_path / "absent"), _url(wrong)], hashlib.sha256(CONTENT).hexdigest())
    assert "\n" not in str(caught.value)
    assert [path.name for path in target.parent.iterdir()] == ["file.lock"]


class _Cut:
    """An answer that ends before its announced length."""

    headers = {"Content-Length": "100"}  # noqa: RUF012

    def __init__(self) -> None:
        self._blocks = [b"half", b""]

    def read(self, _: int) -> bytes:
        return self._blocks.pop(0)

    def __enter__(self) -> "_Cut":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def test_fetch_notices_a_connection_that_was_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: _Cut())
    with pytest.raises(UserError, match="ended after 4 of 100 bytes"):
        fetch(tmp_path / "file", ["http://example.invalid/file"], "")
