"""The cases of ``benchmarks/golden.py``. Every name of a setting that they use stands in ``KEYS`` and ``VALUES``."""

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import golden_models as models
import pyarrow.parquet as pq
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

if TYPE_CHECKING:
    from golden import Run

# What a setting is called today; the cases know the left side alone. Rename on the right.
KEYS = {
    "prior": "prior.path", "variant": "prior.variant", "scheduler": "prior.scheduler", "steps": "prior.steps",
    "cfg": "prior.cfg_scale", "cfg_interval": "prior.cfg_interval", "negative_prompt": "prior.negative_prompt",
    "labels": "prior.labels",
    "labels_by_index": "prior.labels_by_index", "prior_dtype": "prior.dtype", "vae_slicing": "prior.vae_slicing",
    "attention": "prior.attention",
    "teacher": "teacher", "adversary": "adversary", "template": "prompts.template", "subjects": "prompts.subjects",
    "styles": "prompts.styles", "class_prompts": "prompts.class_names",
    "gradient_at": "guidance.gradient_at", "step_size": "guidance.step_size", "normalize": "guidance.normalize",
    "g_ce": "guidance.ce", "g_bn": "guidance.bn", "g_adv": "guidance.adversarial",
    "consistency": "guidance.consistency",
    "interval": "guidance.interval", "every": "guidance.every", "updates": "guidance.updates_per_step",
    "jitter": "guidance.jitter",
    "decoder": "guidance.decoder", "tiny_decoder": "guidance.tiny_decoder",
    "mix": "lca.kind", "mix_every": "lca.every", "mix_interval": "lca.interval", "mix_share": "lca.probability",
    "mix_alpha": "lca.alpha",
    "intermediates": "images.intermediates", "format": "images.format", "side": "images.size",
    "variants": "dda.variants", "strength": "dda.strength", "noise_level": "dda.noise_level",
    "cosine": "dda.min_cosine",
    "space": "dda.space", "dda_guided": "dda.guided",
    "cmi_batches": "cmi.batches", "cmi_steps": "cmi.steps", "cmi_latent": "cmi.latent", "cmi_width": "cmi.width",
    "cmi_cr": "cmi.cr", "cmi_flip": "cmi.flip", "cmi_jitter": "cmi.jitter",
    "di_steps": "deepinversion.steps", "di_flip": "deepinversion.flip", "di_jitter": "deepinversion.jitter",
    "method": "method", "shards": "shards", "groups": "groups_per_shard", "group": "group_size", "seed": "seed",
    "device": "device", "threads": "threads", "min_confidence": "min_confidence", "logits": "store_logits",
}  # fmt: skip
DISTILL_KEYS = {
    "students": "students", "kd": "loss.kd", "temperature": "loss.temperature", "ce": "loss.ce",
    "variants_ce": "loss.variants_ce",
    "cam": "loss.cam", "gradcam": "loss.gradcam", "teacher_layers": "loss.teacher_layers",
    "student_layers": "loss.student_layers",
    "optimizer": "optimizer.name", "lr": "optimizer.lr", "momentum": "optimizer.momentum",
    "weight_decay": "optimizer.weight_decay", "schedule": "optimizer.schedule", "warmup": "optimizer.warmup",
    "milestones": "optimizer.milestones", "gamma": "optimizer.gamma", "clip": "optimizer.clip", "ema": "optimizer.ema",
    "crop": "augment.crop", "flip": "augment.flip", "cutmix": "augment.cutmix", "mixup": "augment.mixup",
    "num_views": "augment.num_views", "cache": "teacher_cache.enabled", "top_k": "teacher_cache.top_k",
    "input": "input", "where": "where", "kept": "include_rejected", "skip_bad": "skip_bad", "balance": "balance",
    "epochs": "epochs", "batch": "batch_size", "seed": "seed", "held_out": "val_fraction", "select": "select",
    "other_teacher": "allow_other_teacher", "eval_every": "eval_every", "device": "device", "dtype": "dtype",
    "channels_last": "channels_last", "memory_gb": "memory_gb", "checkpoint_seconds": "checkpoint_seconds",
}  # fmt: skip
VALUES = {"x0": "x0", "xt": "xt", "kept_only": "false", "all_rows": "true"}

CASES: dict[str, Callable[["Run"], None]] = {}
SLOW: set[str] = set()
STUDENTS = (
    "digits-cnn", "digits-cnn-small", "resnet8", "resnet8-gn", "resnet20", "resnet32", "resnet44", "resnet56",
    "resnet18", "resnet34", "vgg11", "wrn-16-1", "wrn-16-2", "wrn-40-1", "wrn-40-2", "mobilenetv2", "shufflenetv2",
)  # fmt: skip


def case(name: str, slow: bool = False) -> Callable[[Callable[["Run"], None]], Callable[["Run"], None]]:
    """Add a case; ``slow``: only with ``--slow`` or by name."""

    def add(function: Callable[["Run"], None]) -> Callable[["Run"], None]:
        assert name not in CASES, name
        CASES[name] = function
        if slow:
            SLOW.add(name)
        return function

    return add


def sets(keys: dict[str, str], given: dict[str, Any], prefix: str = "") -> list[str]:
    """``--set`` options of settings by the names in ``keys``."""
    found = []
    for name, value in given.items():
        text = str(value).lower() if isinstance(value, bool) else VALUES.get(str(value), str(value))
        key, dot, rest = name.partition("__")  # teacher__num_classes: a key below one that is in the table
        found += ["--set", f"{prefix}{keys[key]}{'.' if dot else ''}{rest}={text}"]
    return found


# ---------------------------------------------------------------------------------------------------------- stage 1

SMALL = {"shards": 2, "groups": 2, "group": 6, "steps": 4, "device": "cpu", "decoder": "full", "g_bn": 2}
CMI = {"cmi_batches": 2, "cmi_steps": 4, "cmi_latent": 16, "cmi_width": 8}
INVERT = {"shards": 1, "groups": 1, "group": 6, "device": "cpu"}
OWN = {"num_classes": 5, "input": "{size: 8, channels: 3, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.4]}"}


def own(function: str, who: str = "teacher") -> dict[str, Any]:
    """Settings of a teacher in the user's own code."""
    return {f"{who}__name": f"golden_nets:{function}"} | {f"{who}__{key}": value for key, value in OWN.items()}


def synth(run: "Run", out: str = "run", *more: str, expect: int | None = 0, **given: Any) -> dict[str, Any]:
    """``factory run synth`` of the default recipe with ``given`` settings; its answer and its folder are recorded."""
    answer = run.factory("run", "synth", "-o", out, *sets(KEYS, given), *more, label=f"synth {out}", expect=expect)
    if (run.folder / out).exists():
        run.files(out)
    return answer


def small(**given: Any) -> Callable[["Run"], None]:
    """A case of one small run of the embedded prior, or of another."""
    return lambda run: synth(run, **SMALL | given)


def prior(name: str, **given: Any) -> dict[str, Any]:
    return {"prior": f"frozen/{name}"} | given


DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LABELS = "{" + ", ".join(f"{name}: {i % 5}" for i, name in enumerate(DIGITS)) + "}"
PRIORS: dict[str, dict[str, Any]] = {
    "sd": prior("sd", cfg=2), "sd-v": prior("sd-v"), "sd-x0": prior("sd-x0"), "sd-dc": prior("sd-dc"),
    "sdxl": prior("sdxl", cfg=2), "if": prior("if", cfg=2), "unclip": prior("unclip", cfg=2),
    "dit": prior("dit", cfg=2, labels=LABELS), "ldm": prior("ldm", cfg=1), "ddpm": prior("ddpm", cfg=1),
    "ddpm-gray": prior("ddpm-gray", cfg=1),
}  # fmt: skip
MIXED = {"mix_every": 2, "mix_interval": "[0, 1]"}
SD = prior("sd", cfg=1)
SYNTH: dict[str, dict[str, Any]] = {
    "method/diffdfkd": {"intermediates": 2},
    "method/dmkd": {"method": "dmkd", "min_confidence": 0.2, "intermediates": 1},
    "decoder/full": {}, "decoder/tiny": {"decoder": "tiny", "tiny_decoder": "frozen/taesd", **SD},
    "decoder/tiny-misfit": {"decoder": "tiny", "tiny_decoder": "frozen/taesd-x4", **SD, "shards": 1},
    "decoder/fitted-pixels": {"decoder": "fitted", **PRIORS["ddpm"], "shards": 1},
    "guide/xt": {"gradient_at": "xt", **SD}, "guide/xt-cfg": {"gradient_at": "xt", **PRIORS["sd"], "every": 2},
    "guide/updates": {"updates": 3, **SD}, "guide/raw": {"normalize": "none", **SD},
    "guide/ce-only": {"g_bn": 0, **SD}, "guide/bn-only": {"g_ce": 0, **SD},
    "guide/every": {"every": 2, "interval": "[0.3, 1]", "steps": 7, **SD}, "guide/jitter": {"jitter": 0.2, **SD},
    "guide/consistency": {"consistency": 0.5, **SD}, "guide/off": {"step_size": 0, **SD},
    "guide/strong": {"step_size": 1e30, "normalize": "none", **SD},
    "guide/adversary": {"g_adv": 0.7, "adversary__name": "frozen/student", **SD},
    "guide/adversary-xt": {"g_adv": 0.7, "adversary__name": "frozen/student", **SD, "gradient_at": "xt", "updates": 1},
    "cfg/interval": {"cfg": 3, "cfg_interval": "[0.25, 0.75]"}, "cfg/negative": {"cfg": 3, "negative_prompt": "a wave"},
    "cfg/off": {"cfg": 1},
    "mix/cutmix": {**SD, **MIXED, "group": 20, "groups": 1},
    "mix/cutmix-share": {**SD, **MIXED, "mix_every": 1, "mix_share": 0.5, "mix_alpha": 2, "group": 20, "groups": 1},
    "mix/mixup": {**SD, **MIXED, "mix": "mixup", "group": 20, "groups": 1},
    "mix/traditional": {**SD, **MIXED, "mix": "traditional", "group": 20, "groups": 1},
    "mix/xt": {**SD, **MIXED, "gradient_at": "xt", "group": 20, "groups": 1},
    "images/jpg": {"format": "jpg", "intermediates": 1, "logits": True}, "images/webp": {"format": "webp", "side": 20},
    "images/side": {"side": 48, **SD}, "images/logits": {"logits": True, "min_confidence": 0.3, "intermediates": 3},
    "prompts/classes": {"class_prompts": True, "template": "a {subject}, {style}", "seed": 7},
    "prompts/own": {"subjects": "[cat, dog]", "styles": "[red, blue]", "template": "{subject} {style}", **SD},
    "sizes/seed": {"seed": 123456789012, **SD}, "sizes/uneven": {"group": 13, "groups": 3, "shards": 1, **SD},
    "sizes/bf16": {"prior_dtype": "bf16", **SD}, "sizes/slicing": {"vae_slicing": True, **SD},
    "sizes/threads": {"threads": 2, **SD, "shards": 1, "groups": 1, "group": 2, "steps": 2},
    "sizes/sdpa": {"attention": "sdpa", **SD, "shards": 1},
    "teacher/own-code": {**own("network"), **SD}, "teacher/no-norms": {**own("no_norms"), **SD},
    "teacher/black-box": {**own("opinions"), **SD, "method": "dmkd", "logits": True},
    "teacher/black-box-guides": {**own("opinions"), **SD},
    "teacher/torchvision": {
        "teacher__name": "torchvision:resnet18", "teacher__weights": "frozen/resnet18.safetensors",
        "teacher__num_classes": 10, "teacher__stem": "native", **SD, "shards": 1,
        "teacher__input": "{size: 32, channels: 3, mean: [0.5,0.5,0.5], std: [0.25,0.25,0.25], resize: area}",
    },
    "invert/cmi": {**INVERT, "method": "cmi", **CMI},
    "invert/cmi-options": {
        **INVERT, "method": "cmi", **CMI, "cmi_flip": True, "cmi_jitter": 0.2, "cmi_cr": 0, "shards": 2, "groups": 2,
    },
    "invert/cmi-adversary": {**INVERT, "method": "cmi", **CMI, "g_adv": 0.5, "adversary__name": "frozen/student"},
    "invert/deepinversion": {**INVERT, "method": "deepinversion", "di_steps": 5, "shards": 2},
    "invert/deepinversion-options": {
        **INVERT, "method": "deepinversion", "di_steps": 5, "di_flip": True, "di_jitter": 0.2, "g_adv": 0.5,
        "adversary__name": "frozen/student", "side": 20, "format": "webp",
    },
    "invert/dda": {**INVERT, "method": "dda", **CMI, "steps": 4, "variants": 2, "cosine": 0.2, "cfg": 2},
    "invert/dda-contrastive": {
        **INVERT, "method": "dda", **CMI, **SD, "steps": 4, "space": "contrastive", "cosine": -1,
    },
    "invert/dda-guided": {**INVERT, "method": "dda", **CMI, **SD, "steps": 6, "dda_guided": True, "decoder": "full"},
    "invert/dda-unclip": {**INVERT, "method": "dda", **CMI, **PRIORS["unclip"], "steps": 4, "noise_level": 200},
    "invert/dda-dit": {**INVERT, "method": "dda", **CMI, **PRIORS["dit"], "steps": 4, "strength": 1, "logits": True},
}  # fmt: skip
for _name, _given in SYNTH.items():
    _base = INVERT if _name.startswith("invert/") else SMALL
    CASES[f"synth/{_name}"] = lambda run, given={**_base, **_given}: synth(run, **given)
for _name, _given in PRIORS.items():
    CASES[f"synth/prior/{_name}"] = small(**_given, **MIXED, intermediates=1)
    CASES[f"synth/prior/{_name}-ddpm"] = small(**_given, scheduler="ddpm", shards=1, groups=1, method="dmkd")
for _scheduler in ("ddim", "ddpm", "dpmsolver++", "euler"):
    CASES[f"synth/scheduler/{_scheduler}"] = small(scheduler=_scheduler, steps=6, cfg=1, shards=1, groups=1)
    for _kind in ("sd", "sd-v", "sd-x0"):
        CASES[f"synth/scheduler/{_scheduler}-{_kind}"] = small(
            **PRIORS[_kind], scheduler=_scheduler, steps=6, **MIXED, shards=1, groups=1, group=12, intermediates=1
        )
    CASES[f"synth/scheduler/{_scheduler}-dit"] = small(
        **PRIORS["dit"], scheduler=_scheduler, steps=6, shards=1, groups=1
    )
    CASES[f"synth/scheduler/{_scheduler}-xt"] = small(**SD, scheduler=_scheduler, gradient_at="xt", shards=1, groups=1)
for _scheduler in ("euler", "dpmsolver++"):
    CASES[f"synth/scheduler/{_scheduler}-flow"] = small(**prior("sd-flow", cfg=2), scheduler=_scheduler, **MIXED)


@case("synth/method/noise")
def noise(run: "Run") -> None:
    synth(run, method="noise", shards=2, groups=2, group=10, side=8)


@case("synth/decoder/fitted-embedded")
def fitted(run: "Run") -> None:
    """The fit, what it says of itself, and a second run that finds it in the cache."""
    synth(run, **SMALL | {"decoder": "fitted", "shards": 1})
    run.files("cache")
    synth(run, "again", **SMALL | {"decoder": "fitted", "shards": 1})


@case("synth/micro-batches")
def micro_batches(run: "Run") -> None:
    """Groups that do not fit the memory: no more than three latents are decoded at once, with and without gradients."""
    decode = diffusers.AutoencoderKL.decode

    def scarce(self: Any, z: torch.Tensor, *more: Any, **options: Any) -> Any:
        if len(z) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return decode(self, z, *more, **options)

    diffusers.AutoencoderKL.decode = scarce
    for name, more in (("x0", {}), ("xt", {"gradient_at": "xt"})):
        synth(run, name, **SMALL | PRIORS["sd"] | MIXED | more, intermediates=1)
    synth(run, "dda", **INVERT | CMI | SD | {"steps": 4, "method": "dda", "dda_guided": True, "decoder": "full"})


@case("synth/resume")
def resume(run: "Run") -> None:
    """Interrupted, gone on with, grown: the bytes of a run that was never stopped; another plan is refused."""
    decode, calls = diffusers.AutoencoderKL.decode, iter(range(1, 10**9))

    def interrupting(self: Any, *more: Any, **options: Any) -> Any:
        if next(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return decode(self, *more, **options)

    given = SMALL | SD | {"intermediates": 1, "step_size": 0.3}
    diffusers.AutoencoderKL.decode = interrupting
    run.factory("run", "synth", "-o", "run", *sets(KEYS, given), label="interrupted", expect=130)
    run.factory("status", "run", label="status")
    run.factory("status", "run", "--json", label="status json")
    synth(run, **given)
    synth(run, **given | {"shards": 3})
    run.factory("run", "synth", "-o", "run", *sets(KEYS, given | {"shards": 1}), label="fewer", expect=2)
    run.factory("run", "synth", "-o", "run", *sets(KEYS, given | {"step_size": 0.2}), label="other plan", expect=3)
    run.factory("run", "synth", "-o", "run", "-c", "run/resolved.yaml", label="its own settings")
    run.factory("run", "synth", "-o", "run", "-c", "run/resolved.yaml", "--dry-run", label="dry run")


@case("synth/ray", slow=True)
def ray_synth(run: "Run") -> None:
    """Two actors, the same bytes."""
    synth(run, "run", "--workers", "2", **SMALL | SD)


# ---------------------------------------------------------------------------------------------------------- stage 2

FROZEN_SYNTH = SMALL | {"group": 12, "intermediates": 1, "min_confidence": 0.1, **MIXED, "logits": True}
SHORT = {"epochs": 2, "batch": 16, "held_out": 0.2, "lr": 0.05, "device": "cpu"}
PLAIN = {"cutmix": 0, "mixup": 0}
DATA = "frozen/data/m.parquet"
INFO, INFO_SHA256 = b"factory.info", b"factory.info_sha256"


def build_frozen(run: "Run") -> None:
    """Models, datasets, a student and labeled images, in the current folder. Manifests lose their recipe."""
    here = Path()
    models.save_priors(here)
    models.save_torchvision_weights(here / "resnet18.safetensors")
    models.save_labeled_images(here / "labeled")
    (here / "golden_nets.py").write_text(models.OWN_CODE)
    synth(run, "data", **FROZEN_SYNTH)
    synth(run, "other", **FROZEN_SYNTH | {"seed": 5, "shards": 1, "format": "jpg", "method": "dmkd", "mix_every": 0})
    synth(run, "dda", **INVERT | CMI | {"method": "dda", "steps": 4, "group": 20, "groups": 2, "cosine": -1})
    for name in ("data", "other", "dda"):
        without_recipe(here / name / "m.parquet")
        for part in ("lease", "tmp", "events.jsonl"):
            shutil.rmtree(here / name / part, ignore_errors=True)
    given = SHORT | {"students": "[digits-cnn-small]", "epochs": 3}
    run.factory("run", "distill", "-m", "data/m.parquet", "-o", "students", *sets(DISTILL_KEYS, given))
    shutil.move("students/digits-cnn-small", "student")
    shutil.rmtree("students")
    shutil.rmtree("cache", ignore_errors=True)


def without_recipe(manifest: Path) -> None:
    """Take the recipe out of a manifest's description: its settings may be called otherwise tomorrow."""
    table = pq.read_table(manifest)
    metadata = dict(table.schema.metadata)
    text = json.dumps(json.loads(metadata[INFO]) | {"recipe": {}}, sort_keys=True, separators=(",", ":")).encode()
    metadata |= {INFO: text, INFO_SHA256: hashlib.sha256(text).hexdigest().encode()}
    pq.write_table(table.replace_schema_metadata(metadata), manifest, write_page_checksum=True)


def distill(run: "Run", out: str = "out", *more: str, data: str = DATA, expect: int | None = 0, **given: Any) -> None:
    """``factory run distill`` on frozen data; its answer and its folder are recorded."""
    options = sets(DISTILL_KEYS, SHORT | given)
    run.factory("run", "distill", "-m", data, "-o", out, *options, *more, label=f"distill {out}", expect=expect)
    run.files(out)


DISTILL: dict[str, dict[str, Any]] = {
    "plain": {}, "kd+ce": {"ce": 0.5, "temperature": 8, **PLAIN}, "no-views": {**PLAIN, "crop": 0},
    "cam+gradcam": {"cam": 1, "gradcam": 1, "ce": 0.5}, "gradcam-layers": {
        "gradcam": 1, "students": "[digits-cnn-small]", "student_layers": "[stage1.0]", "teacher_layers": "[stage1.0]",
    },
    "flip+cutmix+mixup": {"flip": True, "cutmix": 0.5, "mixup": 0.5, "ce": 1},
    "fixed-views": {"num_views": 3, "epochs": 4}, "cache": {"cache": True, "num_views": 2, **PLAIN},
    "cache-top": {"cache": True, "num_views": 2, "top_k": 3, **PLAIN, "ce": 0.2},
    "best": {"select": "best", "epochs": 4}, "bf16": {"dtype": "bf16"}, "channels-last": {"channels_last": True},
    "streamed": {"memory_gb": 0}, "where": {"where": "confidence >= 0.2 and timestep == 0"},
    "rejected-too": {"kept": "all_rows"}, "balance": {"balance": True, "held_out": 0}, "seed": {"seed": 11},
    "adamw": {"optimizer": "adamw", "lr": 0.002, "momentum": 0.8}, "step": {"schedule": "step", "gamma": 0.3},
    "milestones": {"schedule": "step", "milestones": "[0.3, 0.6]", "warmup": 0}, "onecycle": {"schedule": "onecycle"},
    "clip": {"clip": 0.5}, "no-ema": {"ema": 0}, "momentum": {"momentum": 0, "weight_decay": 0, "warmup": 0.3},
    "several": {"students": "[digits-cnn-small, resnet8, resnet8-gn, wrn-16-1]"},
    "diverges": {"students": "[digits-cnn-small]", "lr": 1e30},
    "input": {"input": "{size: 16, channels: 3, mean: [0.5,0.5,0.5], std: [0.5,0.5,0.5]}"},
}  # fmt: skip
for _name, _given in DISTILL.items():
    CASES[f"distill/{_name}"] = lambda run, given=_given: distill(run, expect=int(given.get("lr") == 1e30), **given)


@case("distill/variants")
def variants(run: "Run") -> None:
    """Images made from others (DDA)."""
    distill(run, data="frozen/dda/m.parquet", variants_ce=0.8, ce=0.2)


@case("distill/two-manifests")
def two_manifests(run: "Run") -> None:
    distill(run, "weighted", "-m", "frozen/other/m.parquet@0.5")
    distill(run, "balanced", "-m", "frozen/other/m.parquet@2", balance=True)


@case("distill/every-network")
def every_network(run: "Run") -> None:
    """Every built-in network and one of torchvision: its first weights and a few steps."""
    few = {"epochs": 1, "held_out": 0, "where": "shard == 0 and timestep == 0 and label < 6", "kept": "all_rows"}
    names = [*STUDENTS, "torchvision:mobilenet_v3_small"]
    distill(run, students=f"[{', '.join(names)}]", **few)


@case("distill/test-data")
def test_data(run: "Run") -> None:
    distill(run, "labeled", "--test-data", "frozen/labeled", eval_every=1)
    distill(run, "manifest", "--test-data", "frozen/other/m.parquet")


@case("distill/other-teacher")
def other_teacher(run: "Run") -> None:
    student = ("--teacher", "frozen/student")
    distill(run, "refused", *student, expect=3)
    distill(run, "allowed", *student, other_teacher=True)
    distill(run, "named", "--teacher", "embedded:digits")


@case("distill/resume")
def resume_distill(run: "Run") -> None:
    """Interrupted after a number of steps, and killed: the same weights as unbroken."""
    given = {"students": "[digits-cnn-small, resnet8]", "epochs": 3}
    steps = iter(range(1, 10**9))
    signals = {5: signal.SIGINT, 21: signal.SIGINT}

    def count(*_: Any) -> None:
        if (kind := signals.get(next(steps))) is not None:
            os.kill(os.getpid(), kind)

    hook = register_optimizer_step_post_hook(count)
    options = ("run", "distill", "-m", DATA, "-o", "out", *sets(DISTILL_KEYS, SHORT | given))
    run.factory(*options, label="interrupted", expect=130)
    run.factory(*options, label="interrupted again", expect=130)
    hook.remove()
    distill(run, **given)
    distill(run, "whole", **given)
    changed = sets(DISTILL_KEYS, SHORT | given | {"lr": 0.1})
    run.factory("run", "distill", "-m", DATA, "-o", "out", *changed, label="other settings", expect=3)
    run.factory("run", "distill", "-m", DATA, "-o", "out", *sets(DISTILL_KEYS, SHORT | given), label="finished")
    run.factory("gc", "out", label="gc")


@case("distill/ray", slow=True)
def ray_distill(run: "Run") -> None:
    """Two gloo ranks through Ray Train."""
    distill(run, "out", "--workers", "2", students="[digits-cnn-small, resnet8-gn]", ce=0.5)
