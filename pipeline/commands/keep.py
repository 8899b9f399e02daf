"""``factory gc`` and ``factory rebuild``: tidy and repair a run folder."""

from typing import Annotated, Any

import typer

from pipeline.commands.options import JsonOption, RunArgument, answer


def gc(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="Run folder of stage 1 or 2 (path or URL).", show_default=False)
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove what killed attempts left behind. Done shards, checkpoints and students are never touched."""
    from manifests.storage import Storage
    from pipeline.gc import collect
    from pipeline.text import plain, size

    def lines(result: dict[str, Any]) -> list[str]:
        verb = "would remove" if result["dry_run"] else "removed"
        return [
            f"{verb} {len(result['orphans'])} unreferenced shard files and {len(result['temporary'])} temporary ones, "
            f"{size(result['bytes'])}",
            *(f"left alone, not made by this program: {plain(name)}" for name in result["foreign"]),
        ]

    answer(collect(Storage(run), dry_run), as_json, lines)


def rebuild(run: RunArgument, as_json: JsonOption = False) -> None:
    """Make tables, done records and m.parquet again from the tars alone (a lost or damaged index)."""
    from manifests.errors import DataError
    from pipeline.repair import rebuild_run
    from pipeline.text import plain

    def lines(result: dict[str, Any]) -> list[str]:
        whole = f"{result['rows']} rows of {result['shards']} shards: {plain(result['manifest'])}"
        return [whole] + [
            f"shard {int(shard):06d} has to be made again (factory run synth): {plain(reason)}"
            for shard, reason in result["damaged"].items()
        ]

    result = rebuild_run(run)
    answer(result, as_json, lines)
    if result["damaged"]:
        raise typer.Exit(DataError.exit_code)
