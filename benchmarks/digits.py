"""Student accuracy on the embedded digits, paired over seeds: every method and variant of the demo recipe.

    python benchmarks/digits.py --rows guided unguided --images 400 --seeds 5 --split validation --out runs/digits
    python benchmarks/digits.py --rows guided unguided --cpu-seconds 20 --seeds 5 --out runs/digits

Every cell is one ``run synth`` and one ``run distill`` in its own folder, so a second call resumes and adds; other
settings need another ``--out``. Equal images counts stored, kept images. Equal time counts stage 1 from loading the
models to the merged manifest in CPU seconds (other work on the machine then does not matter); how many shards fit
follows from the first shard's cost. It leaves out fitting a guidance decoder, which a prior needs once and which takes
longer than a small budget. Use the validation split to choose settings; the test split is for a frozen table. Prints a
Markdown table (mean ± 95 % interval over seeds, Student's t) and writes the cells to ``cells.json``.
"""

import argparse
import json
import sys
import time
from itertools import product
from math import ceil, sqrt
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from scipy.stats import t as student_t

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from manifests.reader import Manifest
from pipeline.distill import run_distill
from pipeline.recipe import Recipe, resolve
from pipeline.synth import run_synth
from stages.digits import write_split
from stages.distill.checkpoint import differences
from stages.models.source import teacher_identity
from stages.synth.priors.files import locate_prior
from stages.synth.worker import load_models

CPU = ["synth.device=cpu", "distill.device=cpu"]  # whose seconds are counted
FULL = ["synth.guidance.decoder=full"]  # of every row that names no other
LCA = ["synth.lca.every=4", "synth.lca.interval=[0.0,0.5]"]
FITTED = ["synth.guidance.decoder=fitted"]
CMI = ["synth.method=cmi", "synth.cmi.steps=100"]  # a fifth of the steps that images of 32 pixels take
ROWS: dict[str, list[str]] = {
    "guided": [],
    "unguided": ["synth.method=dmkd"],
    "unguided, selected": ["synth.method=dmkd", "synth.min_confidence=0.5"],
    "guided, class prior only": ["synth.guidance.bn=0"],
    "guided, every second step": ["synth.guidance.every=2"],
    "guided, late 70 %": ["synth.guidance.interval=[0.3,1.0]"],
    "guided, all steps": ["synth.guidance.interval=[0.0,1.0]"],
    "guided, scale 0.1": ["synth.guidance.step_size=0.1"],
    "guided through z_t": ["synth.guidance.gradient_at=xt"],
    "guided + LCA": LCA,
    "guided + LCA, once": ["synth.lca.every=8", "synth.lca.interval=[0.0,0.45]"],
    "guided + LCA, 30 % of the trajectories": [*LCA, "synth.lca.probability=0.3"],
    "guided, one intermediate": ["synth.images.intermediates=1"],
    "guided + LCA, one intermediate": [*LCA, "synth.images.intermediates=1"],
    "guided + latent mixup": [*LCA, "synth.lca.kind=mixup"],
    "guided + latent flip, shift, crop": [*LCA, "synth.lca.kind=traditional"],
    "cmi": CMI,
    "deepinversion": [
        "synth.method=deepinversion",
        "synth.deepinversion.steps=300",
        "synth.deepinversion.jitter=0.125",
    ],
    "dda": [*CMI, "synth.method=dda"],
    "fitted": FITTED,
    "fitted, every second step": [*FITTED, "synth.guidance.every=2"],
    "fitted, every third step": [*FITTED, "synth.guidance.every=3"],
    "fitted, all steps": [*FITTED, "synth.guidance.interval=[0.0,1.0]"],
    "fitted, 20 to 70 %": [*FITTED, "synth.guidance.interval=[0.2,0.7]"],
    "fitted, first 40 %": [*FITTED, "synth.guidance.interval=[0.0,0.4]"],
    "fitted, two updates, every second step": [*FITTED, "synth.guidance.every=2", "synth.guidance.updates_per_step=2"],
}
BASE = "unguided"


def recipe_of(row: str, seed: int) -> Recipe:
    """The demo recipe with the row's settings, one group a shard so that sizes are fine-grained."""
    sets = ["synth.groups_per_shard=1", "distill.min_agreement=0", *CPU, *FULL, *ROWS[row]]
    return resolve("demo", sets=[*sets, f"synth.seed={seed}", f"distill.seed={seed}"])


def synthesize(recipe: Recipe, shards: int, folder: Path) -> tuple[str, float]:
    """Grow the dataset in ``folder`` to ``shards``: its manifest, and the CPU seconds of all of it.

    The seconds are noted after each call, so those of a killed one are lost: delete the cell then.
    """
    noted = folder.with_suffix(".seconds.json")
    spent = json.loads(noted.read_text()) if noted.exists() else {"shards": 0, "seconds": 0.0}
    grown = recipe.synth.model_copy(update={"shards": max(shards, spent["shards"])})
    started = time.process_time()
    made = run_synth(recipe.model_copy(update={"synth": grown}), str(folder), quiet=True)
    if grown.shards > spent["shards"]:
        spent = {"shards": grown.shards, "seconds": spent["seconds"] + time.process_time() - started}
        noted.write_text(json.dumps(spent))
    return made.manifest, spent["seconds"]


def first_kept(manifest: str, images: int) -> str | None:
    """An expression for the fewest trajectories that hold ``images`` kept images; None where there are not so many."""
    found = np.sort(Manifest.open(manifest).column("trajectory"))
    return f"trajectory <= {found[images - 1]}" if len(found) >= images else None


def of_images(recipe: Recipe, images: int, folder: Path) -> tuple[str, float, str]:
    """Shards until ``images`` are kept: manifest, CPU seconds, and the expression that selects them."""
    shards = ceil(images / (recipe.synth.group_size * recipe.synth.images_per_trajectory))
    while True:
        manifest, seconds = synthesize(recipe, shards, folder)
        if where := first_kept(manifest, images):
            return manifest, seconds, where
        shards *= 2


def of_seconds(recipe: Recipe, budget: float, folder: Path) -> tuple[str, float, str]:
    """As many shards as ``budget`` CPU seconds make (at least one), all of their kept images."""
    shards = 1
    while True:
        manifest, seconds = synthesize(recipe, shards, folder)
        fitting = int(shards * budget / seconds)
        if fitting <= shards:
            return manifest, seconds, "kept"
        shards = min(fitting, 4 * shards)


LATER = (
    *("synth.guidance.energy", "synth.guidance.entropy", "synth.guidance.bn_population", "synth.lca.pairs"),
    *("synth.loggers", "distill.loss.feature", "distill.partitions", "distill.best", "distill.steps"),
    *("distill.keys", "distill.exclude_keys", "synth.prompts.classes", "synth.prompts.templates"),
    *("distill.loss.tckd", "distill.loss.nckd", "distill.loss.dist_inter", "distill.loss.dist_intra"),
    *("distill.augment.crop_scale", "distill.augment.brightness", "distill.augment.contrast"),
    *("distill.augment.saturation",),
)
"""Settings that came after cells were kept: at their defaults they change no cell's meaning."""


def meaning(recipe: Recipe, synthetic: bool = True) -> dict:
    """What decides a cell's numbers besides its name: a cell of another meaning is not this call's."""
    meant = {"distill": recipe.distill.model_dump(mode="json", exclude={"device"})}
    if synthetic:
        meant["synth"] = recipe.synth.model_dump(mode="json", exclude={"teacher", "device", "shards"})
        meant["synth"]["prior"]["path"] = locate_prior(recipe.synth.prior).sha256
    chosen = recipe.model_dump(exclude_defaults=True)
    for key in LATER:
        *sections, name = key.split(".")
        there, set_ = meant, chosen
        for section in sections:
            there, set_ = there.get(section, {}), set_.get(section, {})
        if name not in set_:
            there.pop(name, None)
    return meant | {"teacher": teacher_identity(recipe.synth.teacher)["sha256"]}


def finished(done: Path, meant: dict) -> dict | None:
    """The cell in ``done``, None where there is none yet; ends the script where its settings were not ``meant``."""
    if not done.exists():
        return None
    made = json.loads(done.read_text())
    if changed := differences(made.get("meant", {}), meant):
        sys.exit(f"{done} was made with other settings ({'; '.join(changed[:3])}): use another --out, or delete it")
    return made


def cell(row: str, seed: int, images: int | None, budget: float | None, test: str, out: Path) -> dict:
    """One dataset and one student: accuracy, kept images, stage-1 CPU seconds, the teacher's agreement."""
    folder = out / "".join(c if c.isalnum() else "_" for c in f"{row} {images or f'{budget:g}s'} {seed}")
    done = folder / "cell.json"
    recipe = recipe_of(row, seed)
    meant = meaning(recipe)
    if made := finished(done, meant):
        return made
    manifest, seconds, where = of_images(recipe, images, folder) if images else of_seconds(recipe, budget, folder)
    recipe = recipe.model_copy(update={"distill": recipe.distill.model_copy(update={"where": where})})
    learnt = run_distill(recipe, [(manifest, 1.0)], str(folder / "distill"), test_data=test, quiet=True)
    (student,) = learnt.students.values()
    result = {
        "row": row,
        "seed": seed,
        "images": len(Manifest.open(manifest).where(where)),
        "seconds": seconds,
        "accuracy": student.test.accuracy,
        "agreement": learnt.teacher_check.teacher_label_agreement,
        "meant": meant,
    }
    done.write_text(json.dumps(result))
    return result


def interval(values: list[float]) -> float:
    """Half width of the 95 % interval of the mean."""
    n = len(values)
    return float(student_t.ppf(0.975, n - 1)) * stdev(values) / sqrt(n) if n > 1 else float("nan")


def table_row(row: str, made: list[dict], base: dict[int, dict]) -> str:
    """A Markdown row: means over seeds, and the gain over ``base`` (its cells by seed) paired by seed."""
    accuracy = [100 * c["accuracy"] for c in made]
    text = f"| {row} | {mean(c['images'] for c in made):.0f} | {mean(accuracy):.1f} ± {interval(accuracy):.1f} "
    paired = [100 * (c["accuracy"] - base[c["seed"]]["accuracy"]) for c in made if c["seed"] in base]
    text += f"| {mean(paired):+.1f} ± {interval(paired):.1f} " if paired and row != BASE else "| "
    return text + f"| {100 * mean(c['agreement'] for c in made):.1f} | {mean(c['seconds'] for c in made):.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=["unguided", "guided"])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--images", type=int, nargs="+", default=[400], help="equal kept images")
    size.add_argument("--cpu-seconds", type=float, nargs="+", help="equal stage-1 time instead")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--split", choices=["validation", "test"], default="validation")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    test = str(write_split(args.split, args.out / f"{args.split}.parquet"))
    out, cells = args.out / args.split, []
    load_models(resolve("demo", sets=CPU).synth)  # imports are no part of a dataset's time, nor is the decoder's fit
    print(f"| row | images | student, {args.split} % | minus unguided | teacher agreement % | synthesis CPU s |")
    print("|---|---|---|---|---|---|", flush=True)
    sizes = [(None, s) for s in args.cpu_seconds] if args.cpu_seconds else [(n, None) for n in args.images]
    for images, budget in sizes:
        made: dict[str, list[dict]] = {row: [] for row in args.rows}
        for row, seed in product(made, range(args.seeds)):
            made[row].append(cell(row, seed, images, budget, test, out))
            print(f"{row}, seed {seed}: {made[row][-1]['accuracy']:.1%}", file=sys.stderr, flush=True)
        base = {c["seed"]: c for c in made.get(BASE, [])}
        for row, found in made.items():
            print(table_row(row, found, base), flush=True)
            cells += found
    (out / "cells.json").write_text(json.dumps(cells, indent=1))


if __name__ == "__main__":
    main()
