"""Writes the README's tables from records: the demo's verdicts, and the CIFAR-10 leaderboard and verdicts.

python leaderboard/render.py [--check]
"""

import re
import shutil
import sys
from pathlib import Path

from tabulate import tabulate

from robench import leaderboard, record, verdicts
from robench.attacks import registered
from robench.claim import settle_all
from robench.zoo import entries

ROOT = Path(__file__).resolve().parent.parent


def cifar10_blocks() -> dict[str, str]:
    """Return the README blocks that committed records determine."""
    records = record.load_folder(ROOT / "leaderboard" / "records")
    rows = leaderboard.rows(
        records,
        dataset="cifar10",
        attack_versions={name: attack.version for name, attack in registered().items()},
        defense_versions={name: entry.version for name, entry in entries().items()},
    )
    cells = [
        [row.strongest.defense.name, row.strongest.threat, str(row.clean), row.bound, row.strongest.attack.name,
         f"{row.strongest.cost.forwards:,.0f} / {row.strongest.cost.backwards:,.0f}"]
        for row in rows
    ]  # fmt: skip
    headers = ("defense", "threat", "clean accuracy", "robust accuracy", "strongest attack", "its forwards / backwards per image")
    return {
        "cifar10 leaderboard": tabulate(cells, headers=headers, tablefmt="github", disable_numparse=True),
        "cifar10 verdicts": verdicts.as_markdown(settle_all(records, "cifar10")),
    }


def demo_block(folder: Path) -> dict[str, str]:
    """Return the block of the demo's verdicts, from the records that the demo left in `folder`."""
    return {"demo verdicts": verdicts.as_markdown(settle_all(record.load_folder(folder / "records"), "digits"))}


def written(readme: str, blocks: dict[str, str]) -> str:
    """Return the README's text with these blocks' contents replaced."""
    for name, text in blocks.items():
        pattern = rf"(<!-- {re.escape(name)}:[^\n]*-->\n).*?(<!-- end -->)"
        readme, count = re.subn(pattern, lambda match, text=text: f"{match[1]}{text}\n{match[2]}", readme, flags=re.DOTALL)  # type: ignore[misc]
        if count != 1:
            raise SystemExit(f"README.md has {count} blocks named {name!r}")
    return readme


def main() -> None:
    """Rewrite the README, or with --check fail if the committed records say otherwise."""
    path = ROOT / "README.md"
    before = path.read_text()
    if "--check" in sys.argv:
        raise SystemExit(0 if written(before, cifar10_blocks()) == before else "README.md is not what the records say: run make readme")
    demo = ROOT / "robench-demo"
    path.write_text(written(before, cifar10_blocks() | demo_block(demo)))
    figure = ROOT / "leaderboard" / "figures" / "demo.png"
    figure.parent.mkdir(exist_ok=True)
    shutil.copyfile(demo / "accuracy_against_epsilon.png", figure)


if __name__ == "__main__":
    main()
