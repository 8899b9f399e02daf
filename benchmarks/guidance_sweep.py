"""When to guide, and in how many steps: student accuracy against the CPU seconds of stage 1, on the embedded digits.

    python benchmarks/guidance_sweep.py --out runs/sweep --rows … --plot docs/guidance_sweep.png --finalists …

Cells are those of ``benchmarks/digits.py`` (the demo recipe, validation digits, equal kept images, resumed by a second
call). Fitted decoders are fitted before the first cell and so no part of its seconds. Rows with the full VAE at every
step are the exact setting; "minus exact" is paired by seed. ``--finalists`` are compared with it over more seeds.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import digits
from digits import FITTED, cell, interval, recipe_of

from stages.digits import write_split
from stages.synth.worker import load_models

EXACT = "full VAE, every step, ddim 20"
DEFAULT = "ddim 20, all, every 1"
SAMPLERS = {
    "ddim 20": ["synth.prior.scheduler=ddim", "synth.prior.steps=20"],
    "dpmsolver++ 20": ["synth.prior.scheduler=dpmsolver++", "synth.prior.steps=20"],
    "dpmsolver++ 10": ["synth.prior.scheduler=dpmsolver++", "synth.prior.steps=10"],
}
INTERVALS = {
    "all": "[0.0,1.0]",
    "first 70 %": "[0.0,0.7]",
    "first 40 %": "[0.0,0.4]",
    "last 70 %": "[0.3,1.0]",
    "last 40 %": "[0.6,1.0]",
}
GRID = {  # sampler: guided part, every k-th step of it
    "ddim 20": [(part, every) for part in INTERVALS for every in (1, 2, 4)],
    "dpmsolver++ 20": [("all", 1), ("all", 2), ("first 70 %", 1), ("last 40 %", 1)],
    "dpmsolver++ 10": [("all", 1), ("all", 2), ("first 70 %", 1)],
}
CFG = [*FITTED, *SAMPLERS["dpmsolver++ 20"], f"synth.guidance.interval={INTERVALS['all']}", "synth.prior.cfg_scale=1.5"]


def row_of(sampler: str, part: str, every: int, decoder: str = "fitted") -> list[str]:
    when = [f"synth.guidance.interval={INTERVALS[part]}", f"synth.guidance.every={every}"]
    return [*SAMPLERS[sampler], *when, f"synth.guidance.decoder={decoder}"]


ROWS: dict[str, list[str]] = {EXACT: row_of("ddim 20", "all", 1, "full")}
ROWS |= {f"{s}, {part}, every {k}": row_of(s, part, k) for s, cells in GRID.items() for part, k in cells}
ROWS |= {
    "dpmsolver++ 20, all, every 1, CFG 1.5": CFG,
    "dpmsolver++ 20, all, every 1, CFG 1.5 on the second half": [*CFG, "synth.prior.cfg_interval=[0.5,1.0]"],
}
Cells = dict[str, list[dict]]


def run(rows: Sequence[str], seeds: int, images: int, out: Path) -> Cells:
    """The cells of ``rows``, seed by seed, so that rows of a pair meet the same state of the machine."""
    test = str(write_split("validation", out / "validation.parquet"))
    for row in rows:  # fits what is to be fitted
        load_models(recipe_of(row, 0).synth)
    found: Cells = {row: [] for row in rows}
    for seed in range(seeds):
        for row in rows:
            found[row].append(cell(row, seed, images, None, test, out))
            print(f"{row}, seed {seed}: {found[row][-1]['accuracy']:.1%}", file=sys.stderr, flush=True)
    return found


def table(found: Cells, images: int) -> None:
    print(f"\n| row, {images} images | seeds | student, validation % | minus exact | teacher agreement % | CPU s |")
    print("|---|---|---|---|---|---|")
    exact = {made["seed"]: made["accuracy"] for made in found[EXACT]}
    for row, cells in found.items():
        accuracy = [100 * made["accuracy"] for made in cells]
        text = f"| {row} | {len(cells)} | {mean(accuracy):.1f} ± {interval(accuracy):.1f} |"
        paired = [100 * (made["accuracy"] - exact[made["seed"]]) for made in cells]
        text += " |" if row == EXACT else f" {mean(paired):+.1f} ± {interval(paired):.1f} |"
        agreement, seconds = (mean(made[key] for made in cells) for key in ("agreement", "seconds"))
        print(f"{text} {100 * agreement:.1f} | {seconds:.1f} |", flush=True)


def plot(found: Cells, images: int, path: Path) -> None:
    """Mean accuracy of each row, with the span of its seeds, against CPU seconds; a marker for each sampler."""
    from matplotlib import pyplot

    pyplot.switch_backend("Agg")
    figure, axes = pyplot.subplots(figsize=(9.5, 3.8), dpi=90)
    axes.set_prop_cycle(color=pyplot.get_cmap("tab20").colors)
    markers = dict(zip(SAMPLERS, "os^", strict=True))
    for row, cells in found.items():
        accuracy, seconds = [100 * made["accuracy"] for made in cells], mean(made["seconds"] for made in cells)
        center = mean(accuracy)
        span = [[center - min(accuracy)], [max(accuracy) - center]]
        marker = "*" if row == EXACT else next(m for sampler, m in markers.items() if row.startswith(sampler))
        axes.errorbar(seconds, center, span, fmt=marker, markersize=7, elinewidth=0.8, capsize=2, label=row)
    axes.set_xlabel(f"CPU seconds of stage 1 for {images} images")
    axes.set_ylabel("student, validation %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--finalists", nargs="+", choices=list(ROWS), default=[])
    parser.add_argument("--final-seeds", type=int, default=5)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.plot:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            parser.error("--plot needs matplotlib: pip install -c constraints.txt -e '.[bench]'")
    digits.ROWS |= ROWS
    found = run(list(dict.fromkeys([EXACT, *args.rows])), args.seeds, args.images, args.out)
    table(found, args.images)
    if args.finalists:
        rows = list(dict.fromkeys([EXACT, *args.finalists]))
        table(run(rows, args.final_seeds, args.images, args.out), args.images)
    if args.plot:
        plot(found, args.images, args.plot)


if __name__ == "__main__":
    main()
