# SPDX-License-Identifier: Apache-2.0
"""What mutants.sh runs before and after mutmut.

python experiments/mutants.py prepare FOLDER   gpart.py and mutmut's settings, into FOLDER
python experiments/mutants.py report FOLDER    the score, the survivors, the named bugs: Markdown

A survivor that REASONS does not explain, or a named bug that fewer than two tests
notice, makes report exit with 1.
"""

import ast
import importlib.metadata
import platform
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What the mutants face: not what is slow, not what is about other files or the text of
# gpart.py, of the exhaustive tests and the many architectures only what costs little:
# under 20 seconds.
SKIP = (
    "official",
    "toy",
    "short",
    "imports_only",
    "doctests",
    "all_small",
    "mutated_file",
)
SKIP += ("hostile_header", "garbled", "llama", "vit", "mpnet", "qwen2", "roberta")
SKIP += (
    "golden_vectors and 14155776",
    "weight_decay",
    "injective",
    "inner_products",
    "t5",
    "pickle",
)
SELECTION = ["-m", "not slow", "-k", " and ".join(f"not ({words})" for words in SKIP)]

BUGS: dict[
    str, list[tuple[str, str]]
] = {  # {name: [(what gpart.py says, what the bug says)]}
    "scale 1/n instead of 1/sqrt(n)": [(".sqrt().reciprocal()", ".reciprocal()")],
    "group offset one too low from the second layer on": [
        (
            "= n, (n := n + w.numel())",
            "= n - (n > 0), (n := n + w.numel()) - (len(self.ids) > 0)",
        )
    ],
    "bias gradient lost": [
        ("rows.sum(0) if ctx.needs_input_grad[2] else None", "None")
    ],
    "reduce in the gradient's dtype": [
        (
            "torch.zeros_like(scale).index_add(0, ids, w.to(scale)) * scale",
            "torch.zeros_like(scale, dtype=w.dtype).index_add(0, ids, w).to(scale) * scale",
        )
    ],
    "merge adds twice": [
        (
            "copy_(add_update(g.pretrained[name],",
            "copy_(add_update(add_update(g.pretrained[name], *g.parts(g.owners[name], w)),",
        )
    ],
    "cycle walking stops after one step": [
        (
            "x[spare] = permute(x[spare], N, seed)",
            "x[spare] = permute(x[spare], a * b, seed)",
        )
    ],
    "seed ignored above 32 bits": [
        ("(seed + t * 0x9E3779B97F4A7C15)", "(seed % 2**32 + t * 0x9E3779B97F4A7C15)")
    ],
    "order of the manifest ignored on load": [
        (
            "{n: own[n] for n in names}, heads, True)",
            "{n: w for n, w in own.items() if n in names}, heads, True)",
        )
    ],
    "grad_x from W instead of W + P theta": [
        ("grad_y @ add_update(w, *parts).to(grad_y)", "grad_y @ w.to(grad_y)")
    ],
    "theta captured at attach": [
        (
            "self.theta = nn.Parameter(torch.zeros_like(self.scale))",
            "self.theta = self.__dict__['captured'] = nn.Parameter(torch.zeros_like(self.scale))",
        ),
        ("return self.theta, ids", "return self.captured, ids"),
    ],
}
EVEN = "an even number of keys: both halves are equally long"
FALSY = "None is as false as False"
CHILDLESS = "a GPart has no submodules to recurse into"
ONE = "one element goes where none would go"
HIDDEN = "any name will do in a folder of its own, and the file is renamed"
REASONS: dict[str, str] = {  # {what the mutant's line says: why no test can tell}
    "keys.append((z ^ (z >> 32)) >> 33)": "of z >> 31 and z >> 32 no bit reaches the top 31",
    "for even, odd in zip(keys[::2], keys[1::2], strict=None):": EVEN,
    "for even, odd in zip(keys[::2], keys[1::2], ):": EVEN,
    "for even, odd in zip(keys[::2], keys[1::2], strict=False):": EVEN,
    "own = dict(model.named_parameters(remove_duplicate=None))": FALSY,
    "scale = P.scale(dtype=None) if w.dtype is torch.float64 else self.scale": (
        "without a cast the scale stays what it was computed in, float64"
    ),
    "def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = False) -> Any:": CHILDLESS,
    "return super()._apply(lambda t: t.to(device), None)": CHILDLESS,
    "return super()._apply(lambda t: t.to(device), )": CHILDLESS,
    "self.scale = self.scale.to(device := fn(self.theta.data[:1]).device)": ONE,
    "self.ids = {name: self.parts(name, fn(ids[:1]))[1] for name, ids in self.ids.items()}": ONE,
    "theta = sum((reduce(*p).to(self.theta.device) for p in parts), )": "sum starts at 0 too",
    "for name, w in module.named_parameters(path, recurse=None):": FALSY,
    'g, own = model._modules.get("gpart"), dict(model.named_parameters(remove_duplicate=None))': (
        FALSY
    ),
    "own = {**model.state_dict(), **dict(model.named_parameters(remove_duplicate=None))}": FALSY,
    "g.active = None": FALSY,
    'heads = [getattr(m, "get_output_embeddings", lambda: 0)() for m in modules.values()]': (
        "a module is neither None nor 0"
    ),
    'part = os.path.join(folder, "XXadapter.safetensorsXX")': HIDDEN,
    'part = os.path.join(folder, "ADAPTER.SAFETENSORS")': HIDDEN,
    "with open(part, ) as f:": "Linux also flushes a file opened for reading; Windows does not",
}


def unwrapped(source: str) -> str:
    """source with `@f` above a function turned into `g = f(g)` below it, since mutmut
    leaves decorated functions as they are: disabled is among them."""
    lines = source.splitlines()
    for node in reversed(ast.parse(source).body):
        if isinstance(node, ast.FunctionDef) and node.decorator_list:
            (decorator,) = map(ast.unparse, node.decorator_list)
            lines.insert(
                node.end_lineno or 0, f"\n\n{node.name} = {decorator}({node.name})"
            )
            del lines[node.decorator_list[0].lineno - 1]
    return "\n".join(lines) + "\n"


def broken(source: str, changes: list[tuple[str, str]]) -> str:
    """source with a named bug put in; ValueError if source no longer says what the bug
    replaces."""
    for old, new in changes:
        if source.count(old) != 1:
            raise ValueError(
                f"gpart.py says {source.count(old)} times, not once: {old}"
            )
        source = source.replace(old, new)
    return source


def prepare(folder: Path) -> None:
    text = unwrapped((ROOT / "gpart.py").read_text())
    if not (folder / "gpart.py").exists() or (folder / "gpart.py").read_text() != text:
        (folder / "gpart.py").write_text(text)
    settings = f"""
[tool.mutmut]
source_paths = ["gpart.py"]
also_copy = ["train_glue.py", "toy_glue"]
pytest_add_cli_args_test_selection = {["test_gpart.py", "test_properties.py", *SELECTION]}
"""
    (folder / "pyproject.toml").write_text(
        (ROOT / "pyproject.toml").read_text() + settings
    )


def mutmut(folder: Path, *args: str) -> str:
    command = [sys.executable, "-m", "mutmut", *args]
    return subprocess.run(
        command, cwd=folder, check=True, capture_output=True, text=True
    ).stdout


def caught(folder: Path, changes: list[tuple[str, str]]) -> list[str]:
    """The tests that fail with a named bug in gpart.py."""
    there = folder / "named"
    there.mkdir(exist_ok=True)
    for name in (
        "test_gpart.py",
        "test_properties.py",
        "train_glue.py",
        "pyproject.toml",
    ):
        (there / name).write_bytes((ROOT / name).read_bytes())
    (there / "gpart.py").write_text(broken((ROOT / "gpart.py").read_text(), changes))
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-rfE", *SELECTION]
    run = subprocess.run(command, cwd=there, capture_output=True, text=True)
    return sorted(
        set(re.findall(r"^(?:FAILED|ERROR) \S+::(\w+)", run.stdout, re.MULTILINE))
    )


def report(folder: Path) -> bool:
    """Print results/mutants.md; True if all is explained."""
    results = re.findall(
        r"(\S+): (\w[\w ]*)$", mutmut(folder, "results", "--all", "true"), re.M
    )
    if unfinished := [name for name, outcome in results if outcome == "not checked"]:
        raise SystemExit(
            f"{len(unfinished)} mutants were not checked: run mutants.sh again"
        )
    alive = [name for name, outcome in results if outcome not in ("killed", "timeout")]
    killed, rows, good = len(results) - len(alive), [], True
    for name in alive:
        diff = mutmut(folder, "show", name)
        new = (
            " ".join(re.findall(r"^\+(?!\+) *(.*)$", diff, re.M))
            .split("  #")[0]
            .strip()
        )
        good &= new in REASONS
        rows.append(
            (
                re.sub("ǁ", ".", re.sub("^gpart.x[_ǁ]", "", name)),
                new,
                REASONS.get(new, "**unexplained**"),
            )
        )
    print(
        "# Mutants of gpart.py\n\n`pip install mutmut==3.8.1 && experiments/mutants.sh`, with"
    )
    versions = [
        f"{name} {importlib.metadata.version(name)}" for name in ("mutmut", "torch")
    ]
    print(f"{', '.join(versions)}, Python {platform.python_version()}, CPU.\n")
    print(
        f"**{killed} of {len(results)} mutants killed: {killed / len(results):.2%}.** Survivors:\n"
    )
    print("| mutant | it says | why no test can tell |\n|---|---|---|")
    for name, new, reason in rows:
        print(f"| {name} | `{new.replace('|', chr(92) + '|')}` | {reason} |")
    print("\n## Named bugs\n\nEach put in by hand, against the same tests.\n")
    print("| bug | tests that fail | among them |\n|---|---|---|")
    for bug, changes in BUGS.items():
        tests = caught(folder, changes)
        good &= len(tests) > 1
        print(
            f"| {bug} | {len(tests)} | {', '.join(f'`{t}`' for t in tests[:3])} |",
            flush=True,
        )
    return good


if __name__ == "__main__":
    action, where = sys.argv[1:]
    if action == "prepare":
        prepare(Path(where))
    elif not report(Path(where)):
        sys.exit(
            "a survivor is unexplained, or a named bug is noticed by fewer than two tests"
        )
