# SPDX-License-Identifier: Apache-2.0
"""Kill a training run again and again: does --resume end where an undisturbed run ends?

    python tests/resume_under_fire.py --kills 20            # ten minutes on two cores

train_glue.py runs once undisturbed, then under fire: killed (SIGKILL) at a random
moment, start-up included, and started again with --resume. A run that gets through
before its time is followed by another, until so many kills are made; the last one is
left to finish. Metrics, best steps and the digests of the adapters must be equal; every
file that a kill leaves behind must be whole. Writes results/resume_under_fire.json.
What follows `--` goes to train_glue.py.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import safetensors
import torch

ROOT = Path(__file__).resolve().parent.parent
RUN = ["--task", "rte", "--data-dir", str(ROOT / "toy_glue"), "--seeds", "0", "1"]
RUN += ["--max-steps", "60", "--batch-size", "16"]


def outcome(folder: Path) -> dict[str, object]:
    """What must be equal: all of each run but its minutes, and the digests."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    runs = [{**run, "minutes": None} for run in results["runs"]]
    digests = []
    for path in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(path, "pt") as f:
            digests.append(f.metadata()["sha256"])
    return {"per_seed": results["per_seed"], "runs": runs, "sha256": digests}


def progress(folder: Path) -> str:
    """How far the files say the run is; fails if one is not whole."""
    for path in folder.glob("*.safetensors"):
        with safetensors.safe_open(path, "pt") as f:
            f.metadata()
    if not (folder / "checkpoint.pt").exists():
        return "nothing"
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    return f"run {len(state['done'])}, step {state['run'].get('step', 0)}"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--kills", type=int, default=20, help="how often (20)")
    p.add_argument("--seed", type=int, default=0, help="seed of the moments (0)")
    p.add_argument("run", nargs="*", default=RUN, help="train_glue.py's own arguments")
    args = p.parse_args()
    draw, folder = random.Random(args.seed), Path(tempfile.mkdtemp())
    command = [sys.executable, str(ROOT / "train_glue.py"), *args.run]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    began = time.monotonic()
    subprocess.run([*command, "--output", folder / "calm"], check=True, env=env)
    seconds, want = time.monotonic() - began, outcome(folder / "calm")
    kills: list[dict[str, object]] = []
    got: list[dict[str, object]] = []  # what each run under fire ended with
    done = False
    while not done:
        fire = folder / f"fire-{len(got)}"
        process = subprocess.Popen([*command, "--output", fire, "--resume"], env=env)
        life = draw.uniform(0, seconds / 4) if len(kills) < args.kills else None
        try:
            if process.wait(life):
                raise SystemExit(f"train_glue.py failed with {process.returncode}")
            got.append(outcome(fire))
            done = len(kills) >= args.kills
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            left, seconds_in = progress(fire), round(life or 0, 2)
            kills.append({"run": len(got), "seconds": seconds_in, "left": left})
            print(f"kill {len(kills)}: {kills[-1]}", flush=True)
    equal = all(one == want for one in got)
    result = {
        "equal": equal,
        "runs_under_fire": len(got),
        "kills": kills,
        "undisturbed_seconds": round(seconds, 1),
        **want,
        "device": f"CPU {platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }
    path = ROOT / "tests" / "results" / "resume_under_fire.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"{len(kills)} kills, {len(got)} runs under fire, all equal: {equal}")
    sys.exit(0 if equal else 1)


if __name__ == "__main__":
    main()
