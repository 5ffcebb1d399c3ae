"""marc_jax: video language models that read one frame's worth of visual tokens, in JAX."""

import os

__version__ = "0.1.0"

# On a GPU XLA may compute matrix products by Triton kernels of its own, which it picks by timing each alone. In whole
# steps they are slower than cuBLAS: 121.1 against 112.7 ms for a training step (docs/performance.md). XLA reads this
# when the first device is asked for; a choice of yours in XLA_FLAGS stands.
if "xla_gpu_enable_triton_gemm" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_triton_gemm=false".strip()
