# SPDX-License-Identifier: Apache-2.0
"""The lesson, course/geometry.ipynb: it runs, prints what is committed, and stays a
lesson."""

import ast
import re
import time
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest
import torch

import gpart

ROOT = Path(__file__).resolve().parent.parent
PATH = ROOT / "course" / "geometry.ipynb"
NUMBER = re.compile(r"-?\d+\.\d+")


def lesson() -> Any:
    return nbformat.read(PATH, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tagged(notebook: Any, tag: str) -> list[Any]:
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", ())]


def printed(cell: Any) -> str:
    return "".join(
        output.text for output in cell.outputs if output.output_type == "stream"
    )


def figures(cell: Any) -> int:
    return sum("image/png" in output.get("data", ()) for output in cell.outputs)


@pytest.mark.slow
def test_lesson_runs_and_prints_what_is_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In under three minutes: the same words, numbers within 2 %, figures in the same
    cells."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel's own shows figures
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    start, committed, run = time.monotonic(), lesson(), lesson()
    resources = {"metadata": {"path": str(PATH.parent)}}
    nbclient.NotebookClient(
        run, timeout=180, kernel_name="python3", resources=resources
    ).execute()
    assert time.monotonic() - start < 180
    for new, old in zip(code_cells(run), code_cells(committed), strict=True):
        assert {output.get("name") for output in new.outputs} <= {"stdout", None}, (
            new.outputs
        )
        assert figures(new) == figures(old), old.source
        texts = printed(new), printed(old)
        assert NUMBER.sub("#", texts[0]) == NUMBER.sub("#", texts[1])
        a, b = (
            torch.tensor([float(x) for x in NUMBER.findall(text)]) for text in texts
        )
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.001)


def test_lesson_is_committed_as_it_ran() -> None:
    """Every cell in order, once, without errors, and nothing of the machine it ran
    on."""
    cells = code_cells(notebook := lesson())
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell.outputs]
    assert all(
        o.output_type == "display_data" or o.get("name") == "stdout" for o in outputs
    )
    assert not any("execution" in cell.metadata for cell in cells)
    assert {*notebook.metadata} == {"kernelspec", "language_info"}
    text = PATH.read_text()
    assert len(text) < 600_000 and not re.search(r"/(tmp|home|opt|usr|work)/", text)


def test_lesson_is_about_gpart_itself() -> None:
    """Every code cell imports the library, none defines anything by a name of the
    library's."""
    for cell in code_cells(lesson()):
        assert re.search(
            r"^(import gpart|from gpart import .*)$", cell.source, re.MULTILINE
        )
        nodes = [*ast.walk(ast.parse(cell.source))]
        defined = {
            node.name
            for node in nodes
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
        }
        assert not defined & vars(gpart).keys()


def test_figures_say_what_to_see() -> None:
    """A sentence follows every figure."""
    cells = lesson().cells
    shown = [
        k for k, cell in enumerate(cells) if cell.cell_type == "code" and figures(cell)
    ]
    assert len(shown) >= 6
    for k in shown:
        assert cells[k + 1].cell_type == "markdown"
        assert re.match(r"What to see: .*\.$", cells[k + 1].source, re.DOTALL), cells[
            k
        ].source


def test_exercises_have_solutions() -> None:
    """Five: a question with a hint, a cell for the student, a folded solution with
    asserts."""
    cells = (notebook := lesson()).cells
    exercises, solutions = tagged(notebook, "exercise"), tagged(notebook, "solution")
    assert len(exercises) == len(solutions) == 5
    for solution in solutions:
        question, yours, _ = cells[(k := cells.index(solution)) - 2 : k + 1]
        assert (
            question.source.startswith("### Exercise")
            and "<details>" in question.source
        )
        assert "# your turn" in yours.source and not yours.outputs
        assert solution.metadata.jupyter.source_hidden and "assert" in solution.source
