"""Run the README: its Python blocks print what the block after them says, its tests
exist.

Each section has a folder and names of its own, which its blocks share from top to
bottom; a ```text block right after a block is its whole output, in which "..." stands
for what differs.
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
BLOCK = re.compile(r"```python\n(.*?)```(?:\n+```text\n(.*?)```)?", flags=re.DOTALL)


def main() -> int:
    sys.path.insert(0, str(ROOT))
    readme = (ROOT / "README.md").read_text()
    count = failed = 0
    for section in re.split("^## ", readme, flags=re.MULTILINE):
        names = {"__name__": "readme"}
        with tempfile.TemporaryDirectory() as folder:
            for code, expected in BLOCK.findall(section):
                out = io.StringIO()
                os.chdir(folder)
                with contextlib.redirect_stdout(out):
                    exec(compile(code, "README.md", "exec"), names)
                os.chdir(ROOT)
                count += 1
                same = doctest.OutputChecker().check_output
                if not same(expected, out.getvalue(), doctest.ELLIPSIS):
                    failed += 1
                    print(
                        f"{code}\nprinted\n{out.getvalue()}\nbut README.md says\n{expected}"
                    )
    tests = "".join(path.read_text() for path in ROOT.rglob("test_*.py"))
    missing = [
        name
        for name in set(re.findall(r"`(test_\w+)`", readme))
        if f"def {name}(" not in tests
    ]
    print(
        f"README.md: {count} blocks run, {failed} wrong; tests named but missing: {missing}"
    )
    return 1 if failed or missing or not count else 0


if __name__ == "__main__":
    sys.exit(main())
