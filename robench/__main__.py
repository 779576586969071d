"""``python -m robench``."""

from robench.cli import main

if __name__ == "__main__":
    main(prog_name="robench")
