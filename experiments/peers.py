# SPDX-License-Identifier: Apache-2.0
"""The methods GPart is compared with, for train_glue.py --method: PEFT's, and BitFit.

    pip install -c .ci/constraints.txt -e ".[offline,experiments]"
    python train_glue.py --task rte --method unilora --d 23040

    unilora    Uni-LoRA: the factors of a rank-4 LoRA drawn from one vector of d numbers
    lora       LoRA, rank 8, alpha 16
    vera       VeRA, rank 1024: two scaling vectors for each matrix around shared random factors
    fourierft  FourierFT: 1,000 Fourier coefficients for each matrix
    bitfit     every bias of the body

Each adapts the same target modules, with the published ranks and numbers of
coefficients for RoBERTa-base (PEFT's defaults elsewhere), whatever the model; the head
trains whole beside it, as everywhere. PEFT's random structure follows from seeds of its
own, which are left as they are.
"""

import importlib.util
import warnings
from typing import Any

from torch import nn

# Published learning rates for RoBERTa-base on GLUE, the middle one where there are
# several
LR = {"unilora": 5e-3, "lora": 5e-4, "vera": 1e-2, "fourierft": 5e-2, "bitfit": 4e-4}
METHODS = tuple(LR) if importlib.util.find_spec("peft") else ()


def config(method: str, d: int, targets: list[str], rank: int = 8) -> Any:
    """PEFT's settings of a method; rank is LoRA's, and its alpha twice that."""
    import peft  # takes seconds, which train_glue.py spends only where it is wanted

    kinds: dict[str, Any] = {
        "unilora": lambda: peft.UniLoraConfig(
            r=4, theta_d_length=d, target_modules=targets
        ),
        "lora": lambda: peft.LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=targets
        ),
        "vera": lambda: peft.VeraConfig(r=1024, target_modules=targets),
        "fourierft": lambda: peft.FourierFTConfig(
            n_frequency=1000, target_modules=targets
        ),
    }
    return kinds[method]()


def adapt(
    model: nn.Module, method: str, d: int, targets: list[str], rank: int = 8
) -> None:
    """Insert a method into model, in place; only what it trains is left trainable."""
    if method == "bitfit":
        for name, p in model.named_parameters():
            p.requires_grad_(name.endswith("bias"))
        return
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = config(method, d, targets, rank)
        peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[settings.peft_type](
            model, settings, "default"
        )
