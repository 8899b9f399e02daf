"""``factory doctor``: whether this machine, a place for results, and a recipe's models will do, each thing tried.

What it prints can be pasted into an issue: no host names, no user names, no addresses of stores, no secrets.
"""

import getpass
import os
import platform
import re
import socket
import sys
import tempfile
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from manifests.errors import FactoryError, one_line
from manifests.storage import PATIENCE, Storage
from pipeline.recipe import Recipe
from pipeline.terminal import plain, size

State = Literal["ok", "warn", "fail"]
EXTRAS = ("timm", "onnxruntime", "s3fs", "xformers", "tensorboard", "wandb")
HUB_SECONDS, STORE_SECONDS = 5.0, 15.0
PROBES = 32
"""Images of the prior that the teacher is shown."""
MAX_FLOP = 5e12
"""Of drawing these on a CPU: a minute or so; more is left to a GPU."""
GB = 1e9


@dataclass(frozen=True)
class Check:
    """What was looked at, how it is, and what to do about it."""

    name: str
    state: State
    found: str
    todo: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All checks. ``ok``: nothing failed."""

    checks: list[Check]

    @property
    def ok(self) -> bool:
        return all(check.state != "fail" for check in self.checks)

    def lines(self) -> Iterator[str]:
        for check in self.checks:
            yield f"{check.state:<5}{check.name:<11}{plain(check.found)}"
            if check.todo:
                yield f"{'':<16}→ {plain(check.todo)}"

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, "checks": [asdict(check) for check in self.checks]}


def diagnose(out: str, recipe: Recipe | None = None) -> Diagnosis:
    """Look at everything; ``out`` is where results would go, ``recipe`` what would run."""
    looks: list[tuple[str, Callable[[], Check]]] = [
        ("python", _python),
        ("torch", _torch),
        ("gpu", _gpu),
        ("memory", _memory),
        ("attention", _attention),
        ("ray", _ray),
        ("extras", _extras),
        ("store", lambda: _store(out)),
        ("hub", _hub),
    ]
    if recipe:
        looks += [("prior", lambda: _prior(recipe)), ("teacher", lambda: _teacher(recipe))]
    checks = []
    for name, look in looks:
        try:
            check = look()
        except FactoryError as error:
            check = Check(name, "fail", str(error))
        except Exception as error:  # a broken installation fails in its own ways, which is what is looked for
            check = Check(name, "fail", f"{type(error).__name__}: {one_line(error)}", "reinstall it, see README")
        checks.append(Check(check.name, check.state, _anonymous(check.found), _anonymous(check.todo)))
    return Diagnosis(checks)


def _anonymous(text: str) -> str:
    """``text`` without what says whose machine this is."""
    names = [(os.path.expanduser("~"), "~"), (socket.gethostname(), "HOST")]
    with suppress(KeyError, OSError):  # a container without a user
        names.append((getpass.getuser(), "USER"))
    for name, shown in names:
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", shown, text)
    return text


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _python() -> Check:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}, factory "
    found += f"{_version('dfkd-factory') or 'from a clone'}"
    good = sys.version_info >= (3, 11)
    return Check("python", "ok" if good else "fail", found, "" if good else "Python 3.11 or later is needed")


def _torch() -> Check:
    import torch

    torch.ones(8, 8) @ torch.ones(8, 8)
    packages = ("torchvision", "diffusers", "transformers")
    others = ", ".join(f"{name} {_version(name) or 'missing'}" for name in packages)
    bad = [name for name in packages if not _version(name)]
    return Check(
        "torch",
        "fail" if bad else "ok",
        f"{torch.__version__}, {torch.get_num_threads()} of {os.cpu_count()} threads, {others}",
        f"pip install {' '.join(bad)}" if bad else "",
    )


def _gpu() -> Check:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda or getattr(torch.version, "hip", None)
        why = "none seen by torch" if built else "none: this torch is built for CPUs"
        small = "the demo and priors/natural32 need none; Stable Diffusion wants one"
        return Check("gpu", "warn", why, small)
    cards = []
    for at in range(torch.cuda.device_count()):
        (torch.ones(64, 64, device=f"cuda:{at}") @ torch.ones(64, 64, device=f"cuda:{at}")).sum().item()
        free, total = torch.cuda.mem_get_info(at)
        cards.append(f"{torch.cuda.get_device_name(at)}, {size(free)} of {size(total)} free")
    return Check("gpu", "ok", f"{'; '.join(cards)}; CUDA {torch.version.cuda}")


def _memory() -> Check:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError):  # Linux alone says how much of it may be used
        kilobytes = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
        if kilobytes and (free := int(kilobytes[1]) * 1024) < 3 * GB:
            todo = "small groups and batches: --set synth.group_size=50 --set distill.memory_gb=1"
            return Check("memory", "warn", f"{size(free)} of {size(total)} free", todo)
        if kilobytes:
            return Check("memory", "ok", f"{size(free)} of {size(total)} free")
    return Check("memory", "ok", f"{size(total)}")


def _attention() -> Check:
    """Every backend on a small batch, where the prior would run."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from stages.synth.priors.diffusion import xformers_works

    device = "cuda" if torch.cuda.is_available() else "cpu"
    q = torch.ones(1, 2, 16, 64, device=device, dtype=torch.float16 if device == "cuda" else torch.float32)
    works = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        try:
            with sdpa_kernel(backend):
                torch.nn.functional.scaled_dot_product_attention(q, q, q)
            works.append(backend.name.split("_")[0].lower())
        except RuntimeError:
            continue
    torch.nn.functional.scaled_dot_product_attention(q, q, q)
    fast = f"sdpa ({', '.join([*works, 'math'])})"
    if not _version("xformers"):
        return Check("attention", "ok", f"{fast} on {device}")
    why = xformers_works(device)
    found = f"{fast} on {device}; xformers {'works' if why is None else f'does not work: {why}'}"
    todo = "nothing is lost: sdpa is used; pip uninstall xformers, or one built for this torch" if why else ""
    return Check("attention", "warn" if why else "ok", found, todo)


def _ray() -> Check:
    import ray

    shared = Path("/dev/shm")
    free = os.statvfs(shared).f_bavail * os.statvfs(shared).f_frsize if shared.is_dir() else None
    found = f"{ray.__version__}" + (f", {size(free)} of shared memory" if free is not None else "")
    if free is not None and free < GB:
        return Check("ray", "warn", found, "several workers: run the container with --shm-size=2g or more")
    return Check("ray", "ok", found)


def _extras() -> Check:
    there = [f"{name} {version}" for name in EXTRAS if (version := _version(name))]
    missing = [name for name in EXTRAS if not _version(name)]
    found = ", ".join(there) or "none"
    return Check("extras", "ok", found + (f"; not installed: {', '.join(missing)}" if missing else ""))


def _store(out: str) -> Check:
    """Free space, and that a file is written once however many try: what resuming relies on."""
    from manifests.storage import check_url

    is_local = "://" not in check_url(out)
    place = Path(out).absolute()
    while is_local and not place.exists():
        place = place.parent
    where = "folder" if is_local else f"{out.partition('://')[0]} store"
    patience, PATIENCE.stall_seconds = PATIENCE.stall_seconds, min(STORE_SECONDS, PATIENCE.stall_seconds)
    try:
        with (
            tempfile.TemporaryDirectory(prefix=".factory-doctor-", dir=place) if is_local else nullcontext(out) as root
        ):
            storage, name = Storage(root), f".factory-doctor-{uuid.uuid4().hex}"
            try:
                once = storage.create(name, b"1") and not storage.create(name, b"2")
                whole = storage.read(name) == b"1"
            finally:
                storage.delete(name)
    except OSError as error:
        return Check("store", "fail", f"{where}: {error.strerror}", "an --out that can be written")
    except FactoryError as error:
        text = str(error).replace(out, f"the {where}")
        return Check("store", "fail", text, "an --out that can be written, and the extra s3 for s3://")
    finally:
        PATIENCE.stall_seconds = patience
    if not (once and whole):
        return Check(
            "store", "fail", f"{where}: a file was created twice", "another --out: two drivers would not see each other"
        )
    if not is_local:
        return Check("store", "ok", f"{where}: writes, reads, creates only what is absent")
    with tempfile.TemporaryFile(dir=place) as file:
        os.fsync(file.fileno())
    free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
    found = f"{where}: writes, syncs, creates only what is absent; {size(free)} free"
    if free < 2 * GB:
        return Check("store", "warn", found, "room, or another --out; --dry-run says how much a run takes")
    return Check("store", "ok", found)


def _hub() -> Check:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return Check("hub", "warn", "offline by HF_HUB_OFFLINE", "what a recipe needs from it must be in its cache")
    try:
        request = urllib.request.Request(f"{constants.ENDPOINT}/api/models?limit=1")
        with urllib.request.urlopen(request, timeout=HUB_SECONDS) as answer:
            return Check("hub", "ok", f"answers ({answer.status})")
    except (OSError, ValueError) as error:
        local = "embedded priors, priors/natural32 and local folders need no hub"
        reason = type(getattr(error, "reason", error)).__name__
        return Check("hub", "warn", f"not reached within {HUB_SECONDS:.0f} s ({reason})", local)


def _prior(recipe: Recipe) -> Check:
    from stages.synth.priors.files import locate_prior

    if not recipe.synth.needs_prior:
        return Check("prior", "ok", f"method {recipe.synth.method} needs none")
    identity = locate_prior(recipe.synth.prior).identity
    return Check("prior", "ok", f"{identity['pipeline']}, draws {identity['image_size']} px")


def _teacher(recipe: Recipe) -> Check:
    """It loads and answers, and what it makes of a few images of the prior."""
    from stages.models.loading import load_teacher
    from stages.models.teacher import BlackBox

    teacher = load_teacher(recipe.synth.teacher)
    found = f"{teacher.identity['architecture']}, {teacher.num_classes} classes, {teacher.input.size} px; "
    if isinstance(teacher, BlackBox):
        return Check("teacher", "ok", f"{found}a black box: it selects images, and cannot guide")
    why = _too_much(recipe)
    if why or not teacher.has_batchnorm:
        missing = why or "no BatchNorm, whose statistics would tell wrong normalization"
        look = "factory eval RECIPE DATA on a few labeled images is the check that says most"
        return Check("teacher", "ok", f"{found}not shown any image: {missing}", look)
    return _verdict(found, *_shown(recipe, teacher))


def _too_much(recipe: Recipe) -> str | None:
    """Why the prior is not asked for a few images, None where it is."""
    import torch

    from stages.cost import synth_cost
    from stages.synth.inputs import inspect_inputs

    if not recipe.synth.needs_prior or recipe.synth.method == "dda":
        return f"method {recipe.synth.method}"
    probe = _probe(recipe)
    flop = synth_cost(probe.synth, inspect_inputs(probe.synth).sources).flop
    return None if flop < MAX_FLOP or torch.cuda.is_available() else "the prior is slow without a GPU"


def _probe(recipe: Recipe) -> Recipe:
    """A few unguided images of the recipe's prior."""
    unguided = ("method=dmkd", "guidance.adversarial=0", "adversary=null", "lca.every=0", "images.intermediates=0")
    few = ("shards=1", "groups_per_shard=1", f"group_size={PROBES}", "min_confidence=0", "store_logits=false")
    return recipe.changed(*(f"synth.{setting}" for setting in (*unguided, *few)))


def _shown(recipe: Recipe, teacher: Any) -> tuple[float, float]:
    """The teacher's mean confidence in images of the prior, and their BatchNorm gap."""
    from manifests.reader import Manifest
    from pipeline.synth import run_synth
    from stages.synth.metrics import measure

    with tempfile.TemporaryDirectory() as folder:
        made = run_synth(_probe(recipe), f"{folder}/run", title="teacher check", quiet=True)
        images = Manifest.open(made.manifest).where(include_rejected=True)
        confidence = [float(value) for value in images.column("confidence") if value is not None]
        gap = measure(images, teacher, PROBES)["bn_gap"]
    return sum(confidence) / max(1, len(confidence)), gap


def _verdict(found: str, confidence: float, gap: float) -> Check:
    from stages.distill.teacher_check import LARGE_GAP

    found += f"{PROBES} unguided images: mean confidence {confidence:.0%}, BatchNorm gap {gap:.2f}"
    if gap >= LARGE_GAP:
        todo = "wrong weights or normalization, or a prior that draws something else: factory eval RECIPE DATA"
        return Check("teacher", "warn", f"{found} ({LARGE_GAP:g} or more)", todo)
    return Check("teacher", "ok", found)
