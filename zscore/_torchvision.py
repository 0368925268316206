"""Lets a CUDA build of torchvision be imported beside a CPU build of torch.

vLLM's CPU wheel depends on torchvision, and an index that knows nothing of CPU builds serves the CUDA one. Its
compiled operators can't be loaded then, and `import torchvision` (which transformers does too) fails on the shapes
that it registers for two of them. Only its pure Python parts are needed here, so declaring those two is enough.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[Any] = []  # a Library's declarations end with it


def ensure_importable() -> bool:
    """Make `import torchvision` work where it is installed; call before importing transformers or vllm.

    Does nothing where torch has CUDA, where torchvision is absent, and where its compiled operators load.

    Returns:
        Whether operators had to be declared (by this call or an earlier one).
    """
    if _declared:
        return True
    import torch

    if torch.version.cuda is not None:
        return False
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or _compiled_ops_load(Path(spec.origin).parent):
        return False
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for schema in _SCHEMAS:
        library.define(schema)  # type: ignore[no-untyped-call]
    _declared.append(library)
    return True


def _compiled_ops_load(package: Path) -> bool:
    import torch

    for path in sorted(package.glob("_C*.so")):
        try:
            torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
        except OSError:  # built for another torch: the case that this module is for
            return False
        return True
    return False
