# SPDX-License-Identifier: Apache-2.0
"""Which methods are isometric? How far the weights move for how far theta does.

    python -m experiments.isometry

theta is everything that a method trains beside the head, as one vector; dW(theta) the
updates of all-MiniLM-L6-v2's query and value matrices. PAIRS pairs of thetas are drawn,
all entries standard normal, and for each the ratio |dW - dW'| / |theta - theta'| is
taken in float64. Two columns have its largest over its smallest value:

    alike    both thetas as drawn
    any      each theta times a factor of its own between 0.1 and 10, log-uniform. For a
             linear method this changes nothing but the directions of the differences

1 is isometric up to a constant, which is the third column. The methods are those of
peers.py, with about 23,040 numbers where d is theirs to choose, and PEFT's TinyLoRA as
it comes. Writes results/isometry.json and results/isometry.md.
"""

import json
import math
import platform
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

import gpart
import train_glue
from experiments import glue_table as glue
from experiments import peers

PAIRS, TARGETS = 200, ["query", "value"]
METHODS = {
    "gpart": "GPart",
    "gpart-noniso": "GPart, not isometric",
    "shira": "SHiRA",
    "waveft": "WaveFT",
    "c3a": "C3A",
    "fourierft": "FourierFT, 1,000",
    "lora": "LoRA, rank 8",
    "unilora": "Uni-LoRA",
    "vera": "VeRA, rank 1024",
    "tinylora": "TinyLoRA",
}


class Map:
    """theta -> dW of one method on model, which it changes."""

    def __init__(self, model: nn.Module, method: str) -> None:
        self.model = model
        if method.startswith("gpart"):
            isometric = method == "gpart"
            gpart.attach(model, glue.D, target_modules=TARGETS, isometric=isometric)
        elif method == "tinylora":
            peft.get_peft_model(model, peft.TinyLoraConfig(target_modules=TARGETS))
        else:
            peers.adapt(model, method, glue.D, TARGETS)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.size = sum(p.numel() for p in self.trained)

    @torch.no_grad()
    def __call__(self, theta: Tensor) -> Tensor:
        """[size] -> [N], float64."""
        at = 0
        for p in self.trained:
            p.copy_(theta[at : at + p.numel()].view_as(p))
            at += p.numel()
        if hasattr(self.model, "gpart"):
            updates = [*self.model.gpart.delta().values()]
        else:
            updates = [
                layer.get_delta_weight("default")
                for layer in self.model.modules()
                if hasattr(layer, "get_delta_weight")
            ]
        dense = [dw.to_dense() if dw.is_sparse else dw for dw in updates]
        return torch.cat([dw.flatten().double() for dw in dense])


def ratios(method: Map, pairs: int, spread: float, seed: int = 0) -> list[float]:
    """|dW - dW'| / |theta - theta'| of random pairs; a theta's factor is at most
    spread and at least 1 / spread."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(pairs):
        two = torch.randn(2, method.size, generator=draw)
        two *= spread ** (2 * torch.rand(2, 1, generator=draw) - 1)
        moved = method(two[0]) - method(two[1])
        found.append(float(moved.norm() / (two[0] - two[1]).double().norm()))
    return found


def measure(name: str) -> dict[str, Any]:
    torch.manual_seed(0)
    path = train_glue.model_path(train_glue.MINILM)
    method = Map(transformers.AutoModel.from_pretrained(path), name)
    alike, any_ = ratios(method, PAIRS, 1.0), ratios(method, PAIRS, 10.0)
    return {
        "trained": method.size,
        "alike": max(alike) / min(alike),
        "any": max(any_) / min(any_),
        "constant": math.exp(sum(map(math.log, alike)) / len(alike)),
    }


def table(methods: dict[str, dict[str, Any]]) -> str:
    lines = ["| method | trained | alike | any | constant |", "|---" * 5 + "|"]
    for name, one in methods.items():
        values = " | ".join(f"{one[key]:.3f}" for key in ("alike", "any", "constant"))
        lines.append(f"| {METHODS[name]} | {one['trained']:,} | {values} |")
    return "\n".join(lines)


def main() -> None:
    train_glue.Parser(description=(__doc__ or "").split("\n")[0]).parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    content = {
        "settings": {"pairs": PAIRS, "model": train_glue.MINILM, "targets": TARGETS},
        "gpart": gpart.__version__,
        "torch": torch.__version__,
        "peft": peft.__version__,
        "device": f"CPU {platform.machine()}",
        "methods": {name: measure(name) for name in METHODS},
    }
    results = glue.HERE / "results"
    text = json.dumps(content, indent=1) + "\n"
    (results / "isometry.json").write_text(text, encoding="utf-8")
    text = f"""# Which methods are isometric?

`python -m experiments.isometry`: gpart {content["gpart"]}, torch {content["torch"]},
peft {content["peft"]}, {content["device"]}, {PAIRS} random pairs of thetas a column.

{table(content["methods"])}
"""
    (results / "isometry.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
