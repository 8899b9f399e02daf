"""The rows of :mod:`cifar10`: what each changes in the base recipe, and the words that name CIFAR's classes."""

MAPPED = {  # everyday words of the prior's captions that mean the class
    "automobile": "car",
    "bird": "bird",
    "cat": "cat",
    "dog": "dog",
    "frog": "frog",
    "ship": "boat",
    "truck": "truck",
}
UNMAPPED = {"airplane": "projectile", "deer": "gazelle", "horse": "ox"}  # unknown to the prior: the nearest it knows
UNGUIDED, NAMED = ["synth.method=dmkd"], ["synth.prompts.class_names=true"]
LCA, SELECT = ["synth.lca.every=4"], ["synth.min_confidence=0.5"]
PAPER = ["synth.images.intermediates=3"]
ROWS: dict[str, list[str]] = {
    "unguided": UNGUIDED,
    "unguided, named": [*UNGUIDED, *NAMED],
    "unguided, named, selected": [*UNGUIDED, *NAMED, *SELECT],
    "guided": [],
    "guided + LCA": LCA,
    "guided, named": NAMED,
    "guided, named + LCA": [*NAMED, *LCA],
    "guided, named, selected": [*NAMED, *SELECT],
    "guided through z_t": ["synth.guidance.gradient_at=xt"],
    "guided, fitted decoder": ["synth.guidance.decoder=fitted"],
    "guided + mixup": [*LCA, "synth.lca.kind=mixup"],
    "guided + traditional": [*LCA, "synth.lca.kind=traditional"],
    "cmi": ["synth.method=cmi", "synth.cmi.flip=true"],
    "deepinversion": ["synth.method=deepinversion", "synth.deepinversion.flip=true"],
    "dda": ["synth.method=dda", "synth.cmi.flip=true"],
    "guided, 4 images": PAPER,
    "unguided, 4 images": [*UNGUIDED, *PAPER],
    "guided + LCA, 4 images": [*LCA, *PAPER],
}
SWEPT: dict[str, list[str]] = {  # changes of one setting at a time, to choose the base recipe by
    **{f"guided, scale {v}": [f"synth.guidance.step_size={v}"] for v in (0.05, 0.1, 0.2, 0.3, 0.6, 1.0)},
    **{f"guided, bn {v}": [f"synth.guidance.bn={v}"] for v in (0, 1, 3, 10, 30, 100)},
    **{
        f"guided, interval {v}": [f"synth.guidance.interval=[{v}]"]
        for v in ("0.0,0.8", "0.0,1.0", "0.4,1.0", "0.7,1.0")
    },
    **{f"guided, cfg {v}": [f"synth.prior.cfg_scale={v}"] for v in (1, 2, 4)},
    **{f"guided, groups of {v}": [f"synth.group_size={v}"] for v in (50, 100, 250)},
    **{f"guided, {v} steps": [f"synth.prior.steps={v}"] for v in (10, 15, 25, 50)},
    "guided, dpmsolver++ 15 steps": ["synth.prior.steps=15", "synth.prior.scheduler=dpmsolver++"],
    "guided, two updates": ["synth.guidance.updates_per_step=2"],
    "guided, every second step": ["synth.guidance.every=2"],
    "guided, shifted views": ["synth.guidance.jitter=0.125"],
    "guided + LCA on 30 %": [*LCA, "synth.lca.probability=0.3"],
    "guided + LCA, once": ["synth.lca.every=6", "synth.lca.interval=[0.0,0.4]"],
    "guided, tau 1": ["distill.loss.temperature=1"],
    "guided, tau 10": ["distill.loss.temperature=10"],
    "guided, no mixed views": ["distill.augment.cutmix=0", "distill.augment.mixup=0"],
    "guided, every view mixed": ["distill.augment.cutmix=0.5", "distill.augment.mixup=0.5"],
    "guided, lr 0.3": ["distill.optimizer.lr=0.3"],
    "guided + late LCA": ["synth.lca.every=3", "synth.lca.interval=[0.4,0.8]"],
}
REAL = {"real": ["distill.loss.kd=0", "distill.loss.ce=1"], "real-kd": []}
BASE, CEILING = "unguided", "real-kd"
