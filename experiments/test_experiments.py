# SPDX-License-Identifier: Apache-2.0
"""The evidence is only as good as its scripts."""

import json
import types
from pathlib import Path

import mutants
import pytest
import torch

SOURCE = (mutants.ROOT / "gpart.py").read_text()
RESULTS = Path(__file__).parent / "results"


@pytest.mark.parametrize("bug", mutants.BUGS)
def test_named_bugs_are_bugs_of_this_code(bug: str) -> None:
    """Each named bug fits into gpart.py as it is, and leaves valid Python that differs."""
    text = mutants.broken(SOURCE, mutants.BUGS[bug])
    compile(text, "gpart.py", "exec")
    assert text != SOURCE
    with pytest.raises(ValueError, match="says 0 times, not once"):
        mutants.broken(text, mutants.BUGS[bug])


def test_unwrapping_decorators_changes_nothing() -> None:
    """What mutmut mutates is gpart.py: merge, unmerge and disabled work, and none is decorated."""
    text = mutants.unwrapped(SOURCE)
    assert "@torch.no_grad()\n" not in text and "merge = torch.no_grad()(merge)" in text
    module = types.ModuleType("gpart")
    exec(compile(text, "gpart.py", "exec"), vars(module))
    module.attach(net := torch.nn.Linear(3, 3), 2, target_modules="all-linear")
    net.gpart.theta.data.fill_(1.0)
    x = torch.arange(6.0).view(2, 3)
    y = net(x)
    module.merge(net)
    assert torch.equal(net(x), y)
    with module.disabled(net):
        assert not torch.equal(net(x), y)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_results_say_what_they_ran_on(path: Path) -> None:
    """Every result file names its torch and its device, and no path of a machine."""
    result = json.loads(path.read_text())
    assert result["torch"] and result["device"]
    assert "/tmp" not in path.read_text() and "/home" not in path.read_text()
