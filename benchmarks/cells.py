"""Experiments on photographs, one cell (a row with a seed) at a time: each leaves one small JSON file.

    python benchmarks/cells.py views --rows "LCA, plain views" --seeds 0 1 2 --out runs/cells
    python benchmarks/cells.py views --table benchmarks/cells

:mod:`cells_rows` names the questions, their rows, and the sets of images that rows share: a set is made once for a
seed, below ``--out``, and grows where a row needs more of it. The same command resumes what was killed (sets shard by
shard, students from their last checkpoint) and passes over finished cells. One thread; bf16 but for students of digits.
Accuracy is on the validation split alone (``FACTORY_BENCH_DIR``: see :mod:`cifar10`), so any number of settings may be
tried.

Every cell of CIFAR-10 also says how an uninvolved classifier, the third-party ResNet-32, judges its images: how often
it names the label, how far its BatchNorm statistics are off, and how alike (cosine) images of a class are to it.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from math import ceil
from pathlib import Path
from platform import processor
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import numpy as np
import pyarrow.parquet as pq
import torch
from cells_rows import CIFAR_SETS, DIGITS_SETS, QUESTIONS, REAL, STROKES_SETS, Part, Question, Row
from cifar_data import CLASS_NAMES, split_table
from digits import interval, meaning, synthesize
from judge import judged
from PIL import Image

from manifests.dataset import DatasetInfo
from manifests.merge import merge
from manifests.reader import Manifest
from manifests.shard import ShardWriter
from manifests.storage import Storage
from pipeline.distill import dry_run, run_distill
from pipeline.recipe import Recipe, resolve
from stages import digits
from stages.models.source import teacher_identity
from stages.settings import ModelSettings

HERE = Path(__file__).resolve().parent
DECISIVE = ("stages", "pipeline", "manifests", "priors", "benchmarks/cifar10.yaml", "benchmarks/cifar10-teacher")
PRIORS = "synth.prior.path=priors/"
COMMON = ("synth.device=cpu", "distill.device=cpu", "synth.prior.dtype=bf16")
DIGITS = (
    ModelSettings(name="embedded:digits"),
    (
        "distill.students=[digits-cnn-small]",
        "distill.batch_size=64",
        "distill.augment.flip=false",
        "distill.augment.crop=0.1875",
    ),
)
DOMAINS = {
    "cifar10": (
        ModelSettings(name=str(HERE / "cifar10-teacher"), class_names=CLASS_NAMES),
        ("distill.batch_size=256", "distill.dtype=bf16", "distill.channels_last=true"),
    ),
    "digits": DIGITS,
    "strokes": (DIGITS[0], (*DIGITS[1], "distill.batch_size=32", "distill.val_fraction=0.0")),
}
SETS = {"cifar10": CIFAR_SETS, "digits": DIGITS_SETS, "strokes": STROKES_SETS}


def recipe_of(question: Question, name: str, seed: int, row: Row) -> Recipe:
    """The base recipe with what the set ``name`` and the row change."""
    teacher, common = DOMAINS[question.domain]
    base, prior = (
        ("demo", ()) if question.domain == "strokes" else (str(HERE / "cifar10.yaml"), (f"{PRIORS}natural32",))
    )
    changes = (*prior, *COMMON, *common, *sets_of(question).get(name, ()), *row.train)
    sets = [change.replace(PRIORS, f"synth.prior.path={HERE.parent}/priors/") for change in changes]
    recipe = resolve(base, sets=[*sets, f"synth.seed={seed}", f"distill.seed={seed}"])
    return recipe.model_copy(update={"synth": recipe.synth.model_copy(update={"teacher": teacher})})


def sets_of(question: Question) -> dict[str, tuple[str, ...]]:
    return SETS[question.domain]


def real_images(domain: str) -> Iterator[tuple[bytes, int]]:
    """Encoded training images with their labels, in a fixed random order."""
    if domain == "cifar10":
        table = split_table(bench() / "cifar10-train.parquet", "train")
        yield from zip((jpg.as_py() for jpg in table["jpg"]), table["label"].to_pylist(), strict=True)
        return
    images, labels = digits.load_split("train")
    for i in np.random.default_rng(0).permutation(len(images)):
        buffer = io.BytesIO()
        Image.fromarray(np.round(images[i] * (255 / 16)).astype(np.uint8)).save(buffer, "PNG")
        yield buffer.getvalue(), int(labels[i])


def real_set(domain: str, count: int, folder: Path) -> str:
    """The first ``count`` real images as a dataset: its manifest. All seeds have the same ones."""
    storage, (teacher, _) = Storage(folder), DOMAINS[domain]
    names, kind, side = (CLASS_NAMES, "jpg", 32) if domain == "cifar10" else (digits.CLASS_NAMES, "png", 8)
    if not storage.exists("m.parquet"):
        with ShardWriter(storage, 0, "real") as writer:
            for number, (data, label) in zip(range(count), real_images(domain), strict=False):
                row = {"label": label, "class_name": names[label], "method": "real", "trajectory": number}
                writer.add(row | {"kept": True, "timestep": 0}, data, kind)
            writer.commit()
        merge(storage, DatasetInfo("real", {}, {}, teacher_identity(teacher), side, names))
    return storage.path("m.parquet")


def bench() -> Path:
    return Path(os.environ["FACTORY_BENCH_DIR"])


def stored(question: Question, part: Part, seed: int, row: Row, out: Path) -> tuple[str, float]:
    """The manifest of the set that ``part`` is of, made or grown as far as it needs, and its CPU seconds so far."""
    if part.name == REAL:
        return real_set(question.domain, part.trajectories, out / f"real-{question.domain}-{part.trajectories}"), 0.0
    recipe = recipe_of(question, part.name, seed, row)
    shards = ceil(part.trajectories / (recipe.synth.group_size * recipe.synth.groups_per_shard))
    return synthesize(recipe, shards, out / f"{slug(question.domain, part.name)}-{seed}")


def slug(*words: object) -> str:
    """A file name of words.

    >>> slug("views", "LCA, scale 0.1", 2)
    'views-lca_scale_0.1-2'
    """
    kept = ("".join(c if c.isalnum() or c == "." else " " for c in str(word).lower()) for word in words)
    return "-".join("_".join(word.split()) for word in kept)


def condition(part: Part, manifest: str) -> str:
    """The rows of a manifest that belong to ``part``, as an expression."""
    where = f"trajectory < {part.trajectories}" + (f" and {part.where}" if part.where else "")
    if part.best is None:
        return where
    return f"{where} and teacher_label == label and ({surest(Manifest.open(manifest), where, part.best)})"


def surest(manifest: Manifest, where: str, count: int) -> str:
    """The confidence that the ``count`` best rows of each class reach: ``(label == 0 and confidence >= 0.98) or …``."""
    selection = manifest.where(f"{where} and teacher_label == label")
    labels, confidence = selection.labels, selection.column("confidence")
    terms = []
    for label in np.unique(labels):
        ordered = np.sort(confidence[labels == label])[::-1]
        terms.append(f"(label == {label} and confidence >= {float(ordered[min(count, len(ordered)) - 1])!r})")
    return " or ".join(terms)


def validation(domain: str, out: Path) -> str:
    """The labeled images that students are scored on."""
    path = out / f"{domain}-validation.parquet"
    if not path.exists():
        if domain == "cifar10":
            aside = path.with_suffix(".part")
            pq.write_table(split_table(bench() / "cifar10-train.parquet", "validation"), aside)
            aside.rename(path)
        else:
            digits.write_split("validation", path)
    return str(path)


def learn(
    recipe: Recipe, sources: list[tuple[str, float]], where: str, row: Row, test: str, folder: Path
) -> dict[str, Any]:
    """Train the row's student; what is worth keeping of its results."""

    def lasting(epochs: int) -> Recipe:
        update = {"where": where, "min_agreement": 0.0, "epochs": epochs}
        return recipe.model_copy(update={"distill": recipe.distill.model_copy(update=update)})

    each = dry_run(lasting(1), sources, str(folder), recipe.synth.teacher).steps_per_epoch
    epochs = max(1, round(row.steps / each))
    learnt = run_distill(
        lasting(epochs), sources, str(folder), teacher=recipe.synth.teacher, test_data=test, quiet=True
    )
    ((name, student),) = learnt.students.items()
    check = learnt.teacher_check
    return {
        "student": name,
        "images": learnt.images,
        "steps": each * epochs,
        "split": "validation",
        "accuracy": student.test.accuracy,
        "teacher_accuracy": learnt.teacher_accuracy,
        "agreement": check.teacher_label_agreement,
        "confidence": check.confidence,
        "bn_gap": check.bn_gap,
    }


def cell(asked: str, name: str, seed: int, out: Path) -> dict[str, Any]:
    """One row with one seed, made or read."""
    question = QUESTIONS[asked]
    row = question.rows[name]
    done = out / "cells" / f"{slug(asked, name, seed)}.json"
    recipes = [recipe_of(question, part.name, seed, row) for part in row.parts]
    meant = meaning_of(row, recipes)
    if done.exists():
        made: dict[str, Any] = json.loads(done.read_text())
        if made["meaning"] != meant:
            sys.exit(f"{done} was made with other settings: use another --out, or delete it")
        return made
    if same := same_as(meant, done.parent):
        return written(done, same | {"question": asked, "row": name})
    torch.set_num_threads(1)
    folder = out / "students" / slug(asked, name, seed)
    resumed = folder.exists()
    sources, conditions, parts = [], [], []
    for part, recipe in zip(row.parts, recipes, strict=True):
        manifest, seconds = stored(question, part, seed, row, out / "sets")
        sources.append((manifest, part.weight))
        where = condition(part, manifest)
        method = "real" if part.name == REAL else recipe.synth.method
        conditions.append(f"(method == '{method}' and {where})" if len(row.parts) > 1 else where)
        used = {"set": part.name, "changes": sets_of(question).get(part.name, ())}
        parts.append(used | {"where": where, "weight": part.weight, "cpu_seconds": round(seconds)})
    started = time.process_time()
    result: dict[str, Any] = {"question": asked, "row": name, "seed": seed, "data": parts, "train": row.train}
    if row.steps:
        test = validation(question.domain, out)
        result |= learn(recipes[0], sources, " or ".join(conditions), row, test, folder)
    result |= {"cpu_seconds": round(time.process_time() - started), "resumed": resumed}
    if question.domain == "cifar10":
        boxes = stored(question, Part(row.boxes), seed, row, out / "sets")[0] if row.boxes else None
        found = zip(sources, conditions, strict=True)
        result["judged"] = [judged(url, where, boxes, bench()) for (url, _), where in found]
    result |= {"common": [*COMMON, *DOMAINS[question.domain][1]], "meaning": meant, "commit": commit()}
    result |= {
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return written(done, result)


def same_as(meant: str, folder: Path) -> dict[str, Any] | None:
    """A finished cell of another question that is this one."""
    for path in sorted(folder.glob("*.json")):
        made: dict[str, Any] = json.loads(path.read_text())
        if made["meaning"] == meant:
            return made
    return None


def written(path: Path, result: dict[str, Any]) -> dict[str, Any]:
    """``result``, once it stands in ``path``: whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(result, indent=1) + "\n")
    aside.rename(path)
    return result


def meaning_of(row: Row, recipes: Sequence[Recipe]) -> str:
    """A hash of what decides a cell's numbers besides its name and the code."""
    meant = [meaning(recipe, part.name != REAL) for part, recipe in zip(row.parts, recipes, strict=True)]
    return sha256(json.dumps([repr(row), meant], sort_keys=True).encode()).hexdigest()[:16]


def commit() -> str:
    """The last commit that changed what decides a cell; empty outside a clone."""
    asked = ["git", "-C", str(HERE.parent), "log", "-1", "--format=%h", "--", *DECISIVE]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()


def cpu_name() -> str:
    """As the system calls the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), processor())


def table(asked: str, folder: Path) -> Iterator[str]:
    """The finished cells of a question in ``folder`` as Markdown: means over seeds, differences paired by seed."""
    question = QUESTIONS[asked]
    made = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    cells = {name: {c["seed"]: c for c in made if (c["question"], c["row"]) == (asked, name)} for name in question.rows}
    base = cells[question.base]
    learnt = ["seeds", "images", "steps", "student, validation %", f"minus {question.base}", "agreement %"]
    heads = ["row", *learnt, *(f"judge: {name}" for name in ("agrees %", "gap", "alike"))]
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---|" * len(heads)
    for name, found in cells.items():
        if found:
            paired = {seed: base[seed] for seed in found if seed in base and name != question.base}
            yield f"| {' | '.join([name, str(len(found)), *student_columns(found, paired), *judge_columns(found)])} |"


def student_columns(found: dict[int, dict[str, Any]], base: dict[int, dict[str, Any]]) -> list[str]:
    """Images, steps, accuracy, difference to ``base`` (cells by seed) and agreement of a row's cells."""
    each = list(found.values())
    if "accuracy" not in each[0]:
        return [""] * 5
    differences = [100 * (found[seed]["accuracy"] - other["accuracy"]) for seed, other in base.items()]
    return [
        *(f"{mean(c[name] for c in each):.0f}" for name in ("images", "steps")),
        spread([100 * c["accuracy"] for c in each]),
        spread(differences, "+") if differences else "",
        f"{100 * mean(c['agreement'] for c in each):.0f}",
    ]


def judge_columns(found: dict[int, dict[str, Any]]) -> list[str]:
    """What the judge says of a row's first part."""
    judges = [c["judged"][0] for c in found.values() if "judged" in c]
    if not judges:
        return [""] * 3
    agrees, gap, alike = (mean(j[name] for j in judges) for name in ("agrees", "gap", "alike"))
    return [f"{100 * agrees:.0f}", f"{gap:.3f}", f"{alike:.3f}"]


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean, with its 95 % interval of three values and more; of two, the values themselves."""
    text = f"{mean(values):{sign}.1f}"
    if len(values) > 2:
        return f"{text} ± {interval(list(values)):.1f}"
    return f"{text} ({', '.join(f'{value:{sign}.1f}' for value in values)})" if len(values) == 2 else text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("question", choices=list(QUESTIONS))
    parser.add_argument("--rows", nargs="+", help="default: every row of the question")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/cells"))
    parser.add_argument("--table", type=Path, metavar="FOLDER", help="print the finished cells of a folder, and stop")
    args = parser.parse_args()
    if args.table:
        print("\n".join(table(args.question, args.table)))
        return
    rows = args.rows or list(QUESTIONS[args.question].rows)
    if unknown := set(rows) - QUESTIONS[args.question].rows.keys():
        parser.error(f"{args.question} has no row {', '.join(sorted(unknown))}")
    if QUESTIONS[args.question].domain == "cifar10" and "FACTORY_BENCH_DIR" not in os.environ:
        parser.error("FACTORY_BENCH_DIR names no folder with CIFAR-10 (see benchmarks/cifar10.py)")
    for seed in args.seeds:
        for name in rows:
            made = cell(args.question, name, seed, args.out)
            scores = f"{made['accuracy']:.1%}" if "accuracy" in made else made["judged"]
            print(f"{args.question}: {name}, seed {seed}: {scores}", flush=True)


if __name__ == "__main__":
    main()
