# SPDX-License-Identifier: Apache-2.0
"""The scripts of experiments/ and tests/ as a stranger meets them."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from experiments import EXTRAS

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPTS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in ("experiments", "tests")
    for path in sorted((ROOT / folder).glob("*.py"))
    if "__main__" in path.read_text(encoding="utf-8") and path.name[:5] != "test_"
]


def call(folder: pathlib.Path, script: str, path: pathlib.Path = ROOT) -> tuple:
    """(exit code, output, errors) of `python -m script --help` in that folder."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path), str(ROOT)])}
    command = [sys.executable, "-m", script, "--help"]
    run = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    return run.returncode, run.stdout, run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_prints_help_and_starts_nothing(
    script: str, tmp_path: pathlib.Path
) -> None:
    """What the script is about, its flags, and no file."""
    before = {path: path.stat().st_mtime_ns for path in ROOT.glob("*/results/*")}
    code, out, _ = call(tmp_path, script)
    assert code == 0 and out.startswith("usage: ") and "--help" in out
    assert len(out.splitlines()) > 4  # a description too
    assert not [*tmp_path.iterdir()]
    after = {path: path.stat().st_mtime_ns for path in ROOT.glob("*/results/*")}
    assert after == before


@pytest.mark.slow
def test_a_missing_extra_is_named_in_one_line(tmp_path: pathlib.Path) -> None:
    """Which, and how it is installed; whatever else is missing is an error as ever."""
    for name in EXTRAS:
        text = f"raise ModuleNotFoundError('no {name}', name='{name}')"
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    for script, extra in (("landscape", "matplotlib"), ("isometry", "peft")):
        code, out, errors = call(tmp_path, f"experiments.{script}", tmp_path)
        assert (code, out) == (1, "")
        assert errors == f'{extra} is missing: pip install -e ".[experiments]"\n'
    other = tmp_path / "other"  # where the extras are not missing
    other.mkdir()
    (other / "safetensors.py").write_text("import nowhere", encoding="utf-8")
    code, _, errors = call(other, "experiments.isometry", other)
    assert code == 1 and "Traceback" in errors and "nowhere" in errors


@pytest.mark.slow
def test_a_day_with_a_gpu_in_small(tmp_path: pathlib.Path) -> None:
    """Every piece of experiments/gpu.sh runs, and a second call goes on where the first
    was stopped."""
    command = ["bash", str(ROOT / "experiments" / "gpu.sh"), "--dry", str(tmp_path)]
    env = {**os.environ, "PATH": f"{pathlib.Path(sys.executable).parent}:{os.defpath}"}

    def call_it() -> str:
        run = subprocess.run(command, capture_output=True, text=True, env=env)
        assert run.returncode == 0, run.stdout + run.stderr
        return run.stdout

    pieces = ("tests", "bits", "ids", "stateless", "bench", "stsb", "compiled")
    first = call_it()
    assert len(re.findall(": done in", first)) == len(pieces), first
    files = {name: tmp_path / f"{name}-cpu.json" for name in pieces}
    assert {*tmp_path.iterdir()} == {*files.values()}
    found = {name: json.loads(path.read_text("utf-8")) for name, path in files.items()}
    for result in found.values():
        assert result["torch"] and result["device"]
    assert found["bits"]["equal"] and "passed" in found["tests"]["tests/test_device.py"]
    eager, whole = (found[p]["cases"][0]["rows"] for p in ("bench", "compiled"))
    sides = whole.keys() - eager
    assert len(sides) == 5 and all("compiled" in side for side in sides)
    before = files["tests"].stat().st_mtime_ns
    files["ids"].unlink()
    second = call_it()
    assert re.findall("(.+): done in", second) == ["ids"], second
    assert len(re.findall(": there already", second)) == len(pieces) - 1
    assert files["tests"].stat().st_mtime_ns == before and files["ids"].exists()
