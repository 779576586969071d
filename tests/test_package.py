"""The public names, and what importing costs."""

import subprocess
import sys

import pytest

import robench


def test_public_names_are_sorted_and_importable() -> None:
    assert robench.__all__ == sorted(robench.__all__)
    for name in robench.__all__:
        assert getattr(robench, name).__name__ == name, name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="evaluator"):
        _ = robench.evaluator


def test_importing_the_command_line_does_not_import_torch() -> None:
    code = "import sys, robench.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_evaluate_is_the_function_whatever_was_imported_first() -> None:
    code = "import robench.workbench, robench; assert callable(robench.evaluate), robench.evaluate"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False).returncode == 0
