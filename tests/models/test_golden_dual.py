"""The references' answers kept in a file, so that exactness is checked where torch is not installed."""

import jax
import numpy as np
import pytest
from make_golden_dual import CASES, FILE, golden_case, golden_config

from marc_jax.models import clip, clip_weights, perception_encoder, siglip2


@pytest.mark.parametrize("case", CASES)
def test_models_give_the_golden_answers(case):
    golden, cfg = np.load(FILE), golden_config(case)
    family = siglip2 if case == "siglip2" else perception_encoder
    found, pixels, tokens = golden_case(case)
    form = clip_weights.match(cfg, {name: t.shape for name, t in found.items()})
    params = clip_weights.assemble(cfg, form, found.__getitem__, lambda path, shape, piece: piece(()))

    @jax.jit
    def forward(params):
        model = family.bind(cfg, params)
        return clip.unit(model.embed_images(pixels)), clip.unit(model.embed_texts(tokens))

    with jax.default_matmul_precision("highest"):
        images, texts = forward(params)
    np.testing.assert_allclose(images, golden[f"{case}_image"], atol=1e-5)
    np.testing.assert_allclose(texts, golden[f"{case}_text"], atol=1e-5)
