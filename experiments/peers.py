# SPDX-License-Identifier: Apache-2.0
"""The methods GPart is compared with, for train_glue.py --method: PEFT's, and BitFit.

    pip install -c .ci/constraints.txt -e ".[offline,experiments]"
    python train_glue.py --task rte --method unilora --d 23040

    unilora    Uni-LoRA: the factors of a rank-4 LoRA drawn from one vector of d numbers
    lora       LoRA, rank 8, alpha 16
    vera       VeRA, rank 1024: two scaling vectors for each matrix around shared
               random factors
    fourierft  FourierFT: 1,000 Fourier coefficients for each matrix
    shira      SHiRA: entries of each matrix at random places
    waveft     WaveFT: Haar wavelet coefficients of each matrix at random places
    c3a        C3A: each matrix in circulant blocks, one size for all
    bitfit     every bias of the body

Each adapts the same target modules; the head trains whole beside it, as everywhere.
Uni-LoRA, SHiRA, WaveFT and C3A train about d numbers, the last three as near to it as
their own rules allow. The others have the published ranks and numbers of coefficients
for RoBERTa-base, whatever the model, and LoRA's alpha is 16 (the paper's public code
has 8). What is left, as the scales of VeRA, FourierFT and WaveFT, is PEFT's default.
PEFT draws from seeds of its own; seed is added to them, so that 0 leaves them as they
are.
"""

import importlib.util
import math
import warnings
from typing import Any

from torch import nn

# Published learning rates for RoBERTa-base on GLUE, of several the middle one
LR = {"unilora": 5e-3, "lora": 5e-4, "vera": 1e-2, "fourierft": 5e-2, "bitfit": 4e-4}
# None: those at which a step moves MiniLM's weights as far as GPart's 5e-3 does
LR |= {"shira": 5e-3, "waveft": 2e-4, "c3a": 0.22}
METHODS = tuple(LR) if importlib.util.find_spec("peft") else ()
SIZED = ("unilora", "shira", "waveft", "c3a")  # d is their size too


def config(
    method: str,
    model: nn.Module,
    d: int,
    targets: list[str],
    rank: int = 8,
    seed: int = 0,
) -> Any:
    """PEFT's settings of a method; rank is LoRA's, and its alpha twice that."""
    import peft  # takes seconds, which train_glue.py spends only where it is wanted

    shapes = [
        module.weight.shape
        for name, module in model.named_modules()
        if any(f".{name}".endswith(f".{target}") for target in targets)
    ]
    kinds: dict[str, Any] = {
        "unilora": lambda: peft.UniLoraConfig(
            r=4, theta_d_length=d, proj_seed=42 + seed, target_modules=targets
        ),
        "lora": lambda: peft.LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=targets
        ),
        "vera": lambda: peft.VeraConfig(
            r=1024, projection_prng_key=seed, target_modules=targets
        ),
        "fourierft": lambda: peft.FourierFTConfig(
            n_frequency=1000, random_loc_seed=777 + seed, target_modules=targets
        ),
        "shira": lambda: peft.ShiraConfig(
            r=max(1, d // sum(m + n for m, n in shapes)),
            random_seed=seed,
            target_modules=targets,
        ),
        "waveft": lambda: peft.WaveFTConfig(
            n_frequency=max(1, d // len(shapes)),
            random_loc_seed=777 + seed,
            target_modules=targets,
        ),
        "c3a": lambda: peft.C3AConfig(
            block_size=block_size(shapes, d), target_modules=targets
        ),
    }
    return kinds[method]()


def block_size(shapes: list[Any], d: int) -> int:
    """C3A's block that divides every side and gives the nearest to d numbers."""
    most = math.gcd(*(side for shape in shapes for side in shape))
    blocks = [b for b in range(1, most + 1) if most % b == 0]
    N = sum(m * n for m, n in shapes)
    return min(blocks, key=lambda b: abs(N // b - d))


def adapt(
    model: nn.Module,
    method: str,
    d: int,
    targets: list[str],
    rank: int = 8,
    seed: int = 0,
) -> None:
    """Insert a method into model, in place; only what it trains is left trainable."""
    if method == "bitfit":
        for name, p in model.named_parameters():
            p.requires_grad_(name.endswith("bias"))
        return
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = config(method, model, d, targets, rank, seed)
        peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[settings.peft_type](
            model, settings, "default"
        )
    if method == "shira":
        fill_up(model, settings, d)


def fill_up(model: nn.Module, settings: Any, d: int) -> None:
    """SHiRA takes r (m + n) entries of each m x n matrix: some get one r more, spread
    evenly, so that there are d in all."""
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "shira_weight")]
    r, side = settings.r, sum(layers[0].base_layer.weight.shape)
    extra = max(0, d // side - r * len(layers))
    for i, layer in enumerate(layers):
        if (i + 1) * extra // len(layers) > i * extra // len(layers):
            mask = settings.mask_fn(layer.base_layer, r + 1, settings.random_seed)
            layer.update_layer("default", mask, r + 1, config=settings)
