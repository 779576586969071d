"""All benchmarks, one after the other: in their short form, under ten minutes, or in full, a day; each can be run by itself as well.

python -m benchmarks [--full]
"""

import argparse
import sys
from collections.abc import Sequence

import torch

from benchmarks import decoys, engine, gpu_training, overhead, stack, strength, training

SHORT_ROUNDS = 3
SHORT_STRENGTH = ["--n", "20", "--attack", "autoattack", "--attack", "fast", "--defense", "natural", "--defense", "single_adv",
                  "--defense", "robust,eps=2"]  # fmt: skip
FULL_STRENGTH = ["--dataset", "cifar10", "--attack", "autoattack", "--attack", "fast", "--precision", "bfloat16", "--n", "1000"]
SHORT_DECOYS = ["--n", "20", "--attacks", "fast", "adaptive", "--only", "natural", "single_adv", "saturated_logits", "hard_vote",
                "quantised_input", "shattered", "gaussian_noise"]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what iterations, AutoAttack, the stack and training cost, attacks beside the reference, and what sees through decoys."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="all steps, queries, attacks and examples")
    full = parser.parse_args(arguments).full
    overhead.main(overhead.ROUNDS if full else SHORT_ROUNDS)
    print()
    engine.main(["--full" if full else "--short"])
    print()
    stack.main()
    print()
    training.main(["--equal"] if full else ["--rounds", "1"])
    if torch.cuda.is_available():
        print()
        gpu_training.main()
    print()
    strength.main(FULL_STRENGTH if full else SHORT_STRENGTH)
    print()
    return decoys.main([] if full else SHORT_DECOYS)


if __name__ == "__main__":
    sys.exit(main())
