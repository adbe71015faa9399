# SPDX-License-Identifier: Apache-2.0
"""The course: its notebooks run and print what is committed, and its checks can tell
right from wrong; and the figure of P is drawn from today's gpart.py."""

import itertools
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import nbclient
import nbformat
import pytest
import torch

from experiments import figure_of_P
from gpart import Partition

ROOT = Path(__file__).resolve().parent.parent
COURSE = ROOT / "course"
BLANK = "    ...  # your turn\n"
NUMBER = re.compile(r"-?\d+\.\d+")
VERDICTS = {"geometry": "Not yet. {} returns nothing so far.", "solutions": "Correct."}

sys.path.append(str(COURSE))
import checks  # noqa: E402


def notebook(name: str) -> Any:
    return nbformat.read(COURSE / f"{name}.ipynb", as_version=4)


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def exercises(notebook: Any) -> list[Any]:
    return [
        cell for cell in notebook.cells if "exercise" in cell.metadata.get("tags", ())
    ]


def printed(cell: Any) -> str:
    outputs = [output for output in cell.outputs if output.output_type == "stream"]
    assert {output.name for output in outputs} <= {"stdout"}, outputs
    return "".join(output.text for output in outputs)


def figures(cell: Any) -> list[Any]:
    outputs = cell.get("outputs", ())
    return [out for out in outputs if "image/png" in out.get("data", ())]


def cpu_of_children() -> float:
    times = os.times()
    return times.children_user + times.children_system


@pytest.mark.slow
@pytest.mark.parametrize("name", VERDICTS)
def test_a_notebook_prints_what_is_committed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In less than three minutes of a CPU: the same words, numbers within 2 %."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel's own
    for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(variable, str(tmp_path))
    before, run = cpu_of_children(), notebook(name)
    nbclient.NotebookClient(
        run,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(COURSE)}},
    ).execute()
    assert cpu_of_children() - before < 180
    for new, old in zip(code(run), code(notebook(name)), strict=True):
        assert len(figures(new)) == len(figures(old)), old.source
        assert NUMBER.sub("#", printed(new)) == NUMBER.sub("#", printed(old))
        a, b = (
            torch.tensor([*map(float, NUMBER.findall(printed(c)))]) for c in (new, old)
        )
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.001)


@pytest.mark.parametrize("name", VERDICTS)
def test_a_notebook_is_committed_as_it_ran(name: str) -> None:
    """Every cell once, in order, without an error; nothing of the machine in it."""
    committed = notebook(name)
    nbformat.validate(committed)
    cells = code(committed)
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell.outputs]
    assert {out.output_type for out in outputs} <= {"stream", "display_data"}
    assert not any("execution" in cell.metadata for cell in cells)
    assert {*committed.metadata} == {"kernelspec", "language_info"}
    text = (COURSE / f"{name}.ipynb").read_text(encoding="utf-8")
    assert len(text) < 600_000 and not re.search(r"/(tmp|home|opt|usr|work)/", text)


@pytest.mark.parametrize("name", VERDICTS)
def test_each_exercise_says_how_far_it_is(name: str) -> None:
    """'Not yet' under each of the six blanks, 'Correct' under each of the solutions."""
    cells = exercises(notebook(name))
    assert len(cells) == 6
    for cell in cells:
        function = re.match(r"def (\w+)", cell.source)[1]
        assert printed(cell).startswith(VERDICTS[name].format(function))


def test_solutions_answer_the_questions_of_the_lesson() -> None:
    """The same question, signature and check: only the blank is filled in."""
    lesson, solved = notebook("geometry"), notebook("solutions")
    for blank, full in zip(exercises(lesson), exercises(solved), strict=True):
        before, after = blank.source.split(BLANK)
        assert full.source.startswith(before) and full.source.endswith(after)
        assert len(full.source) > len(before + after)
        question = lesson.cells[lesson.cells.index(blank) - 1]
        assert question.source.startswith("### Exercise ")
        assert question.source == solved.cells[solved.cells.index(full) - 1].source


def test_every_figure_has_words() -> None:
    """An alternative text, and what to see in the cell below."""
    cells = notebook("geometry").cells
    count = 0
    for cell, below in itertools.pairwise(cells):
        for figure in figures(cell):
            assert len(figure.metadata["image/png"]["alt"]) > 80
            assert below.source.startswith("What to see: ")
            count += 1
    assert count == 6


def test_every_section_has_a_goal_and_minutes() -> None:
    """The table at the top is that of the sections, which have the same numbers."""
    top, *texts = [cell.source for cell in notebook("geometry").cells]
    table = re.findall(r"^\| (\d) \| (.*?) \| (.*?) \| (\d+) \|$", top, re.MULTILINE)
    heads = [re.match(r"## (\d)\. (.*)\n\n\*(.*)\. (\d+) minutes", t) for t in texts]
    found = [head.groups() for head in heads if head]
    goals = [(k, title, f"You can then {goal}", m) for k, title, goal, m in table]
    assert [(k, t, " ".join(g.split()), m) for k, t, g, m in found] == goals
    assert len(found) == 6


def not_scaled(theta: Any, coarse: Partition, fine: Partition) -> Any:
    return theta[torch.arange(fine.d) % coarse.d]


def neighbours(theta: Any, coarse: Partition, fine: Partition) -> Any:
    k = fine.d // coarse.d
    return (theta / k**0.5).repeat_interleave(k)


def gradients(
    x: Any, W: Any, theta: Any, ids: Any, scale: Any, grad_y: Any
) -> tuple[Any, Any]:
    W = W + (theta * scale)[ids].view(W.shape)
    grad_w = (grad_y.T @ x).flatten()
    return grad_y @ W, torch.zeros_like(theta).index_add(0, ids, grad_w) * scale


def frozen_weight(x: Any, W: Any, theta: Any, *rest: Any) -> tuple[Any, Any]:
    return rest[2] @ W, gradients(x, W, theta, *rest)[1]


def no_second_scale(x: Any, W: Any, theta: Any, ids: Any, scale: Any, g: Any) -> Any:
    grad_x, grad_theta = gradients(x, W, theta, ids, scale, g)
    return grad_x, grad_theta / scale


def last_wins(x: Any, W: Any, theta: Any, ids: Any, scale: Any, g: Any) -> Any:
    grad_theta = torch.zeros_like(theta)
    grad_theta[ids.long()] += (g.T @ x).flatten()
    return gradients(x, W, theta, ids, scale, g)[0], grad_theta * scale


@pytest.mark.parametrize(
    ("check", "answer", "text"),
    [
        (checks.embed, not_scaled, "N = 2, d = 1, kd = 2, .* should be [0.7071, 0.7"),
        (checks.embed, neighbours, "the update is"),
        (checks.embed, lambda theta, *_: theta, "its shape is [1], not [2]"),
        (checks.other_factors, lambda B, A: (B, A), "0 away, less than 1"),
        (checks.other_factors, lambda B, A: (2 * B, A), "the product is [[2]], and"),
        (checks.other_factors, lambda B, A: B, "It should return 2 values, not 1"),
        (
            checks.other_factors,
            lambda B, A: (B[0, 0], A),
            "has the wrong type or shape",
        ),
        (checks.other_factors, lambda B, A: (None, A), "has the wrong type or shape"),
        (checks.nearest, lambda P, w: P.reduce(w), "isometric=False"),
        (checks.nearest, lambda P, w: P.reduce(w) / P.sizes(), "isometric=True"),
        (checks.kept, lambda N, d: (d / N) ** 0.5, "N = 2, d = 1 .* should be 0.5"),
        (checks.kept, lambda N, d: d // 0, "it raises ZeroDivisionError"),
        (checks.rates, lambda sizes, lr: lr / sizes**0.5, "the step of the weights is"),
        (checks.rates, lambda sizes, lr: lr / sizes[0], "sizes = [2, 1]"),
        (checks.rates, lambda sizes, lr: torch.ones(9), "has the wrong type or shape"),
        (checks.backward, frozen_weight, "grad_x is"),
        (checks.backward, no_second_scale, "grad_theta is"),
        (checks.backward, last_wins, "grad_theta is"),
    ],
)
def test_a_check_shows_the_smallest_case_that_is_wrong(
    check: Callable[..., None],
    answer: Callable[..., Any],
    text: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    check(answer)
    said = capsys.readouterr().out
    assert said.startswith("Not yet. ")
    assert re.search(re.escape(text).replace(r"\.\*", ".*").replace(r"\ ", " "), said)


@pytest.mark.parametrize(
    ("check", "answer"),
    [
        (checks.other_factors, lambda B, A: (-B, -A)),
        (checks.nearest, lambda P, w: P.dense().float().pinverse() @ w),
        (checks.rates, lambda sizes, lr: [lr / n for n in sizes.tolist()]),
        (checks.backward, gradients),
    ],
)
def test_a_check_takes_every_right_answer(
    check: Callable[..., None],
    answer: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    check(answer)
    assert capsys.readouterr().out.startswith("Correct. ")


def test_the_figure_of_P_is_drawn_from_this_partition(tmp_path: Path) -> None:
    """Up to fonts: squares of 20 x 20 pixels have the colours of those committed."""
    figure_of_P.draw(figure_of_P.example(), tmp_path / "P.png")
    squares = []
    for path in (tmp_path / "P.png", figure_of_P.PATH):
        image = torch.tensor(plt.imread(path))[:, :, :3]
        assert image.shape == (740, 1600, 3)
        squares.append(image.view(37, 20, 80, 20, 3).mean((1, 3)))
    torch.testing.assert_close(*squares, atol=0.1, rtol=0.0)
