"""The data contract: rows, shards, manifests; how they are stored, read and verified. Imports no stage, no torch.

from manifests import Manifest, verify
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors
    from manifests.errors import (  # noqa: F401
        DataError,
        FactoryError,
        Interrupted,
        LinkError,
        NumericsError,
        StoreError,
        UsageError,
    )
    from manifests.integrity import verify  # noqa: F401
    from manifests.reader import Manifest  # noqa: F401
    from manifests.shard import ShardWriter  # noqa: F401


def lazy_exports(
    package: str, modules: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """``__getattr__``, ``__dir__`` and ``__all__`` (PEP 562) of a ``package`` whose names are imported on first use.

    ``modules``: the module of each name. No name may be that of a module in the package.
    """

    def load(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(modules[name]), name)

    return load, lambda: sorted(modules), sorted(modules)


_ERRORS = ("FactoryError", "UsageError", "DataError", "LinkError", "StoreError", "NumericsError", "Interrupted")
_MODULES = {"Manifest": "manifests.reader", "ShardWriter": "manifests.shard", "verify": "manifests.integrity"}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _MODULES | dict.fromkeys(_ERRORS, "manifests.errors"))
