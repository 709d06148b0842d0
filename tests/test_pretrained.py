"""What stands beside the weights: which tokenizer a checkpoint has, its chat template, and a conversion's files."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from llama_fast import pretrained
from llama_fast.pretrained import chat_template, load_tokenizer, write_companions
from llama_fast.tokenizer import Tokenizer

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
TEXTS = ["", "the", " two  spaces\n", "def f(x):\n    return x**2", "日本語 😀 \u2581 <s>"]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    Tokenizer.train([(Path(sysconfig.get_path("stdlib")) / "argparse.py").read_text()], path, vocab_size=900)
    return path


def gguf_of(model_path: Path, path: Path, **change: Any) -> Path:
    """A GGUF file with the vocabulary of a SentencePiece model, as llama.cpp's converter writes it, and no weights."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(model_path))
    ids = range(sp.get_piece_size())

    def kind(i: int) -> int:
        return 2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(change.get("model", "llama"))
    writer.add_token_list([sp.id_to_piece(i) for i in ids])
    writer.add_token_scores([sp.get_score(i) for i in ids])
    writer.add_token_types([kind(i) for i in ids])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages }}")
    if "space" in change:
        writer.add_add_space_prefix(change["space"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_a_sentencepiece_vocabulary_inside_a_gguf(model_path: Path, tmp_path: Path) -> None:
    path = gguf_of(model_path, tmp_path / "a.gguf")
    inside, outside = load_tokenizer(path), Tokenizer(model_path)
    assert isinstance(inside, Tokenizer)
    assert (inside.vocab_size, inside.bos_id, inside.eos_ids) == (900, 1, (2,))
    source = Path(__file__).read_text()
    for text in [*TEXTS, source]:
        assert inside.encode(text) == outside.encode(text), text
        assert inside.decode(inside.encode(text)) == text
    assert chat_template(path) == "{{ messages }}"


def test_gguf_vocabularies_that_will_not_do(model_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a.gguf: tokenizer.ggml.add_space_prefix = False: expected True"):
        load_tokenizer(gguf_of(model_path, tmp_path / "a.gguf", space=False))
    with pytest.raises(ValueError, match=r"b.gguf: tokenizer.ggml.model = 'bert': expected gpt2 or llama"):
        load_tokenizer(gguf_of(model_path, tmp_path / "b.gguf", model="bert"))
    with pytest.raises(ValueError, match=r"c: tokenizer.ggml.scores is missing"):
        pretrained.sentencepiece_model(Path("c"), {"tokenizer.ggml.tokens": []})


def test_a_folder_and_a_checkpoint_in_a_run(model_path: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model_path.read_bytes())
    (tmp_path / "step_0000001").mkdir()
    for path in (tmp_path, tmp_path / "step_0000001"):
        assert load_tokenizer(path).encode("the") == Tokenizer(model_path).encode("the")
        assert chat_template(path) is None


def test_a_checkpoint_in_a_run_by_any_of_its_names(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = tmp_path / "run" / "step_0000001"
    (step / "sub").mkdir(parents=True)
    (tmp_path / "run" / "tokenizer.model").write_bytes(model_path.read_bytes())
    (tmp_path / "link").symlink_to(step)
    (tmp_path / "run" / "step_0000002").symlink_to(model_path.parent.parent)  # moved away, its run is here
    for where, names in (
        (step, (".", "../step_0000001", "../step_0000002")),
        (step / "sub", ("..", tmp_path / "link")),
    ):
        monkeypatch.chdir(where)
        for name in names:
            assert load_tokenizer(name).vocab_size == 900


def test_a_folder_of_hugging_face_takes_no_tokenizer_from_around_it(model_path: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model_path.read_bytes())  # of another model, perhaps
    for name in ("hf", "meta", "step_0000001"):
        (tmp_path / name).mkdir()
    for name in ("hf", "step_0000001"):
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "step_0000001" / "manifest.json").write_text("{}")
    (tmp_path / "meta" / "params.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"hf: expected tokenizer.json or tokenizer.model, in it$"):
        load_tokenizer(tmp_path / "hf")
    for name in ("meta", "step_0000001"):
        assert load_tokenizer(tmp_path / name).vocab_size == 900


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("{{ a }}", "{{ a }}"),
        ([{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}], "d"),
        ([{"name": "rag", "template": "r"}], None),
        (None, None),
    ],
)
def test_chat_templates(tmp_path: Path, value: Any, expected: str | None) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    assert chat_template(tmp_path) == expected
    (tmp_path / "chat_template.jinja").write_text("{{ b }}")
    assert chat_template(tmp_path) == "{{ b }}"


def test_companions_of_a_sentencepiece_checkpoint(model_path: Path, tmp_path: Path) -> None:
    path = gguf_of(model_path, tmp_path / "a.gguf")
    write_companions(path, tmp_path)
    assert load_tokenizer(tmp_path).encode(TEXTS[3]) == Tokenizer(model_path).encode(TEXTS[3])
    assert chat_template(tmp_path) == "{{ messages }}"
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"], config["tokenizer_class"]) == ("<s>", "</s>", "LlamaTokenizer")
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": [2]}
