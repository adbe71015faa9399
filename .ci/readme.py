"""Run the README: its Python blocks print what the block after them says, its tests exist.

Each block runs by itself in an empty folder; a ```text block right after it is its whole output.
"""

import contextlib
import io
import os
import pathlib
import re
import sys
import tempfile

ROOT = pathlib.Path(__file__).parent.parent


def main() -> int:
    readme = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```(?:\n+```text\n(.*?)```)?", readme, flags=re.DOTALL)
    failed = 0
    for code, expected in blocks:
        out = io.StringIO()
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(out):
            os.chdir(folder)
            exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
            os.chdir(ROOT)
        if out.getvalue() != expected:
            failed += 1
            print(f"{code}\nprinted\n{out.getvalue()}\nbut README.md says\n{expected}")
    tests = "".join(path.read_text() for path in ROOT.glob("test_*.py"))
    missing = [
        name for name in set(re.findall(r"`(test_\w+)`", readme)) if f"def {name}(" not in tests
    ]
    print(
        f"README.md: {len(blocks)} blocks run, {failed} wrong; tests named but missing: {missing}"
    )
    return 1 if failed or missing or not blocks else 0


if __name__ == "__main__":
    sys.exit(main())
