"""Writes from records the README's tables (the demo's verdicts, the CIFAR-10 leaderboard and verdicts), the page of paper 1 and the zoo's.

python leaderboard/render.py [--check | --records-only]       the latter leaves what the demo measures as it is
"""

import re
import shutil
import sys
from pathlib import Path

import ensemble_everything
import zoo_page
from tabulate import tabulate

from robench import leaderboard, record, verdicts
from robench.attacks import current_version
from robench.settlement import settle_all
from robench.zoo import entries

ROOT = Path(__file__).resolve().parent.parent


def cifar10_blocks() -> dict[str, str]:
    """Return the README blocks that committed records determine."""
    records = record.load_folder(ROOT / "leaderboard" / "records")
    rows = leaderboard.rows(
        records,
        dataset="cifar10",
        attack_version=current_version,
        defense_versions={name: entry.version for name, entry in entries().items()},
    )
    strongest = [(row, row.strongest) for row in rows]
    cells = [
        [zoo_page.copy_name(r.defense.name, r.defense.training_seed), r.scale, r.threat, str(row.clean), row.bound, r.attack.name,
         f"{r.cost.forwards:,.0f} / {r.cost.backwards:,.0f}"]
        for row, r in strongest
    ]  # fmt: skip
    headers = ("defense", "scale", "threat", "clean accuracy", "robust accuracy", "strongest attack", "its forwards / backwards per image")
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
    """Rewrite them, or with --check fail if the committed records say otherwise."""
    path, board = ROOT / "README.md", ROOT / "leaderboard"
    before, records, figures = path.read_text(), record.load_folder(board / "records"), board / "figures"
    pages = {
        board / "ensemble_everything.md": ensemble_everything.page(records),
        board / "zoo.md": zoo_page.page(records, zoo_page.load_diagnoses(board / "doctor")),
    }
    if "--check" in sys.argv:
        wanted = {path: written(before, cifar10_blocks()), **pages}
        stale = [p.name for p, now in wanted.items() if not p.exists() or p.read_text() != now]
        raise SystemExit(f"{' and '.join(stale)}: not what the records say; run make readme" if stale else 0)
    demo = None if "--records-only" in sys.argv else ROOT / "robench-demo"
    path.write_text(written(before, cifar10_blocks() | (demo_block(demo) if demo else {})))
    for page, text in pages.items():
        page.write_text(text)
    figures.mkdir(exist_ok=True)
    ensemble_everything.draw_figures(records, figures)
    if demo:
        shutil.copyfile(demo / "accuracy_against_epsilon.png", figures / "demo.png")


if __name__ == "__main__":
    main()
