"""Settings of stage 1 (``factory run synth``), beside their owner. Imports no torch."""

from collections.abc import Sequence
from string import Formatter
from typing import Literal

from pydantic import Field, field_validator, model_validator

from stages.models.settings import ModelSettings, Settings
from stages.synth.inversion_settings import CmiSettings, DdaSettings, DeepInversionSettings

_SEVERAL = "it evaluates the network several times for one step, and guidance would move only one of them"
UNGUIDABLE = {
    "pndm": "its first steps average several evaluations of one latent",
    "heun": _SEVERAL,
    "kdpm2": _SEVERAL,
    "dpmsolver-singlestep": _SEVERAL,
    "unipc": "its corrector re-does the step before, and with it undoes the guidance",
    "lms": "it remembers slopes, which a moved prediction falsifies",
    "deis": "it remembers slopes, which a moved prediction falsifies",
    "lcm": "it needs a distilled network",
    "tcd": "it needs a distilled network",
}


UNSTEERED = ("dmkd", "noise")  # methods that follow no adversary
MAX_SEED = 2**63 - 1  # the manifest's ``seed`` holds 64 bits


def check_interval(name: str, interval: tuple[float, float]) -> None:
    """Raises ValueError where ``interval`` is no part of the steps, from 0 = first to 1 = last."""
    low, high = interval
    if not 0 <= low < high <= 1:
        raise ValueError(f"{name} must satisfy 0 <= start < end <= 1, got {low}, {high}")


class PriorSettings(Settings):
    """The diffusion prior and how it is sampled."""

    path: str = Field("embedded:strokes32", description="diffusers folder, hub id, or embedded:strokes32")
    variant: str | None = Field(None, description="weight variant of the folder, e.g. fp16")
    scheduler: Literal["ddim", "ddpm", "dpmsolver++", "euler"] = "ddim"
    steps: int = Field(20, gt=0, le=1000)
    cfg: float = Field(3.0, ge=0, description="classifier-free guidance scale; 1 is off (unconditional: always)")
    cfg_interval: tuple[float, float] = Field((0.0, 1.0), description="part of the steps with cfg, 0 = first, 1 = last")
    negative_prompt: str = ""
    labels: dict[str, int] = Field({}, description="class-conditional priors: teacher's class name to prior's label")
    labels_by_index: bool = Field(False, description="in place of labels: prior and teacher number the same classes")
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    attention: Literal["auto", "sdpa", "xformers"] = "auto"
    vae_slicing: bool = Field(False, description="decode image by image: less memory, more time")
    compile: bool = Field(False, description="torch.compile the denoising network: a slow start, faster steps")

    @field_validator("scheduler", mode="before")
    @classmethod
    def _guidable(cls, name: object) -> object:
        if isinstance(name, str) and (why := UNGUIDABLE.get(name.lower())):
            raise ValueError(f"{name} cannot be guided safely: {why}; use ddim, ddpm, dpmsolver++ or euler")
        return name

    @model_validator(mode="after")
    def _cfg_interval(self) -> "PriorSettings":
        check_interval("cfg_interval", self.cfg_interval)
        return self

    @model_validator(mode="after")
    def _one_way_to_label(self) -> "PriorSettings":
        if self.labels and self.labels_by_index:
            raise ValueError("labels and labels_by_index exclude each other")
        return self

    def labelled(self, names: Sequence[str]) -> "PriorSettings":
        """With ``labels`` for the teacher's classes ``names``, written out where they go by index."""
        if not self.labels_by_index:
            return self
        return self.model_copy(update={"labels": {name: i for i, name in enumerate(names)}, "labels_by_index": False})

    def cfg_at(self, step: int) -> float:
        """The guidance scale of denoising step ``step``: ``cfg`` inside its interval, else 1."""
        low, high = self.cfg_interval
        return self.cfg if low <= step / self.steps < high else 1.0


class PromptSettings(Settings):
    """The prompt bank: ``template`` filled with a random subject and style (DiffDFKD, section IV-A)."""

    template: str = "a realistic photo of {subject}, {style}"
    subjects: tuple[str, ...] = ("an object",)
    styles: tuple[str, ...] = ("natural light",)
    class_names: bool = Field(False, description="named track: {subject} becomes the teacher's class name")

    @model_validator(mode="after")
    def _template_fields(self) -> "PromptSettings":
        try:
            parts = [*Formatter().parse(self.template)]
        except ValueError as error:
            raise ValueError(f"template may use only {{subject}} and {{style}}: {error}") from None
        for _, name, width, conversion in parts:
            if name is not None and (name not in ("subject", "style") or width or conversion):
                raise ValueError(f"template may use only {{subject}} and {{style}}, as they are, not {{{name}}}")
        if not self.subjects or not self.styles:
            raise ValueError("subjects and styles must each hold at least one entry")
        return self


class GuidanceSettings(Settings):
    """Teacher guidance (DiffDFKD, equations 6-10), with per-sample gradient normalisation."""

    through: Literal["z0", "zt"] = Field("z0", description="gradient at the predicted latent, or through the denoiser")
    scale: float = Field(0.1, ge=0, description="update size as a share of the latent's unit variance")
    normalise: Literal["rms", "none"] = "rms"
    ce: float = Field(1.0, ge=0, description="class prior weight (equation 7)")
    bn: float = Field(10.0, ge=0, description="feature-statistics weight (equation 6; a mean over layers, normalised)")
    adversarial: float = Field(0.0, ge=0, description="needs an adversary (equation 8)")
    consistency: float | None = Field(
        None, ge=0, description="equal answers to two views; default: 1 for a teacher without BatchNorm, else 0"
    )
    interval: tuple[float, float] = Field((0.0, 1.0), description="guided part of the steps, 0 = first, 1 = last")
    every: int = Field(1, gt=0, description="guide every k-th step of the interval")
    inner: int = Field(1, gt=0, description="updates per guided step (z0 only)")
    shift: float = Field(0.0, ge=0, lt=0.5, description="random shift before the teacher, as a share of the image side")
    decoder: Literal["full", "tiny", "fitted"] = Field(
        "fitted", description="what guidance decodes with (stored images always use the prior's own)"
    )
    tiny_decoder: str | None = Field(None, description="AutoencoderTiny: folder or hub id; default: the prior's own")

    @model_validator(mode="after")
    def _consistent(self) -> "GuidanceSettings":
        check_interval("interval", self.interval)
        if self.through == "zt" and self.inner > 1:
            raise ValueError("inner > 1 needs through: z0 (each z_t update costs a pass through the denoiser)")
        if self.tiny_decoder and self.decoder != "tiny":
            raise ValueError("tiny_decoder does nothing unless decoder is tiny")
        return self

    def at(self, step: int, steps: int) -> bool:
        """Whether step ``step`` (0 = first) of ``steps`` is guided: every k-th step of the interval."""
        low, high = self.interval
        inside = self.scale > 0 and low <= step / steps < high
        return inside and (step - self.first(steps)) % self.every == 0

    def first(self, steps: int) -> int:
        """The interval's first step of ``steps``."""
        return next(step for step in range(steps + 1) if self.interval[0] <= step / steps)


class LatentMixSettings(Settings):
    """Augmentation of latents during denoising: LCA (DiffDFKD, equation 11) and what its table IV compares it with."""

    kind: Literal["cutmix", "mixup", "traditional"] = Field(
        "cutmix", description="a box or a blend of another latent of the class; or flip, shift, crop-and-resize"
    )
    every: int = Field(0, ge=0, description="at every k-th step; 0 switches it off")
    interval: tuple[float, float] = Field((0.0, 0.6), description="part of the steps in which it may happen")
    probability: float = Field(1.0, ge=0, le=1, description="share of trajectories that it happens to")
    alpha: float = Field(1.0, gt=0, description="lambda ~ Beta(alpha, alpha), drawn per pair: 1 - lambda is mixed in")

    @model_validator(mode="after")
    def _interval(self) -> "LatentMixSettings":
        check_interval("interval", self.interval)
        return self

    def at(self, step: int, steps: int) -> bool:
        """Whether step ``step`` (0 = first) of ``steps`` mixes. Step 0 is pure noise, so it never does."""
        low, high = self.interval
        return self.every > 0 and step > 0 and step % self.every == 0 and low <= step / steps < high


class ImageSettings(Settings):
    """Which images of a trajectory are stored, and how."""

    intermediates: int = Field(0, ge=0, description="decoded x0-predictions stored besides the final image")
    format: Literal["png", "jpg", "webp"] = "png"
    size: int | None = Field(
        None,
        gt=0,
        le=4096,
        description="stored side in pixels; default: what the prior decodes, inverted: what the teacher sees",
    )


class SynthSettings(Settings):
    """Everything that decides what stage 1 makes. All but ``shards`` and ``device`` enter the fingerprint."""

    method: Literal["diffdfkd", "dmkd", "dda", "cmi", "deepinversion", "noise"] = "diffdfkd"
    prior: PriorSettings = PriorSettings()
    teacher: ModelSettings = ModelSettings()
    adversary: ModelSettings | None = Field(None, description="frozen student of an earlier round, for the ADV term")
    prompts: PromptSettings = PromptSettings()
    guidance: GuidanceSettings = GuidanceSettings()
    lca: LatentMixSettings = LatentMixSettings()
    images: ImageSettings = ImageSettings()
    dda: DdaSettings = DdaSettings()
    cmi: CmiSettings = CmiSettings()
    deepinversion: DeepInversionSettings = DeepInversionSettings()
    shards: int = Field(4, gt=0, le=1 << 24, description="shards in total; growing it later only adds")
    groups_per_shard: int = Field(4, gt=0)
    group_size: int = Field(50, gt=1, description="trajectories guided together; BN statistics see the whole group")
    seed: int = Field(0, ge=0, le=MAX_SEED)
    threads: int = Field(1, gt=0, description="CPU threads per worker; part of the plan, since sums depend on it")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 …")
    min_confidence: float = Field(0.0, ge=0, le=1, description="keep images whose class gets at least this")
    store_logits: bool = False

    @model_validator(mode="after")
    def _adversary_and_its_weight(self) -> "SynthSettings":
        if self.guidance.adversarial > 0 and self.adversary is None:
            raise ValueError("guidance.adversarial > 0 needs an adversary: the model folder of a student")
        if self.adversary is not None and not self.guidance.adversarial:
            raise ValueError("an adversary without weight does nothing: set guidance.adversarial, e.g. to 1")
        if self.adversary is not None and self.method in UNSTEERED:
            raise ValueError(f"{self.method} follows no adversary: leave adversary and guidance.adversarial out")
        return self

    @model_validator(mode="after")
    def _denoising(self) -> "SynthSettings":
        steps, (low, high) = self.prior.steps, self.guidance.interval
        most = max(1, steps - 1)  # as :func:`stages.synth.sampler.intermediate_steps` spreads them
        if self.method in ("diffdfkd", "dmkd") and self.images.intermediates > most:
            raise ValueError(f"images.intermediates {self.images.intermediates}: {steps} steps have at most {most}")
        if self.guides and not any(low <= step / steps < high for step in range(steps)):
            raise ValueError(f"guidance.interval {low:g}, {high:g} contains no step of {steps}: widen it")
        if self.lca.every and self.method not in ("diffdfkd", "noise"):
            raise ValueError(f"{self.method} mixes no latents: leave lca.every at 0")
        if self.lca.every and self.method == "diffdfkd" and not any(self.lca.at(step, steps) for step in range(steps)):
            low, high = self.lca.interval
            raise ValueError(
                f"lca.every {self.lca.every} meets no step of {steps} in lca.interval {low:g}, {high:g}: lower it"
            )
        return self

    @model_validator(mode="after")
    def _inverted(self) -> "SynthSettings":
        if (self.inverts or self.method == "noise") and self.images.intermediates:
            raise ValueError(f"{self.method} has no intermediate images: leave images.intermediates at 0")
        if self.method in ("cmi", "dda") and self.cmi.batches > self.group_size // 2:
            raise ValueError(
                f"cmi.batches {self.cmi.batches} leave less than two images of group_size {self.group_size} each"
            )
        if self.method == "dda" and self.dda.space == "contrastive" and not self.cmi.cr:
            raise ValueError("dda.space contrastive needs the head that cmi.cr > 0 trains")
        return self

    @property
    def inverts(self) -> bool:
        """Whether the method inverts the teacher; what it makes then has the teacher's size by default."""
        return self.method in ("dda", "cmi", "deepinversion")

    @property
    def needs_prior(self) -> bool:
        """Whether the method samples a diffusion prior."""
        return self.method in ("diffdfkd", "dmkd", "dda")

    @property
    def guides(self) -> bool:
        """Whether the teacher steers the denoising."""
        return self.method == "diffdfkd" or (self.method == "dda" and self.dda.guided)

    @property
    def images_per_trajectory(self) -> int:
        """Stored images of one trajectory, kept or not."""
        return 1 + (self.dda.variants if self.method == "dda" else self.images.intermediates)
