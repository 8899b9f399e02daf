"""More cases of ``benchmarks/golden.py``: commands that look at or repair what is there, recipes, wrong calls."""

import importlib
import json
import os
import re
import shlex
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from golden_cases import (
    CASES,
    DATA,
    DISTILL_KEYS,
    INVERT,
    KEYS,
    SD,
    SHORT,
    SMALL,
    case,
    own,
    prior,
    sets,
    synth,
)

if TYPE_CHECKING:
    from golden import Run

RUN = SMALL | SD | {"method": "dmkd", "intermediates": 1, "min_confidence": 0.12, "logits": True}
QUICK = sets(DISTILL_KEYS, SHORT | {"epochs": 1})


# ------------------------------------------------------------------------------------------------- look, keep, rescore


@case("keep/look")
def look(run: "Run") -> None:
    """Status, inspect, verify, gc of an intact run; of a manifest alone; eval."""
    synth(run, **RUN)
    for command in (
        ("status", "run"), ("verify", "run"), ("verify", "run", "--quick"), ("verify", "run/m.parquet"), ("gc", "run"),
        ("inspect", "run", "--sheet", "run.png"),
        ("inspect", "run/m.parquet", "--metrics", "--columns", "3", "--sheet", "sheet.png"),
        ("inspect", DATA, "--where", "confidence > 0.2 and timestep == 0", "--sheet", "some.png"),
        ("inspect", DATA, "--where", "label == 77", "--sheet", "none.png"),
    ):  # fmt: skip
        run.factory(*command, label=" ".join(command), expect=None)
        run.factory(*command, "--json", label=" ".join((*command, "--json")), expect=None)
    for sheet in ("sheet.png", "some.png", "run.png"):
        run.keep(sheet, run.file(Path(sheet)))


@case("keep/eval")
def evaluate(run: "Run") -> None:
    for data in ("frozen/labeled", DATA, "frozen/data"):
        run.factory("eval", "frozen/student", data, label=f"eval {data}")
    teacher = ("--teacher", "embedded:digits", "--confusion", "confusion.png")
    run.factory("eval", "frozen/student", "frozen/labeled", *teacher, label="eval teacher")
    run.factory("eval", "frozen/student", "frozen/labeled", *teacher, "--json", label="eval teacher json")
    run.keep("confusion.png", run.file(Path("confusion.png")))


@case("keep/export", slow=True)
def export(run: "Run") -> None:
    """The texts without sizes: the files hold names of source files."""
    for option, file in (("--torch-export", "student.pt2"), ("--onnx", "student.onnx")):
        answer = run.factory("export", "student", "frozen/student", option, file, label=None)
        run.keep(option, {name: re.sub(r"[\d.]+ kB", "<size>", str(text)) for name, text in answer.items()})


@case("keep/rescore")
def rescore(run: "Run") -> None:
    synth(run, **RUN)
    for more in (
        (), ("--threshold", "0.12"), ("--threshold", "0.3", "-o", "strict.parquet"),
        ("--teacher", "frozen/student", "-o", "student.parquet"), ("--threshold", "0.1", "-o", "../o.parquet"),
        ("--teacher", "frozen/student", "--threshold", "0.2", "-o", "both.parquet", "--json"),
        ("--threshold", "0.1", "-o", "m.parquet"), ("--threshold", "2"), ("--teacher", "frozen/nothing"),
    ):  # fmt: skip
        run.factory("rescore", "run/m.parquet", *more, label=f"rescore {' '.join(more)}", expect=None)
    run.files("run", "files after")
    for name in ("rescored", "strict", "student", "both"):
        run.factory("verify", f"run/{name}.parquet", label=f"verify {name}")
    again = ("-m", "run/student.parquet", "-o", "out")
    run.factory("run", "distill", *again, *QUICK, label="distill, other teacher", expect=None)
    run.factory("run", "distill", "-m", "run/strict.parquet", "-o", "strict", *QUICK, label="distill", expect=None)
    run.files("strict")


# -------------------------------------------------------------------------------------------------------------- damage


def only(pattern: str) -> Path:
    """The first file of the run that matches."""
    return sorted(Path("run").glob(pattern))[0]


def flip(path: Path, where: int | float) -> None:
    """Change one bit of the byte at ``where`` (a share of the size below 1)."""
    data = bytearray(path.read_bytes())
    data[int(len(data) * where) if where < 1 else int(where)] ^= 1
    path.write_bytes(data)


def cut(path: Path, size: int | float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * size) if 0 < size < 1 else int(size)])


def edit(path: Path, **changes: Any) -> None:
    """Values of JSON replaced, its checksum left alone."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def member(name: str) -> int:
    """Where the content of a member of shard 1's tar begins."""
    with tarfile.open(only("shards/000001-*.tar")) as tar:
        return next(each.offset_data for each in tar if each.name.endswith(name))


DAMAGE: dict[str, Callable[[], Any]] = {
    "nothing": lambda: None,
    "tar cut": lambda: cut(only("shards/000001-*.tar"), 0.5),
    "tar cut short": lambda: cut(only("shards/000001-*.tar"), 1024),
    "tar empty": lambda: cut(only("shards/000001-*.tar"), 0),
    "tar longer": lambda: only("shards/000001-*.tar").open("ab").write(b"\0" * 512),
    "tar missing": lambda: only("shards/000001-*.tar").unlink(),
    "tar of another": lambda: shutil.copy(only("shards/000000-*.tar"), only("shards/000001-*.tar")),
    "image flipped": lambda: flip(only("shards/000001-*.tar"), member(".png") + 60),
    "row flipped": lambda: flip(only("shards/000001-*.tar"), member(".json") + 20),
    "header flipped": lambda: flip(only("shards/000001-*.tar"), 2),
    "table missing": lambda: only("shards/000001-*.parquet").unlink(),
    "table flipped": lambda: flip(only("shards/000001-*.parquet"), 0.4),
    "table cut": lambda: cut(only("shards/000001-*.parquet"), 0.5),
    "done missing": lambda: only("done/000001*").unlink(),
    "done flipped": lambda: flip(only("done/000001*"), 0.5),
    "done of another": lambda: shutil.copy(only("done/000000*"), only("done/000001*")),
    "done is text": lambda: only("done/000001*").write_text("done"),
    "done is a list": lambda: only("done/000001*").write_text("[1, 2]"),
    "plan missing": lambda: Path("run/plan.json").unlink(),
    "plan altered": lambda: edit(Path("run/plan.json"), shards=3),
    "plan is text": lambda: Path("run/plan.json").write_text("{"),
    "dataset missing": lambda: Path("run/dataset.json").unlink(),
    "dataset altered": lambda: edit(Path("run/dataset.json"), image_size=17),
    "manifest missing": lambda: Path("run/m.parquet").unlink(),
    "manifest flipped": lambda: flip(Path("run/m.parquet"), 0.3),
    "manifest cut": lambda: cut(Path("run/m.parquet"), 0.7),
    "manifest is a table": lambda: shutil.copy(only("shards/000001-*.parquet"), "run/m.parquet"),
    "manifest and dataset missing": lambda: [Path(f"run/{name}").unlink() for name in ("m.parquet", "dataset.json")],
    "index missing": lambda: [p.unlink() for p in (*Path("run/done").iterdir(), *Path("run").rglob("*.parquet"))],
    "teacher flipped": lambda: flip(Path("run/teacher/model.safetensors"), 0.5),
    "teacher missing": lambda: Path("run/teacher/model.safetensors").unlink(),
    "teacher altered": lambda: edit(Path("run/teacher/config.json"), num_classes=9),
    "foreign files": lambda: [Path(f"run/{name}").write_text("mine") for name in FOREIGN],
    "orphans": lambda: [
        Path("run/shards/000001-0123456789ab.tar").write_bytes(only("shards/000001-*.tar").read_bytes()),
        Path("run/shards/000009-0123456789ab.parquet").write_bytes(b"x"),
        Path("run/tmp").mkdir(exist_ok=True), Path("run/tmp/write-1").write_bytes(b"half"),
    ],
    "quarantine": lambda: (
        Path("run/failed").mkdir(exist_ok=True),
        Path("run/failed/000001.json").write_text('{"shard": 1, "attempts": 3, "error": "an error"}'),
        only("done/000001*").unlink(),
    ),
    "link out": lambda: (only("shards/000001-*.tar").unlink(), Path(TAR).symlink_to(Path("whole") / Path(TAR).name)),
}  # fmt: skip
FOREIGN = ("notes.txt", "shards/a.tar", "done/x")
TAR = "run/shards/000001-link.tar"


def sums(folder: str) -> dict[str, str]:
    """What changed in ``folder`` since it was copied from ``whole``: gone, new, other content."""
    left = {p.relative_to("whole").as_posix(): p for p in Path("whole").rglob("*") if p.is_file()}
    right = {p.relative_to(folder).as_posix(): p for p in Path(folder).rglob("*") if p.is_file()}
    skip = ("events.jsonl", "lease/", "report.html")
    return {
        name: "gone" if name not in right else "new" if name not in left else "changed"
        for name in sorted({*left, *right})
        if not name.startswith(skip)
        and (name not in left or name not in right or left[name].read_bytes() != right[name].read_bytes())
    }


@case("keep/damaged")
def damaged(run: "Run") -> None:
    """Every command on a run with one thing wrong; what rebuild makes of it; students of what is left."""
    synth(run, "whole", **RUN)
    for name, damage in DAMAGE.items():
        shutil.copytree("whole", "run")
        damage()
        commands = [
            ("verify", "run"), ("verify", "run", "--quick"), ("verify", "run/m.parquet", "--json"), ("status", "run"),
            ("gc", "run", "--dry-run"), ("inspect", "run/m.parquet", "--sheet", "sheet.png"),
            ("run", "distill", "-m", "run/m.parquet", "-o", "out", *QUICK),
            ("run", "distill", "-m", "run/m.parquet", "-o", "out", *QUICK, "--skip-bad"),
            ("rescore", "run/m.parquet", "--threshold", "0.2"), ("gc", "run"), ("rebuild", "run"), ("verify", "run"),
        ]  # fmt: skip
        for command in commands:
            short = " ".join(word for word in command if word not in QUICK)
            run.factory(*command, label=f"{name}: {short}", expect=None)
            shutil.rmtree("out", ignore_errors=True)
            if command[0] == "rebuild":
                run.keep(f"{name}: rebuilt", sums("run"))
        shutil.rmtree("run")


@case("keep/damaged-then-synth")
def made_again(run: "Run") -> None:
    """The same command again makes what is missing, or refuses."""
    synth(run, "whole", **RUN)
    for name in ("tar missing", "done missing", "manifest missing", "plan altered", "plan missing", "foreign files",
                 "teacher missing", "orphans", "quarantine", "done flipped", "table missing"):  # fmt: skip
        shutil.copytree("whole", "run")
        DAMAGE[name]()
        run.factory("run", "synth", "-o", "run", *sets(KEYS, RUN), label=f"{name}: synth", expect=None)
        run.factory("verify", "run", label=f"{name}: verify", expect=None)
        run.keep(f"{name}: files", sums("run"))
        shutil.rmtree("run")


# ------------------------------------------------------------------------------------------------- both stages, recipes

RECIPE = """
extends: demo
name: mine
description: the demo, shorter
synth:
  shards: 1
  groups_per_shard: 1
"""


@case("both/rounds")
def rounds(run: "Run") -> None:
    given = SMALL | SD | {"group": 12}
    options = [*sets(KEYS, given, "synth."), *sets(DISTILL_KEYS, SHORT | {"device": "cpu"}, "distill.")]
    run.factory(
        "run", "rounds", "-o", "out", "--rounds", "2", "--test-data", "frozen/labeled", *options, label="rounds"
    )
    run.files("out")
    run.factory("run", "rounds", "-o", "out", "--rounds", "3", "--dry-run", *options, label="dry run")


@case("both/demo")
def demo(run: "Run") -> None:
    options = [*sets(KEYS, SMALL | {"shards": 1}, "synth."), *sets(DISTILL_KEYS, {"epochs": 2}, "distill.")]
    run.factory("demo", "-o", "out", *options, label="demo")
    run.files("out")


@case("both/layers")
def layers(run: "Run") -> None:
    """File under environment under --set under flag; extends; the manifest's own recipe."""
    Path("mine.yaml").write_text(RECIPE)
    options = sets(KEYS, {**SMALL, **SD, "shards": 1})
    run.factory("run", "synth", "-c", "mine.yaml", *options, "--seed", "3", "-o", "run", label="synth")
    run.files("run")
    run.factory(
        "run", "distill", "-m", "run/m.parquet", "--epochs", "1", "--batch-size", "4", label="distill", expect=None
    )
    run.files("runs")
    dry = ("run", "distill", "-m", "run/m.parquet", "--dry-run")
    for more in ((), ("--json",), ("--student", "resnet8", "--student", "timm:resnet18"), ("-c", "mine.yaml")):
        run.factory(*dry, *more, label=f"dry {' '.join(more)}", expect=None)


EMBEDDED = ("--prior", "embedded:strokes32", "--teacher", "embedded:digits")
EMBEDDABLE = {"variant": "null", "prior_dtype": "fp32", "decoder": "full", "tiny_decoder": "null"}


@case("recipes")
def recipes(run: "Run") -> None:
    """Every packaged recipe: its text, resolved, and what each stage would do with it."""
    run.factory("recipes", label="list")
    names = run.factory("recipes", "--json", label="list json")["out"]
    for name in names:
        run.factory("recipes", name, label=f"{name}: text")
        run.factory("recipes", name, "--json", label=f"{name}: resolved")
        dry = ("run", "synth", "-c", name, "--dry-run", "-o", "out")
        run.factory(*dry, label=f"{name}: as it is", expect=None)
        embedded = (*dry, *EMBEDDED, *sets(KEYS, EMBEDDABLE))
        run.factory(*embedded, label=f"{name}: embedded", expect=None)
        rounds = ("run", "rounds", "-c", name, "--dry-run", "-o", "out")
        run.factory(*rounds, label=f"{name}: rounds", expect=None)
        trained = ("run", "distill", "-c", name, "-m", DATA, "-o", "out", "--dry-run")
        run.factory(*trained, label=f"{name}: distill", expect=None)
        if name == "demo":
            run.factory(*embedded, "--json", label=f"{name}: embedded json")
            run.factory(*trained, "--json", label=f"{name}: distill json")


@case("dry-runs")
def dry_runs(run: "Run") -> None:
    """Counted cost of each method, decoder and kind of prior."""
    for name, given in {
        "dmkd": {"method": "dmkd"}, "noise": {"method": "noise"}, "fitted": {"decoder": "fitted"},
        "xt": {"gradient_at": "xt"},
        "cmi": {"method": "cmi"}, "deepinversion": {"method": "deepinversion"}, "dda": {"method": "dda"},
        "cfg": {"cfg": 3, "cfg_interval": "[0.2, 0.5]"}, "updates": {"updates": 2, "every": 2}, "own": own("network"),
        "tiny": {"decoder": "tiny", "tiny_decoder": "frozen/taesd"} | SD, "unclip": prior("unclip", method="dda"),
        "sdxl": prior("sdxl"), "if": prior("if"), "ldm": prior("ldm"),
        "black box": own("opinions") | {"method": "dmkd"},
        "adversary": {"g_adv": 1, "adversary__name": "frozen/student"},
    }.items():  # fmt: skip
        options = sets(KEYS, (INVERT if given.get("method") in ("cmi", "dda", "deepinversion") else SMALL) | given)
        run.factory("run", "synth", "--dry-run", "-o", "out", *options, "--json", label=name)
    cached = {"cache": True, "num_views": 2, "cutmix": 0, "mixup": 0}
    several = {"students": "[resnet8, wrn-16-1]"}
    for name, given in {"plain": {}, "cam": {"cam": 1, "gradcam": 1}, "cache": cached, "several": several}.items():
        options = sets(DISTILL_KEYS, SHORT | given)
        run.factory("run", "distill", "-m", DATA, "-o", "out", "--dry-run", *options, label=f"distill {name}")


# --------------------------------------------------------------------------------------------------- the command line


@case("cli/surface")
def surface(run: "Run") -> None:
    """Commands and options, from the application itself and from each --help."""
    import typer
    from golden import APP

    def visit(command: Any, path: tuple[str, ...]) -> None:
        options = {}
        for param in command.params:
            facts = {
                name: getattr(param, name, None) for name in ("required", "multiple", "is_flag", "envvar", "metavar")
            }
            options[" ".join((*param.opts, *param.secondary_opts))] = facts | {"default": repr(param.default)}
        run.keep(f"factory {' '.join(path)}".strip(), options)
        run.factory(*path, "--help", label=f"{' '.join(path)} --help".strip())
        for name, child in sorted(getattr(command, "commands", {}).items()):
            visit(child, (*path, name))

    visit(typer.main.get_command(getattr(importlib.import_module(APP[0]), APP[1])), ())


FILES = {
    "notes.txt": "not a manifest\n",
    "image/0/a.png": "no image",
    "model/config.json": "{}",
    "alias.yaml": "synth: &x {seed: 1}\ndistill: *x\n",
    "base.yaml": "extends: nothing.yaml\n",
    "circle.yaml": "extends: circle.yaml\n",
    "date.yaml": "a: 2020-13-45\n",
    "latin.yaml": "name: caf\u00e9\n",
    "list.yaml": "- a\n- b\n",
    "nan.yaml": "distill:\n  epochs: .nan\n",
    "section.yaml": "sinth: {}\n",
    "tabs.yaml": "synth:\n\tseed: 1\n",
    "teacher.yaml": "name: resnet20\nweights: nowhere.safetensors\n",
    "twice.yaml": "a: 1\na: 2\n",
    "type.yaml": "synth:\n  seed: one\n",
    "unknown.yaml": "synth:\n  sede: 1\n",
}
COMMON = """
nonsense
run
run nonsense
--nonsense
--version
recipes nothing
recipes demoo
status
status . --interval 0
status .
status absent
status notes.txt
gc .
gc absent
gc notes.txt
verify .
verify absent
verify notes.txt
rebuild .
rebuild absent
rebuild notes.txt
inspect notes.txt
inspect .
inspect DATA --columns 0
inspect DATA --where 'nothing > 1'
inspect DATA --sheet notes.txt/s.png
eval frozen/student
eval frozen/nothing frozen/labeled
eval frozen/student image
eval frozen/student absent
eval model frozen/labeled
eval frozen/student frozen/labeled --device tpu
export frozen/student
export model --onnx x.onnx
rescore notes.txt
rescore notes.txt --threshold 0.1
rescore absent.parquet --threshold 0.1
run rounds
run rounds -o notes.txt
run rounds -o out --set synth.method=dmkd
run rounds -o out --rounds 0
run rounds -o memory://x/y
demo --workers 0
demo --out memory://x/demo
demo --out notes.txt
demo --set seed=1
"""
SYNTH = """
--nonsense
--shards many
--shards 0
--workers 0 SMALL
-c nonsense
-c dem
-c absent.yaml
--set nonsense
--set =1
--dry-run --set synth.seed=1
--set seed.more=1
--set prior.stpes=1
--set nothing.at.all=1
seed=x
seed=-1
seed=9223372036854775808
cfg=inf
cfg_interval='[0.5, 0.2]'
steps=0
steps=2000
template='{nothing}'
template='{subject'
subjects='[]'
gradient_at=xt updates=2
tiny_decoder=x
decoder=large
step_size=-1
jitter=0.5
g_adv=1
--adversary frozen/student
--adversary frozen/student --method dmkd g_adv=1
steps=2 intermediates=5
steps=2 interval='[0.6, 0.9]'
interval='[0.6, 0.6]'
--method dmkd mix_every=2
mix_every=50
mix=nothing
--method nothing
--method cmi intermediates=1
--method cmi cmi_batches=40
--method dda space=contrastive cmi_cr=0
--method dda steps=4 strength=0.01
--method dda steps=4 strength=0.5 dda_guided=true interval='[0, 0.2]'
group=1
side=5000
format=gif
labels='{a: 1}' labels_by_index=true
SMALL --device tpu
SMALL --gpus-per-worker 1
SMALL --memory-per-worker 1
SMALL --workers 2 --gpus-per-worker 0.00001
--prior ./nowhere
--prior nobody/nothing
--prior model
--prior notes.txt
--prior embedded:nothing
--prior frozen/dit
--prior frozen/taesd
--prior frozen/ldm cfg=5
--prior frozen/ldm decoder=tiny
--prior frozen/dit labels_by_index=true
--prior frozen/dit 'labels={zero: 9}'
SMALL --prior frozen/sd-flow scheduler=ddim
--teacher ./nowhere
--teacher model
--teacher resnet20
--teacher resnet21
--teacher embedded:nothing
--teacher teacher.yaml
--teacher golden_nets:nothing
--teacher nobody:nothing
--teacher hf:nobody/nothing
--teacher timm:nothing
SMALL --out notes.txt
SMALL --out notes.txt/run
SMALL --out image
SMALL --out data
"""
DISTILLED = """
--where 'colour == 3'
--where 'label =='
--where 'label == 77'
--where "__import__('os')"
--student resnet9
--student nobody:nothing
--student resnet8 --student resnet8
--epochs 0
--batch-size 1
kd=0
cutmix=0.7 mixup=0.7
cache=true
cache=true cutmix=0 mixup=0
cache=true cutmix=0 mixup=0 num_views=2 cam=1
select=best held_out=0
variants_ce=1 kd=0
optimizer=lion
schedule=linear
temperature=0
held_out=0.99
dtype=fp16
--test-data absent
--test-data image
--test-data notes.txt
--teacher frozen/nothing
--teacher frozen/student
--set nothing=1
--device tpu
gradcam=1 student_layers='[nothing]'
-m missing/m.parquet
-m frozen/data@x
-o notes.txt
-o data
-m frozen/dda/m.parquet@-1
"""
SCHEDULERS = [
    "heun",
    "pndm",
    "kdpm2",
    "dpmsolver-singlestep",
    "unipc",
    "lms",
    "deis",
    "lcm",
    "tcd",
    "euler-a",
    "nothing",
]


def wrong_calls() -> dict[str, list[str]]:
    """Calls that are refused, or nearly. ``name=value`` is a setting by its name in the tables, DATA a manifest."""
    synths = [*SYNTH.strip().splitlines(), *(f"-c {name}" for name in FILES if name.endswith(".yaml"))]
    lines = [(line, KEYS, []) for line in ["", *COMMON.strip().splitlines()]]
    lines += [(f"run synth {line}", KEYS, []) for line in (*synths, *(f"scheduler={name}" for name in SCHEDULERS))]
    lines += [("run distill", {}, []), ("run distill -m notes.txt", {}, []), ("run distill -m absent.parquet", {}, [])]
    lines += [
        (f"run distill {line}", DISTILL_KEYS, ["-o", "out", "-m", DATA]) for line in DISTILLED.strip().splitlines()
    ]
    found = {}
    for line, table, after in lines:
        words = []
        for word in shlex.split(line):
            name, equals, value = word.partition("=")
            if equals and name in table and words[-1:] != ["--set"]:
                words += sets(table, {name: value})
            else:
                words += sets(KEYS, SMALL | SD) if word == "SMALL" else [word.replace("DATA", DATA)]
        found[line] = [*words[:2], *after, *words[2:]]
    return found


@case("cli/wrong-calls")
def wrong(run: "Run") -> None:
    """Exit codes and lines; what is left behind."""
    for name, text in FILES.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text, encoding="latin-1")
    shutil.copytree("frozen/data", "data")
    before = set(Path().rglob("*"))
    for line, call in wrong_calls().items():
        run.factory(*call, label=f"factory {line}", expect=None)
        left = {path for path in Path().rglob("*") if path.parts[0] not in ("home", "cache")} - before
        if left:
            run.keep(f"left by factory {line}", sorted(path.as_posix() for path in left)[:20])
        for path in sorted(left, reverse=True):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@case("cli/environment")
def environment(run: "Run") -> None:
    """Settings from the environment."""
    key = "FACTORY_SYNTH__" + KEYS["steps"].upper().replace(".", "__")
    for name, value in ((key, "7"), (key, "many"), ("FACTORY_NOTHING__SEED", "1"), ("FACTORY_WORKERS", "0")):
        os.environ[name] = value
        run.factory(
            "run",
            "synth",
            "--dry-run",
            "-o",
            "out",
            *sets(KEYS, {"device": "cpu"}),
            label=f"{name}={value}",
            expect=None,
        )
        del os.environ[name]


assert len(CASES) > 100
