"""Host side: files to arrays. Never imports jax, never imports marc_jax."""
