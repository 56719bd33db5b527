"""Hot rows: the same bits with and without, never a row of another table, kept only where they help."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from tokenizers import Tokenizer

from engram import Progress
from engram.builders.corpus import CorpusConfig
from engram.builders.process_memory import cached_bytes, cached_share, forget_cached, is_mapped
from engram.quantize.package import ExportConfig, Package, export_package, open_package
from engram.quantize.tables import QuantizeConfig, quantize
from engram.quantize.verify import verify_package
from engram.runtime import hot_rows, warm
from engram.runtime.engine import Model
from engram.runtime.generate import RunConfig, run
from engram.runtime.hot_rows import HotRows, HotRowsError
from engram.runtime.reader import RowReader
from engram.runtime.warm import RowCounts, WarmConfig

TEXT = "".join(f"{tiny.TEXT} Number {i} of the rows. " for i in range(12))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = tiny.write_checkpoint(tmp_path_factory.mktemp("tiny"), rows_per_head=3001)
    quantize(QuantizeConfig(checkpoint=checkpoint, out=checkpoint.parent / "q", tables="int8"))
    export_package(ExportConfig(source=checkpoint.parent / "q", out=checkpoint.parent / "package"))
    return checkpoint.parent / "package"


@pytest.fixture
def folder(made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A package without hot rows, and a cache folder of the test's own."""
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hot_rows, "cached_share", lambda path: 0.5)  # so small a table is always in the page cache
    with open_package(made) as package:
        hot_rows.drop(package)
    return made


@pytest.fixture
def text(tmp_path: Path) -> CorpusConfig:
    (tmp_path / "text.txt").write_text(TEXT)
    return CorpusConfig((str(tmp_path / "text.txt"),))


def rows_of(package: Package, seed: int = 0, shape: tuple[int, int, int] = (2, 50, 4)) -> dict[int, Any]:
    generator = np.random.default_rng(seed)
    return {n: generator.integers(0, table.rows, shape) for n, table in package.layers.items()}


def keep(package: Package, chosen: dict[int, Any], folder: Path) -> None:
    """Write hot rows without measuring them."""
    folder.mkdir(parents=True, exist_ok=True)
    with open_package(package.folder) as source:  # what it reads does not count as asked for in `package`
        warm._write(source, {n: np.unique(rows) for n, rows in chosen.items()}, folder)


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements in which hot rows help, whatever the disk of the day does."""
    measured = warm._trial

    def trial(folder: Path, hot: Path | None, requests: list[Any]) -> tuple[float, dict[str, int]]:
        return (0.5 if hot else 1.0), measured(folder, hot, requests)[1]

    monkeypatch.setattr(warm, "_trial", trial)


def test_memory_is_the_same_with_and_without(folder: Path) -> None:
    with open_package(folder) as package, open_package(folder) as other:
        rows = rows_of(package)
        keep(package, {n: ids[:, ::2] for n, ids in rows.items()}, folder / "hot")
        plain, hot = RowReader(package), RowReader(other, hot=hot_rows.load_all(other, folder / "hot"))
        for seed in (0, 1, 0):
            rows = rows_of(package, seed)
            expected, got = plain.ask(rows), hot.ask(rows)
            for n in (3, 1, 3):
                poisoned = np.full((2, 50, 32), np.nan, dtype=np.float32)
                assert hot.take(got, n, out=poisoned).tobytes() == plain.take(expected, n).tobytes()
                as_bf16 = np.full((2, 50, 32), 0xFFFF, dtype=np.uint16)
                assert hot.take(got, n, out=as_bf16).tobytes() == plain.take(expected, n, as_bf16.copy()).tobytes()
        counters = hot.counters()
        assert counters["rows_hot"] > 0 and counters["rows_read"] > 0
        assert counters["rows_hot"] + counters["rows_read"] == 2 * 3 * 3 * 400


def test_hot_rows_spare_the_device_and_leave_pages_that_were_asked_for_to_the_table(folder: Path) -> None:
    with open_package(folder) as package:
        per_page = 4096 // package.layers[1].row_bytes
        keep(package, {1: np.arange(10)}, folder / "hot")
        reader = RowReader(package, hot=hot_rows.load_all(package, folder / "hot"))
        reader.take(reader.ask({1: np.array([[[3, 9, 3]]])}), 1)
        nothing = {"rows_read": 0, "bytes_read": 0, "pages_read": 0}
        assert reader.counters() == {"rows_asked": 3, "rows_hot": 3} | nothing
        reader.take(reader.ask({1: np.array([[[3, 10, per_page]]])}), 1)  # 10 and the next page are the table's
        assert (reader.counters()["rows_hot"], reader.counters()["pages_read"]) == (4, 2)
        reader.take(reader.ask({1: np.array([[[3, 10, 9]]])}), 1)  # their page is in memory now
        assert (reader.counters()["rows_hot"], reader.counters()["pages_read"]) == (4, 2)


def test_past_the_page_cache_every_kept_row_is_served(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_package(folder) as package:
        table = package.layers[1]
        monkeypatch.setattr(table, "io", "uring")
        hot = HotRows(table, np.arange(10), table.gather(np.arange(10)))
        for _ in range(2):
            split = hot.split(np.array([10, 3, 11]))
            assert split is not None
            assert (split.hot_N.tolist(), split.kept_N.tolist(), split.cold_N.tolist()) == ([1], [3], [0, 2])


def test_the_command_counts_measures_and_keeps(folder: Path, text: CorpusConfig, faster: None) -> None:
    result = warm.warm(WarmConfig(folder, text, size=40_000))
    assert result["kept"] and result["out"] == str(folder / "hot") and 0 < result["bytes"] <= 41_000
    assert 0 < result["lookups_served"] <= 1
    assert result["cold_seconds"] == {"without": 1.0, "with": 0.5} and result["seconds_saved"] == 0.5
    assert verify_package(folder)["ok"]
    assert not [path for path in folder.iterdir() if path.name.startswith(".hot-")]
    with open_package(folder) as package:
        kept = hot_rows.load_all(package, folder / "hot")
        assert {n: len(hot.rows_U) for n, hot in kept.items()} == result["rows"]
        for n, hot in kept.items():
            assert hot.bytes_UK.tobytes() == package.layers[n].gather(hot.rows_U).tobytes()
    model = Model.open(folder)
    assert model.reader.hot.keys() == result["rows"].keys()
    model.close()
    hot_text = run(RunConfig(folder, prompt=tiny.TEXT, max_tokens=20), lambda piece: None)
    assert hot_text["rows_hot"] > 0
    assert warm.drop(folder) == {"removed": [str(folder / "hot")]}
    plain = run(RunConfig(folder, prompt=tiny.TEXT, max_tokens=20), lambda piece: None)
    assert plain["rows_hot"] == 0 and plain["token_ids"] == hot_text["token_ids"]
    assert warm.drop(folder) == {"removed": []}


def test_a_table_that_is_in_memory_needs_no_hot_rows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_package(folder) as package:
        keep(package, rows_of(package), folder / "hot")
        assert hot_rows.for_reader(package).keys() == {1, 3}
        monkeypatch.setattr(hot_rows, "cached_share", lambda path: None)  # a system that does not tell
        assert hot_rows.for_reader(package).keys() == {1, 3}
        monkeypatch.setattr(hot_rows, "cached_share", lambda path: 0.95)
        assert hot_rows.for_reader(package) == {}


def test_hot_rows_count_towards_the_bound_on_resident_tables(folder: Path) -> None:
    with open_package(folder) as package:
        keep(package, rows_of(package), folder / "hot")
    size = sum(path.stat().st_size for path in (folder / "hot").iterdir())
    for bound, used in ((2 * size, True), (2 * size - 2, False)):
        model = Model.open(folder, cache_bytes=bound)
        assert bool(model.reader.hot) == used and model.reader.budget is not None
        held = sum(hot.bytes_UK.nbytes for hot in model.reader.hot.values())
        assert model.reader.budget.limit == bound - held
        model.close()


def test_what_does_not_help_is_removed(
    folder: Path, text: CorpusConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "hot").mkdir()
    counters = {"rows_hot": 9, "rows_asked": 10}
    monkeypatch.setattr(warm, "_trial", lambda folder, hot, trial: (0.91 if hot else 1.0, counters))
    result = warm.warm(WarmConfig(folder, text))
    assert not result["kept"] and result["out"] is None
    assert not [path for path in folder.iterdir() if "hot" in path.name], "an older one goes too: it was not shown"


def test_an_interrupted_command_leaves_nothing(
    folder: Path, text: CorpusConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(warm, "_trial", interrupt)
    before = sorted(folder.rglob("*"))
    with pytest.raises(KeyboardInterrupt):
        warm.warm(WarmConfig(folder, text))
    assert sorted(folder.rglob("*")) == before


def test_a_package_that_cannot_be_written_to_keeps_them_in_the_cache_folder(
    folder: Path, text: CorpusConfig, faster: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = warm.tempfile.mkdtemp

    def read_only(*, prefix: str, dir: Path) -> str:
        if dir == folder:
            raise PermissionError("read-only")
        return str(made(prefix=prefix, dir=dir))

    monkeypatch.setattr(warm.tempfile, "mkdtemp", read_only)
    result = warm.warm(WarmConfig(folder, text))
    assert Path(result["out"]).parent == tmp_path / "cache" / "hot"
    model = Model.open(folder)
    assert model.reader.hot
    model.close()
    assert warm.drop(folder)["removed"] == [result["out"]]


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the page cache cannot be emptied here")
def test_the_measurement_is_cold(folder: Path, text: CorpusConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    result = warm.warm(WarmConfig(folder, text))
    assert all(seconds > 0 for seconds in result["cold_seconds"].values())
    monkeypatch.setattr(warm, "cached_bytes", lambda path: 1 << 30)
    with pytest.raises(HotRowsError, match="cannot be measured cold"):
        warm.warm(WarmConfig(folder, text))


def damage(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("place", [-1, -2000, 3, 12, 40, 100, 200, 320])
def test_a_damaged_file_is_refused(folder: Path, place: int) -> None:
    with open_package(folder) as package:
        keep(package, rows_of(package), folder / "hot")
        damage(folder / "hot" / "layer-01.safetensors", place)
        with pytest.raises(HotRowsError, match="layer-01.safetensors") as caught:
            hot_rows.load_all(package, folder / "hot")
    assert "engram warm" in caught.value.hint


@pytest.mark.parametrize("bytes_left", [0, 7, 100, 5000])
def test_a_truncated_file_is_refused(folder: Path, bytes_left: int) -> None:
    with open_package(folder) as package:
        keep(package, rows_of(package), folder / "hot")
        os.truncate(folder / "hot" / "layer-03.safetensors", bytes_left)
        with pytest.raises(HotRowsError, match="layer-03.safetensors"):
            hot_rows.load_all(package, folder / "hot")


def test_rows_of_another_table_are_refused(folder: Path) -> None:
    with open_package(folder) as package:
        keep(package, rows_of(package), folder / "hot")
        seal = str(package.manifest["tables"]["1"]["seal"])
        with pytest.raises(HotRowsError, match="holds rows of another table"):
            hot_rows.load(folder / "hot" / "layer-01.safetensors", package.layers[1], "0" * 64)
        with pytest.raises(HotRowsError, match="holds rows of another table"):
            hot_rows.load(folder / "hot" / "layer-01.safetensors", package.layers[3], seal)
    (folder / "hot" / "layer-01.safetensors").replace(folder / "hot" / "layer-03.safetensors")
    with pytest.raises(HotRowsError, match="holds rows of another table"):
        Model.open(folder)


@pytest.mark.parametrize("ids", [[5, 5], [7, 6], [-1, 2], [0, 1 << 40], []])
def test_row_ids_that_make_no_sense_are_refused(folder: Path, ids: list[int]) -> None:
    with open_package(folder) as package:
        table, seal = package.layers[1], str(package.manifest["tables"]["1"]["seal"])
        path = folder / "odd.safetensors"
        content = np.zeros((len(ids), table.row_bytes), np.uint8)
        hot_rows.save(path, np.array(ids, dtype=np.int64), content, layer=1, seal=seal)
        with pytest.raises(HotRowsError, match="must name at least one row, ascending"):
            hot_rows.load(path, table, seal)
        path.unlink()


def test_another_version_is_refused(folder: Path) -> None:
    with open_package(folder) as package:
        keep(package, rows_of(package), folder / "hot")
        path = folder / "hot" / "layer-01.safetensors"
        path.write_bytes(path.read_bytes().replace(b'"version":"1"', b'"version":"2"'))
        with pytest.raises(HotRowsError, match="has format engram-hot-rows 2, expected engram-hot-rows 1"):
            hot_rows.load_all(package, folder / "hot")


def test_the_file_opens_in_the_safetensors_library(folder: Path) -> None:
    from safetensors.numpy import load_file

    with open_package(folder) as package:
        chosen = rows_of(package)
        keep(package, chosen, folder / "hot")
        tensors = load_file(folder / "hot" / "layer-01.safetensors")
        assert tensors["rows"].tolist() == np.unique(chosen[1]).tolist()
        assert tensors["bytes"].tobytes() == package.layers[1].gather(np.unique(chosen[1])).tobytes()


def test_the_golden_file_is_what_is_written(tmp_path: Path) -> None:
    golden = Path(__file__).parent / "golden" / "hot-rows.safetensors"
    values = np.arange(15, dtype=np.uint8).reshape(3, 5)
    hot_rows.save(tmp_path / "hot", np.array([2, 3, 1 << 40]), values, layer=7, seal="ab" * 32)
    assert (tmp_path / "hot").read_bytes() == golden.read_bytes()


def test_reading_past_the_page_cache_always_has_use_for_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hot_rows, "cached_share", lambda path: 0.95)
    with open_package(folder) as package:
        keep(package, rows_of(package), folder / "hot")
        assert hot_rows.for_reader(package) == {}
        monkeypatch.setattr(package.layers[3], "io", "uring")
        assert hot_rows.for_reader(package).keys() == {1, 3}


def test_counts_are_exact_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    rows = generator.zipf(1.3, 20_000) % 5000
    monkeypatch.setattr(warm, "_WAITING", 1000)
    counts = RowCounts()
    for part in np.split(rows.reshape(40, 500), 40):
        counts.add(part)
    counts.settle()
    expected = np.unique(rows, return_counts=True)
    assert np.array_equal(counts.rows_U, expected[0]) and np.array_equal(counts.counts_U, expected[1])
    monkeypatch.setattr(warm, "_MOST", 50)
    counts.add(np.array([4999]))
    counts.settle()
    assert len(counts.rows_U) == 50 and (np.diff(counts.rows_U) > 0).all()
    assert counts.counts_U.sum() >= np.sort(expected[1])[-50:].sum()


def test_the_rows_read_most_are_chosen_within_the_size() -> None:
    counts = {1: RowCounts(), 3: RowCounts()}
    counts[1].add(np.array([9, 9, 9, 4, 4, 2]))
    counts[3].add(np.array([8, 8, 8, 8, 7, 7]))
    for count in counts.values():
        count.settle()
    chosen = warm.choose(counts, {1: 92, 3: 192}, 400)
    assert {n: rows.tolist() for n, rows in chosen.items()} == {1: [4, 9], 3: [8]}
    with pytest.raises(HotRowsError, match="reads no row twice"):
        warm.choose(counts, {1: 92, 3: 192}, 100)


def test_text_that_is_too_short_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a")
    with pytest.raises(HotRowsError, match="too few"):
        warm.warm(WarmConfig(folder, CorpusConfig((str(tmp_path / "short.txt"),))))
    with pytest.raises(HotRowsError, match="at least 4096"):
        WarmConfig(folder, CorpusConfig(("x",)), size=1)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the page cache cannot be emptied here")
def test_the_cache_forgets_a_file_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.write(bytes(1 << 20))
        os.fsync(file.fileno())
    assert cached_bytes(path) == 1 << 20 and cached_share(path) == 1.0
    forget_cached(path)
    assert cached_bytes(path) == 0 and cached_share(path) == 0.0 and not is_mapped(path)
    with path.open("rb") as file:
        file.read(4096)
    assert cached_bytes(path)


def test_threads_share_hot_rows(folder: Path) -> None:
    with open_package(folder) as package:
        keep(package, rows_of(package), folder / "hot")
        reader = RowReader(package, hot=hot_rows.load_all(package, folder / "hot"))
        wrong: list[int] = []

        def work(seed: int) -> None:
            rows = rows_of(package, seed % 3)
            taken = reader.take(reader.ask(rows), 1).reshape(-1, 8)
            expected = np.empty_like(taken)
            package.layers[1].decode(rows[1].reshape(-1), expected)
            wrong.extend([seed] if taken.tobytes() != expected.tobytes() else [])

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(30)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


def test_the_tokenizer_of_the_package_reads_the_text(folder: Path, text: CorpusConfig, faster: None) -> None:
    """The hot rows are those that the package's own hashing names, counted here once more and by hand."""
    warm.warm(WarmConfig(folder, text, size=1 << 20), Progress())
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT, add_special_tokens=False).ids
    with open_package(folder) as package:
        rows = package.layout.rows(np.array([ids[: int(len(ids) * 0.9)]]))
        for n, hot in hot_rows.load_all(package, folder / "hot").items():
            found, counts = np.unique(rows[n], return_counts=True)
            assert hot.rows_U.tolist() == found[counts > 1].tolist()
