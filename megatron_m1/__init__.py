"""MiniMax-M1 on Megatron-core: the model, its training, its inference."""

from pathlib import Path

import kernels

_ROOT = Path(__file__).resolve().parent.parent

if Path(kernels.__file__ or "").resolve() != _ROOT / "kernels" / "__init__.py":
    # Hugging Face publishes a package of the same name.
    raise ImportError(
        f"'kernels' was imported from {kernels.__file__}, but this project's lies in {_ROOT}: "
        "start python from the project's root (python -m megatron_m1.pretrain), put the root first "
        "in PYTHONPATH, or uninstall the other package (pip uninstall kernels)"
    )
