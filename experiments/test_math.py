# SPDX-License-Identifier: Apache-2.0
"""train_math.py on a tiny language model, and the Trainer on an attached one."""

import json
import sys
from pathlib import Path
from typing import Any

import mutants
import pytest
import tokenizers
import torch
import transformers

sys.path.insert(0, str(mutants.ROOT))
from experiments import train_math

ROWS = [
    (f"What is {a} plus {b}?", f"{a} + {b} = {a + b}\n#### {a + b}")
    for a in range(9)
    for b in range(9)
]
SMALL = ["--max-steps", "8", "--accumulation", "2", "--d", "128", "--target-modules", "o_proj"]


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
    (folder / "sums.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def command(folder: Path, *more: str) -> list[str]:
    data = str(folder / "sums.jsonl")
    result = ["--train", data, "--test", data, "--model", str(folder / "model"), *SMALL]
    return [*result, "--work", str(folder / "work"), "--output", str(folder / "out.json"), *more]


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


def test_answers_are_compared_as_numbers_where_they_are_numbers() -> None:
    """And no answer is never right."""
    for got, expected in [("$1,000.0", "1000"), ("0.5", "1/2"), ("50\\%", "50"), ("x + 1", "x+1")]:
        assert train_math.same_answer(got, expected)
    for got, expected in [("72", "73"), ("", ""), ("", "5"), ("1/0", "5"), ("x", "y")]:
        assert not train_math.same_answer(got, expected)


def test_loss_is_on_the_answer_and_its_end_only(folder: Path) -> None:
    """Labels hide the prompt; a row that is too long is left out, not cut."""
    bench = train_math.Bench(train_math.parse(command(folder)))
    (one,) = train_math.encode(bench.tokenizer, ROWS[:1], 100)
    shown = [i for i, label in zip(one["input_ids"], one["labels"], strict=True) if label != -100]
    assert bench.tokenizer.decode(shown) == f" {ROWS[0][1]}<end>"
    assert bench.tokenizer.decode(one["input_ids"]).startswith("Question: What is 0 plus 0?")
    assert train_math.encode(bench.tokenizer, ROWS[:1], len(one["input_ids"]) - 1) == []


def test_loss_does_not_depend_on_the_batches(folder: Path) -> None:
    """The mean over all answer tokens, whatever rows are evaluated together."""
    args = train_math.parse(command(folder))
    bench = train_math.Bench(args)
    rows = train_math.encode(
        bench.tokenizer, [(q, a * n) for n, (q, a) in enumerate(ROWS[:20], 1)], 1000
    )
    model = train_math.build(args, "none", 0)
    tokens = [sum(label != -100 for label in row["labels"]) for row in rows]
    alone = [bench.loss(model, [row]) for row in rows]
    mean = sum(n * loss for n, loss in zip(tokens, alone, strict=True)) / sum(tokens)
    assert bench.loss(model, rows) == pytest.approx(mean, rel=1e-5)


def test_exact_match_generates_from_the_prompt_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that adds up gets all sums right, one that says the same always only those."""
    args = train_math.parse(command(folder))
    bench = train_math.Bench(args)
    model = train_math.build(args, "none", 0)

    def answering(answer: Any) -> Any:
        def generate(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
            prompts = bench.tokenizer.batch_decode(input_ids, skip_special_tokens=True)
            out = bench.tokenizer(
                [f"#### {answer(p)}" for p in prompts],
                padding=True,
                padding_side="right",
                return_tensors="pt",
            )
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
    """Up while the loss falls, else down, so that the best lies between two that are worse."""
    for best in (-3, -1, 0, 1, 4):
        seen = []

        def loss_at(rate: float, best: int = best, seen: list[float] = seen) -> float:
            seen.append(rate)
            return abs(torch.tensor(rate / 2e-4).log().div(torch.tensor(3.0).log()).item() - best)

        assert train_math.best_rate(2e-4, loss_at) == pytest.approx(2e-4 * 3.0**best, rel=0.01)
        assert min(seen) < 2e-4 * 3.0**best < max(seen) or best in (0,)


@pytest.mark.slow
def test_every_method_learns_and_is_not_run_again(folder: Path, capsys: Any) -> None:
    """A table of all methods from the results file; a second call trains nothing."""
    more = ("--seeds", "0", "--lr", "0.05", "--problems", "2", "--max-new-tokens", "4")
    text = train_math.main(command(folder, *more))
    first = [line.split(" | ")[0] for line in text.splitlines()[2:]]
    assert first == ["| pretrained", "| gpart", "| unilora", "| lora"]
    runs = json.loads((folder / "out.json").read_text())["runs"]
    before = runs["none"]["tiny/sums"]["loss"]
    for method in train_math.METHODS:
        one = runs[f"{method}-lr0.05-seed0"]
        assert one["tiny/sums"]["loss"] < before - 0.01 and one["tiny/sums"]["exact match"] == 0
        assert one["trainable"] == 128
    capsys.readouterr()
    assert train_math.main(command(folder, *more)) == text
    assert "minutes" not in capsys.readouterr().out


def test_mistakes_are_one_line(folder: Path, tmp_path: Path) -> None:
    """What was got, what is allowed, the way out."""
    (tmp_path / "other.jsonl").write_text('{"text": "a"}\n')
    cases = [
        (
            ["--train", str(tmp_path / "other.jsonl")],
            "has text: its columns must be question/answer",
        ),
        (["--train", str(tmp_path / "none.jsonl")], "No such file"),
        (["--d", "10000000"], "d must be in 1..N = 1..2048"),
        (["--max-length", "5"], "at most 5 tokens: --max-length"),
        (["--target-modules", "query"], "no module matches 'query' among"),
    ]
    for more, message in cases:
        with pytest.raises(SystemExit, match=message):
            train_math.main(command(folder, *more, "--output", str(tmp_path / "new.json")))
    with pytest.raises(SystemExit):
        train_math.main(["--model", str(folder / "model")])
    assert not (tmp_path / "new.json").exists()


# --- The Trainer on an attached model ---
def trained(folder: Path, output: Path, steps: int, resume: bool = False, **options: Any) -> Any:
    """theta after steps of a run of 6, with a checkpoint at step 3."""
    args = train_math.parse(command(folder))
    bench = train_math.Bench(args)
    model = train_math.build(args, "gpart", 0)
    settings: dict[str, Any] = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    settings |= {"max_steps": 6, "save_steps": 3, "logging_steps": 3, "learning_rate": 0.01}
    settings |= {"report_to": "none", "use_cpu": True, "dataloader_pin_memory": False} | options
    arguments = transformers.TrainingArguments(output_dir=str(output), seed=1, **settings)

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step >= steps

    rows = train_math.encode(bench.tokenizer, ROWS, 1000)
    trainer = transformers.Trainer(model, arguments, bench.collate, rows, callbacks=[Stop()])
    trainer.train(resume_from_checkpoint=resume)
    return model.gpart.theta.detach()


@pytest.mark.slow
def test_trainer_resumes_to_the_same_theta(folder: Path, tmp_path: Path) -> None:
    """Killed after its checkpoint and started again, a run ends as an undisturbed one."""
    whole = trained(folder, tmp_path / "whole", 6)
    half = trained(folder, tmp_path / "half", 3)
    assert not torch.equal(half, whole)
    assert torch.equal(trained(folder, tmp_path / "half", 6, resume=True), whole)


@pytest.mark.slow
def test_accumulated_gradients_are_those_of_the_whole_batch(folder: Path, tmp_path: Path) -> None:
    """4 x 2 rows train as 8 x 1 rows do, to rounding."""
    ways = [{}, {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}]
    a, b = (trained(folder, tmp_path / str(k), 3, **way) for k, way in enumerate(ways))
    torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)
    assert a.norm() > 0.1
