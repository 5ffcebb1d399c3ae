"""torchvision beside a torch for CPUs, whichever torch it was built for."""

import sys

_operators = []  # they live as long as the process


def load() -> bool:
    """Imports torchvision; False where it is not installed.

    Built for CUDA, it loads on a torch for CPUs only if two of its operators exist, at least by name.
    """
    import torch

    try:
        import torchvision  # noqa: F401
    except ImportError:
        return False
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        _operators.append(torch.library.Library("torchvision", "DEF"))
        for name in ("nms", "qnms"):
            _operators[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401
    return True
