"""A few cases of every GPU backend: ``compute-sanitizer python -m tests.gpu.sanitized``."""

from __future__ import annotations

import torch

from tests.gpu.toolbox import DEVICE, FAMILIES, OWN, impl_of, refusal, spread

# Odd sizes and aligned ones. Under the sanitizer every launch takes milliseconds.
COUNT = 4


def main() -> None:
    for family, own in OWN.items():
        taken = [case for case in FAMILIES[family].CASES if refusal(family, case, own) is None]
        for case in (*spread(tuple(taken), COUNT), taken[-1]):
            FAMILIES[family].check(case, impl=impl_of(own), device=DEVICE)
            print(family, case.name, flush=True)
    if DEVICE == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
