"""What the name of a classifier refers to, and what may be built from a stored name. Imports no torch."""

import re
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Literal

from manifests.errors import DataError, UsageError
from stages.models.settings import SMALL, Stem

Scheme = Literal["builtin", "timm", "torchvision", "hf", "onnx", "code"]
IMAGENET_NETS = ("resnet18", "resnet34", "vgg11", "mobilenetv2", "shufflenetv2")  # built-ins with a stem to adapt
_CODE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def split_name(name: str) -> tuple[Scheme, str]:
    """The scheme of an architecture's name, and the rest of it.

    >>> split_name("timm:resnet18"), split_name("my.nets:build"), split_name("wrn-16-1")
    (('timm', 'resnet18'), ('code', 'my.nets:build'), ('builtin', 'wrn-16-1'))
    """
    prefix, colon, rest = name.partition(":")
    if colon and prefix in ("timm", "torchvision", "hf", "onnx"):
        return prefix, rest  # type: ignore[return-value]
    if name.endswith(".onnx"):
        return "onnx", name
    return ("code", name) if _CODE.fullmatch(name) and prefix != "embedded" else ("builtin", name)


def tells_all(name: str) -> bool:
    """True where the files that ``name`` stands for tell weights, input and classes by themselves.

    >>> tells_all("embedded:digits"), tells_all("hf:microsoft/resnet-18"), tells_all("resnet20")
    (True, True, False)
    """
    scheme, rest = split_name(name)
    if scheme == "timm":
        return "." in rest or Path(rest).is_dir()
    return scheme == "hf" or name.startswith("embedded:") or name.endswith((".yaml", ".yml")) or Path(name).is_dir()


def only_named(name: str) -> bool:
    """Whether only the user may name it: loading it runs foreign code, or fetches something.

    Built-in, timm and torchvision architectures are built without weights; ``hf:`` from a local folder.
    """
    scheme, rest = split_name(name)
    return scheme in ("code", "onnx") or (scheme == "hf" and not Path(rest).is_dir())


def check_stored(name: str, where: str) -> None:
    """Refuse to build what a stored file names where that is :func:`only_named`.

    Raises UsageError saying how to load it by name instead.
    """
    if only_named(name):
        what = "is your own code" if split_name(name)[0] == "code" else "is not at hand here"
        raise UsageError(
            f"{where} names '{name}', which {what} and is never loaded because a file says so: "
            f"name it yourself, in a FILE.yaml with name: {name}, weights, input and num_classes"
        )


def default_stem(name: str, size: int, student: bool = False) -> Stem:
    """``small`` where an ImageNet network meets images of up to 64 px: always for built-ins, for students of others.

    A teacher from outside has weights that were trained with one stem or the other: its user says which.
    """
    scheme, rest = split_name(name)
    adaptable = rest in IMAGENET_NETS if scheme == "builtin" else student and scheme in ("timm", "torchvision")
    return "small" if adaptable and size <= SMALL else "native"


def source_file(name: str) -> Path:
    """The file of the module in ``module.path:function``, found without running it: here first, then ``sys.path``.

    Raises DataError where there is none.
    """
    module = name.partition(":")[0]
    path: list[str] | None = [str(Path.cwd()), *sys.path]
    spec = None
    for part in module.split("."):  # not the full name: namespace packages look for their parent in sys.modules
        spec = PathFinder.find_spec(part, path) if path is not None else None
        if spec is None:
            break
        path = list(spec.submodule_search_locations) if spec.submodule_search_locations is not None else None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise DataError(f"'{name}': no Python file for module {module}, neither in {Path.cwd()} nor on sys.path")
    return Path(spec.origin)
