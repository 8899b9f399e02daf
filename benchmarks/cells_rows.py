"""The questions that :mod:`cells` answers: the sets of images they need, and the rows that learn from these."""

from dataclasses import dataclass, field

UNGUIDED = ("synth.method=dmkd",)
LCA = ("synth.lca.every=4",)  # in the first half of 25 steps, as the base recipe says: at steps 4, 8 and 12
WHOLE = ("synth.guidance.interval=[0.0,1.0]",)
PLAIN = ("distill.augment.cutmix=0", "distill.augment.mixup=0")

# DiffDFKD's own protocol: guided from the first step, four x̂0 of each trajectory besides the final image, a cut
# between any two of them; 200 trajectories a group, so that 600 are whole groups
PAPER = (*WHOLE, "synth.images.intermediates=4", "synth.group_size=200")
PAPER_LCA = ("synth.lca.every=5", "synth.lca.interval=[0.0,1.0]")
PERMUTATION = ("synth.lca.pairs=permutation",)  # one permutation and one box a class, as in the public code
DDPM = ("synth.prior.scheduler=ddpm",)
PAPER_TRAINING = (*PLAIN, "distill.loss.temperature=30", "distill.batch_size=200")

CMI = ("synth.method=cmi", "synth.cmi.flip=true", "synth.cmi.steps=100", "synth.cmi.width=32", "synth.cmi.bn=200")
# CMI's published 1 is 160 (means) to 320 (variances) for this teacher, DeepInversion's 10 is 1,600 to 3,200; ours was
# 10 for both. As published: ce 1, a contrastive temperature of 0.2, no factor for the first layer. Shorter: 200 of 500
# steps with half the width, 400 of 2,000.
CMI_PUBLISHED = (
    *("synth.method=cmi", "synth.cmi.flip=true", "synth.cmi.steps=200", "synth.cmi.width=32"),
    *("synth.cmi.ce=1", "synth.cmi.temperature=0.2"),
)
DEEPINVERSION = (
    *("synth.method=deepinversion", "synth.deepinversion.flip=true", "synth.deepinversion.steps=400"),
    "synth.deepinversion.first_bn=1",
)
# the 1,500 images as one shard, so that every group but the first joins those before it
POPULATION = ("synth.groups_per_shard=6",)
FEW = ("synth.prior.scheduler=dpmsolver++", "synth.prior.steps=6")
THREE = ("synth.guidance.updates_per_step=3",)
DIGITS = ("synth.group_size=100", "synth.guidance.bn=1.0")  # bn: what the published 0.1 is for this teacher

CIFAR_SETS: dict[str, tuple[str, ...]] = {  # what a set changes in benchmarks/cifar10.yaml
    "unguided": UNGUIDED,
    "guided": (),
    "LCA": LCA,
    **{f"LCA, scale {v}": (*LCA, f"synth.guidance.step_size={v}") for v in (0.1, 0.15, 0.2)},
    "LCA, bn 30": (*LCA, "synth.guidance.bn=30"),
    "LCA, permutation": (*LCA, *PERMUTATION),
    "ddim, none": PAPER,
    "ddim, LCA": (*PAPER, *PAPER_LCA),
    "ddpm, none": (*PAPER, *DDPM),
    "ddpm, LCA": (*PAPER, *DDPM, *PAPER_LCA),
    "ddim, LCA, permutation": (*PAPER, *PAPER_LCA, *PERMUTATION),
    "ddpm, LCA, permutation": (*PAPER, *DDPM, *PAPER_LCA, *PERMUTATION),
    **{f"bn {v}": (f"synth.guidance.bn={v}",) for v in (3, 20, 30, 60, 100)},
    "all steps": WHOLE,
    "all steps, bn 30": (*WHOLE, "synth.guidance.bn=30"),
    "ddpm": DDPM,
    "CFG 3": ("synth.prior.cfg_scale=3",),
    "CFG 3, bn 30": ("synth.prior.cfg_scale=3", "synth.guidance.bn=30"),
    "scale 0.2": ("synth.guidance.step_size=0.2",),
    "groups of 500": ("synth.group_size=500",),
    "population 0.5": (*POPULATION, "synth.guidance.bn_population=0.5"),
    "population 0.5, bn 20": (*POPULATION, "synth.guidance.bn_population=0.5", "synth.guidance.bn=20"),
    "population 0.9, bn 100": (*POPULATION, "synth.guidance.bn_population=0.9", "synth.guidance.bn=100"),
    **{f"energy {v}": (f"synth.guidance.energy={v}",) for v in (0.1, 1)},
    "energy 1, no class prior": ("synth.guidance.energy=1", "synth.guidance.ce=0"),
    **{f"entropy {v}": (f"synth.guidance.entropy={v}",) for v in (-0.3, 1)},
    **{f"cmi, bn {v}": (*CMI_PUBLISHED, f"synth.cmi.bn={v}") for v in (10, 100, 200, 300)},
    **{f"deepinversion, bn {v}": (*DEEPINVERSION, f"synth.deepinversion.bn={v}") for v in (10, 1000, 2000, 3000)},
    "inverted": CMI,
    "unguided, 6 steps": (*UNGUIDED, *FEW),
    "6 steps": FEW,
    "6 steps, three updates": (*FEW, *THREE),
}
DIGITS_SETS: dict[str, tuple[str, ...]] = {
    "unguided": (*DIGITS, *UNGUIDED),
    "guided": DIGITS,
    "guided, scale 1": (*DIGITS, "synth.guidance.step_size=1.0"),
    "guided, all steps": (*DIGITS, *WHOLE),
    "guided, all steps, scale 1": (*DIGITS, *WHOLE, "synth.guidance.step_size=1.0"),
    "guided, bn 10": (*DIGITS, "synth.guidance.bn=10"),
}

DEMO = ("synth.groups_per_shard=1",)  # groups of 50, as the demo recipe says
LCM = ("synth.prior.distilled=lcm", "synth.prior.scheduler=lcm", "synth.prior.steps=4")
DISTILLED = (*DEMO, "synth.prior.path=priors/strokes32-lcm", *LCM)
STROKES_SETS: dict[str, tuple[str, ...]] = {  # what a set changes in the demo recipe
    "unguided": (*DEMO, *UNGUIDED, "synth.prior.steps=25"),
    "guided": (*DEMO, "synth.prior.steps=25"),
    "6 steps": (*DEMO, *FEW),
    "6 steps, three updates": (*DEMO, *FEW, *THREE),
    "4 distilled": DISTILLED,
    "4 distilled, three updates": (*DISTILLED, *THREE),
    "2 distilled, three updates": (*DISTILLED, *THREE, "synth.prior.steps=2"),
}


@dataclass(frozen=True)
class Part:
    """Images of one stored set: its first ``trajectories`` (real: images), of these the rows that satisfy ``where``,
    of these the ``best`` of each class, those that the teacher is surest of."""

    name: str
    trajectories: int = 1500
    where: str | None = None
    best: int | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Row:
    """What a student learns from, and how: ``train`` changes the recipe's ``distill`` section.

    Without ``steps`` there is no student: the images are only judged, after the boxes of the mixes that the set
    ``boxes`` went through were cut out of their pixels, where one is named.
    """

    parts: tuple[Part, ...]
    train: tuple[str, ...] = ()
    steps: int = 800
    boxes: str | None = None


@dataclass(frozen=True)
class Question:
    """Rows of one table. ``domain``: what the teacher knows, ``cifar10`` or ``digits`` (from a prior of photographs),
    or ``strokes``: digits from a prior of pen strokes."""

    about: str
    rows: dict[str, Row]
    domain: str = "cifar10"
    base: str = field(default="")  # the row that others are compared with, by seed


def of(name: str, steps: int = 800, train: tuple[str, ...] = (), **part: object) -> Row:
    """A row of one set."""
    return Row((Part(name, **part),), train, steps)  # type: ignore[arg-type]


REAL = "real"
SCHEDULES: dict[str, tuple[int, tuple[str, ...]]] = {  # one list for every row of the headline
    "800": (800, ()),
    "2400": (2400, ()),
    "2400, EMA 0.999": (2400, ("distill.optimizer.ema=0.999",)),
    "2400, lr 0.2": (2400, ("distill.optimizer.lr=0.2",)),
    "2400, every view mixed": (2400, ("distill.augment.cutmix=0.5", "distill.augment.mixup=0.5")),
    "2400, tau 10": (2400, ("distill.loss.temperature=10",)),
    "4800": (4800, ()),
}
SCREENED = (
    *(name for name in CIFAR_SETS if name.startswith(("bn ", "all steps", "CFG"))),
    *("ddpm", "scale 0.2", "groups of 500"),
    *(name for name in CIFAR_SETS if name.startswith(("population", "energy", "entropy"))),
)

QUESTIONS: dict[str, Question] = {
    "alike": Question(
        "does cutting boxes out of pixels raise the cosine between images of a class as much as latent CutMix does?",
        {
            "guided": of("guided", 0),
            "LCA": of("LCA", 0),
            "guided, boxes of LCA cut out of its pixels": Row((Part("guided"),), steps=0, boxes="LCA"),
            "unguided": of("unguided", 0),
            "real": of(REAL, 0),
            "real, boxes of LCA cut out of its pixels": Row((Part(REAL),), steps=0, boxes="LCA"),
        },
        base="guided",
    ),
    "views": Question(
        "is latent CutMix worth more where stage 2 mixes no pixels itself (H3), and after longer training (H7)?",
        {
            "guided, plain views": of("guided", 800, PLAIN),
            "LCA, plain views": of("LCA", 800, PLAIN),
            "guided, mixed views": of("guided"),
            "LCA, mixed views": of("LCA"),
            "guided, plain views, 2400": of("guided", 2400, PLAIN),
            "LCA, plain views, 2400": of("LCA", 2400, PLAIN),
            "guided, plain views, 5000": of("guided", 5000, PLAIN),
            "LCA, plain views, 5000": of("LCA", 5000, PLAIN),
        },
        base="guided, plain views",
    ),
    "stronger": Question(
        "does latent CutMix act as stronger guidance, so that its loss goes at a smaller scale (H2, H8)?",
        {name: of(name) for name in CIFAR_SETS if name.startswith("LCA, ")} | {"guided": of("guided")},
        base="guided",
    ),
    "protocol": Question(
        "latent CutMix in the paper's own protocol: 600 trajectories, five images each (H1), and both samplers (H5)",
        {
            f"{sampler}, {name}": of(
                f"{sampler}, {'LCA' if 'LCA' in name else 'none'}",
                3000,
                PAPER_TRAINING,
                **({"where": "timestep == 0"} if "finals" in name else {}),
                trajectories=3000 if "3,000" in name else 600,
            )
            for sampler in ("ddim", "ddpm")
            for name in ("none", "LCA", "600 finals", "LCA, 600 finals", "3,000 finals")
        }
        | {
            f"{sampler}, LCA, permutation": of(f"{sampler}, LCA, permutation", 3000, PAPER_TRAINING, trajectories=600)
            for sampler in ("ddim", "ddpm")
        },
        base="ddim, none",
    ),
    "schedule": Question(
        "which training suits every row of the headline: 1,500 images each",
        {
            f"{name}, {schedule}": of(data, steps, train)
            for schedule, (steps, train) in SCHEDULES.items()
            for name, data in (("guided", "guided"), ("unguided", "unguided"), ("real-kd", REAL))
        },
        base="unguided, 800",
    ),
    "images": Question(
        "which 1,500 images teach most: one change of the base recipe each, 800 steps",
        {
            **{name: of(name) for name in ("guided", *SCREENED)},
            "best half of 3,000": of("guided", trajectories=3000, best=150),
            "1,125 guided, 375 inverted": Row((Part("guided", 1125), Part("inverted", 375))),
            "1,350 guided, 150 inverted": Row((Part("guided", 1350), Part("inverted", 150))),
            "inverted": of("inverted"),
            "1,125 guided, 375 unguided": Row((Part("guided", 1125), Part("unguided", 375))),
        },
        base="guided",
    ),
    "inversion": Question(
        "what the older methods reach with the published BatchNorm weights in our unit (10 was ours)",
        {
            "guided": of("guided"),
            **{name: of(name) for name in CIFAR_SETS if name.startswith(("cmi, ", "deepinversion, "))},
        },
        base="guided",
    ),
    "few-steps": Question(
        "what few sampling steps cost at equal images, and win at equal time: 2,400 steps of training",
        {
            "unguided": of("unguided", 2400),
            "guided": of("guided", 2400),
            "6 steps": of("6 steps", 2400),
            "6 steps, three updates": of("6 steps, three updates", 2400),
            "6 steps, 6,000 images": of("6 steps", 2400, trajectories=6000),
            "6 steps, three updates, 4,500 images": of("6 steps, three updates", 2400, trajectories=4500),
        },
        base="guided",
    ),
    "few-strokes": Question(
        "the same on digits, from the prior of pen strokes and its few-step twin: two images a class, or as many as "
        "take the CPU seconds of those in 25 steps; 2,400 steps of 32",
        {
            **{name: of(name, 2400, trajectories=20) for name in STROKES_SETS},
            **{
                f"{name}, {count} images": of(name, 2400, trajectories=count)
                for name, count in {
                    "6 steps": 62,
                    "6 steps, three updates": 49,
                    "4 distilled, three updates": 84,
                    "2 distilled, three updates": 148,
                }.items()
            },
        },
        domain="strokes",
        base="guided",
    ),
    "shift": Question(
        "domain shift: a prior of photographs, a teacher of handwritten digits; 400 images, 1,000 steps of 64",
        {
            **{name: of(name, 1000, trajectories=400) for name in DIGITS_SETS},
            **{f"guided, {count} images": of("guided", 1000, trajectories=count) for count in (800, 1600)},
            "real-kd": of(REAL, 1000, trajectories=400),
        },
        domain="digits",
        base="unguided",
    ),
}
