"""Commands on many measurements: demo, campaign, leaderboard, claims."""

from collections.abc import Callable
from pathlib import Path

import click

from robench.cli.common import (
    PATH,
    RECORDS,
    available,
    cache_option,
    device_option,
    in_seconds,
    load_plugins,
    main,
    plugin_option,
    writable,
)
from robench.files import cache_folder, write_atomic


@main.command()
@click.option("--out", type=PATH, default=Path("robench-demo"), show_default=True, help="Folder of the records and the figure.")
@cache_option
def demo(out: Path, cache_dir: Path | None) -> int:
    """Settle the claims on the embedded digits."""
    from robench import console, demo

    cache = writable(cache_folder(cache_dir))
    with console.progress() as progress:
        return demo.run(out=writable(out), cache=cache, echo=progress)


@main.command()
@click.argument("plan")
@click.option("--budget", metavar="DURATION", callback=in_seconds, help="Stop after so long, as in 90s, 9m or 1h30m; run again to go on.")
@click.option(
    "--records", type=PATH, default=RECORDS, show_default=True, help="The folder of records: what is there, and where new ones go."
)
@click.option("--batch-size", type=click.IntRange(1), help="Examples attacked together.  [default: 100, on cuda 500]")
@device_option
@cache_option
@plugin_option
def campaign(
    plan: str, budget: float | None, records: Path, batch_size: int | None, device: str | None, cache_dir: Path | None,
    plugins: tuple[Path, ...],
) -> int:  # fmt: skip
    """Make the records of PLAN, in order of what settles most claims per minute: smoke, cpu, gpu, cifar100, or a TOML file."""
    from robench import record
    from robench.campaign import Campaign
    from robench.plan import load
    from robench.workbench import Workbench

    load_plugins(plugins)
    made = load(plan)
    cache, device = writable(cache_folder(cache_dir)), available(device)
    known = record.load_folder(writable(records))
    bench = Workbench(
        made.dataset, made.scale, records=known, device=device, cache=cache, examples=made.n, batch_size=batch_size,
        progress=lambda line: click.echo(f"  {line}", err=True),
    )  # fmt: skip
    return Campaign(made, bench, records, budget, click.echo).run()


@main.command()
@click.option("--format", "style", type=click.Choice(["table", "md", "html", "json", "csv"]), default="table", show_default=True)
@click.option("--out", type=PATH, help="Write to this file instead of stdout.")
@click.option("--dataset", help="Only this data set.")
@click.option("--threat", help="Only this threat model.")
@click.option("--records", type=PATH, default=RECORDS, show_default=True, help="The folder of records.")
@plugin_option
def leaderboard(style: str, out: Path | None, dataset: str | None, threat: str | None, records: Path, plugins: tuple[Path, ...]) -> None:
    """Rank the defenses by what the records say."""
    from robench import attacks, console, leaderboard, leaderboard_formats, leaderboard_table, page, record, settlement, verdicts, zoo

    load_plugins(plugins)
    known = record.load_folder(records)
    rows = leaderboard.rows(
        known, dataset=dataset, threat=threat, verdicts=verdicts.by_row(settlement.settle_all(known)),
        attack_version=attacks.current_version,
        defense_versions={name: entry.version for name, entry in zoo.entries().items()},
    )  # fmt: skip
    if style == "table" and out is None:
        console.show(leaderboard_table.as_table(rows, zoo.short))
        return
    renderings: dict[str, Callable[[], str]] = {
        "table": lambda: console.as_text(leaderboard_table.as_table(rows, zoo.short)),
        "md": lambda: leaderboard_formats.as_markdown(rows) + "\n",
        "html": lambda: page.as_html(rows),
        "json": lambda: leaderboard_formats.as_json(rows) + "\n",
        "csv": lambda: leaderboard_formats.as_csv(rows),
    }
    text = renderings[style]()
    if out is None:
        click.echo(text, nl=False)
    else:
        write_atomic(out, text)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--records", type=PATH, help=f"The folder of records that give the verdicts.  [default: {RECORDS}, if there]")
def claims(as_json: bool, records: Path | None) -> int:
    """List every claim: paper, number, protocol, last verdict."""
    from robench import claim, console, record, settlement

    known = record.load_folder(records or RECORDS) if records or RECORDS.is_dir() else []
    found, settled = claim.discover(), settlement.settle_all(known)
    if as_json:
        click.echo(console.claims_json(found, settled))
    else:
        console.show(console.claims_table(found, settled))
    return 0 if all(settlement.as_stood_by for settlement in settled) else 1
