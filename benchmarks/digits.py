"""Student accuracy on the embedded digits, paired over seeds: guided, unguided and variants of the demo recipe.

    python benchmarks/digits.py --rows guided unguided --seeds 5 --split validation --out runs/digits

Every cell is one ``run synth`` and one ``run distill`` in its own folder, so a second call resumes and adds. Use the
validation split to choose settings; the test split is for a frozen table. Prints a Markdown table (mean ± 95 %
interval over seeds, Student's t) and writes the cells to ``cells.json``.
"""

import argparse
import json
import sys
from math import sqrt
from pathlib import Path
from statistics import mean, stdev

from scipy.stats import t as student_t

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.distill import run_distill
from pipeline.executors.settings import ExecutorSettings
from pipeline.recipe import resolve
from pipeline.synth import run_synth
from stages.models.digits_data import write_split

ROWS: dict[str, list[str]] = {
    "guided": [],
    "unguided": ["synth.method=dmkd"],
    "guided, class prior only": ["synth.guidance.bn=0"],
    "guided, every second step": ["synth.guidance.every=2"],
    "guided, late 70 %": ["synth.guidance.interval=[0.3,1.0]"],
    "guided, all steps": ["synth.guidance.interval=[0.0,1.0]"],
    "guided, scale 0.1": ["synth.guidance.scale=0.1"],
    "guided through z_t": ["synth.guidance.through=zt"],
    "guided + LCA": ["synth.lca.every=4", "synth.lca.interval=[0.0,0.5]"],
}


def cell(row: str, seed: int, images: int, test: str, out: Path) -> dict:
    """One dataset and one student; accuracy, images and stage-1 seconds of the run that made it."""
    folder = out / f"{row}-{images}-{seed}".replace(" ", "_").replace(",", "").replace("%", "")
    kept = folder / "cell.json"
    if kept.exists():
        return json.loads(kept.read_text())
    recipe = resolve("demo", sets=[*ROWS[row], f"synth.seed={seed}", f"distill.seed={seed}"])
    synth = recipe.synth
    shards = images // (synth.groups_per_shard * synth.group_size)
    recipe = recipe.model_copy(
        update={
            "synth": synth.model_copy(update={"shards": shards}),
            "distill": recipe.distill.model_copy(update={"min_agreement": 0.0}),
        }
    )
    made = run_synth(recipe, str(folder), ExecutorSettings(threads=synth.threads), quiet=True)
    learnt = run_distill(recipe, [(made["manifest"], 1.0)], str(folder / "distill"), test_data=test, quiet=True)
    (student,) = learnt["students"].values()
    result = {"row": row, "seed": seed, "images": made["kept"], "seconds": made["seconds"]}
    result["accuracy"] = student["test"]["accuracy"]
    result["agreement"] = learnt["teacher_check"]["agreement"]
    kept.write_text(json.dumps(result))
    return result


def interval(values: list[float]) -> float:
    """Half width of the 95 % interval of the mean."""
    n = len(values)
    return float(student_t.ppf(0.975, n - 1)) * stdev(values) / sqrt(n) if n > 1 else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=["guided", "unguided"])
    parser.add_argument("--images", type=int, nargs="+", default=[400])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--split", choices=["validation", "test"], default="validation")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    test = str(write_split(args.split, args.out / f"{args.split}.parquet"))
    out, cells = args.out / args.split, []
    print(f"| row | images | student, {args.split} % | minus unguided | teacher agreement % | synthesis s |")
    print("|---|---|---|---|---|---|")
    for images in args.images:
        for row in args.rows:
            made = [cell(row, seed, images, test, out) for seed in range(args.seeds)]
            cells += made
            accuracy = [100 * c["accuracy"] for c in made]
            text = f"| {row} | {images} | {mean(accuracy):.1f} ± {interval(accuracy):.1f} "
            base = {c["seed"]: c for c in cells if c["row"] == "unguided" and c["images"] == made[0]["images"]}
            paired = [100 * (c["accuracy"] - base[c["seed"]]["accuracy"]) for c in made if c["seed"] in base]
            text += f"| {mean(paired):+.1f} ± {interval(paired):.1f} " if paired and row != "unguided" else "| "
            text += f"| {100 * mean(c['agreement'] for c in made):.1f} | {mean(c['seconds'] for c in made):.0f} |"
            print(text, flush=True)
    (out / "cells.json").write_text(json.dumps(cells, indent=1))


if __name__ == "__main__":
    main()
