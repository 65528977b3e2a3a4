"""Kept features: exact round trips, what makes them anew, what is refused; two processes keep what one does."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from sde.data import DATASETS, Order
from sde.errors import UserError
from sde.evaluation import digests
from sde.evaluation.digests import digest_of_examples
from sde.evaluation.extractors import Examples, Extractor, Features, Random
from sde.evaluation.reference import (
    Reference,
    choose,
    extract,
    open_reference,
    read_reference,
    read_statistics,
    reference,
    write_reference,
    write_statistics,
)
from tests.distributed_worker import Worlds
from tests.pictures_of_shapes import Bars

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SDE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that extractors are called with."""
    sizes: list[int] = []
    call = Extractor.__call__

    def counted(self: Extractor, values: Tensor) -> Features:
        sizes.append(len(values))
        return call(self, values)

    monkeypatch.setattr(Extractor, "__call__", counted)
    return sizes


def made(dataset: Bars | None = None, seed: int = 0, **options: Any) -> Reference:
    options = {"split": "train", "batch_size": 64} | options
    dataset = Bars() if dataset is None else dataset
    return reference(dataset, extractor=Random(seed=seed), device=CPU, **options)


# What is kept


def test_features_in_batches_are_those_of_all_at_once() -> None:
    extractor, dataset = Random(), Bars(channels=3)
    extractor.prepare(dataset, CPU)
    values = dataset.split("train").values
    whole = extractor(values).features
    for batch_size in (7, 64, 1000):
        found = extract(extractor, lambda rows: values[rows.start : rows.stop], len(values), batch_size)
        assert found.probabilities is None
        assert float((found.features - whole).abs().max()) <= 1e-6 * float(whole.abs().max())


def test_vectors_come_back_as_they_are() -> None:
    dataset = DATASETS.get("gaussians")(train_size=1000, test_size=10)  # type: ignore[call-arg]
    found = reference(dataset, "train", Examples(), CPU, 64)
    assert torch.equal(found.features, dataset.split("train").values)
    some = reference(dataset, "train", Examples(), CPU, 64, n=100, seed=3)
    chosen = np.sort(Order(1000, 100, 3).shuffle(0)[:100])
    assert torch.equal(some.features, dataset.split("train").values[chosen])
    assert (some.about["n"], some.about["of"], some.about["seed"]) == (100, 1000, 3)


def test_features_are_found_once(calls: list[int], cache: Path) -> None:
    first = made()
    assert sum(calls) == 300
    again = made(batch_size=50)
    assert sum(calls) == 300
    assert torch.equal(again.features, first.features)
    assert (again.key, again.about) == (first.key, first.about)
    assert len(list(cache.glob("features-*.safetensors"))) == 1


def test_whatever_numbers_depend_on_makes_them_anew(calls: list[int]) -> None:
    keys = [made().key]
    changed = Bars()
    changed.split("train").values[299, 0, 11, 11] ^= 1
    swapped = Bars()
    swapped.split("train").values[:2] = swapped.split("train").values[:2].flip(0)
    others: list[dict[str, Any]] = [
        {"dataset": changed},
        {"dataset": swapped},
        {"dataset": Bars(channels=3)},
        {"split": "test"},
        {"seed": 1},
        {"n": 200},
    ]
    for options in others:
        before = sum(calls)
        keys.append(made(**options).key)
        assert sum(calls) - before == {"test": 60}.get(options.get("split", ""), options.get("n", 300))
    assert len(set(keys)) == len(keys) == 7
    before = sum(calls)
    assert made(n=300).key == keys[0]  # all of them, in their order
    assert sum(calls) == before


@pytest.mark.parametrize("how", ["a byte", "the end", "nothing left", "another"])
def test_a_damaged_cache_is_made_again_silently(how: str, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = made()
    (path,) = cache.glob("features-*.safetensors")
    content = path.read_bytes()
    if how == "another":
        write_reference(path, made(seed=1))
    else:
        flipped = content[:-9] + bytes([content[-9] ^ 4]) + content[-8:]
        path.write_bytes({"a byte": flipped, "the end": content[:-9], "nothing left": b""}[how])
    capsys.readouterr()
    assert torch.equal(made().features, first.features)
    assert "error" not in capsys.readouterr().err
    assert path.read_bytes() == content


def test_an_interrupted_search_keeps_nothing(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    call = Extractor.__call__

    def interrupted(self: Extractor, values: Tensor) -> Features:
        if len(values) < 64:  # the last batch
            raise KeyboardInterrupt
        return call(self, values)

    monkeypatch.setattr(Extractor, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made()
    assert not list(cache.rglob("*features*"))


def test_two_processes_keep_the_file_of_one(tmp_path: Path) -> None:
    """Bit for bit, since batches are the same."""
    (tmp_path / "job.py").write_text(
        textwrap.dedent(
            """
            import torch
            from sde.distributed import is_main, join, leave
            from sde.evaluation.classifier import Classifier
            from sde.evaluation.reference import reference
            from tests.pictures_of_shapes import Bars

            def main():
                join()
                extractor = Classifier(width=4, steps=20, batch_size=16)
                found = reference(Bars(), "train", extractor, torch.device("cpu"), 32)
                again = reference(Bars(), "train", extractor, torch.device("cpu"), 32)
                assert torch.equal(found.features, again.features) or not is_main()
                print(len(found), found.key, extractor.identity())
                leave()
            """
        )
    )
    worlds = Worlds(tmp_path)
    said, files = {}, {}
    try:
        for size in (1, 2):
            own = tmp_path / f"cache-{size}"
            answers = worlds.command(size, "job", folder=tmp_path, environment={"SDE_CACHE": str(own)})
            assert [code for code, *_ in answers] == [0] * size, answers
            said[size] = [out.split() for _, out, _ in answers]
            files[size] = [path.read_bytes() for path in sorted(own.rglob("*.safetensors"))]
    finally:
        worlds.close()
    assert files[1] == files[2]
    assert len(files[1]) == 2
    assert [int(words[0]) for words in said[2]] == [300, 0]  # rank 0 alone has them
    assert {tuple(words[1:]) for words in said[1] + said[2]} == {tuple(said[1][0][1:])}


# Which examples


def test_examples_are_chosen_by_the_seed() -> None:
    assert choose(10, None, 0) is None
    assert choose(10, 10, 5) is None
    one, two = choose(100, 30, 0), choose(100, 30, 1)
    assert one is not None
    assert two is not None
    assert one.tolist() == sorted(set(one.tolist()))
    assert one.tolist() != two.tolist()
    for n in (0, 11, 2.5):
        with pytest.raises(UserError, match=f"n={n}"):
            choose(10, n, 0)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="has no examples"):
        choose(0, None, 0)


def test_a_digest_is_of_all_bytes_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randint(0, 256, (50, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = digest_of_examples(x)
    assert whole == digest_of_examples(x, torch.arange(50))
    assert whole == digest_of_examples(x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2))
    others = [
        x.flip(0),
        x[:49],
        x.reshape(50, 3, 2, 8),
        x.view(torch.int8),
        x ^ (torch.arange(50 * 48) == 2399).view(x.shape),
    ]
    assert whole not in {digest_of_examples(other) for other in others}
    chosen = torch.tensor([3, 1, 40])
    assert digest_of_examples(x, chosen) == digest_of_examples(x[chosen]) != digest_of_examples(x, chosen.flip(0))
    monkeypatch.setattr(digests, "_BLOCK", 100)  # two examples
    assert digest_of_examples(x) == whole
    assert digest_of_examples(x, chosen) == digest_of_examples(x[chosen])


# Files that the user names


def test_a_reference_is_read_as_it_was_written(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    features, probabilities = torch.randn(9, 4, generator=generator), torch.rand(9, 3, generator=generator)
    found = made()
    for given in (probabilities, None):
        path = tmp_path / "given.safetensors"
        write_reference(path, Reference(features, given, found.key, found.about))
        read = read_reference(path)
        assert torch.equal(read.features, features)
        assert read.probabilities is given or torch.equal(read.probabilities, probabilities)  # type: ignore[arg-type]
        assert (read.key, read.about) == (found.key, found.about)


def test_a_file_that_fits_is_opened(tmp_path: Path) -> None:
    path, dataset = tmp_path / "given.safetensors", Bars()
    for options in ({}, {"n": 100}, {"n": 100, "choice": 2}):
        found = reference(dataset, "train", ready(Random()), CPU, 64, options.get("n"), options.get("choice", 0))
        write_reference(path, found)
        opened = open_reference(path, ready(Random()), dataset, "train")
        assert torch.equal(opened.features, found.features)


def ready(extractor: Extractor) -> Extractor:
    extractor.prepare(Bars(), CPU)
    return extractor


def test_a_file_that_does_not_fit_is_refused_with_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "given.safetensors"
    write_reference(path, made())
    changed = Bars()
    changed.split("train").values[0, 0, 0, 0] ^= 1
    of_test = "300 of 300 examples of the train split of bars, and here are 60 examples of the test split"
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: open_reference(path, ready(Examples())), "holds features=random and these are features=none"),
        (lambda: open_reference(path, ready(Random(seed=1))), "by another features=random .its options, weights"),
        (lambda: open_reference(path, ready(Random()), Bars(), "test"), of_test),
        (lambda: open_reference(path, ready(Random()), Bars(train=99)), "and here are 99 examples of the train split"),
        (lambda: open_reference(path, ready(Random()), changed), "whose pixels or values are not those of the 300"),
        (lambda: read_reference(tmp_path / "none"), "does not exist"),
    ]
    for act, match in cases:
        with pytest.raises(UserError, match=match):
            act()


def test_damaged_files_are_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "given.safetensors"
    write_reference(path, made())
    content = path.read_bytes()
    path.write_bytes(content[:-9] + bytes([content[-9] ^ 4]) + content[-8:])
    with pytest.raises(UserError, match="its numbers are not those that were written"):
        read_reference(path)
    for bad in (content[:-4], content[:20], b"", b"\xff" * 100):
        path.write_bytes(bad)
        with pytest.raises(UserError, match="is damaged or holds no features of this package"):
            read_reference(path)
    for header in (None, {"reference": "[]"}, {"reference": "{}"}, {"reference": "x"}):
        safetensors.torch.save_file({"features": torch.zeros(1, 1)}, path, header)
        with pytest.raises(UserError, match="is damaged or holds no features of this package"):
            read_reference(path)
    later = content.replace(b'\\"version\\": 1', b'\\"version\\": 7')
    assert later != content
    path.write_bytes(later)
    with pytest.raises(UserError, match="has version 7 and this package reads 1"):
        read_reference(path)


# Statistics of others


def test_statistics_are_those_of_numpy(tmp_path: Path) -> None:
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)) * 3 + 100
    path = tmp_path / "statistics.npz"
    write_statistics(path, x)
    with np.load(path, allow_pickle=False) as arrays:
        mu, sigma = arrays["mu"], arrays["sigma"]
    assert mu.dtype == sigma.dtype == np.float64
    wide = x.double().numpy()
    np.testing.assert_allclose(mu, wide.mean(0), rtol=1e-14)
    # centered sums of 500 products; the mean of 100 costs no digits
    np.testing.assert_allclose(sigma, np.cov(wide, rowvar=False), rtol=0, atol=500 * 2**-52 * np.cov(wide.T).max())
    read = read_statistics(path, dimensions=6)
    assert np.array_equal(read.mean, mu)
    assert np.array_equal(read.covariance, (sigma + sigma.T) / 2)
    assert "cannot be checked" in read.note


def test_statistics_in_float32_are_read(tmp_path: Path) -> None:
    path = tmp_path / "edm.npz"
    sigma = np.cov(np.random.default_rng(0).normal(size=(3, 50))).astype(np.float32)
    np.savez(path, mu=np.arange(3, dtype=np.float32), sigma=sigma, extra=np.zeros(4))
    read = read_statistics(path)
    assert read.mean.tolist() == [0, 1, 2]
    assert read.covariance.dtype == torch.float64
    assert np.array_equal(read.covariance.float(), sigma)


def test_statistics_that_are_none_are_refused(tmp_path: Path) -> None:
    mu, sigma = np.zeros(3), np.eye(3)
    crooked = sigma + np.triu(np.ones((3, 3)), 1)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"mu": mu}, "has mu, not mu and sigma"),
        ({"mu": mu, "sigma": np.eye(4)}, r"mu of shape \(3,\) and sigma of \(4, 4\)"),
        ({"mu": mu * np.nan, "sigma": sigma}, "not finite"),
        ({"mu": mu, "sigma": crooked}, "not symmetric"),
        ({"mu": np.array([{}, 1, 2], dtype=object), "sigma": sigma}, "is damaged or is not an .npz file of arrays"),
    ]
    path = tmp_path / "bad.npz"
    for arrays, match in cases:
        np.savez(path, **arrays)
        with pytest.raises(UserError, match=match):
            read_statistics(path)
    np.savez(path, mu=mu, sigma=sigma)
    with pytest.raises(UserError, match="has 3 dimensions and the features have 5"):
        read_statistics(path, dimensions=5)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"is damaged or is not an \.npz file"):
        read_statistics(path)
    for name, match in (("none.npz", "does not exist"), ("x.pkl", "a .pkl can run code")):
        if name == "x.pkl":
            (tmp_path / name).touch()
        with pytest.raises(UserError, match=match):
            read_statistics(tmp_path / name)
    with pytest.raises(UserError, match="1 examples have no covariance"):
        write_statistics(path, torch.zeros(1, 3))
