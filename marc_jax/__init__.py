"""marc_jax: video language models that read one frame's worth of visual tokens, in JAX."""

__version__ = "0.1.0"
