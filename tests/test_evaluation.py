"""lm-eval's view of a checkpoint: log-likelihoods, windows and answers, and, where the harness is there, a whole task.

Where the harness is not installed, a stand-in of its base class shows the same methods at work.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import llama_fast
from llama_fast.config import LlamaConfig
from llama_fast.model import Llama
from llama_fast.tokenizer import Tokenizer

HARNESS = importlib.util.find_spec("lm_eval") is not None


def stand_in() -> dict[str, types.ModuleType]:
    """What the class takes from lm_eval: a registry and a base whose `loglikelihood` encodes pairs of texts."""
    names = ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.registry")
    modules = {name: types.ModuleType(name) for name in names}

    class TemplateLM:
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            encoded = []
            for context, continuation in (r.args for r in requests):
                whole, before = self.tok_encode(context + continuation), self.tok_encode(context)  # type: ignore[attr-defined]
                encoded.append(((context, continuation), before, whole[len(before) :]))
            return self._loglikelihood_tokens(encoded)  # type: ignore[attr-defined]

    modules["lm_eval.api.model"].TemplateLM = TemplateLM  # type: ignore[attr-defined]
    modules["lm_eval.api.registry"].register_model = lambda name: lambda cls: cls  # type: ignore[attr-defined]
    return modules


@pytest.fixture(scope="module")
def evaluation() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        if not HARNESS:
            for name, module in stand_in().items():
                patch.setitem(sys.modules, name, module)
        import llama_fast.evaluation as module

        yield module
    if not HARNESS:
        del sys.modules["llama_fast.evaluation"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "a"
    texts = ["".join(f"{i} the quick brown fox jumps over {i * 7} lazy dogs.\n" for i in range(500))]
    tokenizer = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    Tokenizer.train(texts, tokenizer, vocab_size=350)
    model = Llama(LlamaConfig(64, 2, 4, 2, 176, 350, 48))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(4.0)
    model.save_pretrained(path)
    (path / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    return path


def alone(model: Llama, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """One pair, token after token."""
    total, greedy = 0.0, True
    for i, token in enumerate(continuation):
        seen = [*context, *continuation[:i]][-model.config.max_seq_len :]
        with torch.no_grad():
            logits = model(torch.tensor([seen]))[0, -1]
        total += float(logits.log_softmax(-1)[token])
        greedy = greedy and int(logits.argmax()) == token
    return total, greedy


@pytest.mark.parametrize("batch_size", [1, 3, 99])
def test_loglikelihoods_are_those_of_one_token_after_the_other(evaluation: Any, folder: Path, batch_size: int) -> None:
    model = Llama.from_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    sizes = [(1, 1), (5, 3), (1, 20), (7, 0), (30, 18), (12, 12)]
    pairs = [tuple(torch.randint(350, (n,), generator=generator).tolist() for n in pair) for pair in sizes]
    answer = model.generate([pairs[0][0]], max_new_tokens=6)[0]
    pairs.append(([answer[0]], answer[1:]))
    found = evaluation.loglikelihoods(model, pairs, batch_size)
    for (value, greedy), pair in zip(found, pairs, strict=True):
        expected, likeliest = alone(model, *pair)
        assert value == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert greedy == likeliest
    assert [g for _, g in found] == [False, False, False, True, False, False, True]
    # of a pair that is too long, the front of the context is left out
    ((value, _),) = evaluation.loglikelihoods(model, [(pairs[4][0] * 3, pairs[4][1])])
    assert value == pytest.approx(alone(model, (pairs[4][0] * 3)[-31:], pairs[4][1])[0], rel=1e-4)
    assert value != pytest.approx(found[4][0], rel=1e-4)
    for bad in (([], [1]), ([1], [1] * 49)):
        with pytest.raises(ValueError, match="at most max_seq_len = 48"):
            evaluation.loglikelihoods(model, [bad])


@pytest.mark.parametrize("n", [0, 1, 3, 4, 5, 8, 11])
def test_windows_score_each_token_once_with_all_that_fits_before(evaluation: Any, n: int) -> None:
    ids = list(range(10, 10 + n))
    windows = list(evaluation.rolling_windows(ids, 1, 4))
    assert [i for _, scored in windows for i in scored] == ids
    for context, scored in windows:
        whole = [1, *ids]
        end = whole.index(scored[-1]) + 1
        assert [*context, *scored] == whole[max(0, end - 5) : end]  # 4 inputs, and the last that is only scored


class Request:
    def __init__(self, *args: Any) -> None:
        self.args = args


def test_the_class(evaluation: Any, folder: Path) -> None:
    device = None if torch.cuda.is_available() else "cuda:0"  # which the harness says where it is told nothing
    lm = evaluation.LlamaFastLM(pretrained=str(folder), batch_size=2, device=device)
    assert lm.model.norm.weight.is_cpu
    tok = lm.text_tokenizer
    assert (lm.max_length, lm.eot_token_id, lm.prefix_token_id) == (48, 2, 1)
    assert lm.tok_encode("the") == tok.encode("the", bos=True) == lm.tok_encode("<s>the")
    assert lm.tok_encode("the", add_special_tokens=False) == tok.encode("the")
    (found,) = lm.loglikelihood([Request("the quick", " brown fox")])
    context = tok.encode("the quick", bos=True)
    expected = alone(lm.model, context, tok.encode("the quick brown fox", bos=True)[len(context) :])
    assert found == (pytest.approx(expected[0], rel=1e-4), expected[1])
    text = "the quick brown fox jumps over 123456789 lazy dogs. " * 3
    (rolled,) = lm.loglikelihood_rolling([Request(text)])
    ids = tok.encode(text)
    assert len(ids) > lm.max_length
    pairs = evaluation.rolling_windows(ids, 1, 48)
    assert rolled == pytest.approx(sum(alone(lm.model, *pair)[0] for pair in pairs), rel=1e-4)
    free, cut = lm.generate_until([Request("the", {"max_gen_toks": 12}), Request("the", {"until": ["dogs"]})])
    new = lm.model.generate([tok.encode("the", bos=True)], max_new_tokens=12, eos_id=2)[0]
    assert free == tok.decode(new[2:], continuation=True)
    assert "dogs" not in cut
    context = tok.encode("the", bos=True)
    for options, same in (
        ({"max_new_tokens": 5}, {"max_new_tokens": 5}),
        ({"max_tokens": 4, "max_gen_toks": 6, "do_sample": False, "temperature": 2.0}, {"max_new_tokens": 6}),
        ({"temperature": 5.0, "top_k": 0}, {"max_new_tokens": 9, "temperature": 5.0}),
        (
            {"temperature": 5.0, "do_sample": True, "min_p": 0.2},
            {"max_new_tokens": 9, "temperature": 5.0, "min_p": 0.2},
        ),
        ({"repetition_penalty": 3.0, "top_p": None}, {"max_new_tokens": 9, "repetition_penalty": 3.0}),
    ):
        torch.manual_seed(0)
        (found,) = lm.generate_until([Request("the", {"max_completion_tokens": 9} | options)])
        torch.manual_seed(0)
        new = lm.model.generate([context], eos_id=2, **same)[0]
        assert found == tok.decode(new[len(context) :], continuation=True), options
    with pytest.warns(UserWarning, match="options that llama_fast does not know: num_beams"):
        lm.generate_until([Request("the", {"max_gen_toks": 1, "num_beams": 2})])
    with pytest.raises(ValueError, match="has no chat template"):
        lm.apply_chat_template([{"role": "user", "content": "Hi"}])


def test_a_task_of_the_harness_on_local_data(evaluation: Any, folder: Path, tmp_path: Path) -> None:
    if not HARNESS:
        pytest.skip("the extra eval is not installed")
    from lm_eval import evaluator
    from lm_eval.api.registry import get_model
    from lm_eval.api.task import ConfigurableTask

    assert get_model("llama_fast") is evaluation.LlamaFastLM
    model = Llama.from_pretrained(folder)
    tok = evaluation.load_tokenizer(folder)
    choices = [" dogs", " fox", " quick"]
    docs = [{"text": t, "choices": choices, "label": i % 3} for i, t in enumerate(["the lazy", "brown", "the", "over"])]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(d) + "\n" for d in docs))
    config = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    results = evaluator.simple_evaluate(
        model="llama_fast",
        model_args=f"pretrained={folder}",
        tasks=[ConfigurableTask(config=config)],
        bootstrap_iters=0,
    )
    right = 0
    for doc in docs:
        before = tok.encode(doc["text"], bos=True)
        scores = [alone(model, before, tok.encode(doc["text"] + c, bos=True)[len(before) :])[0] for c in choices]
        right += scores.index(max(scores)) == doc["label"]
    assert results["results"]["local"]["acc,none"] == right / len(docs)


def test_the_extra_is_named_where_it_is_missing(folder: Path) -> None:
    code = "import sys; sys.modules['lm_eval'] = None; from llama_fast import cli; cli.main()"
    command = [sys.executable, "-c", code, "evaluate", str(folder), "--tasks", "arc_easy"]
    root = Path(llama_fast.__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'llama_fast[eval]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1
