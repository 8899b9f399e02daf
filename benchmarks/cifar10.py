"""The paper's experiment on real data: CIFAR-10 students of a third-party teacher, with a prior of other photographs.

    python benchmarks/cifar10.py --rows real-kd unguided guided "guided + LCA" --seeds 5 --out runs/cifar10
    python benchmarks/cifar10.py --rows unguided guided --cpu-seconds 900 --seeds 5 --out runs/cifar10-900
    python benchmarks/cifar10.py --rows unguided guided --measure rates.json --out runs/rates
    python benchmarks/cifar10.py --rows unguided guided --cpu-seconds 900 --rates rates.json --jobs 12 --out runs/gpu

The bench folder, ``FACTORY_BENCH_DIR``, holds ``cifar10-train.parquet`` and ``cifar10-test-a.tar``; the teacher is
the model folder beside this script (see its card). 5,000 training rows are the validation split, for every choice;
``--split test`` reads the test tar once a cell, for a frozen table. Every student takes the same number of steps, to
whole epochs. Rows are kept cell by cell, so a second call resumes and adds; other settings need another ``--out``.
Equal time on another machine: measure the rows' rates on the CPU first; as many trajectories as 900 CPU seconds make
are then made wherever there is a faster device. Real images are read by the reference rows alone (``real``: labels,
``real-kd``: the teacher's answers), never by synthesis, and are the same ones for all seeds.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from math import ceil
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import digits
import pyarrow.parquet as pq
import torch
from cifar10_rows import BASE, CEILING, MAPPED, REAL, ROWS, SWEPT, UNMAPPED
from cifar_data import CLASS_NAMES, split_table, third_party
from digits import finished, interval, of_images, of_seconds, synthesize

from manifests.dataset import DatasetInfo
from manifests.merge import merge
from manifests.reader import Manifest
from manifests.shard import ShardWriter
from manifests.storage import Storage
from pipeline.distill import run_distill
from pipeline.recipe import Recipe, resolve
from stages.distill.batches import batch_bounds
from stages.models.source import teacher_identity
from stages.settings import ModelSettings
from stages.synth.worker import ShardWorker

HERE = Path(__file__).resolve().parent
NEEDED = ("cifar10-train.parquet", "cifar10-test-a.tar")
THIRD_PARTY = "cifar10-resnet20.safetensors"


def recipe_of(row: str, seed: int, args: argparse.Namespace) -> Recipe:
    """The base recipe with the row's settings; the named track calls the teacher's classes by the prior's words."""
    sets = [*args.set, *(ROWS | SWEPT | REAL)[row], f"synth.seed={seed}", f"distill.seed={seed}"]
    sets += [f"synth.prior.path={args.prior}", f"distill.students=[{','.join(args.students)}]"]
    recipe = resolve(str(HERE / "cifar10.yaml"), sets=sets)
    words = tuple((MAPPED | UNMAPPED)[name] for name in CLASS_NAMES)
    names = words if recipe.synth.prompts.class_names else CLASS_NAMES
    teacher = args.teacher.model_copy(update={"class_names": names})
    return recipe.model_copy(update={"synth": recipe.synth.model_copy(update={"teacher": teacher})})


def real_dataset(args: argparse.Namespace) -> str:
    """Training rows (as many as synthetic images, else all) in the factory's own format: the manifest."""
    images = None if args.cpu_seconds else args.images
    storage, table = Storage(args.out / f"real-{images or 'all'}"), split_table(args.bench / NEEDED[0], "train")
    if not storage.exists("m.parquet"):
        table = table.slice(0, images)
        with ShardWriter(storage, 0, "real") as writer:
            for number, (jpg, label) in enumerate(zip(table["jpg"], table["label"].to_pylist(), strict=True)):
                row = {"label": label, "class_name": CLASS_NAMES[label], "method": "real", "trajectory": number}
                writer.add(row | {"kept": True}, jpg.as_py(), "jpg")
            writer.commit()
        merge(storage, DatasetInfo("real", {}, {}, teacher_identity(args.teacher), 32, CLASS_NAMES))
    return storage.path("m.parquet")


def measure_rates(args: argparse.Namespace) -> dict[str, float]:
    """Trajectories that each row makes in a CPU second of one thread: rows take turns, the faster of two counts."""
    torch.set_num_threads(1)
    rates: dict[str, float] = {}
    for turn in range(2):
        for row in args.rows:
            with TemporaryDirectory() as folder:
                recipe = recipe_of(row, 0, args)
                synth = recipe.synth.model_copy(update={"device": "cpu", "shards": 1, "groups_per_shard": 1})
                worker = ShardWorker(synth, folder, "0" * 64)  # loading, and fitting a decoder, fall outside
                started = time.process_time()
                worker.run(turn)
                rates[row] = max(rates.get(row, 0.0), synth.group_size / (time.process_time() - started))
                print(f"{row}: {rates[row]:.2f} trajectories / CPU s", flush=True)
    return rates


def of_trajectories(recipe: Recipe, count: int, folder: Path) -> tuple[str, float, str]:
    """``count`` trajectories, all of their kept images."""
    manifest, seconds = synthesize(recipe, ceil(count / recipe.synth.group_size), folder)
    return manifest, seconds, f"trajectory < {count}"


def meaning(row: str, recipe: Recipe, args: argparse.Namespace) -> dict:
    """As :func:`digits.meaning`, with what is this script's own."""
    meant = digits.meaning(recipe, row not in REAL) | {"steps": args.steps}
    if row not in REAL:
        meant["rate"] = json.loads(args.rates.read_text())[row] if args.rates else None
    return meant


def cell(row: str, seed: int, test: str, args: argparse.Namespace) -> dict:
    """One dataset and its students: accuracy of each, images, stage-1 CPU seconds, the teacher's agreement."""
    budget = args.cpu_seconds
    size = f"{budget:g}s" if budget else args.images or "all"
    folder = args.out / args.split / "".join(c if c.isalnum() else "_" for c in f"{row} {size} {seed}")
    done = folder / "cell.json"
    recipe = recipe_of(row, seed, args)
    meant = meaning(row, recipe, args)
    if made := finished(done, meant):
        return made
    torch.set_num_threads(1)
    if row in REAL:
        manifest, seconds, where = real_dataset(args), 0.0, "kept"
    elif budget and args.rates:
        count = int(budget * meant["rate"])
        manifest, seconds, where = of_trajectories(recipe, count, folder)
    elif budget:
        manifest, seconds, where = of_seconds(recipe, budget, folder)
    else:
        manifest, seconds, where = of_images(recipe, args.images, folder)
    count = len(Manifest.open(manifest).where(where))
    steps = len(batch_bounds(count, recipe.distill.batch_size)) - 1
    epochs = max(1, round(args.steps / steps))
    learning = {"where": where, "epochs": epochs, "min_agreement": 0.0}
    recipe = recipe.model_copy(update={"distill": recipe.distill.model_copy(update=learning)})
    learnt = run_distill(
        recipe, [(manifest, 1.0)], str(folder / "distill"), teacher=recipe.synth.teacher, test_data=test, quiet=True
    )
    result = {
        "row": row,
        "seed": seed,
        "images": count,
        "steps": steps * epochs,
        "seconds": seconds,
        "accuracy": {name: student.test.accuracy for name, student in learnt.students.items()},
        "agreement": learnt.teacher_check.teacher_label_agreement,
        "teacher": learnt.teacher_accuracy,
        "meant": meant,
    }
    folder.mkdir(parents=True, exist_ok=True)
    done.write_text(json.dumps(result))
    return result


def table_rows(row: str, made: list[dict], known: dict[str, list[dict]]) -> Sequence[str]:
    """A Markdown row a student: accuracy, and differences to unguided and to KD on real images, paired by seed."""
    for name in made[0]["accuracy"]:
        accuracy = [100 * c["accuracy"][name] for c in made]
        text = f"| {row} | {name} | {mean(c['images'] for c in made):.0f} | {mean(c['steps'] for c in made):.0f} "
        text += f"| {mean(accuracy):.1f} ± {interval(accuracy):.1f} "
        for other in (BASE, CEILING):
            base = {c["seed"]: c["accuracy"][name] for c in known.get(other, [])}
            paired = [100 * (c["accuracy"][name] - base[c["seed"]]) for c in made if c["seed"] in base]
            text += f"| {mean(paired):+.1f} ± {interval(paired):.1f} " if paired and row != other else "| "
        yield text + f"| {100 * mean(c['agreement'] for c in made):.0f} | {mean(c['seconds'] for c in made):.0f} |"


def absent(args: argparse.Namespace) -> str:
    """Why nothing can be measured here; empty where it can."""
    if args.bench is None:
        return "FACTORY_BENCH_DIR names no folder"
    needed = (*NEEDED, THIRD_PARTY) if args.teacher == "third-party" else NEEDED
    missing = [name for name in needed if not (args.bench / name).exists()]
    if missing:
        return f"{args.bench} lacks {', '.join(missing)}"
    if not (args.prior / "model_index.json").exists() and any(row not in REAL for row in args.rows):
        return f"no prior at {args.prior}: train one with tools/train_natural_prior.py"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=[*REAL, *ROWS, *SWEPT], default=["real-kd", "unguided", "guided"])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--images", type=int, default=1500, help="equal kept images; real rows: this many real ones")
    size.add_argument("--cpu-seconds", type=float, help="equal stage-1 time instead; real rows: every training image")
    parser.add_argument("--rates", type=Path, help="with --cpu-seconds: sizes follow from these rates, on any machine")
    parser.add_argument("--measure", type=Path, help="measure the rows' rates on this CPU, write them here, and stop")
    parser.add_argument("--jobs", type=int, default=1, help="cells at the same time")
    parser.add_argument("--steps", type=int, default=3000, help="of every student")
    parser.add_argument("--students", nargs="+", default=["resnet8"])
    parser.add_argument(
        "--teacher", default=str(HERE / "cifar10-teacher"), help="model folder, or third-party (as it is)"
    )
    parser.add_argument("--prior", type=Path, default=HERE.parent / "priors" / "natural32")
    parser.add_argument("--set", action="append", default=[], help="changes the base recipe; use another --out")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--split", choices=["validation", "test"], default="validation")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.rates and not args.cpu_seconds:
        parser.error("--rates needs --cpu-seconds, the time that the rates are multiplied by")
    if args.rates and not args.rates.is_file():
        parser.error(f"--rates {args.rates}: no such file; --measure makes one")
    if args.rates and (unknown := set(args.rows) - REAL.keys() - json.loads(args.rates.read_text()).keys()):
        parser.error(f"--rates {args.rates} has no rate of {', '.join(sorted(unknown))}: measure it with --measure")
    if args.cpu_seconds and not args.rates and torch.cuda.is_available():
        parser.error("--cpu-seconds on a GPU machine counts launches: measure --rates on the CPU, and name them here")
    if args.measure and (real := REAL.keys() & set(args.rows)):
        parser.error(f"--measure: {', '.join(sorted(real))} synthesizes nothing, so it has no rate")
    args.bench = Path(os.environ["FACTORY_BENCH_DIR"]) if "FACTORY_BENCH_DIR" in os.environ else None
    if why := absent(args):
        print(f"skipped: {why}")
        return
    foreign = args.teacher == "third-party"
    args.teacher = third_party("resnet20", args.bench / THIRD_PARTY) if foreign else ModelSettings(name=args.teacher)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.measure:
        args.measure.write_text(json.dumps(measure_rates(args), indent=1))
        return
    test = args.bench / NEEDED[1]
    if args.split == "validation":
        test = args.out / "validation.parquet"
        pq.write_table(split_table(args.bench / NEEDED[0], "validation"), test)
    print(f"named track: {MAPPED}; unknown to the prior: {UNMAPPED}")
    asked = [(row, seed) for row in args.rows for seed in range(args.seeds)]
    if args.jobs > 1:
        if any(row in REAL for row in args.rows):
            real_dataset(args)
        with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
            for future in [pool.submit(cell, *each, str(test), args) for each in asked]:
                future.result()
    known: dict[str, list[dict]] = {row: [] for row in args.rows}
    for row, seed in asked:  # every cell first: rows are compared with each other
        known[row].append(cell(row, seed, str(test), args))
        scores = [f"{name} {100 * value:.1f} %" for name, value in known[row][-1]["accuracy"].items()]
        print(f"{row}, seed {seed}: {', '.join(scores)}", flush=True)
    print(f"| row | student | images | steps | {args.split} % | minus unguided | minus real-kd | agreement % | CPU s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in args.rows:
        for line in table_rows(row, known[row], known):
            print(line)
    print(f"teacher: {100 * mean(c['teacher'] for cells in known.values() for c in cells):.1f} %")


if __name__ == "__main__":
    main()
