"""README.md says what is so: its examples and those of docs/ run, its tables are the code's, its commands exist."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

import llama_fast
from llama_fast.cli import _benchmarks, app, main
from llama_fast.config import LlamaConfig
from llama_fast.model import Llama
from llama_fast.ops.table import OPS, Op
from llama_fast.verify import Case

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def _row(op: Op) -> str:
    page = f"docs/ops/{'rms_norm' if op.name == 'add_rms_norm' else op.name}.md"  # the two share a page
    backends = ", ".join(f"`{b.name}`" for b in op.backends)
    return f"| [`{op.name}`]({page}) | `{op.fwd.text}` | {backends} |"


def test_op_table() -> None:
    found = [line for line in README.splitlines() if line.startswith("| [`")]
    assert found == [_row(op) for op in OPS.values()]


def _gain(file: str, op: str, ours: str, what: str, bytes_of: str, *others: tuple[str, str]) -> str:
    """A row of README's first table: time, and memory if there is any, of transformers, ours and others."""
    lines = json.loads((ROOT / file).read_text())["lines"]
    found = {x["provider"]: x for x in lines if (x["op"], x["dtype"], x["status"]) == (op, "bfloat16", "measured")}

    def text(provider: str) -> str:
        x = found[provider]
        memory = x[f"{bytes_of}_bytes"]
        size = f", {memory / 1e9:.1f} GB" if (memory or 0) > 1e9 else f", {memory / 1e6:.0f} MB" if memory else ""
        return f"{x['seconds']['median'] * 1e3:,.0f} ms{size}"

    rest = "; ".join(f"{name} {text(provider)}" for name, provider in others)
    return f"| [{what}]({file}) | {text('transformers')} | {text(f'llama_fast:{ours}')} | {rest} |"


def test_gains_are_those_of_the_result_files() -> None:
    zen5, h200 = "benchmarks/results/zen5-models.json", "results/models-nvidia-h200.json"
    layer = (
        "Zen 5, 2 threads: a layer of width 2048 (its block alone), 1,024 tokens, both ways; memory kept between them"
    )
    tokens = "the same, 64 tokens made one by one by 6 layers of width 768, 92 M parameters"
    small = "a training step of the same model, 2,048 tokens; peak"
    step = "H200: a training step of 3 layers of the 65B, 8,192 tokens; peak"
    plain, own = ("plain PyTorch", "eager"), ("`lf.Llama`", "llama_fast")
    assert [line for line in README.splitlines() if line.startswith("| [") and " ms" in line] == [
        _gain(zen5, "block", "recompute-cheap", layer, "kept", plain),
        _gain(zen5, "decode", "hf", tokens, "kept", own, plain),
        _gain(zen5, "training_step", "hf", small, "peak", ("torch.compile", "torch.compile"), plain),
        _gain(h200, "training_step", "hf", step, "peak", ("with Liger-Kernel", "transformers+liger"), plain),
    ]


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def _lines(program: str) -> list[str]:
    """Command lines of the README that call `program`, less their comments."""
    lines = [line.partition("  #")[0].strip() for block in _blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line.split()[0] == program]


# Options that make a line short are put behind it; for bench one tiny case stands for all.
SHORTER = {
    "train": "--config tiny --vocab-size 320 --batch-size 2 --seq-len 32 --eval-batches 1 --steps 2",
    "verify": "--op swiglu",
    "bench": "--quick",
    "generate": "--max-new-tokens 4",
    "evaluate": "--limit 2",
}
CHATML = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
TASK = """task: my_task
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc}]
"""


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the README speaks of: my-llama, in the formats of Hugging Face and GGUF, texts, a task."""
    folder = tmp_path_factory.mktemp("reader")
    texts = [f"{i} the quick brown fox jumps over {i * 7} lazy dogs.\n" for i in range(3000)]
    (folder / "my_texts").mkdir()
    (folder / "my_texts" / "a.txt").write_text("".join(texts))
    (folder / "more.txt").write_text("".join(texts[::-1]))
    (folder / "book.txt").write_text("".join(texts[::3]))
    (folder / "my_code").mkdir()
    (folder / "my_code" / "a.py").write_text("".join(texts[1::3]))
    model = Llama(dataclasses.replace(LlamaConfig.preset("tiny"), n_heads=8, n_kv_heads=4, vocab_size=264))
    _checkpoint(model, folder / "my-llama")
    if importlib.util.find_spec("gguf"):
        from test_weights_gguf import write_gguf

        write_gguf(folder / "my-llama.gguf", model)
    (folder / "my_tasks").mkdir()
    data = folder / "my_tasks" / "data.jsonl"
    docs = [{"text": t, "choices": [" dogs", " fox"], "label": i % 2} for i, t in enumerate(("the lazy", "brown"))]
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (folder / "my_tasks" / "my_task.yaml").write_text(TASK.replace("DATA", str(data)))
    return folder


def _checkpoint(model: Llama, folder: Path) -> None:
    model.save_pretrained(folder)
    if importlib.util.find_spec("tokenizers") is None:
        return
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", *(f"<|{i}|>" for i in range(4))]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({t: i for i, t in enumerate([*special, *alphabet])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(special)
    made.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**names, "chat_template": CHATML}))


def _skip_without(text: str, **extras: str) -> None:
    for module, word in extras.items():
        if word in text and importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")


@pytest.mark.parametrize("number", range(len(_blocks("python"))))
def test_examples_run(number: int, reader: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = _blocks("python")[number]
    _skip_without(code, transformers="transformers", gguf=".gguf", tokenizers="load_tokenizer", jinja2="chat_template")
    monkeypatch.chdir(reader)
    try:
        exec(compile(code, "README.md", "exec"), {})
    finally:
        shutil.rmtree("my-llama-meta", ignore_errors=True)
        if "register()" in code and importlib.util.find_spec("transformers.monkey_patching"):
            importlib.import_module("transformers.monkey_patching").clear_patch_mapping()


DOCS = {
    f"{page.stem}-{i}": code
    for page in sorted((ROOT / "docs").glob("*.md"))
    for i, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
}
# What makes the examples of docs/ short: the sizes and the steps of a training.
SMALLER = {
    'lf.LlamaConfig.preset("demo")': "replace(lf.LlamaConfig.preset('tiny'), vocab_size=320)",
    "steps=1000, lr=1e-3, warmup_steps=100": "steps=2, warmup_steps=1",
    "vocab_size=8192": "vocab_size=320",
    "max_new_tokens=64": "max_new_tokens=4",
    "256": "32",
}


@pytest.mark.parametrize("name", DOCS)
def test_examples_of_the_docs_run(name: str, reader: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = DOCS[name]
    _skip_without(code, transformers="transformers", tokenizers="load_tokenizer", jinja2="chat_template")
    for text, shorter in SMALLER.items():
        code = code.replace(text, shorter)
    monkeypatch.chdir(reader)
    exec(compile(code, f"docs/{name}", "exec"), {"replace": dataclasses.replace})


@pytest.mark.parametrize("line", _lines("llama-fast"))
def test_command_lines_run(
    line: str, reader: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _skip_without(line, lm_eval="evaluate", tokenizers="my-llama", jinja2="--chat")
    monkeypatch.chdir(reader)
    monkeypatch.setattr(llama_fast, "keep_host_memory", lambda: None, raising=False)  # other tests keep their allocator
    suite = _benchmarks("suite")
    tiny = suite.Benchmark(Case("swiglu", {"...": (64,), "F": 256}), torch.float32, "tiny", quick=True)
    monkeypatch.setattr(suite, "collect", lambda ops, quick: [tiny])
    monkeypatch.setenv("OMP_PROC_BIND", "false")  # as it is: bench would start itself again
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n/new\nAgain\n"))
    for part in line.split("&&"):
        arguments = shlex.split(part)[1:]
        monkeypatch.setattr("sys.argv", ["llama-fast", *arguments, *SHORTER.get(arguments[0], "").split()])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert not stopped.value.code, capsys.readouterr().err
    shutil.rmtree("my-llama-8", ignore_errors=True)


def test_every_command_line_is_known() -> None:
    """Lines of llama-fast run above, targets of make are checked below; what pip is asked for, its extras, exists."""
    assert sum(map(len, map(_lines, ("llama-fast", "make", "pip")))) == sum(b.count("\n") for b in _blocks("sh"))
    extras = {e.strip() for group in re.findall(r"\[([a-z, ]+)\]'", README) for e in group.split(",")}
    assert extras
    declared = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    assert extras <= set(re.findall(r"^(\w+) = \[", declared, re.MULTILINE))


def test_make_targets_exist_and_are_listed() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z0-9-]+):.*## ", makefile, re.MULTILINE))
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert targets == set(phony.split())
    for document in ("README.md", "CONTRIBUTING.md"):
        named = re.findall(
            r"\bmake ([a-z0-9-]+)\b(?=[`  ]|$)", "".join(re.findall(r"`[^`]+`", (ROOT / document).read_text()))
        )
        assert set(named) <= targets


def test_commands_exist() -> None:
    commands = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback is not None}
    for document in (README, (ROOT / "CONTRIBUTING.md").read_text()):
        assert set(re.findall(r"llama-fast ([a-z]+)\b", document)) <= commands


def test_ci_runs_the_test_command_and_the_checks() -> None:
    text = (ROOT / ".ci" / "run").read_text()
    assert re.search(r"for target in test check asan", text)
    assert "make test" in README
