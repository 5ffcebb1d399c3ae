"""transformers' answers kept in a file, so that exactness is checked where torch is not installed."""

import jax
import numpy as np
from make_golden import FILE, golden_case, golden_config

from marc_jax.models import qwen25_vl, weights


def test_model_gives_the_golden_answers():
    golden = np.load(FILE)
    cfg = golden_config()
    tensors, patches, prompt = golden_case()
    params = weights.assemble(cfg, tensors.__getitem__, lambda path, shape, piece: piece(()))

    @jax.jit
    def forward(params):
        model = qwen25_vl.bind(cfg, params)
        visual = model.vision(patches, (10, 14))
        x = model.embed(prompt.tokens[None], visual.reshape(1, -1, cfg.text.hidden_size), prompt.vis_index[None])
        hidden, _ = model.prefill(x, prompt.pos[:, None], np.ones((1, len(prompt.tokens)), bool))
        return visual, model.logits(hidden)[0]

    with jax.default_matmul_precision("highest"):
        visual, logits = forward(params)
    np.testing.assert_allclose(visual, golden["visual"], atol=1e-5)
    np.testing.assert_allclose(np.asarray(logits)[prompt.vis_index < 0], golden["logits"], atol=1e-5)
