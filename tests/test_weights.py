"""Hugging Face folders both ways; for every format: what is wrong is named, memory, nothing is left half-written."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import llama_fast
from llama_fast import checkpoint
from llama_fast.config import LinearRopeScaling, Llama3RopeScaling, LlamaConfig
from llama_fast.model import Llama
from llama_fast.weights import hf
from llama_fast.weights.source import tensor_shapes

TINY = LlamaConfig.preset("tiny")
ROOT = Path(llama_fast.__file__).parents[1]
LLAMA3 = Llama3RopeScaling(8.0, 1.0, 4.0, 32)
CONFIGS = {
    "plain": TINY,
    "tied": dataclasses.replace(TINY, tie_embeddings=True),
    "llama3": dataclasses.replace(TINY, rope_theta=500000.0, rope_scaling=LLAMA3),
    "linear": dataclasses.replace(TINY, rope_scaling=LinearRopeScaling(4.0), norm_eps=1e-6),
    "head_dim": dataclasses.replace(TINY, explicit_head_dim=32),
}


def assert_same(a: Llama, b: Llama) -> None:
    """Equal configs, and every parameter bit for bit of the same dtype."""
    assert a.config == b.config
    names = dict(b.named_parameters())
    assert [n for n, _ in a.named_parameters()] == list(names)
    for name, p in a.named_parameters():
        assert p.dtype == names[name].dtype, name
        assert torch.equal(p, names[name]), name


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("shards", [1, 3])
def test_hugging_face_round_trip_is_bitwise(tmp_path: Path, kind: str, shards: int) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        model = Llama(CONFIGS[kind], dtype=dtype)
        path = tmp_path / str(dtype)
        model.save_pretrained(path, shards=shards)
        assert_same(model, Llama.from_pretrained(path))
    files = [n for n in names(path) if n.endswith(".safetensors")]
    assert len(files) == shards
    # the safetensors package reads the same, and finds nothing else
    read = {k: v for f in files for k, v in safetensors.torch.load_file(path / f).items()}
    assert read.keys() == {hf.hf_name(n) for n in tensor_shapes(model.config)}
    assert torch.equal(read["model.norm.weight"], model.norm.weight)
    if shards > 1:
        index = json.loads((path / hf.INDEX).read_text())
        assert index["weight_map"].keys() == read.keys()
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in read.values())


def test_any_number_of_shards(tmp_path: Path) -> None:
    model = Llama(TINY)
    most = len(tensor_shapes(TINY))
    for shards in (2, 5, most):
        model.save_pretrained(tmp_path / str(shards), shards=shards)
        assert len(list((tmp_path / str(shards)).glob("*.safetensors"))) == shards
        assert_same(model, Llama.from_pretrained(tmp_path / str(shards)))
    for shards in (0, most + 1):
        with pytest.raises(ValueError, match=rf"shards = {shards}: expected 1 to {most}"):
            model.save_pretrained(tmp_path / "no", shards=shards)
    assert names(tmp_path) == sorted(["2", "5", str(most)])


def test_dtype_and_policy_of_the_caller(tmp_path: Path) -> None:
    model = Llama(TINY)
    model.save_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    half = Llama.from_pretrained(tmp_path / "half", policy="save")
    assert half.norm.weight.dtype == torch.bfloat16
    assert half.layers[0].options.policy == "save"
    assert not half.training
    wide = Llama.from_pretrained(tmp_path / "half", dtype=torch.float32)
    assert torch.equal(wide.lm_head.weight, model.lm_head.weight.bfloat16().float())
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_the_context_of_the_caller(tmp_path: Path) -> None:
    Llama(TINY).save_pretrained(tmp_path / "a")
    assert Llama.from_pretrained(tmp_path / "a", max_seq_len=77).config.max_seq_len == 77
    with pytest.raises(ValueError, match="max_seq_len = 0: expected an integer of 1 or more"):
        Llama.from_pretrained(tmp_path / "a", max_seq_len=0)


def test_a_model_that_was_changed_is_not_saved_in_part(tmp_path: Path) -> None:
    tied = Llama(CONFIGS["tied"])
    tied.lm_head.weight = torch.nn.Parameter(tied.lm_head.weight.detach().clone())
    tied.save_pretrained(tmp_path / "equal")
    assert_same(Llama(CONFIGS["tied"]), Llama.from_pretrained(tmp_path / "equal"))
    with torch.no_grad():
        tied.lm_head.weight.mul_(2)
    short, more = Llama(TINY), Llama(TINY)
    short.layers = short.layers[:1]
    more.extra = torch.nn.Linear(2, 2)
    for format in ("hf", "meta"):
        with pytest.raises(ValueError, match=r"model: .*lm_head.weight differs from the embedding"):
            tied.save_pretrained(tmp_path / "a", format)
        with pytest.raises(ValueError, match=r"model: tensors do not fit its config: missing: layers\.1\.input"):
            short.save_pretrained(tmp_path / "a", format)
        with pytest.raises(ValueError, match=r"extra: extra\.bias, extra\.weight"):
            more.save_pretrained(tmp_path / "a", format)
    assert names(tmp_path) == ["equal"]


def test_the_default_device_is_not_the_files(tmp_path: Path) -> None:
    model = Llama(TINY)
    model.save_pretrained(tmp_path / "a")
    with torch.device("meta"):  # as where the default is a GPU
        found = Llama.from_pretrained(tmp_path / "a", device="cpu", dtype=torch.bfloat16)
    assert torch.equal(found.lm_head.weight, model.lm_head.weight.bfloat16())


def test_progress_ends_with_all_bytes(tmp_path: Path) -> None:
    model = Llama(TINY)
    seen: list[tuple[str, int, int]] = []
    model.save_pretrained(tmp_path / "a", shards=2, progress=lambda *step: seen.append(step))
    bytes_in_all = 4 * TINY.n_params
    assert seen[-1] == ("lm_head.weight", bytes_in_all, bytes_in_all)
    seen.clear()
    Llama.from_pretrained(tmp_path / "a", progress=lambda *step: seen.append(step))
    assert len(seen) == len(tensor_shapes(TINY))
    assert seen[-1][1:] == (bytes_in_all, bytes_in_all)


def test_a_training_checkpoint_is_one_too(tmp_path: Path) -> None:
    model = Llama(CONFIGS["tied"])
    path = checkpoint.save(tmp_path, 3, model, {})
    assert_same(model, Llama.from_pretrained(path))


# ---- transformers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_transformers_reads_and_writes_the_same_model(tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = Llama(CONFIGS[kind])
    model.save_pretrained(tmp_path / "ours", shards=2)
    from hf_pairs import DTYPE

    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours", **{DTYPE: torch.float32})
    tokens = torch.arange(2, 102).view(2, 50)
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model(tokens), rtol=1e-4, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="200kB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    assert_same(model, Llama.from_pretrained(tmp_path / "theirs"))


SIZES = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 176,
    "vocab_size": 256,
    "max_position_embeddings": 128,
}
OLD = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
OLD["original_max_position_embeddings"] = 32


@pytest.mark.parametrize(
    ("rope", "theta", "scaling"),
    [
        ({}, 10000.0, None),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, None),
        ({"rope_theta": 5e5, "rope_scaling": OLD}, 5e5, LLAMA3),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 10000.0, LinearRopeScaling(2.0)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, None),
        ({"rope_parameters": {**OLD, "rope_type": "llama3", "rope_theta": 5e5}}, 5e5, LLAMA3),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, 1e4, LinearRopeScaling(2.0)),
    ],
)
def test_configs_old_and_new(rope: dict[str, Any], theta: float, scaling: Any) -> None:
    config = hf.config_from_hf({**SIZES, **rope})
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)
    assert (config.n_kv_heads, config.norm_eps, config.tie_embeddings) == (4, 1e-6, False)
    assert hf.config_from_hf(hf.config_to_hf(config, torch.float32)) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma"}, "model_type = 'gemma': expected one of llama, mistral, qwen2, qwen3"),
        ({"model_type": ["llama"]}, r"model_type = \['llama'\]: expected one of llama, "),
        ({"hidden_size": None}, "hidden_size = None: expected an integer of 1 or more"),
        ({"hidden_size": "64"}, "hidden_size = '64': expected a number above 0"),
        ({"hidden_size": 64.5}, "hidden_size = 64.5: expected an integer of 1 or more"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0: expected a number above 0"),
        ({"num_attention_heads": [4]}, r"num_attention_heads = \[4\]: expected a number above 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3: expected a divisor of num_attention_heads = 4"),
        ({"head_dim": 15}, "head_dim = 15: expected an even number"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps = -1e-05: expected a number above 0"),
        ({"rope_parameters": "llama3"}, "rope_parameters = 'llama3': expected an object"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type = 'yarn': expected default, linear"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor is missing"),
        ({"attention_bias": True}, "attention_bias = True: expected False"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu': expected 'silu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is set"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
    ],
)
def test_configs_that_are_no_llama(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    Llama(TINY).save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text(json.dumps({**SIZES, **change}))
    with pytest.raises(ValueError, match=rf"config.json: {message}"):
        Llama.from_pretrained(tmp_path / "a")


# ---- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Llama(TINY).save_pretrained(tmp_path / "a")
    return tmp_path / "a"


def test_tensors_that_do_not_fit_are_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    del tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(64, 176)
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(ValueError, match="do not fit") as caught:
        Llama.from_pretrained(folder)
    assert str(caught.value) == (
        f"{folder}: tensors do not fit its config: missing: model.norm.weight; "
        "extra: model.layers.0.self_attn.q_proj.bias; "
        "misshapen: model.layers.1.mlp.up_proj.weight is (64, 176), expected (176, 64)"
    )


def test_old_buffers_are_no_extra_tensors(folder: Path) -> None:
    file = folder / "model.safetensors"
    before = Llama.from_pretrained(folder)
    tensors = safetensors.torch.load_file(file)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    safetensors.torch.save_file(tensors, file)
    assert_same(before, Llama.from_pretrained(folder))


def test_a_tied_head_may_be_stored_if_it_is_the_embedding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "_PIECE", 64 * 100)  # of 256 rows: three pieces
    model = Llama(CONFIGS["tied"])
    model.save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(tensors, file)
    assert_same(model, Llama.from_pretrained(tmp_path / "a"))
    other = tensors["lm_head.weight"].clone()
    other[253, 4] += 1
    for head in (other, tensors["lm_head.weight"][:-1].contiguous()):
        safetensors.torch.save_file(tensors | {"lm_head.weight": head}, file)
        with pytest.raises(ValueError, match=r"lm_head.weight differs from the embedding"):
            Llama.from_pretrained(tmp_path / "a")
    safetensors.torch.save_file(tensors | {"model.norm.weight": torch.ones(3)}, file)
    monkeypatch.delattr(hf, "read_tensor")  # nothing is read before all shapes fit
    with pytest.raises(ValueError, match=r"misshapen: model.norm.weight is \(3,\), expected \(64,\)"):
        Llama.from_pretrained(tmp_path / "a")


def test_truncated_tensors_are_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    size = file.stat().st_size
    os.truncate(file, size - 1)
    with pytest.raises(ValueError, match=rf"truncated, {size - 1} of {size} bytes: tensors cut off: lm_head.weight$"):
        Llama.from_pretrained(folder)
    os.truncate(file, size - 4 * 256 * 64 - 1)
    with pytest.raises(ValueError, match=r"tensors cut off: model.norm.weight, lm_head.weight$"):
        Llama.from_pretrained(folder)
    os.truncate(file, 40)
    with pytest.raises(ValueError, match=r"model.safetensors: 40 bytes, and no header"):
        Llama.from_pretrained(folder)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"not json", "JSONDecodeError"),
        (b"[1, 2]", "TypeError"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', r"4 bytes for \(2,\) of F32"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}', r"-4 bytes"),
        (b'{"a": {"dtype": "F32", "data_offsets": [0, 4]}}', "KeyError"),
    ],
)
def test_headers_that_are_none(folder: Path, header: bytes, message: str) -> None:
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
    with pytest.raises(ValueError, match=rf"model.safetensors: .*{message}.*expected a safetensors file"):
        Llama.from_pretrained(folder)


def test_integers_and_small_floats_are_no_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    for dtype, name in ((torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")):
        tensors["model.norm.weight"] = torch.ones(64).to(dtype)
        safetensors.torch.save_file(tensors, file)
        with pytest.raises(ValueError, match=rf"tensor model.norm.weight has dtype {name}, expected float32"):
            Llama.from_pretrained(folder)


def test_damaged_indexes(tmp_path: Path) -> None:
    Llama(TINY).save_pretrained(tmp_path / "a", shards=2)
    folder = tmp_path / "a"
    index = json.loads((folder / hf.INDEX).read_text())
    first, second = sorted(set(index["weight_map"].values()))

    index["weight_map"]["model.lost.weight"] = first
    (folder / hf.INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"{first}: missing: model.lost.weight"):
        Llama.from_pretrained(folder)
    del index["weight_map"]["model.lost.weight"]
    (folder / hf.INDEX).write_text(json.dumps(index))
    (folder / second).rename(folder / "elsewhere")
    with pytest.raises(FileNotFoundError, match=rf"{second}: missing; it holds \d+ tensors, model"):
        Llama.from_pretrained(folder)
    (folder / second).write_bytes((folder / first).read_bytes())
    with pytest.raises(ValueError, match=rf"{second}: missing: "):
        Llama.from_pretrained(folder)
    (folder / hf.INDEX).write_text('{"weight_map": {"a": "../b"}}')
    with pytest.raises(ValueError, match="expected a weight_map"):
        Llama.from_pretrained(folder)
    (folder / hf.INDEX).unlink()
    with pytest.raises(FileNotFoundError, match=r"expected model.safetensors or .*found config.json, elsewhere"):
        Llama.from_pretrained(folder)


def test_other_dtypes_are_named(folder: Path) -> None:
    for dtype in ("bfloat16", torch.int8):
        with pytest.raises(ValueError, match=rf"dtype = {dtype!r}: expected one of torch.float32, "):
            Llama.from_pretrained(folder, dtype=dtype)
        with pytest.raises(ValueError, match=rf"dtype = {dtype!r}: expected one of torch.float32, "):
            Llama(TINY).save_pretrained(folder.parent / "b", dtype=dtype)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match="no such folder or file, expected a folder of Hugging Face or Meta, or a GGUF"
    ):
        Llama.from_pretrained(tmp_path / "none")
    (tmp_path / "a.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"expected config.json or params.json.*, found a.txt"):
        Llama.from_pretrained(tmp_path)


# ---- written whole or not at all -------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["hf", "meta"])
def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    model = Llama(TINY)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for broken in ("os.fsync", "os.replace", "pathlib.Path.write_text"):
        with monkeypatch.context() as patch:
            patch.setattr(broken, full)
            with pytest.raises(OSError, match="No space left"):
                model.save_pretrained(tmp_path / "a", format, shards=2)
        assert names(tmp_path) == [], broken

    def stop(name: str, done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path / "a", format, shards=2, progress=stop)
    assert names(tmp_path) == []
    (tmp_path / ".a.killed_0.tmp").mkdir()
    (tmp_path / ".a.killed_0.tmp" / "model.safetensors").write_bytes(b"half")
    (tmp_path / "a").mkdir()
    model.save_pretrained(tmp_path / "a", format)
    assert names(tmp_path) == ["a"]
    with pytest.raises(FileExistsError, match="expected a new or an empty folder"):
        model.save_pretrained(tmp_path / "a", format)
    with pytest.raises(ValueError, match="format = 'gguf': expected one of hf, meta"):
        model.save_pretrained(tmp_path / "b", "gguf")
    assert names(tmp_path) == ["a"]


def test_too_little_space_is_seen_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 4 * TINY.n_params}))
    monkeypatch.setattr("tempfile.mkdtemp", None)
    with pytest.raises(OSError, match=r"bytes needed, .* free") as caught:
        Llama(TINY).save_pretrained(tmp_path / "a")
    assert caught.value.errno == errno.ENOSPC


# ---- memory ----------------------------------------------------------------------------------------------------------

# The system refuses what passes the limit. It counts the process's own memory, and mapped files that it could change,
# as torch.load maps them, though they take no memory while nothing changes them.
MEMORY = """
import resource, sys
from pathlib import Path
from llama_fast import weights
from llama_fast.config import LlamaConfig
from llama_fast.model import Llama

config = LlamaConfig(512, 6, 8, 4, 1536, 8192, 128)
model_bytes, tensor, slack = 4 * config.n_params, 4 * config.vocab_size * config.dim, 6 << 20
folder = Path(sys.argv[1])

def memory(kind):
    return int(Path("/proc/self/status").read_text().split(kind)[1].split()[0]) * 1024

def within(allowed, work):
    now = memory("VmData:")
    resource.setrlimit(resource.RLIMIT_DATA, (now + allowed, resource.RLIM_INFINITY))
    try:
        return work()
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

small = Llama(LlamaConfig.preset("tiny"))  # imports, and what torch sets up at its first call
large = Llama(config, device="meta").to_empty(device="cpu")
for format, shards in (("hf", 3), ("meta", 2)):
    small.save_pretrained(folder / f"small-{format}", format, shards=shards)
    Llama.from_pretrained(folder / f"small-{format}")
    within(tensor + slack, lambda: large.save_pretrained(folder / format, format, shards=shards))
del large
for format in ("hf", "meta"):
    mapped = sum(p.stat().st_size for p in (folder / format).glob("*.pth"))
    def load():
        return Llama.from_pretrained(folder / format)
    def convert(to):
        weights.write(weights.open_checkpoint(folder / format), folder / f"{format}-to-{to}", to)
    before = memory("RssAnon:")
    source = weights.open_checkpoint(folder / format)
    assert memory("RssAnon:") < before + slack, "opening a checkpoint reads it"
    del source
    within(mapped + model_bytes + tensor + slack, load)
    for to in weights.FORMATS:
        within(mapped + tensor + slack, lambda: convert(to))
    try:
        within(mapped + model_bytes - slack, load)
    except RuntimeError as error:
        assert "can't allocate memory" in str(error), error
    else:
        raise AssertionError("the limit does not bind")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process's memory so")
def test_peak_memory_is_the_model_and_one_tensor(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back, and is no hidden reserve
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
