"""All benchmarks in their short form, one after the other; each has a longer one of its own (``python -m benchmarks.NAME --help``)."""

import sys

from benchmarks import decoys, engine, overhead, stack, strength, training


def main() -> int:
    """Print what iterations, AutoAttack, the stack and training cost, attacks beside the reference, and what sees through decoys."""
    overhead.main()
    print()
    engine.main([])
    print()
    stack.main()
    print()
    training.main([])
    print()
    strength.main(["--n", "20"])
    print()
    return decoys.main(["--n", "30", "--attacks", "fast", "adaptive"])


if __name__ == "__main__":
    sys.exit(main())
