# SPDX-License-Identifier: Apache-2.0
"""What mutants.py mutates is the file itself."""

import pathlib
import re
import types

import pytest
import torch

from tests import mutants


@pytest.mark.parametrize("section", mutants.TESTS)
def test_unwrapping_decorators_changes_nothing(section: str) -> None:
    """No function of a module is decorated, and the module says the same names."""
    source = (mutants.ROOT / f"{section}.py").read_text(encoding="utf-8")
    text = mutants.unwrapped(source)
    assert "\n@contextlib" not in text and "\n@torch" not in text
    for name in set(mutants.re.findall(r"^def (\w+)", source, mutants.re.MULTILINE)):
        assert f"\ndef {name}(" in text
    compile(text, section, "exec")


def test_an_unwrapped_gpart_is_gpart() -> None:
    """disabled, which has a decorator, works as it did."""
    source = (mutants.ROOT / "gpart.py").read_text(encoding="utf-8")
    module = types.ModuleType("gpart")
    exec(compile(mutants.unwrapped(source), "gpart.py", "exec"), vars(module))
    module.attach(net := torch.nn.Linear(3, 3), 2, target_modules="all-linear")
    net.gpart.theta.data.fill_(1.0)
    x = torch.arange(6.0).view(2, 3)
    y = net(x)
    with module.disabled(net):
        assert not torch.equal(net(x), y)
    module.merge(net)
    assert torch.equal(net(x), y)


def test_what_the_mutants_face_is_there(tmp_path: pathlib.Path) -> None:
    """Every copied path and every test file, in a folder of its own."""
    mutants.prepare("train_glue", tmp_path)
    for name in (*mutants.COPIES, *mutants.TESTS["train_glue"]):
        assert (tmp_path / name).exists(), name
    for name in mutants.TESTS["gpart"]:
        assert (mutants.ROOT / name).exists(), name


@pytest.mark.parametrize("section", mutants.TESTS)
def test_the_page_has_the_score(section: str) -> None:
    """tests/README.md says how many are noticed, and each survivor has a reason."""
    path = mutants.ROOT / "tests" / "results" / f"mutants-{section}.md"
    said = path.read_text(encoding="utf-8")
    score = re.search(r"\*\*([\d,]+) of ([\d,]+) killed", said)
    killed, tried = (int(number.replace(",", "")) for number in score.groups())
    page = (mutants.ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    assert f"{killed:,} of {tried:,}" in page
    rows = said.partition("|---|---|---|\n")[2].strip().splitlines()
    assert len(rows) == tried - killed and "unexplained" not in said
