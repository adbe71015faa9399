"""Run the pages: their Python blocks print what the block after them says.

Each section has a folder and names of its own, which its blocks share from top to
bottom; a ```text block right after a block is its whole output, in which "..." stands
for what differs. Tests that a page names must exist.
"""

import contextlib
import doctest
import io
import os
import pathlib
import re
import sys
import tempfile

ROOT = pathlib.Path(__file__).parent.parent
PAGES = (
    "README.md",
    "experiments/README.md",
    "tests/README.md",
    "course/integrations.md",
)
BLOCK = re.compile(r"```python\n(.*?)```(?:\n+```text\n(.*?)```)?", flags=re.DOTALL)


def run(code: str, names: dict[str, object]) -> str:
    """What code prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "<page>", "exec"), names)
    return out.getvalue()


def wrong_blocks(page: str) -> int:
    """How many blocks of a page print something else than it says."""
    same = doctest.OutputChecker().check_output
    wrong = 0
    for section in re.split("^## ", page, flags=re.MULTILINE):
        names: dict[str, object] = {"__name__": "page"}
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            for code, expected in BLOCK.findall(section):
                printed = run(code, names)
                if not same(expected, printed, doctest.ELLIPSIS):
                    wrong += 1
                    print(f"{code}\nprinted\n{printed}\nbut the page says\n{expected}")
    return wrong


def missing_tests(page: str) -> list[str]:
    """Tests that a page names and nobody wrote."""
    paths = [*ROOT.glob("test_*.py"), *ROOT.glob("*/test_*.py")]
    tests = "".join(path.read_text(encoding="utf-8") for path in paths)
    named = set(re.findall(r"`(test_\w+)`", page))
    return sorted(name for name in named if f"def {name}(" not in tests)


def main() -> int:
    sys.path.insert(0, str(ROOT))
    os.environ["HF_HUB_OFFLINE"] = "1"
    failed = 0
    for name in PAGES:
        page = (ROOT / name).read_text(encoding="utf-8")
        wrong, missing = wrong_blocks(page), missing_tests(page)
        print(f"{name}: {len(BLOCK.findall(page))} blocks run, {wrong} wrong", missing)
        failed += wrong + len(missing)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
