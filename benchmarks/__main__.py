"""All benchmarks in their short form, one after the other; each has a longer one of its own (``python -m benchmarks.NAME --help``)."""

import sys

from benchmarks import decoys, overhead, stack, strength, training


def main() -> int:
    """Print what iterations, the stack and training cost, the attacks beside the reference, and what sees through decoys."""
    overhead.main()
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
