"""All settings of both stages, and how a classifier is named. Imports no torch.

Recipes (:mod:`pipeline.recipe`) hold them by the same names: ``synth.guidance.step_size`` is ``step_size`` of
:class:`GuidanceSettings`.
"""

import re
from collections.abc import Mapping, Sequence
from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

ALGORITHM_VERSION = 4
"""Part of every fingerprint: raise when the same settings would make other bytes, or when a default changes."""
LOSS_SCALE = 2.0**9
"""Of guidance's gradients that pass through fp16, where no number is below 2⁻²⁴: a faint gradient would vanish in part,
and the normalized update would blow up what is left of it."""

Stem = Literal["native", "small"]
SMALL = 64  # pixels; up to this size the stem of an ImageNet network would throw most of the image away
MAX_CLASSES = 100_000
MAX_STEPS = 1000  # of denoising
MAX_ITERATIONS = 32767  # of inversion: the manifest's ``step`` holds 16 bits
MAX_SEED = 2**63 - 1  # the manifest's ``seed`` holds 64 bits
MAX_TRAJECTORIES = 2**31  # the manifest's ``trajectory`` holds 32 bits
MAX_THREADS = 1024
MAX_BATCH = 2**20  # images at once
MAX_WEIGHT = 1e9
UNSTEERED = ("dmkd", "noise")  # methods that follow no adversary

_SEVERAL = "it evaluates the network several times for one step, and guidance would move only one of them"
UNGUIDABLE = {
    "pndm": "its first steps average several evaluations of one latent",
    "heun": _SEVERAL,
    "kdpm2": _SEVERAL,
    "dpmsolver-singlestep": _SEVERAL,
    "unipc": "its corrector re-does the step before, and with it undoes the guidance",
    "lms": "it remembers slopes, which a moved prediction falsifies",
    "deis": "it remembers slopes, which a moved prediction falsifies",
}
"""Schedulers that are refused, and why."""
DISTILLED: dict[str, tuple[str, ...]] = {
    "lcm": ("lcm",),
    "tcd": ("tcd",),
    "turbo": ("euler-ancestral", "euler"),
    "lightning": ("euler",),
    "hyper": ("ddim", "tcd"),
}
"""Schedulers that few-step priors are made for, by how they were distilled; the first is the default."""


class Settings(BaseModel):
    """Base of every settings class: frozen, unknown keys and infinite numbers refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _check_interval(interval: tuple[float, float]) -> tuple[float, float]:
    low, high = interval
    if not 0 <= low < high <= 1:
        raise ValueError(f"must satisfy 0 <= start < end <= 1, got {low}, {high}")
    return interval


Share = Annotated[float, Field(ge=0, le=1)]
Interval = Annotated[tuple[Share, Share], AfterValidator(_check_interval)]
"""Part of the steps, from 0 = first to 1 = last; the end is excluded."""
Loggers = tuple[Literal["tensorboard", "wandb", "mlflow"], ...]


def _is_none(value: object) -> bool:
    return value is None


def _is_usual(value: object) -> bool:
    return value in ("even", "rgb")


Side = Annotated[int, Field(gt=0, le=4096)]
"""Of an image, in pixels."""


Moment = Annotated[float, Field(ge=-MAX_WEIGHT, le=MAX_WEIGHT)]


class InputSettings(Settings):
    """What a classifier expects: ``channels × size × size``, values in [0, 1] normalized by ``mean`` and ``std``.

    ``resize_size`` is what comes before the center crop that makes pictures square, as in torchvision's ``Resize``: a
    number is the short side and keeps the aspect, ``[height, width]`` does not. Images of a dataset are square and
    made by stage 1 as the network sees them: they become ``size × size`` without a crop.
    """

    size: Side
    channels: Literal[1, 3] = Field(3, description="1 means luminance")
    mean: tuple[Moment, ...]
    std: tuple[Moment, ...]
    resize: Literal["bilinear", "bicubic", "area", "nearest"] = Field(
        "bilinear", description="interpolation, antialiased where it shrinks (but nearest)"
    )
    resize_size: Side | tuple[Side, Side] | None = Field(
        None,
        exclude_if=_is_none,
        description="of pictures before a center crop of size × size: the short side, or [height, width]; "
        "default: [size, size], so nothing is cropped",
    )
    crop_rounding: Literal["even", "down"] = Field(
        "even", exclude_if=_is_usual, description="of half a pixel of margin: even as torchvision, down as transformers"
    )

    channel_order: Literal["rgb", "bgr"] = Field(
        "rgb", exclude_if=_is_usual, description="in which the network takes them; mean and std are those of RGB"
    )

    @model_validator(mode="after")
    def _one_value_per_channel(self) -> "InputSettings":
        if len(self.mean) != self.channels or len(self.std) != self.channels or min(self.std) <= 0:
            raise ValueError(f"mean and std (> 0) must have {self.channels} values, one per channel")
        return self

    @model_validator(mode="after")
    def _nothing_to_pad(self) -> "InputSettings":
        sides = self.resize_size if isinstance(self.resize_size, tuple) else (self.resize_size or self.size,)
        if min(sides) < self.size:
            raise ValueError(f"resize_size {self.resize_size} is less than size {self.size}: there is nothing to crop")
        return self

    def __str__(self) -> str:
        """
        >>> str(InputSettings(size=224, resize_size=256, mean=(0.5,) * 3, std=(0.25,) * 3, resize="bicubic"))
        '224 px, RGB, short side to 256 and center crop, bicubic, mean 0.5 0.5 0.5, std 0.25 0.25 0.25'
        """
        rule = "both sides resized, whatever the aspect"
        if isinstance(self.resize_size, tuple):
            rule = f"resized to {self.resize_size[0]}×{self.resize_size[1]}, whatever the aspect, and center crop"
        elif self.resize_size:
            rule = f"short side to {self.resize_size} and center crop"
        mean, std = (" ".join(f"{value:.6g}" for value in values) for values in (self.mean, self.std))
        color = self.channel_order.upper() if self.channels == 3 else "luminance"
        return f"{self.size} px, {color}, {rule}, {self.resize}, mean {mean}, std {std}"

    def yaml(self) -> str:
        """One line to copy into a settings file: what differs from the defaults.

        >>> InputSettings(size=8, channels=1, mean=(0.5,), std=(0.25,), resize_size=9).yaml()
        '{size: 8, channels: 1, mean: [0.5], std: [0.25], resize_size: 9}'
        """
        values = self.model_dump(mode="json", exclude_defaults=True)
        return "{" + ", ".join(f"{key}: {value}" for key, value in values.items()) + "}"


class ModelSettings(Settings):
    """A classifier, and what cannot be known from it.

    ``name`` is one of

    - a folder holding ``config.json`` + ``model.safetensors`` (what distillation writes), or ``embedded:digits``;
    - a built-in architecture (:mod:`stages.models.nets`), ``timm:NAME`` or ``torchvision:NAME``, with ``weights``,
      ``input`` and ``num_classes``;
    - ``timm:FOLDER``, ``timm:NAME.TAG`` (the hub's weights), ``hf:FOLDER`` or ``hf:ORG/NAME``: these know their own;
    - ``module.path:function`` of your own code, with ``input``, ``num_classes`` and, if it loads none, ``weights``;
    - ``FILE.onnx`` with ``input`` and ``num_classes``: a black box, used for scores only;
    - ``FILE.yaml`` holding these very settings.
    """

    name: str = "embedded:digits"
    weights: str | None = Field(None, description="safetensors or torch.save: a file, an index of shards, a folder")
    checkpoint_key: str | None = Field(
        None, min_length=1, description="the table to read of several, e.g. state_dict_ema (default: averaged first)"
    )
    input: InputSettings | None = None
    num_classes: int | None = Field(None, gt=1, le=MAX_CLASSES)
    class_names: tuple[str, ...] | None = None
    stem: Stem | None = Field(
        None, description="small: the first layers keep the resolution; default: small for built-ins up to 64 px"
    )


class LoraSettings(Settings):
    """A LoRA to merge into the prior: a user's own concept, or what makes few steps enough (LCM-LoRA, Hyper-SD)."""

    path: str = Field(description="safetensors file, or FILE of a hub repository: org/name/FILE")
    weight: float = Field(1.0, ge=-10, le=10)


class PriorSettings(Settings):
    """The diffusion prior and how it is sampled."""

    path: str = Field("embedded:strokes32", description="diffusers folder, hub id, or embedded:strokes32")
    variant: str | None = Field(None, description="weight variant of the folder, e.g. fp16")
    lora: tuple[LoraSettings, ...] = Field((), description="LoRA files to merge at load, with their weights")
    distilled: Literal["lcm", "tcd", "turbo", "lightning", "hyper"] | None = Field(
        None, description="how a few-step prior was distilled; without more said: its scheduler, 4 steps, no CFG"
    )
    scheduler: Literal["ddim", "ddpm", "dpmsolver++", "euler", "euler-ancestral", "lcm", "tcd"] = "ddim"
    eta: float = Field(0.3, ge=0, le=1, description="tcd: share of fresh noise in a step (the paper's γ)")
    steps: int = Field(20, gt=0, le=MAX_STEPS)
    cfg_scale: float = Field(
        3.0, ge=0, le=MAX_WEIGHT, description="classifier-free guidance scale; 1 is off (unconditional: always)"
    )
    cfg_interval: Interval = Field((0.0, 1.0), description="part of the steps with cfg, 0 = first, 1 = last")
    negative_prompt: str = ""
    labels: dict[str, Annotated[int, Field(ge=0, lt=2**31)]] = Field(
        {}, description="class-conditional priors: the prior's label of each of the teacher's class names"
    )
    labels_by_index: bool = Field(
        False, description="in place of labels: prior and teacher number the same classes alike"
    )
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

    @model_validator(mode="before")
    @classmethod
    def _few_steps(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and (schedulers := DISTILLED.get(str(values.get("distilled")))):
            return {"scheduler": schedulers[0], "steps": 4, "cfg_scale": 1.0} | dict(values)
        return values

    @model_validator(mode="after")
    def _made_for(self) -> "PriorSettings":
        if self.distilled is None and self.scheduler in ("lcm", "tcd"):
            raise ValueError(f"{self.scheduler} needs a distilled network: say how it was made with distilled")
        if self.distilled is not None and self.scheduler not in (fitting := DISTILLED[self.distilled]):
            raise ValueError(f"distilled {self.distilled} is sampled with {' or '.join(fitting)}, not {self.scheduler}")
        return self

    @model_validator(mode="after")
    def _one_way_to_label(self) -> "PriorSettings":
        if self.labels and self.labels_by_index:
            raise ValueError("labels and labels_by_index exclude each other")
        return self

    def labeled(self, names: Sequence[str]) -> "PriorSettings":
        """With ``labels`` for the teacher's classes ``names``, written out where they go by index."""
        if not self.labels_by_index:
            return self
        return self.model_copy(update={"labels": {name: i for i, name in enumerate(names)}, "labels_by_index": False})

    def cfg_at(self, step: int) -> float:
        """The classifier-free guidance scale of denoising step ``step``: 1 outside ``cfg_interval``."""
        low, high = self.cfg_interval
        return self.cfg_scale if low <= step / self.steps < high else 1.0


class PromptSettings(Settings):
    """The prompt bank: ``template`` filled with a random subject and style (DiffDFKD, section IV-A)."""

    template: str = "a realistic photo of {subject}, {style}"
    templates: tuple[str, ...] = Field((), description="several to draw from, in place of template")
    subjects: tuple[str, ...] = ("an object",)
    styles: tuple[str, ...] = ("natural light",)
    class_names: bool = Field(False, description="named track: {subject} becomes the teacher's class name")
    classes: dict[str, tuple[str, ...]] = Field(
        {}, description="subjects of their own for some of the teacher's classes, by name"
    )

    @property
    def all_templates(self) -> tuple[str, ...]:
        return self.templates or (self.template,)

    def subjects_of(self, class_name: str) -> tuple[str, ...]:
        """What ``{subject}`` may become in a prompt for ``class_name``."""
        return self.classes.get(class_name) or ((class_name,) if self.class_names else self.subjects)

    @model_validator(mode="after")
    def _template_fields(self) -> "PromptSettings":
        try:
            parts = [part for template in (self.template, *self.templates) for part in Formatter().parse(template)]
        except ValueError as error:
            raise ValueError(f"template may use only {{subject}} and {{style}}: {error}") from None
        for _, name, width, conversion in parts:
            if name is not None and (name not in ("subject", "style") or width or conversion):
                raise ValueError(f"template may use only {{subject}} and {{style}}, as they are, not {{{name}}}")
        if not self.subjects or not self.styles:
            raise ValueError("subjects and styles must each hold at least one entry")
        if empty := [name for name, subjects in self.classes.items() if not subjects]:
            raise ValueError(f"classes gives no subject for {empty[0]}: leave the class out, or name at least one")
        return self


class GuidanceSettings(Settings):
    """Teacher guidance (DiffDFKD, equations 6-10), with per-sample gradient normalization."""

    gradient_at: Literal["x0", "xt"] = Field(
        "x0", description="gradient at the predicted ẑ0, or through the denoiser at z_t"
    )
    step_size: float = Field(
        0.1, ge=0, le=MAX_WEIGHT, description="update size as a share of the latent's unit variance"
    )
    normalize: Literal["rms", "none"] = "rms"
    ce: float = Field(1.0, ge=0, le=MAX_WEIGHT, description="class prior weight (equation 7)")
    bn: float = Field(
        10.0, ge=0, le=MAX_WEIGHT, description="feature-statistics weight (equation 6; a mean over layers, normalized)"
    )
    adversarial: float = Field(0.0, ge=0, le=MAX_WEIGHT, description="needs an adversary (equation 8)")
    consistency: float | None = Field(
        None,
        ge=0,
        le=MAX_WEIGHT,
        description="weight of equal predictions for two views; default: 1 for a teacher without BatchNorm, else 0",
    )
    energy: float = Field(
        0.0, ge=0, le=MAX_WEIGHT, description="weight of the free energy of the teacher's logits: no label takes part"
    )
    entropy: float = Field(
        0.0,
        ge=-MAX_WEIGHT,
        le=MAX_WEIGHT,
        description="weight of the answer's entropy; below 0 asks for unsure answers",
    )
    bn_population: float = Field(
        0.0, ge=0, lt=1, description="share of a shard's earlier groups in the statistics that bn matches (0.9: Fast)"
    )
    interval: Interval = Field((0.0, 1.0), description="guided part of the steps, 0 = first, 1 = last")
    every: int = Field(1, gt=0, le=MAX_STEPS, description="guide every k-th step of the interval")
    updates_per_step: int = Field(1, gt=0, le=MAX_STEPS, description="updates per guided step (x0 only)")
    jitter: float = Field(0.0, ge=0, lt=0.5, description="random shift before the teacher, a share of the side")
    decoder: Literal["full", "tiny", "fitted"] = Field(
        "fitted", description="what guidance decodes with (stored images: images.decoder)"
    )
    tiny_decoder: str | None = Field(None, description="AutoencoderTiny: folder or hub id; default: the prior's own")

    @model_validator(mode="after")
    def _consistent(self) -> "GuidanceSettings":
        if self.gradient_at == "xt" and self.updates_per_step > 1:
            raise ValueError(
                "updates_per_step > 1 needs gradient_at: x0 (each z_t update costs a pass through the denoiser)"
            )
        return self

    def at(self, step: int, steps: int) -> bool:
        """Whether step ``step`` (0 = first) of ``steps`` is guided: every k-th step of the interval."""
        low, high = self.interval
        inside = self.step_size > 0 and low <= step / steps < high
        return inside and (step - self.first(steps)) % self.every == 0

    def first(self, steps: int) -> int:
        """The interval's first step of ``steps``."""
        return next(step for step in range(steps + 1) if self.interval[0] <= step / steps)


class LatentMixSettings(Settings):
    """Augmentation of latents during denoising: LCA (DiffDFKD, equation 11) and what its table IV compares it with."""

    kind: Literal["cutmix", "mixup", "traditional"] = Field(
        "cutmix", description="a box or a blend of another latent of the class; or flip, shift, crop-and-resize"
    )
    pairs: Literal["independent", "permutation"] = Field(
        "independent", description="a partner and box for each trajectory; or a permutation and one box for each class"
    )
    every: int = Field(0, ge=0, le=MAX_STEPS, description="mix at every k-th step; 0 switches it off")
    interval: Interval = Field((0.0, 0.6), description="part of the steps in which it may happen")
    probability: float = Field(1.0, ge=0, le=1, description="share of trajectories that it happens to")
    alpha: float = Field(
        1.0, gt=0, le=MAX_WEIGHT, description="lambda ~ Beta(alpha, alpha), drawn per pair: 1 - lambda is mixed in"
    )

    @model_validator(mode="after")
    def _paired(self) -> "LatentMixSettings":
        if self.kind == "traditional" and self.pairs == "permutation":
            raise ValueError("traditional augmentation takes no partner: leave lca.pairs out")
        return self

    def at(self, step: int, steps: int) -> bool:
        """Whether step ``step`` (0 = first) of ``steps`` mixes. Step 0 is pure noise, so it never does."""
        low, high = self.interval
        return self.every > 0 and step > 0 and step % self.every == 0 and low <= step / steps < high


class ImageSettings(Settings):
    """Which images of a trajectory are stored, and how."""

    intermediates: int = Field(
        0, ge=0, le=MAX_STEPS, description="decoded x0-predictions stored besides the final image"
    )
    format: Literal["png", "jpg", "webp"] = "png"
    decoder: Literal["full", "tiny"] = Field(
        "full", description="what decodes stored images: the prior's own VAE, or guidance.tiny_decoder (far cheaper)"
    )
    size: int | None = Field(
        None,
        gt=0,
        le=4096,
        description="stored side in pixels; default: what the prior decodes, inverted: what the teacher sees",
    )


class DeepInversionSettings(Settings):
    """Optimization of pixels (Yin et al. 2020). The competition term's weight is ``guidance.adversarial``."""

    steps: int = Field(2000, gt=0, le=MAX_ITERATIONS)
    lr: float = Field(0.05, gt=0, le=MAX_WEIGHT, description="of Adam, in units of the pixel range [-1, 1]")
    ce: float = Field(1.0, ge=0, le=MAX_WEIGHT, description="class prior weight")
    bn: float = Field(
        10.0, ge=0, le=MAX_WEIGHT, description="feature-statistics weight (normalized: a mean over layers)"
    )
    first_bn: float = Field(10.0, ge=0, le=MAX_WEIGHT, description="factor of the first BatchNorm layer")
    tv: float = Field(2.5e-5, ge=0, le=MAX_WEIGHT, description="total-variation weight")
    l2: float = Field(1e-5, ge=0, le=MAX_WEIGHT, description="weight of the image's norm")
    jitter: float = Field(0.0625, ge=0, lt=0.5, description="random shift before the teacher, a share of the side")
    flip: bool = Field(False, description="show half of the steps mirrored; wrong for digits and text")


class CmiSettings(Settings):
    """Contrastive model inversion (Fang et al. 2021): a generator for each batch, and one contrastive head a group.

    CMI weighs a sum of BatchNorm norms over layers with 1; with the mean over layers used here that would be too weak
    beside the contrastive term (benchmarks/RESULTS.md). The weight of the adversarial term, 0.5 in CMI, is
    ``guidance.adversarial``.
    """

    batches: int = Field(
        2, gt=0, le=MAX_BATCH, description="batches that a group is made in; the bank holds the earlier ones"
    )
    steps: int = Field(500, gt=0, le=MAX_ITERATIONS, description="for each batch")
    lr: float = Field(1e-3, gt=0, le=MAX_WEIGHT, description="of Adam, for generator, latents and head")
    latent: int = Field(256, gt=0, le=2**16, description="length of the vector that an image is generated from")
    width: int = Field(
        64, gt=0, le=4096, description="channels of the generator's last layer; the others have twice as many"
    )
    ce: float = Field(0.5, ge=0, le=MAX_WEIGHT, description="class prior weight")
    bn: float = Field(
        10.0, ge=0, le=MAX_WEIGHT, description="feature-statistics weight (normalized: a mean over layers)"
    )
    cr: float = Field(0.8, ge=0, le=MAX_WEIGHT, description="contrastive weight")
    temperature: float = Field(0.1, gt=0, le=MAX_WEIGHT, description="of the contrastive term")
    crop: tuple[Share, Share] = Field(
        (0.25, 1.0), description="smallest and largest area of the local view, shares of the image"
    )
    jitter: float = Field(0.125, ge=0, lt=0.5, description="random shift of the global view, a share of the side")
    flip: bool = Field(False, description="mirror half of the views; wrong for digits and text")

    @model_validator(mode="after")
    def _crop(self) -> "CmiSettings":
        low, high = self.crop
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop must satisfy 0 < smallest <= largest <= 1, got {low}, {high}")
        return self


class DdaSettings(Settings):
    """Diffusion augmentation of inverted images (Li et al. 2024); ``cmi`` says how these are made.

    The paper's guidance of 0.5 is ``prior.cfg_scale`` 1: diffusers' pipelines switch CFG off at 1 and below. A prior
    with an image encoder varies images from pure noise, as in the paper; others start from the noised image
    (image-to-image), for which the paper names no ``strength``.
    """

    variants: int = Field(3, gt=0, le=1000, description="images made from each inverted one")
    strength: float = Field(
        0.5, gt=0, le=1, description="share of the steps, 1: only the prompt is left; not for image variation"
    )
    noise_level: int = Field(0, ge=0, lt=1000, description="image variation: noise on the image's features")
    min_cosine: float = Field(0.75, ge=-1, le=1, description="keep variants whose cosine with their source is above")
    space: Literal["teacher", "contrastive"] = Field("teacher", description="where cosines are taken")
    guided: bool = Field(False, description="the teacher steers the variants too, as guidance says")

    def first_step(self, steps: int, varies: bool) -> int:
        """The denoising step that augmentation starts at, of ``steps``: 0 for strength 1, and where the prior
        ``varies`` images by itself."""
        return 0 if varies else steps - round(self.strength * steps)


class SynthSettings(Settings):
    """Everything that decides what stage 1 makes. All but ``shards`` and ``device`` enter the fingerprint."""

    method: Literal["diffdfkd", "dmkd", "dda", "cmi", "deepinversion", "noise", "import"] = "diffdfkd"
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
    shards: int = Field(4, gt=0, le=2**24, description="shards in total; growing it later only adds")
    groups_per_shard: int = Field(4, gt=0, le=MAX_BATCH)
    group_size: int = Field(
        50, gt=1, le=MAX_BATCH, description="trajectories guided together; BN statistics see the whole group"
    )
    seed: int = Field(0, ge=0, le=MAX_SEED)
    threads: int = Field(
        1, gt=0, le=MAX_THREADS, description="CPU threads per worker; part of the plan, since sums depend on it"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 …")
    loggers: Loggers = Field((), description="where progress goes besides the terminal; decides no image")
    min_confidence: float = Field(
        0.0, ge=0, le=1, description="keep images to whose class the teacher gives at least this probability"
    )
    store_logits: bool = False

    @model_validator(mode="after")
    def _numbered_with_32_bits(self) -> "SynthSettings":
        if (count := self.shards * self.groups_per_shard * self.group_size) > MAX_TRAJECTORIES:
            raise ValueError(
                f"shards, groups_per_shard and group_size make {count} trajectories: a dataset holds at most "
                f"{MAX_TRAJECTORIES}"
            )
        return self

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
        limit = max(1, steps - 1)  # as :func:`stages.synth.sampler.intermediate_steps` spreads them
        if self.method in ("diffdfkd", "dmkd") and self.images.intermediates > limit:
            raise ValueError(f"images.intermediates {self.images.intermediates}: {steps} steps have at most {limit}")
        if self.guides and not any(low <= step / steps < high for step in range(steps)):
            raise ValueError(f"guidance.interval {low:g}, {high:g} contains no step of {steps}: widen it")
        if self.lca.every and self.method not in ("diffdfkd", "noise", "import"):
            raise ValueError(f"{self.method} mixes no latents: leave lca.every at 0")
        if self.lca.every and self.method == "diffdfkd" and not any(self.lca.at(step, steps) for step in range(steps)):
            low, high = self.lca.interval
            raise ValueError(
                f"lca.every {self.lca.every} meets no step of {steps} in lca.interval {low:g}, {high:g}: lower it"
            )
        return self

    @model_validator(mode="after")
    def _population(self) -> "SynthSettings":
        if self.guidance.bn_population and (self.method != "diffdfkd" or not self.guidance.bn):
            raise ValueError("guidance.bn_population needs method diffdfkd and guidance.bn > 0")
        return self

    @model_validator(mode="after")
    def _tiny(self) -> "SynthSettings":
        if self.images.decoder == "tiny" and not self.needs_prior:
            raise ValueError(f"{self.method} decodes no latents: leave images.decoder at full")
        if self.guidance.tiny_decoder and "tiny" not in (self.guidance.decoder, self.images.decoder):
            raise ValueError("guidance.tiny_decoder does nothing unless guidance.decoder or images.decoder is tiny")
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
    def uses_tiny_decoder(self) -> bool:
        """Whether guidance or stored images are decoded by an AutoencoderTiny."""
        return self.images.decoder == "tiny" or (self.guides and self.guidance.decoder == "tiny")

    @property
    def guides(self) -> bool:
        """Whether the teacher steers the denoising."""
        return self.method == "diffdfkd" or (self.method == "dda" and self.dda.guided)

    @property
    def images_per_trajectory(self) -> int:
        """Stored images of one trajectory, kept or not."""
        return 1 + (self.dda.variants if self.method == "dda" else self.images.intermediates)

    @property
    def images_per_shard(self) -> int:
        """Stored images of one shard, kept or not."""
        return self.groups_per_shard * self.group_size * self.images_per_trajectory


def student_name(architecture: str) -> str:
    """How a student is called in results, and its folder.

    >>> student_name("timm:resnet18")
    'timm-resnet18'
    """
    return re.sub(r"[^\w.-]+", "-", architecture)


class LossSettings(Settings):
    """Weights of the loss terms; each is logged on its own. A weight of 0 switches a term off."""

    kd: float = Field(1.0, ge=0, le=MAX_WEIGHT, description="τ²·KL(teacher ‖ student), batchmean")
    tckd: float = Field(0.0, ge=0, le=MAX_WEIGHT, description="DKD's target-class term, its weight α (paper: 1)")
    nckd: float = Field(0.0, ge=0, le=MAX_WEIGHT, description="DKD's term of the other classes, β (paper: 0.5 to 8)")
    dist_inter: float = Field(0.0, ge=0, le=MAX_WEIGHT, description="DIST: 1 − correlation over each image's classes")
    dist_intra: float = Field(0.0, ge=0, le=MAX_WEIGHT, description="DIST: 1 − correlation over the batch, per class")
    temperature: float = Field(4.0, gt=0, le=MAX_WEIGHT, description="temperature τ of KD, DKD and DIST")
    ce: float = Field(0.0, ge=0, le=MAX_WEIGHT, description="cross-entropy with the manifest's label")
    variants_ce: float = Field(
        0.0, ge=0, le=MAX_WEIGHT, description="cross-entropy on image variants only (DDA equation 7)"
    )
    cam: float = Field(0.0, ge=0, le=MAX_WEIGHT, description="class activation maps, every class (mSARC)")
    gradcam: float = Field(0.0, ge=0, le=MAX_WEIGHT, description="Grad-CAM at the end of each stage (mSARC)")
    feature: float = Field(
        0.0, ge=0, le=MAX_WEIGHT, description="the last stage's maps, the student's through a trained head (DDA's code)"
    )
    teacher_layers: tuple[str, ...] | None = Field(None, description="module paths for gradcam; default: its stages")
    student_layers: tuple[str, ...] | None = Field(None, description="module paths for gradcam; default: its stages")

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the terms that are on, in the order in which they are computed."""
        names = ("kd", "tckd", "nckd", "dist_inter", "dist_intra", "ce", "variants_ce", "cam", "gradcam", "feature")
        return tuple(name for name in names if getattr(self, name))

    @property
    def compares_logits(self) -> bool:
        """Whether a term compares the teacher's logits with the student's."""
        return any((self.kd, self.tckd, self.nckd, self.dist_inter, self.dist_intra))

    @model_validator(mode="after")
    def _something_to_learn(self) -> "LossSettings":
        if not self.active:
            raise ValueError("every loss weight is 0: nothing to learn from")
        return self


class OptimizerSettings(Settings):
    """How weights move. Lengths are shares of the run, so that changing ``epochs`` keeps the shape."""

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(0.1, gt=0, le=MAX_WEIGHT, description="peak learning rate")
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd: Nesterov momentum; adamw: beta1")
    weight_decay: float = Field(
        5e-4, ge=0, le=MAX_WEIGHT, description="not applied to biases and normalization weights"
    )
    schedule: Literal["cosine", "step", "onecycle"] = "cosine"
    warmup: float = Field(0.05, ge=0, lt=1, description="share of steps; onecycle: the rising part")
    milestones: tuple[Share, ...] = Field((0.5, 0.75), description="step schedule: shares of the run")
    gamma: float = Field(0.1, gt=0, le=1, description="step schedule: factor at each milestone")
    clip: float = Field(0.0, ge=0, le=MAX_WEIGHT, description="largest gradient norm; 0 switches it off")
    ema: float = Field(0.99, ge=0, lt=1, description="decay of the averaged weights that become the student; 0: none")


class AugmentSettings(Settings):
    """Augmentation: a pure function of (seed, epoch, sample), in the order of these settings but for the flip, which is
    made together with the shift. λ of cutmix and mixup is uniform."""

    crop: float = Field(0.1875, ge=0, lt=0.5, description="random shift, as a share of the side, reflect-padded")
    crop_scale: tuple[Share, Share] = Field(
        (1.0, 1.0), description="random resized crop: share of the area, say [0.5, 1]; ratio 3/4 to 4/3"
    )
    flip: bool = Field(False, description="alternating horizontal flip; wrong for digits and text")
    brightness: float = Field(0.0, ge=0, le=1, description="color jitter: factor within 1 ± this, as in torchvision")
    contrast: float = Field(0.0, ge=0, le=1, description="color jitter: factor within 1 ± this")
    saturation: float = Field(0.0, ge=0, le=1, description="color jitter: factor within 1 ± this")
    cutmix: float = Field(0.3, ge=0, le=1, description="share of images that receive a box of another one")
    mixup: float = Field(0.4, ge=0, le=1, description="share of images blended with another one")
    num_views: int = Field(
        0, ge=0, le=10**6, description="number of views of an image, taken in turn; 0: a new one in every epoch"
    )

    @model_validator(mode="after")
    def _shares(self) -> "AugmentSettings":
        if not 0 < self.crop_scale[0] <= self.crop_scale[1]:
            raise ValueError("crop_scale needs two rising shares above 0, e.g. [0.5, 1]")
        if self.cutmix + self.mixup > 1:
            raise ValueError("cutmix + mixup must not exceed 1: an image receives one of them")
        return self


class TeacherCacheSettings(Settings):
    """The teacher's logits for ``augment.num_views`` views of every image, computed once and then looked up."""

    enabled: bool = Field(False, description="needs augment.num_views; excludes cam, gradcam, feature, cutmix, mixup")
    top_k: int | None = Field(
        None, ge=1, le=MAX_CLASSES, description="logits kept for each view; default: all, above 256 classes 64"
    )
    folder: str | None = Field(None, description="default: teacher-cache in the run folder; runs may share one")


class DistillSettings(Settings):
    """Everything that decides what stage 2 trains. All but those in ``PLACE`` must be the same on resume."""

    students: tuple[str, ...] = Field(
        ("digits-cnn-small",), min_length=1, description="architectures, trained in one pass"
    )
    loss: LossSettings = LossSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    augment: AugmentSettings = AugmentSettings()
    teacher_cache: TeacherCacheSettings = TeacherCacheSettings()
    input: InputSettings | None = Field(None, description="the students' input; default: the teacher's")
    where: str | None = Field(None, description="rows to use, e.g. confidence >= 0.5 and timestep == 0")
    include_rejected: bool = Field(False, description="also use images that synthesis rejected")
    keys: str | None = Field(None, description="file of the keys of the images to use: Parquet, CSV or text")
    exclude_keys: str | None = Field(None, description="file of keys of images to leave out")
    best: str | None = Field(
        None, description="the best of each class, e.g. 100:confidence; 100:-entropy takes the lowest"
    )
    skip_bad: bool = Field(False, description="leave out images that are missing or altered instead of stopping")
    balance: bool = Field(False, description="every class equally often, over all manifests together")
    epochs: int = Field(80, gt=0, le=10**6)
    steps: int | None = Field(
        None, gt=0, le=10**9, exclude_if=_is_none, description="optimizer steps in all, in place of epochs"
    )
    batch_size: int = Field(64, gt=1, le=MAX_BATCH, description="images per step, over all workers together")
    seed: int = Field(0, ge=0, le=MAX_SEED)
    val_fraction: float = Field(
        0.05, ge=0, lt=1, description="share of the images held out for validation, by trajectory and LCA partner"
    )
    select: Literal["last", "best"] = Field(
        "last", description="which weights become the student; best is by the validation split"
    )
    allow_other_teacher: bool = Field(False, description="allow a teacher that is not the one the data was made for")
    min_agreement: float = Field(0.5, ge=0, le=1, description="warn if the teacher agrees with fewer labels")
    loggers: Loggers = Field((), description="where metrics go besides metrics.jsonl")
    eval_every: int = Field(
        0, ge=0, le=10**6, description="epochs between evaluations on the test data; 0: once, at the end"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 …")
    threads: int = Field(1, gt=0, le=MAX_THREADS, description="CPU threads; sums depend on it")
    dtype: Literal["fp32", "bf16"] = Field("fp32", description="bf16: autocast of students and teacher; CPUs: AMX")
    channels_last: bool = Field(False, description="channels last in memory: faster on CPUs, and with bf16")
    compile: bool = Field(False, description="torch.compile of the students; excludes cam, gradcam and feature")
    memory_gb: float = Field(
        4.0, ge=0, le=2**20, description="decoded images are kept in memory up to this size; more are streamed"
    )
    cache_dir: str | None = Field(
        None, description="folder of this machine that keeps whole tars of remote datasets; jobs share it"
    )
    cache_gb: float = Field(50.0, ge=0, le=2**20, description="size of cache_dir: the least recently used tars go")
    partitions: int = Field(
        1,
        gt=0,
        le=4096,
        description="parts of the dataset, by tar: images are shuffled within each, and every batch takes equally many "
        "from all, so that each of N workers (N divides it) reads and caches only 1/N of the tars; "
        "1: shuffled as a whole",
    )
    stall_seconds: float = Field(
        60.0, gt=0, le=10**6, description="time after which a store that sends nothing more ends the run"
    )
    checkpoint_seconds: float = Field(30.0, ge=0, le=10**9, description="time between checkpoints; 0: at every step")

    def total_steps(self, per_epoch: int) -> int:
        """Optimizer steps of the whole training, with ``per_epoch`` in an epoch."""
        return self.steps or self.epochs * per_epoch

    @property
    def length(self) -> str:
        """``80 epochs`` or ``1000 steps``."""
        return f"{self.steps} steps" if self.steps else f"{self.epochs} epochs"

    @field_validator("students")
    @classmethod
    def _no_name_twice(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if twice := sorted({name for name in value if value.count(name) > 1}):
            raise ValueError(f"student named twice: {', '.join(twice)}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "DistillSettings":
        if self.select == "best" and not self.val_fraction:
            raise ValueError("select: best needs val_fraction > 0 to choose by")
        if self.compile and (self.loss.cam or self.loss.gradcam or self.loss.feature):
            raise ValueError("compile excludes loss.cam, loss.gradcam and loss.feature: they look inside the network")
        return self

    @model_validator(mode="after")
    def _cached_views_recur(self) -> "DistillSettings":
        wrong = [f"loss.{name}" for name in ("cam", "gradcam", "feature") if getattr(self.loss, name)]
        wrong += [f"augment.{name}" for name in ("cutmix", "mixup") if getattr(self.augment, name)]
        if self.teacher_cache.enabled and wrong:
            raise ValueError(
                f"teacher_cache.enabled needs {' and '.join(f'{name} 0' for name in wrong)}: their views never recur"
            )
        if self.teacher_cache.enabled and not self.augment.num_views:
            raise ValueError("teacher_cache.enabled needs augment.num_views, the number of views of each image, say 8")
        return self


PLACE = frozenset(
    {"memory_gb", "cache_dir", "cache_gb", "stall_seconds"}
    | {"checkpoint_seconds", "min_agreement", "eval_every", "loggers"}
)
"""Settings that change where or how a run goes, not what it computes: free to differ on resume."""
