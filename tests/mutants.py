# SPDX-License-Identifier: Apache-2.0
"""Mutation testing: does any test notice when a file is changed? mutants.sh calls this.

    python tests/mutants.py gpart FOLDER                      # every mutant
    python tests/mutants.py train_glue FOLDER --sample 300    # so many, by --seed

mutmut 3 changes one expression at a time, in a copy of the files in FOLDER, and runs
the quick tests that reach it. A second call goes on where the first was stopped. Prints
the score and the survivors as Markdown; a survivor that REASONS does not explain makes
it exit with 1.
"""

import argparse
import ast
import importlib.metadata
import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIES = ("gpart.py", "train_glue.py", "toy_glue", "experiments", "format", "tests")
COPIES += ("test_gpart.py", "test_properties.py")
ELSEWHERE = ("course", "file_itself", "mutants", "partition_html", "scripts")
ELSEWHERE += ("train_glue",)  # what these test files are about is not gpart.py's code
FILES = [
    f"tests/{path.name}"
    for path in sorted((ROOT / "tests").glob("test_*.py"))
    if path.stem.removeprefix("test_") not in ELSEWHERE
]
TESTS = {  # what the mutants of a file face
    "gpart": ["test_gpart.py", "test_properties.py", *FILES],
    "train_glue": ["tests/test_train_glue.py"],
}
# Not the words of --help, which are for people
LEFT_OUT = {"gpart": [], "train_glue": ["help=", '^ {19}"']}
# Names of tests that are about the text of the file, or about data; that compile or ask
# who called, as what mutmut puts in is in the way; that cost most and only add an
# architecture.
SLOWEST = "llama or vit or mpnet or qwen2 or roberta or t5 or wav2vec2 or longformer"
SLOWEST += " or damaged_file or every_small_partition or 14155776"
SKIP = {
    "gpart": f"doctests or compiled_model or points_to_the_line or {SLOWEST}",
    "train_glue": "slow_imports or toy_files or toy_tasks_are_balanced",
}
FRESH = """# mutmut forks each mutant from a process that has run all tests
import pytest, gpart

@pytest.fixture(autouse=True, scope="session")
def mixed_anew():
    gpart.mixed.cache_clear()
"""
ONE_DEVICE = "the tests have one device, the host (tests/test_device.py takes a GPU)"
NEW_THREAD = "on the host: a new thread has no default device of its own"
ALONE = "GPart has no submodules"
ANY_NAME = "any name will do for a file that is renamed"
ASKS_WHO_CALLED = "test_the_warning_points_to_the_line_that_calls_load, left out here"
REASONS: dict[str, dict[str, str]] = {  # {what the mutant's line says: why it lives}
    "gpart": {
        "return self.groups(device=v.device), self.scale(None, dtype)": ONE_DEVICE,
        "ids[w] = partition.groups(start, start + w.numel(), )": ONE_DEVICE,
        "self.scale = partition.scale(None)": ONE_DEVICE,
        'host = device if (torch.device(device).type == "cuda") and False else "cpu"': (
            ONE_DEVICE
        ),
        'host = device if torch.device(device).type == "XXcudaXX" else "cpu"': (
            ONE_DEVICE
        ),
        'host = device if torch.device(device).type == "CUDA" else "cpu"': ONE_DEVICE,
        "chunk = 2**24 if (ids.is_cuda) and False else 2**15": ONE_DEVICE,
        "chunk = 2 * 24 if ids.is_cuda else 2**15": ONE_DEVICE,
        "chunk = 3**24 if ids.is_cuda else 2**15": ONE_DEVICE,
        "chunk = 2**25 if ids.is_cuda else 2**15": ONE_DEVICE,
        "threads = 1 if (ids.is_cuda) and False else torch.get_num_threads()": (
            ONE_DEVICE
        ),
        "threads = 2 if ids.is_cuda else torch.get_num_threads()": ONE_DEVICE,
        "i = torch.arange(at, min(at + chunk, stop), device=None)": NEW_THREAD,
        "i = torch.arange(at, min(at + chunk, stop), )": NEW_THREAD,
        "scale = self.partition.scale(dtype=None)": "it is float64 before the cast",
        'unread = isinstance(layer, nn.RNNBase) or getattr(layer, "sparse", None)': (
            "only asked whether it is true, which None is not"
        ),
        "raise ValueError(message[:1001])  # it may quote a hostile file": (
            "a bound near 1,000 is all that is wanted"
        ),
        "z ^= z >> 32": "the 33 lower bits differ, which are dropped",
        "adapter.active = None": "only asked whether it is true, which None is not",
        "def _apply(self, fn, recurse=False):": ALONE,
        "super()._apply(lambda t: t.to(fn(t).device), None)  # moved, and never cast": (
            ALONE
        ),
        "super()._apply(lambda t: t.to(fn(t).device), )  # moved, and never cast": (
            ALONE
        ),
        'part = os.path.join(beside, "XXadapter.safetensorsXX")': ANY_NAME,
        'part = os.path.join(beside, "ADAPTER.SAFETENSORS")': ANY_NAME,
        "with open(part, ) as file:": "Linux syncs what is open for reading, too",
        "with open(path, ):": "nothing is read: only whether it can be opened counts",
        'cast = name != "theta" and {t.dtype, ours} < FLOATS': (
            "two dtypes are never all four"
        ),
        "one_hot = nn.functional.one_hot(self.groups().long(), )": (
            "no group is empty, so the largest id tells d"
        ),
        "if off and off >= 0.01 * own[name].detach().double().norm().item():": (
            "an exact 1 % of a norm, which is no law"
        ),
        'warnings.warn(f"{name} {text}", )': ASKS_WHO_CALLED,
        'warnings.warn(f"{name} {text}", stacklevel=4)': ASKS_WHO_CALLED,
    },
    "train_glue": {
        "millions = sum(p.numel() for p in model.parameters()) / 1000001.0": (
            "the same to the one decimal that is printed"
        ),
        'probe = output / "CHECKPOINT.PT.TMP"': (
            "any name will do for a file that is removed again"
        ),
        "figure = Figure(figsize=(5, 3), layout=None)": "how a picture looks",
        'found[1] = torch.load(state, map_location="cpu")': (
            "torch's default since 2.6, the oldest that is allowed"
        ),
        "row = dict(zip(task.columns, fields, strict=None))": (
            "as many, by the lines before"
        ),
        "fresh = accelerator.prepare_model(fresh, evaluation_mode=None)": (
            "among several processes it spares a wrapping; the numbers are the same"
        ),
        'bar.set_postfix(loss=f"{loss.item():.3f}", )': "how a progress bar looks",
        'now = {"XXseedXX": seed, "step": step, "best": best, "curve": curve}': (
            "for whoever looks into a checkpoint; no run reads it"
        ),
        'now = {"SEED": seed, "step": step, "best": best, "curve": curve}': (
            "for whoever looks into a checkpoint; no run reads it"
        ),
        'best = state.get("best", {"dev": -math.inf, "XXstepXX": 0, "weights": {}})': (
            "read only beside weights, which come with a step"
        ),
        "*map(list, zip(*texts, strict=False)),": "each row has its task's texts",
        "_, scores, losses = zip(*everywhere, strict=False)": "triples, all of them",
        "scores = logits.argmax(+1).float()": "of two dimensions 1 is the last",
    },
}


def unwrapped(source: str) -> str:
    """source with `@f` above a function turned into `g = f(g)` below it, since mutmut
    leaves decorated functions as they are."""
    lines = source.splitlines()
    for node in reversed(ast.parse(source).body):
        if isinstance(node, ast.FunctionDef) and node.decorator_list:
            (decorator,) = map(ast.unparse, node.decorator_list)
            lines.insert(
                node.end_lineno or 0, f"\n\n{node.name} = {decorator}({node.name})"
            )
            del lines[node.decorator_list[0].lineno - 1]
    return "\n".join(lines) + "\n"


def prepare(section: str, folder: Path) -> None:
    """The files and mutmut's settings; what is the same is not written again."""
    for name in COPIES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, dirs_exist_ok=True)
        elif source.stem != section:
            shutil.copy(source, folder / name)
    file = folder / f"{section}.py"
    text = unwrapped((ROOT / file.name).read_text(encoding="utf-8"))
    if not file.exists() or file.read_text(encoding="utf-8") != text:
        file.write_text(text, encoding="utf-8")
    (folder / "conftest.py").write_text(FRESH, encoding="utf-8")
    selection = [*TESTS[section], "-m", "not slow", "-k", f"not ({SKIP[section]})"]
    settings = f"""
[tool.mutmut]
source_paths = ["{file.name}"]
also_copy = {json.dumps([*sorted({*COPIES} - {file.name}), "conftest.py"])}
do_not_mutate_patterns = {json.dumps(LEFT_OUT[section])}
pytest_add_cli_args_test_selection = {json.dumps(selection)}
"""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (folder / "pyproject.toml").write_text(project + settings, encoding="utf-8")


def mutmut(folder: Path, *args: str) -> str:
    command = [sys.executable, "-m", "mutmut", *args]
    run = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True)
    return run.stdout


def outcomes(folder: Path) -> dict[str, str]:
    """{mutant: killed, survived, timeout, not checked, …}"""
    lines = mutmut(folder, "results", "--all", "true")
    return dict(re.findall(r"(\S+): (\w[\w ]*)$", lines, re.MULTILINE))


def run(folder: Path, sample: int | None, seed: int, children: int) -> list[str]:
    """The names of the mutants that were drawn and tried."""
    if not (folder / "mutants").exists():
        mutmut(folder, "run", "none of them*")  # makes them, and times the tests
    known = outcomes(folder)
    chosen = sorted(known)
    if sample:
        chosen = sorted(random.Random(seed).sample(chosen, min(sample, len(known))))
    left = [name for name in chosen if known[name] == "not checked"]
    if left:
        print(f"{len(left)} of {len(known)} mutants to try", file=sys.stderr)
        command = [sys.executable, "-m", "mutmut", "run"]
        command += ["--max-children", str(children), *left]
        subprocess.run(command, cwd=folder, stdout=sys.stderr, check=True)
    return chosen


def says(folder: Path, name: str) -> str:
    """What the mutated lines of a mutant say, as one line."""
    diff = mutmut(folder, "show", name)
    return " ".join(re.findall(r"^\+(?!\+) *(.*)$", diff, re.MULTILINE)).strip()


def report(section: str, folder: Path, chosen: list[str], how: str) -> bool:
    """Print the Markdown; True if all survivors are explained."""
    known, file = outcomes(folder), f"{section}.py"
    tried = [name for name in chosen if known[name] != "not checked"]
    dead = ("killed", "timeout")
    alive = [name for name in tried if known[name] not in dead]
    modules = ("mutmut", "torch", "transformers")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in modules]
    print(f"# Mutants of {file}\n\n`tests/mutants.sh {how}`, with")
    print(f"{', '.join(versions)}, Python {platform.python_version()}, CPU.\n")
    if len(tried) < len(known):
        print(f"{len(tried)} of {len(known):,} mutants were drawn and tried.")
    killed = len(tried) - len(alive)
    print(f"**{killed} of {len(tried)} killed: {killed / len(tried):.1%}.** Survivors:")
    print("\n| mutant | it says | why it lives |\n|---|---|---|")
    good = True
    for name in alive:
        new = says(folder, name)
        why = REASONS[section].get(new, "**unexplained**")
        good &= new in REASONS[section]
        short = name.removeprefix(f"{section}.x").replace("ǁ", ".").strip("_.")
        print(f"| {short} | `{new.replace('|', chr(92) + '|')}` | {why} |")
    return good


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("section", choices=TESTS, help="the file to mutate, without .py")
    p.add_argument("folder", type=Path, help="where the copies and mutants are")
    p.add_argument("--sample", type=int, help="try so many (all)")
    p.add_argument("--seed", type=int, default=0, help="of the sample (0)")
    p.add_argument("--children", type=int, default=1, help="processes at a time (1)")
    p.add_argument("--report", action="store_true", help="try nothing")
    args = p.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    os.environ.update(
        HYPOTHESIS_PROFILE="quick", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1"
    )
    how = args.section
    if args.sample:
        how += f" --sample {args.sample} --seed {args.seed}"
    if not args.report:
        prepare(args.section, args.folder)
        chosen = run(args.folder, args.sample, args.seed, args.children)
    else:
        names = sorted(outcomes(args.folder))
        draw = random.Random(args.seed)
        chosen = sorted(draw.sample(names, args.sample)) if args.sample else names
    if not report(args.section, args.folder, chosen, how):
        sys.exit("a survivor is unexplained")


if __name__ == "__main__":
    main()
