"""Sources, token files and the mixture: no overlap, nothing half-written, exact resumption."""

import errno
import json
import os
import resource
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from llama_fast.tokenizer import Tokenizer
from llama_fast.train import data as data_module
from llama_fast.train.data import Mixture, Source, TokenDataset, TokenSource, build_token_file, parse_data_args

TEXT = "".join(f"def f{i}(x):\n    return x * {i} + {i * i}\n\n" for i in range(400))


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.train([TEXT], tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", vocab_size=300)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of 40 documents, each of its own text, beside things that are no text."""
    root = tmp_path / "docs"
    (root / "sub" / ".hidden").mkdir(parents=True)
    for i in range(40):
        (root / ("sub" if i % 2 else "") / f"{i}.txt").write_text(f"document {i} " * (20 + i) + f"end {i}\n")
    (root / "link.txt").symlink_to(root / "0.txt")
    (root / "sub" / "loop").symlink_to(root)
    (root / "empty.txt").write_text("")
    (root / "image.png").write_bytes(b"\x89PNG\0\0")
    (root / "latin.txt").write_bytes(b"caf\xe9")
    (root / ".dotfile").write_text("hidden")
    (root / "sub" / ".hidden" / "x.txt").write_text("hidden")
    return root


def documents(tok: Tokenizer, ids: np.ndarray) -> list[str]:
    """The documents of a token file, which must be bos, text, eos, one after another."""
    ends = np.flatnonzero(ids == tok.eos_id)
    starts = np.flatnonzero(ids == tok.bos_id)
    assert starts.tolist() == [0, *(ends[:-1] + 1)]
    assert ends[-1] == len(ids) - 1
    return [tok.decode(ids[a : b + 1].tolist()) for a, b in zip(starts, ends, strict=True)]


def counting(*lengths: int, weights: tuple[float, ...] = (), valid: int = 500) -> TokenDataset:
    """A dataset whose source number i holds the ids 10000 * i, 10000 * i + 1, ..., so that a row tells its place."""
    sources = [
        TokenSource(
            f"s{i}",
            weights[i] if weights else 1.0,
            np.arange(10_000 * i, 10_000 * i + length, dtype=np.uint16),
            np.arange(10_000 * i + length, 10_000 * i + length + valid, dtype=np.uint16),
            Path(f"s{i}.train.bin"),
            Path(f"s{i}.valid.bin"),
        )
        for i, length in enumerate(lengths)
    ]
    return TokenDataset(sources, 65_536, "data", "tokenizer")


# Sources


def test_default_sources_are_the_standard_library() -> None:
    code, prose = data_module.default_sources()
    assert (code.name, code.weight, prose.name, prose.weight) == ("code", 0.9, "prose", 0.1)
    names = [path.relative_to(code.root).as_posix() for path in code.paths]
    assert len(names) == len(set(names)) > 200
    assert not [n for n in names if {"test", "tests", "site-packages", "pydoc_data", "encodings"} & set(n.split("/"))]
    assert 4_000_000 < sum(path.stat().st_size for path in code.paths) <= 8_000_000
    assert data_module.default_sources()[0] == code
    topics = dict(prose.documents())
    assert len(topics) > 50
    assert b"yield" in topics["topics.py/yield"]
    assert all(text.decode() for text in topics.values())


def test_arguments_give_files_and_folders_with_weights(folder: Path, tmp_path: Path) -> None:
    odd = tmp_path / "a:2"
    odd.write_text("with a colon")
    plain = tmp_path / "my book.txt"
    plain.write_text("prose")
    sources = parse_data_args(
        [f"{folder}:3", str(odd), f"{odd}:0.5".replace("a:2", "my book.txt"), f"{folder}/../a:2"][:3]
    )
    assert [(s.name, s.weight, len(s.paths), s.skipped) for s in sources] == [
        ("docs", 3.0, 40, 3),
        ("a_2", 1.0, 1, 0),
        ("my_book.txt", 0.5, 1, 0),
    ]
    assert parse_data_args([f"{odd}:7"])[0].weight == 7.0
    assert [name for name, _ in sources[0].documents()] == sorted(name for name, _ in sources[0].documents())
    assert "sub/1.txt" in dict(sources[0].documents())
    assert dict(sources[1].documents()) == {"a:2": b"with a colon"}


def test_sources_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for name in ("x", "y", "z"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ("Book" if name == "z" else "book")).write_text(name)
    args = [str(tmp_path / "x" / "book"), str(tmp_path / "y" / "book"), str(tmp_path / "z" / "Book")]
    assert [s.name for s in parse_data_args(args)] == ["book", "book-2", "Book-3"]


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda p: [], "no data arguments"),
        (lambda p: [""], "data ''.*does not exist"),
        (lambda p: [f"{p}/nowhere"], "data '.*/nowhere': .*/nowhere' does not exist; expected PATH or PATH:WEIGHT"),
        (lambda p: [f"{p}/nowhere:2"], "data '.*/nowhere:2': .*/nowhere' does not exist"),
        (lambda p: [f"{p}/docs:"], "data '.*/docs:': weight ''; expected a positive finite number"),
        (lambda p: [f"{p}/docs:abc"], "data '.*/docs:abc': weight 'abc'"),
        (lambda p: [f"{p}/docs:0"], "weight '0'; expected a positive"),
        (lambda p: [f"{p}/docs:-1"], "weight '-1'"),
        (lambda p: [f"{p}/docs:nan"], "weight 'nan'"),
        (lambda p: [f"{p}/docs:inf"], "weight 'inf'"),
        (lambda p: [f"{p}/docs/empty.txt"], "data '.*empty.txt': .*empty.txt is empty"),
        (lambda p: [f"{p}/docs/image.png:2"], "data '.*image.png:2': .* is binary: a zero byte at 4; expected UTF-8"),
        (lambda p: [f"{p}/docs/latin.txt"], "latin.txt is not UTF-8 text: byte 0xe9 at 3"),
        (lambda p: [f"{p}/nothing"], "data '.*/nothing': no text in folder .*1 empty or binary files"),
        (lambda p: [f"{p}/fifo"], "fifo is not a regular file"),
        (lambda p: [f"{p}/docs", f"{p}/docs/0.txt"], "data '.*/0.txt': .*0.txt is already in '.*/docs'"),
        (lambda p: [f"{p}/docs"] * 2, "is already in"),
    ],
)
def test_bad_arguments_are_named(folder: Path, tmp_path: Path, make: Callable[[Path], list[str]], problem: str) -> None:
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "binary").write_bytes(b"\0")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ValueError, match=problem):
        parse_data_args(make(tmp_path))


def test_what_is_written_is_no_text(folder: Path, tmp_path: Path) -> None:
    (folder / "link").symlink_to(tmp_path)
    for inside in (folder, folder / "run", folder / "sub" / "run", tmp_path / "x" / ".." / folder.name / "run"):
        with pytest.raises(ValueError, match=r"data '.*' *: .* lies in it, and what is written there would be read"):
            parse_data_args([str(folder)], [tmp_path / "out", inside])
    outside = (
        tmp_path,
        tmp_path / f"{folder.name}-run",
        folder / ".run",
        folder / ".a" / "run",
        folder / "link" / "run",
    )
    assert parse_data_args([str(folder)], outside) == parse_data_args([str(folder)])
    assert parse_data_args([str(folder / "0.txt")], [folder / "run"])  # a file alone: its folder is no text


def test_a_source_checks_itself(tmp_path: Path) -> None:
    for name, paths, weight in [
        ("a/b", (tmp_path,), 1.0),
        ("", (tmp_path,), 1.0),
        ("a", (), 1.0),
        ("a", (tmp_path,), 0.0),
    ]:
        with pytest.raises(ValueError, match="source"):
            Source(name, paths, weight, tmp_path)


# Token files


def test_token_files_hold_every_document_once(folder: Path, tok: Tokenizer, tmp_path: Path) -> None:
    sources = parse_data_args([str(folder)])
    dataset = build_token_file(sources, tok, tmp_path / "out", valid_fraction=0.2)
    source = dataset.sources[0]
    train, valid = documents(tok, source.train), documents(tok, source.valid)
    assert sorted(train + valid) == sorted(text.decode() for _, text in sources[0].documents())
    assert not set(train) & set(valid)
    total = sum(map(len, train + valid))
    assert 0.1 * total <= sum(map(len, valid)) <= 0.2 * total
    assert source.train.dtype == np.uint16
    assert sorted(os.listdir(tmp_path / "out")) == [".lock", "docs.train.bin", "docs.valid.bin", "meta.json"]
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["sources"][0]["train"] == {
        "documents": len(train),
        "bytes": sum(map(len, train)),
        "tokens": len(source.train),
    }
    assert meta["sources"][0]["skipped_files"] == 3


def test_what_is_held_out_depends_on_names_alone(folder: Path, tok: Tokenizer, tmp_path: Path) -> None:
    (source,) = parse_data_args([str(folder)])
    turned = Source("docs", source.paths[::-1], 1.0, source.root)
    a = build_token_file([source], tok, tmp_path / "a", valid_fraction=0.2).sources[0]
    b = build_token_file([turned], tok, tmp_path / "b", valid_fraction=0.2).sources[0]
    assert documents(tok, a.valid) == documents(tok, b.valid)[::-1]


@pytest.mark.parametrize("text", [TEXT, "no newline " * 500, "\u4e2d\u6587" * 998, "line\n" + "x" * 3000])
def test_one_document_is_split_at_its_tail(tok: Tokenizer, tmp_path: Path, text: str) -> None:
    (tmp_path / "book").write_text(text)
    dataset = build_token_file(parse_data_args([str(tmp_path / "book")]), tok, tmp_path / "out", valid_fraction=0.1)
    (train,), (valid,) = (documents(tok, ids) for ids in (dataset.sources[0].train, dataset.sources[0].valid))
    assert train + valid == text
    assert 0.09 * len(text) < len(valid) <= 0.1 * len(text) + 1
    assert "\n" not in text[10:] or train.endswith("\n")


def test_a_few_large_documents_are_split_at_their_tails(tok: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "books").mkdir()
    for name, lines in {"a": 1, "b": 500, "c": 500}.items():
        (tmp_path / "books" / name).write_text(f"a line of {name}\n" * lines)
    dataset = build_token_file(parse_data_args([str(tmp_path / "books")]), tok, tmp_path / "out", valid_fraction=0.1)
    valid = documents(tok, dataset.sources[0].valid)
    assert [text.count("\n") for text in valid[-2:]] == [49, 49]


def test_long_documents_and_many_documents_encode_alike(
    folder: Path, tok: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "long.txt").write_text(TEXT)
    a = build_token_file(parse_data_args([str(folder)]), tok, tmp_path / "a").sources[0]
    monkeypatch.setattr(data_module, "_BATCH_BYTES", 1000)
    monkeypatch.setattr("llama_fast.tokenizer._CHUNK_CHARS", 10)
    monkeypatch.setattr("llama_fast.tokenizer._CHUNKS_A_PART", 3)
    encode_parts, long = Tokenizer.encode_parts, []

    def counted(self: Tokenizer, text: str | bytes, **options: bool) -> Iterator[list[int]]:
        for part in encode_parts(self, text, **options):  # type: ignore[arg-type]
            long.append(len(part))
            yield part

    monkeypatch.setattr(Tokenizer, "encode_parts", counted)
    b = build_token_file(parse_data_args([str(folder)]), tok, tmp_path / "b").sources[0]
    assert len(long) > 100, "a long document's ids come in parts"
    assert max(long) < 1000 < len(tok.encode(TEXT)) / 5
    assert a.train.tolist() == b.train.tolist()
    assert a.valid.tolist() == b.valid.tolist()


def test_large_vocabularies_use_four_bytes() -> None:
    assert data_module._dtype(65_536).itemsize == 2
    assert data_module._dtype(65_537).itemsize == 4


def test_a_second_build_reuses_the_files(
    folder: Path, tok: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    calls = []
    encode = Tokenizer.encode_many

    def counted(self: Tokenizer, *args: object, **kwargs: object) -> list[list[int]]:
        calls.append(args)
        return encode(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Tokenizer, "encode_many", counted)
    first = build_token_file(parse_data_args([str(folder)]), tok, out)
    inode = first.sources[0].train_path.stat().st_ino
    assert calls
    calls.clear()
    os.utime(folder / "0.txt")
    again = build_token_file(parse_data_args([f"{folder}:5"]), tok, out)
    assert not calls
    assert again.sources[0].train_path.stat().st_ino == inode
    assert again.fingerprint == first.fingerprint
    assert (again.sources[0].weight, TokenDataset.open(out).sources[0].weight) == (5.0, 5.0)

    (folder / "0.txt").write_text((folder / "0.txt").read_text().replace("document", "Document"))
    changed = build_token_file(parse_data_args([str(folder)]), tok, out)
    assert calls
    assert changed.fingerprint != first.fingerprint
    text = "".join(documents(tok, changed.sources[0].train) + documents(tok, changed.sources[0].valid))
    assert text.count("Document 0 ") == 20
    fractions = {
        build_token_file(parse_data_args([str(folder)]), tok, out, valid_fraction=f).fingerprint for f in (0.1, 0.3)
    }
    other = Tokenizer.train([TEXT], tmp_path / "other.model", vocab_size=299)
    fractions.add(build_token_file(parse_data_args([str(folder)]), other, out, valid_fraction=0.3).fingerprint)
    assert len(fractions) == 3


def test_a_new_build_removes_the_old_ones_files_and_no_others(folder: Path, tok: Tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build_token_file(parse_data_args([str(folder)]), tok, out)
    (out / "mine.train.bin").write_text("not the dataset's")
    (out / ".docs.train.bin.tmp").write_text("of a builder that was killed")
    build_token_file(parse_data_args([str(folder / "sub" / "39.txt")]), tok, out)
    kept = [".lock", "39.txt.train.bin", "39.txt.valid.bin", "meta.json", "mine.train.bin"]
    assert sorted(os.listdir(out)) == kept


def test_a_full_disk_leaves_the_old_dataset(folder: Path, tok: Tokenizer, tmp_path: Path) -> None:
    """The kernel's own refusal: a limit on file size stands in for the disk's end."""
    out = tmp_path / "out"
    build_token_file(parse_data_args([str(folder)]), tok, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (folder / "big.txt").write_text(TEXT * 4)
    sources = parse_data_args([str(folder)])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"cannot write the dataset in {out}, nothing of it was kept") as raised:
            build_token_file(sources, tok, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert raised.value.errno == errno.EFBIG
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    TokenDataset.open(out, tok)


@pytest.mark.parametrize("call", range(4))
def test_an_error_at_any_rename_leaves_no_half_dataset(
    folder: Path, tok: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    out = tmp_path / "out"
    build_token_file(parse_data_args([str(folder)]), tok, out)
    (folder / "new.txt").write_text(TEXT)
    replace, calls = os.replace, iter(range(100))

    def failing(a: str, b: str) -> None:
        if next(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        if call < 3:
            with pytest.raises(OSError, match="nothing of it was kept: No space left"):
                build_token_file(parse_data_args([str(folder)]), tok, out)
            assert os.listdir(out) == [".lock"]
            with pytest.raises(FileNotFoundError, match=r"meta\.json"):
                TokenDataset.open(out)
        else:
            build_token_file(parse_data_args([str(folder)]), tok, out)
    build_token_file(parse_data_args([str(folder)]), tok, out)
    TokenDataset.open(out, tok)


def test_builders_in_one_folder_take_turns(
    folder: Path, tok: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    inside, built = [], []
    build, locked = data_module._build, data_module._locked

    def slow(*args: object) -> None:
        inside.append(1)
        assert len(inside) == 1
        time.sleep(0.2)
        build(*args)  # type: ignore[arg-type]
        inside.pop()
        built.append(1)

    @contextmanager
    def slowly_left(folder: Path) -> Iterator[None]:
        with locked(folder):
            yield
        time.sleep(0.2)  # the next one writes its weights

    monkeypatch.setattr(data_module, "_build", slow)
    monkeypatch.setattr(data_module, "_locked", slowly_left)
    sources = [parse_data_args([f"{folder}:{weight}"]) for weight in (1, 2, 3, 4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda of: build_token_file(of, tok, out), sources))
    assert {dataset.fingerprint for dataset in found} == {TokenDataset.open(out, tok).fingerprint}
    assert [dataset.sources[0].weight for dataset in found] == [1, 2, 3, 4], "another's weights"
    assert len(built) == 1


def test_damage_is_found_and_named(folder: Path, tok: Tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sources = parse_data_args([str(folder)])
    dataset = build_token_file(sources, tok, out)
    meta_path, valid_path = out / "meta.json", out / "docs.valid.bin"
    meta, valid = json.loads(meta_path.read_text()), valid_path.read_bytes()

    def meta_with(**changes: object) -> str:
        return json.dumps({**meta, **changes})

    broken = {
        "meta.json is damaged: Expecting": "{",
        "meta.json is damaged: it holds no object": "[]",
        "meta.json is damaged: 'vocab_size'": json.dumps({k: v for k, v in meta.items() if k != "vocab_size"}),
        "meta.json is damaged: version 9; expected 1": meta_with(version=9),
        "meta.json is damaged: dtype uint32; expected uint16": meta_with(dtype="uint32"),
        "meta.json is damaged: no sources": meta_with(sources=[]),
        "meta.json is damaged: source name '../x'": meta_with(sources=[meta["sources"][0] | {"name": "../x"}]),
        "meta.json is damaged: weight nan": meta_with(sources=[meta["sources"][0] | {"weight": float("nan")}]),
        r"missing.train.bin is missing": meta_with(sources=[meta["sources"][0] | {"name": "missing"}]),
    }
    for problem, text in broken.items():
        meta_path.write_text(text)
        with pytest.raises(ValueError, match=problem):
            TokenDataset.open(out)
    meta_path.write_text(json.dumps(meta))
    for size in (0, len(valid) - 1, len(valid) + 2):
        valid_path.write_bytes((valid + b"\0\0")[:size])
        with pytest.raises(ValueError, match=rf"docs.valid.bin is {size} bytes long; expected {len(valid)}"):
            TokenDataset.open(out)
    other = Tokenizer.train([TEXT], tmp_path / "other.model", vocab_size=299)
    valid_path.write_bytes(valid)
    with pytest.raises(ValueError, match=rf"made with tokenizer {tok.fingerprint[:12]}; expected .*other.model"):
        TokenDataset.open(out, other)
    valid_path.write_bytes(b"\xff" * len(valid))
    with pytest.raises(ValueError, match=r"docs.valid.bin is damaged: id 65535 in a vocabulary of 300"):
        next(TokenDataset.open(out).valid_batches(1, 8))
    valid_path.unlink()
    assert build_token_file(sources, tok, out).fingerprint == dataset.fingerprint
    assert valid_path.read_bytes() == valid


def test_bad_builds_are_errors(folder: Path, tok: Tokenizer, tmp_path: Path) -> None:
    (source,) = parse_data_args([str(folder)])
    for fraction in (0.0, -0.1, 0.6, float("nan")):
        with pytest.raises(ValueError, match="valid_fraction"):
            build_token_file([source], tok, tmp_path / "out", valid_fraction=fraction)
    for sources in ([], [source, Source("DOCS", source.paths, 1.0, source.root)]):
        with pytest.raises(ValueError, match="different names"):
            build_token_file(sources, tok, tmp_path / "out")
    (tmp_path / "tiny").write_text("x")
    with pytest.raises(ValueError, match="source tiny: no text is left for train"):
        build_token_file(parse_data_args([str(tmp_path / "tiny")]), tok, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == [".lock"]


def test_a_file_that_changes_while_it_is_read_is_an_error(tok: Tokenizer, tmp_path: Path) -> None:
    versions = iter([TEXT, TEXT.replace("return", "RETURN")])

    def reader(path: Path) -> Iterator[tuple[str, bytes]]:
        yield "doc", next(versions).encode()

    with pytest.raises(ValueError, match="doc changed while it was read"):
        build_token_file([Source("s", (tmp_path,), 1.0, tmp_path, reader=reader)], tok, tmp_path / "out")


# The mixture


def test_targets_are_the_next_tokens_and_an_epoch_takes_each_window_once() -> None:
    batches = counting(101).batches(5, 10, seed=3)
    for _ in range(3):
        seen = []
        for _ in range(2):
            tokens, targets = next(batches)
            assert tokens.dtype == targets.dtype == torch.int64
            assert tokens.shape == targets.shape == (5, 10)
            assert torch.equal(targets, tokens + 1)
            assert tokens.is_contiguous()
            assert targets.is_contiguous()
            seen.append(tokens.flatten())
        assert sorted(torch.cat(seen).tolist()) == list(range(100))


def test_every_epoch_and_seed_has_its_own_order() -> None:
    orders = set()
    for seed in (0, 1):
        batches = counting(201).batches(20, 10, seed=seed)
        orders |= {tuple(next(batches)[0][:, 0].tolist()) for _ in range(3)}
    assert len(orders) == 6
    assert all(list(order) != sorted(order) for order in orders)


def test_windows_are_drawn_by_weight() -> None:
    dataset = counting(5001, 301, 901, weights=(6.0, 3.0, 1.0))
    batches = dataset.batches(16, 10, seed=1)
    rows = torch.cat([next(batches)[0][:, 0] for _ in range(500)]) // 10_000
    shares = torch.bincount(rows, minlength=3) / len(rows)
    assert torch.allclose(shares, torch.tensor([0.6, 0.3, 0.1]), atol=0.02)
    usage = batches.usage()
    assert [row["tokens"] for row in usage] == (torch.bincount(rows) * 10).tolist()
    assert [row["epochs"] for row in usage] == [
        row["tokens"] / n for row, n in zip(usage, (5000, 300, 900), strict=True)
    ]
    assert [row["weight"] for row in usage] == [0.6, 0.3, 0.1]
    table = batches.usage_table().splitlines()
    assert table[0].split() == ["source", "weight", "tokens", "epochs", "available"]
    assert table[2].split() == ["s1", "30.0%", f"{usage[1]['tokens']:,}", f"{usage[1]['epochs']:.2f}", "301"]


@pytest.mark.parametrize("steps", [0, 1, 7, 64])
def test_a_resumed_run_sees_the_same_batches(steps: int, tmp_path: Path) -> None:
    dataset = counting(301, 151, weights=(0.7, 0.3))
    batches = dataset.batches(3, 10, seed=9)
    for _ in range(steps):
        next(batches)
    as_json = json.loads(json.dumps(batches.state_dict()))
    torch.save(batches.state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    expected = [next(batches) for _ in range(40)]
    for state in (as_json, saved):
        resumed = dataset.batches(3, 10, seed=9)
        next(resumed)
        resumed.load_state_dict(state)
        for a, b in zip(expected, resumed, strict=False):
            assert torch.equal(a[0], b[0])
            assert torch.equal(a[1], b[1])
        assert len(json.dumps(state)) < 500


def test_the_stream_is_pinned() -> None:
    """A checkpoint must resume on another machine and NumPy: these numbers may change with `_VERSION` only."""
    batches = counting(1001, 1001, weights=(0.8, 0.2)).batches(4, 10, seed=5)
    assert [next(batches)[0][:, 0].tolist() for _ in range(3)] == [
        [410, 530, 10230, 320],
        [450, 540, 700, 60],
        [860, 10470, 130, 640],
    ]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 1),
        ("seq_len", 11),
        ("global_batch", 9),
        ("dataset", "x"),
        ("weights", {"s0": 1.0, "s1": 2.0}),
        ("version", 2),
        ("step", 3),
        ("step", "2"),
        ("windows", [1, 2]),
        ("windows", [-1, 9]),
        ("windows", [8]),
        ("windows", None),
        ("windows", [8.0, 0]),
    ],
)
def test_a_state_of_something_else_is_refused(key: str, value: object) -> None:
    batches = counting(301, 151).batches(4, 10)
    next(batches)
    next(batches)
    state = batches.state_dict()
    with pytest.raises(ValueError, match=key if key != "step" else "step|windows"):
        batches.load_state_dict(state | {key: value})
    with pytest.raises(ValueError, match="version"):
        batches.load_state_dict({})
    assert batches.state_dict() == state


def test_ranks_share_one_batch() -> None:
    dataset = counting(301, 151)
    whole = dataset.batches(6, 10, seed=4)
    parts = [dataset.batches(2, 10, seed=4, rank=rank, world_size=3) for rank in range(3)]
    for _ in range(20):
        assert torch.equal(next(whole)[0], torch.cat([next(part)[0] for part in parts]))
    assert parts[0].state_dict() == parts[2].state_dict() == whole.state_dict()


def test_bad_sizes_are_errors() -> None:
    dataset = counting(30, valid=5)
    for batch_size, seq_len, seed, rank, problem in [
        (0, 8, 0, 0, "batch_size 0"),
        (1, 0, 0, 0, "seq_len 0"),
        (1, 8, -1, 0, "seed -1"),
        (1, 8, 2**32, 0, "seed 4294967296"),
        (1, 8, 0, 1, r"rank 1 is not an integer in \[0, 1\)"),
        (1, 30, 0, 0, "source s0: 30 train tokens are too few for seq_len 30, which needs 31"),
    ]:
        with pytest.raises(ValueError, match=problem):
            Mixture(dataset, batch_size, seq_len, seed, rank=rank)
    with pytest.raises(ValueError, match=r"weights \[1e\+308, 1e\+308\]: together inf; expected a finite sum"):
        counting(30, 30, weights=(1e308, 1e308)).batches(1, 8)
    next(dataset.batches(1, 29))
    with pytest.raises(ValueError, match="source s0: 5 valid tokens are too few for seq_len 8"):
        dataset.valid_batches(1, 8)
    with pytest.raises(ValueError, match="source 's9': expected one of s0"):
        dataset.valid_batches(1, 2, source="s9")
    with pytest.raises(ValueError, match="limit 0"):
        dataset.valid_batches(1, 2, limit=0)


def test_held_out_windows_are_fixed() -> None:
    dataset = counting(100, 100, valid=45)
    batches = list(dataset.valid_batches(3, 10))
    assert [len(tokens) for tokens, _ in batches] == [3, 3, 2]
    starts = torch.cat([tokens[:, 0] for tokens, _ in batches]).tolist()
    assert starts == [100, 110, 120, 130, 10_100, 10_110, 10_120, 10_130]
    assert all(torch.equal(targets, tokens + 1) for tokens, targets in batches)
    few = [tokens[:, 0].tolist() for tokens, _ in dataset.valid_batches(2, 10, limit=2)]
    assert few == [[100, 120], [10_100, 10_120]]
    one = [tokens[:, 0].tolist() for tokens, _ in dataset.valid_batches(9, 10, source="s1", limit=5)]
    assert one == [[10_100, 10_110, 10_120, 10_130]]


def test_from_text_to_batches(folder: Path, tok: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "book").write_text(TEXT)
    dataset = build_token_file(parse_data_args([f"{folder}:2", str(tmp_path / "book")]), tok, tmp_path / "out")
    tokens, targets = next(dataset.batches(8, 64, seed=0))
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    texts = ["".join(documents(tok, s.train)) for s in dataset.sources]
    for row in tokens:
        middle = tok.decode(row.tolist()[5:], continuation=True).split("end")[0]
        assert any(middle[:40] in text for text in texts)
    held_out = torch.cat([t.flatten() for t, _ in dataset.valid_batches(4, 32)])
    assert 0 < len(held_out) <= sum(len(s.valid) for s in dataset.sources)
