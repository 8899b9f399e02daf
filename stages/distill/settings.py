"""Settings of stage 2 (``factory run distill``), beside their owner. Imports no torch."""

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from stages.models.settings import InputSettings, Settings


def student_name(architecture: str) -> str:
    """How a student is called in results, and its folder.

    >>> student_name("timm:resnet18")
    'timm-resnet18'
    """
    return re.sub(r"[^\w.-]+", "-", architecture)


class LossSettings(Settings):
    """Weights of the loss terms; each is logged on its own. A weight of 0 switches a term off."""

    kd: float = Field(1.0, ge=0, description="τ²·KL(teacher ‖ student), batchmean")
    tau: float = Field(4.0, gt=0, description="temperature of the KD term")
    ce: float = Field(0.0, ge=0, description="cross-entropy with the manifest's label")
    derived: float = Field(0.0, ge=0, description="cross-entropy on derived images only (DDA equation 7)")
    cam: float = Field(0.0, ge=0, description="class activation maps, every class (mSARC)")
    gradcam: float = Field(0.0, ge=0, description="Grad-CAM at the end of each stage (mSARC)")
    teacher_layers: tuple[str, ...] | None = Field(None, description="module paths for gradcam; default: its stages")
    student_layers: tuple[str, ...] | None = Field(None, description="module paths for gradcam; default: its stages")

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the terms that are on, in the order in which they are computed."""
        return tuple(name for name in ("kd", "ce", "derived", "cam", "gradcam") if getattr(self, name))

    @model_validator(mode="after")
    def _something_to_learn(self) -> "LossSettings":
        if not self.active:
            raise ValueError("every loss weight is 0: nothing to learn from")
        return self


class OptimiserSettings(Settings):
    """How weights move. Lengths are shares of the run, so that changing ``epochs`` keeps the shape."""

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(0.1, gt=0, description="peak learning rate")
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd: Nesterov momentum; adamw: beta1")
    weight_decay: float = Field(5e-4, ge=0, description="not applied to biases and normalisation weights")
    schedule: Literal["cosine", "step", "onecycle"] = "cosine"
    warmup: float = Field(0.05, ge=0, lt=1, description="share of steps; onecycle: the rising part")
    milestones: tuple[float, ...] = Field((0.5, 0.75), description="step schedule: shares of the run")
    gamma: float = Field(0.1, gt=0, le=1, description="step schedule: factor at each milestone")
    clip: float = Field(0.0, ge=0, description="largest gradient norm; 0 switches it off")
    ema: float = Field(0.99, ge=0, lt=1, description="decay of the averaged weights that become the student; 0: none")


class ViewSettings(Settings):
    """Augmentation: a pure function of (seed, epoch, sample). λ of cutmix and mixup is uniform."""

    crop: float = Field(0.1875, ge=0, lt=0.5, description="random shift, as a share of the side, reflect-padded")
    flip: bool = Field(False, description="alternating horizontal flip; wrong for digits and text")
    cutmix: float = Field(0.3, ge=0, le=1, description="share of images that receive a box of another one")
    mixup: float = Field(0.4, ge=0, le=1, description="share of images blended with another one")
    fixed: int = Field(0, ge=0, description="number of views of an image, taken in turn; 0: a new one in every epoch")

    @model_validator(mode="after")
    def _shares(self) -> "ViewSettings":
        if self.cutmix + self.mixup > 1:
            raise ValueError("cutmix + mixup must not exceed 1: an image receives one of them")
        return self


class CacheSettings(Settings):
    """The teacher's logits for ``views.fixed`` views of every image, computed once and then looked up."""

    use: bool = Field(False, description="needs views.fixed; excludes cam, gradcam, cutmix and mixup")
    top: int | None = Field(None, ge=1, description="logits kept of each answer; default: all, above 256 classes 64")
    folder: str | None = Field(None, description="default: teacher-cache in the run folder; runs may share one")


class DistillSettings(Settings):
    """Everything that decides what stage 2 trains. All but those in ``PLACE`` must be the same on resume."""

    students: tuple[str, ...] = Field(
        ("digits-cnn-small",), min_length=1, description="architectures, trained in one pass"
    )
    loss: LossSettings = LossSettings()
    optimiser: OptimiserSettings = OptimiserSettings()
    views: ViewSettings = ViewSettings()
    cache: CacheSettings = CacheSettings()
    input: InputSettings | None = Field(None, description="the students' input; default: the teacher's")
    where: str | None = Field(None, description="rows to use, e.g. confidence >= 0.5 and timestep == 0")
    kept: bool = Field(True, description="leave out images that synthesis rejected")
    skip_bad: bool = Field(False, description="leave out images that are missing or altered instead of stopping")
    balance: bool = Field(False, description="every class equally often, over all manifests together")
    epochs: int = Field(80, gt=0)
    batch_size: int = Field(64, gt=1, description="images per step, over all workers together")
    seed: int = Field(0, ge=0)
    held_out: float = Field(0.05, ge=0, lt=1, description="share held out, by trajectory and LCA partner")
    keep: Literal["last", "best"] = Field("last", description="which weights become the student; best is by held_out")
    other_teacher: bool = Field(False, description="allow a teacher that is not the one the data was made for")
    min_agreement: float = Field(0.5, ge=0, le=1, description="warn if the teacher agrees with fewer labels")
    track: tuple[Literal["tensorboard", "wandb"], ...] = Field((), description="where metrics go besides metrics.jsonl")
    eval_every: int = Field(0, ge=0, description="epochs between looks at the test data; 0: once, at the end")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 …")
    threads: int = Field(1, gt=0, description="CPU threads; sums depend on it")
    dtype: Literal["fp32", "bf16"] = Field("fp32", description="bf16: autocast of students and teacher; CPUs: AMX")
    channels_last: bool = Field(False, description="channels last in memory: faster on CPUs, and with bf16")
    compile: bool = Field(False, description="torch.compile of the students; excludes cam and gradcam")
    memory_gb: float = Field(4.0, ge=0, description="decoded images are kept in memory up to this; above, streamed")
    checkpoint_seconds: float = Field(30.0, ge=0, description="time between checkpoints; 0: at every step")

    @field_validator("students")
    @classmethod
    def _no_name_twice(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        twice = sorted({name for name in value if value.count(name) > 1})
        if twice:
            raise ValueError(f"student named twice: {', '.join(twice)}")
        return value

    @model_validator(mode="after")
    def _best_needs_held_out(self) -> "DistillSettings":
        if self.keep == "best" and not self.held_out:
            raise ValueError("keep: best needs held_out > 0 to choose by")
        return self

    @model_validator(mode="after")
    def _compiled_nets_keep_their_maps(self) -> "DistillSettings":
        if self.compile and (self.loss.cam or self.loss.gradcam):
            raise ValueError("compile excludes loss.cam and loss.gradcam: they look inside the network")
        return self

    @model_validator(mode="after")
    def _cached_answers_fit(self) -> "DistillSettings":
        wrong = [f"loss.{name}" for name in ("cam", "gradcam") if getattr(self.loss, name)]
        wrong += [f"views.{name}" for name in ("cutmix", "mixup") if getattr(self.views, name)]
        if self.cache.use and wrong:
            raise ValueError(f"cache.use needs {' and '.join(f'{name} 0' for name in wrong)}: no view of theirs recurs")
        if self.cache.use and not self.views.fixed:
            raise ValueError("cache.use needs views.fixed, the number of views of each image, say 8")
        return self


PLACE = frozenset({"memory_gb", "checkpoint_seconds", "min_agreement", "eval_every", "track"})
"""Settings that change where or how a run goes, not what it computes: free to differ on resume."""
