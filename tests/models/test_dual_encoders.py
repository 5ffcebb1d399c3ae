"""PE-Core and SigLIP 2 against their references, and against plain numpy where no reference is installed."""

import dataclasses

import cpu_torchvision
import dual_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marc_jax.models import clip, perception_encoder, siglip2

TOL = {"atol": 1e-5, "rtol": 1e-5}
PE = perception_encoder.tiny()


@pytest.fixture(scope="module", autouse=True)
def exact():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def meta():
    torch = pytest.importorskip("torch")
    cpu_torchvision.load()
    pytest.importorskip("core.vision_encoder.pe", reason="facebookresearch/perception_models is not on the path")
    return torch


def pe_config(class_token, layers=3):
    image = (64, layers, 4, 373, 56, 14)  # 373 = int(64 * 8960 / 1536)
    return perception_encoder.tiny(image=image, class_token=class_token)


def pixels(*shape):
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


TOKENS = np.array([[88, 5, 7, 89, 0, 0, 0, 0, 0, 0, 0, 0], [88, *range(3, 13), 89], [88, 89, 0, 0, *[0] * 8]], np.int32)


def run(family, cfg, params, method, *args, **options):
    return np.asarray(jax.jit(lambda p, *a: getattr(family.bind(cfg, p), method)(*a, **options))(params, *args))


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("size", [(56, 56), (42, 84), (112, 70), (14, 28)], ids=str)
def test_pe_images_equal_the_original(meta, class_token, size):
    cfg = pe_config(class_token)
    model = reference.meta_model(cfg)
    x = pixels(2, *size, 3)
    with meta.no_grad():
        want = model.encode_image(meta.from_numpy(x).permute(0, 3, 1, 2)).numpy()
    got = run(perception_encoder, cfg, reference.ours(cfg, reference.tensors(model)), "embed_images", x)
    np.testing.assert_allclose(got, want, **TOL)


@pytest.mark.parametrize("length", [12, 7])
def test_pe_texts_equal_the_original(meta, length):
    model = reference.meta_model(PE)
    tokens = TOKENS[:, :length].copy()
    with meta.no_grad():
        want = model.encode_text(meta.from_numpy(tokens).long()).numpy()
    got = run(perception_encoder, PE, reference.ours(PE, reference.tensors(model)), "embed_texts", tokens)
    np.testing.assert_allclose(got, want, **TOL)


@pytest.mark.parametrize("norm", [True, False])
def test_pe_videos_equal_the_original(meta, norm):
    model = reference.meta_model(PE)
    x = pixels(2, 3, 56, 56, 3)
    with meta.no_grad():
        want = model.encode_video(meta.from_numpy(x).permute(0, 1, 4, 2, 3), normalize=norm).numpy()
    params = reference.ours(PE, reference.tensors(model))
    got = run(perception_encoder, PE, params, "embed_videos", x, normalise_frames=norm)
    np.testing.assert_allclose(got, want, **TOL)
    assert not norm or (np.linalg.norm(got, axis=1) < 1).all()
    np.testing.assert_allclose(run(perception_encoder, PE, params, "scale"), model.logit_scale.exp().item(), rtol=1e-6)


def test_siglip_equals_transformers():
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    cfg = siglip2.tiny()
    model = reference.siglip_model(cfg)
    params = reference.ours(cfg, reference.tensors(model))
    x, tokens = pixels(3, 56, 56, 3), np.random.default_rng(2).integers(0, 90, (3, 12)).astype(np.int32)
    with torch.no_grad():
        out = model(input_ids=torch.from_numpy(tokens).long(), pixel_values=torch.from_numpy(x).permute(0, 3, 1, 2))
    images = run(siglip2, cfg, params, "embed_images", x)
    texts = run(siglip2, cfg, params, "embed_texts", tokens)
    unit = lambda a: a / np.linalg.norm(a, axis=-1, keepdims=True)  # noqa: E731
    np.testing.assert_allclose(unit(images), out.image_embeds.numpy(), **TOL)
    np.testing.assert_allclose(unit(texts), out.text_embeds.numpy(), **TOL)
    logits = unit(texts) @ unit(images).T * run(siglip2, cfg, params, "scale") + params["logit_bias"]
    np.testing.assert_allclose(logits, out.logits_per_text.numpy(), atol=1e-4)


def test_rope_against_float64():
    grid, head = (3, 5), 16
    cos, sin = perception_encoder.rope_2d(grid, head, True)
    x = np.random.default_rng(0).standard_normal((1, 16, 2, head))
    got = np.asarray(clip.rotate_pairs(jnp.asarray(x, jnp.float32), cos, sin))
    np.testing.assert_array_equal(got[:, 0], x[:, 0].astype(np.float32))  # the class token does not turn
    for at, row, col in ((1, 1, 1), (2, 1, 2), (6, 2, 1), (15, 3, 5)):
        for pair in range(head // 2):
            place = (col, row)[pair >= head // 4]
            angle = place * 10000.0 ** (-2 * (pair % (head // 4)) / (head // 2))
            a, b = x[0, at, :, 2 * pair], x[0, at, :, 2 * pair + 1]
            np.testing.assert_allclose(got[0, at, :, 2 * pair], a * np.cos(angle) - b * np.sin(angle), atol=1e-5)
            np.testing.assert_allclose(got[0, at, :, 2 * pair + 1], b * np.cos(angle) + a * np.sin(angle), atol=1e-5)


def test_resampling_keeps_a_linear_table_linear_inside():
    table = np.add.outer(np.arange(6.0), 10 * np.arange(6.0)).reshape(36, 1)
    got = np.asarray(clip.resample(jnp.asarray(table), 6, (12, 3))).reshape(12, 3)
    place = (np.arange(12) + 0.5) / 2 - 0.5
    np.testing.assert_allclose(got[:, 1], np.clip(place, 0, 5) + 10 * 2.5, atol=1e-5)
    np.testing.assert_array_equal(clip.resample(jnp.asarray(table), 6, (6, 6)), table)


def test_published_sizes():
    """Parameters of the image tower and of the rest, as counted in the published checkpoints."""
    want = {"B16-224": (93_672_960, 353_986_561), "L14-336": (317_151_232, 353_986_561)}
    want["G14-448"] = (1_882_032_640, 537_233_921)
    for name, (image, rest) in want.items():
        weights = perception_encoder.describe(perception_encoder.pe_core(f"PE-Core-{name}"))
        count = lambda tree: sum(w.size for w in jax.tree.leaves(tree))  # noqa: E731
        assert (count(weights["image"]), count(weights) - count(weights["image"])) == (image, rest)


def test_bfloat16_is_near_float32():
    params = perception_encoder.init(PE, jax.random.key(0))
    x = np.random.default_rng(0).integers(0, 256, (2, 56, 56, 3), np.uint8)
    full = run(perception_encoder, PE, params, "embed_images", x)
    half = jax.jit(lambda p, x: perception_encoder.bind(PE, p, dtype=jnp.bfloat16).embed_images(x))(params, x)
    half = np.asarray(half, np.float32)
    assert np.linalg.norm(half - full) < 2e-2 * np.linalg.norm(full)


def test_an_image_does_not_depend_on_its_batch():
    params = perception_encoder.init(PE, jax.random.key(0))
    x = np.random.default_rng(0).integers(0, 256, (3, 56, 56, 3), np.uint8)
    both = run(perception_encoder, PE, params, "embed_images", x)
    np.testing.assert_allclose(run(perception_encoder, PE, params, "embed_images", x[1:2]), both[1:2], atol=1e-6)


def test_gradients_with_recomputation_are_the_same():
    params = perception_encoder.init(PE, jax.random.key(0))
    x = np.random.default_rng(0).integers(0, 256, (2, 56, 56, 3), np.uint8)

    def loss(params, remat):
        model = perception_encoder.bind(PE, params, remat=remat)
        return jnp.sum(model.embed_images(x) * model.embed_texts(TOKENS[:2]))

    plain, again = (jax.jit(jax.grad(loss), static_argnums=1)(params, remat) for remat in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), plain, again)
    assert np.abs(plain["image"]["pool"]["probe"]).max() > 0


def test_impossible_inputs_are_errors():
    params = perception_encoder.init(PE, jax.random.key(0))
    with pytest.raises(ValueError, match="57x56 pixels does not divide into patches of 14"):
        perception_encoder.bind(PE, params).embed_images(np.zeros((1, 56, 57, 3), np.uint8))
    with pytest.raises(ValueError, match="13 tokens, the model reads 12"):
        perception_encoder.bind(PE, params).embed_texts(np.zeros((1, 13), np.int32))
    with pytest.raises(ValueError, match="PE-Core-L14-336"):
        perception_encoder.pe_core("PE-Core-L14")
    with pytest.raises(ValueError, match="pooling heads"):
        dataclasses.replace(PE, pool_heads=7)
    cfg = siglip2.tiny()
    params = siglip2.init(cfg, jax.random.key(0))
    with pytest.raises(ValueError, match="pad them to 12"):
        siglip2.bind(cfg, params).embed_texts(np.zeros((1, 5), np.int32))
