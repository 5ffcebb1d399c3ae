"""Conversations against transformers: ids, patches and positions of its processor, and logits of a tiny model."""

import json

import jax
import numpy as np
import pytest
import tokenizers

torch = pytest.importorskip("torch", reason="torch is the [parity] extra")
transformers = pytest.importorskip("transformers", reason="transformers is the [parity] extra")

import qwen_reference as reference  # noqa: E402

from data_pipelines import video  # noqa: E402
from data_pipelines.patches import normalise_patches  # noqa: E402
from marc_jax import messages  # noqa: E402
from marc_jax.models import prompts, qwen25_vl  # noqa: E402
from marc_jax.tokenizer import Tokenizer  # noqa: E402

SMALL = {"min_pixels": 16 * 784, "max_pixels": 30 * 784}


def conversations(folder, image):
    bikes = {"type": "video", "video": str(folder / "bikes.mp4"), "fps": 1.0, "max_frames": 6, **SMALL}
    dog = {"type": "video", "video": str(folder / "dog.mp4"), "nframes": 4, **SMALL}
    photo = {"type": "image", "image": str(image), **SMALL}
    say = lambda words: {"type": "text", "text": words}  # noqa: E731
    return {
        "video": [{"role": "user", "content": [bikes, say("What happens?")]}],
        "image": [{"role": "user", "content": [say("In "), photo, say(" you see?")]}],
        "two videos and an image": [{"role": "user", "content": [bikes, photo, say("or "), dog, say("?")]}],
        "turns": [
            {"role": "system", "content": "Réponds brièvement."},
            {"role": "user", "content": [dog, say("Qu'est-ce que c'est\u00a0?")]},
            {"role": "assistant", "content": "Un chien, né en 2013."},
            {"role": "user", "content": [photo, photo, say("Lequel?\n\n")]},
        ],
        "text": [{"role": "user", "content": "Is 12345 > 678?"}],
    }


@pytest.fixture(scope="module")
def image(test_data, tmp_path_factory):
    import cv2

    path = tmp_path_factory.mktemp("image") / "frame.png"
    cv2.imwrite(str(path), video.read_frames(test_data / "videos" / "demo.mp4", num_frames=2).frames[0][..., ::-1])
    return path


@pytest.fixture(scope="module")
def processor(test_data, qwen_vl_utils):
    folder = test_data / "tokenizer" / "qwen2.5"
    size = {"shortest_edge": 3136, "longest_edge": 12845056}
    return transformers.Qwen2_5_VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(size=size),
        tokenizer=transformers.AutoTokenizer.from_pretrained(folder),
        video_processor=transformers.Qwen2VLVideoProcessor(size=size),
        chat_template=json.loads((folder / "chat_template.json").read_text())["chat_template"],
    )


def processed(processor, qwen_vl_utils, asked):
    """What a user of transformers and qwen-vl-utils gets for a conversation."""
    text = processor.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    images, videos, _ = qwen_vl_utils.process_vision_info(asked, return_video_kwargs=True, return_video_metadata=True)
    how = {"do_sample_frames": False, "return_tensors": "pt"}
    if videos:
        how |= {"videos": [v for v, _ in videos], "video_metadata": [m for _, m in videos]}
    return processor(text=[text], images=images, **how)


def rope_index(model, theirs):
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    return model.model.get_rope_index(**{k: theirs[k] for k in names if k in theirs})


@pytest.mark.parametrize("name", ["video", "image", "two videos and an image", "turns", "text"])
def test_the_processor_of_transformers_says_the_same(processor, qwen_vl_utils, test_data, image, name):
    asked = conversations(test_data / "videos", image)[name]
    theirs = processed(processor, qwen_vl_utils, asked)
    tokenizer = Tokenizer.load(test_data / "tokenizer" / "qwen2.5")
    got = messages.process(tokenizer, asked, rule="transformers5")
    assert got.prompt.tokens.tolist() == theirs["input_ids"][0].tolist()
    for kind, pixels, grids in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        mine = [visual for visual in got.visuals if visual.kind == kind]
        if not mine:
            assert pixels not in theirs
            continue
        assert [list(visual.grid) for visual in mine] == theirs[grids].tolist()
        rows = np.concatenate([normalise_patches(visual.patches).reshape(-1, 1176) for visual in mine])
        off = np.abs(rows - theirs[pixels].numpy())
        # One level of a pixel is 0.0146. Pillow 13 goes height first for this picture: see resize_frames.
        assert off.max() < 0.016 and (off > 1e-3).mean() < (0.12 if kind == "image" else 2e-3)
    videos = [visual for visual in got.visuals if visual.kind == "video"]
    if videos:
        expected = np.asarray(theirs["second_per_grid_ts"], float)
        np.testing.assert_allclose([visual.second_per_grid for visual in videos], expected, rtol=1e-6)
    positions, delta = rope_index(reference.hf_model(), theirs)
    assert (got.prompt.pos == positions[:, 0].numpy()).all()
    assert got.prompt.next_pos == len(got.prompt.tokens) + int(delta)


@pytest.mark.parametrize("second_per_grid", [1.0, 2.0, 3.7, 0.4])
def test_positions_of_many_grids_by_transformers_rule(second_per_grid):
    model, pads = reference.hf_model(), {"image": 305, "video": 306}
    rng = np.random.default_rng(0)
    for _ in range(20):
        visuals, ids = [], [11, 12]
        for _ in range(int(rng.integers(1, 4))):
            kind = ["image", "video"][int(rng.integers(2))]
            grid = (1 if kind == "image" else int(rng.integers(1, 9)), *(int(x) for x in rng.integers(1, 7, 2)))
            visuals.append(prompts.Visual(kind, grid, second_per_grid))
            ids += [303, pads[kind], 304, *range(20, 20 + int(rng.integers(0, 5)))]
        got = prompts.expand(ids, visuals, pads, rule="transformers5")
        tokens = torch.from_numpy(got.tokens)[None].long()
        theirs = {"input_ids": tokens, "mm_token_type_ids": (tokens == 305) + 2 * (tokens == 306)}
        for kind, name in (("image", "image_grid_thw"), ("video", "video_grid_thw")):
            grids = [(v.grid[0], 2 * v.grid[1], 2 * v.grid[2]) for v in visuals if v.kind == kind]
            theirs |= {name: torch.tensor(grids)} if grids else {}
        theirs["second_per_grid_ts"] = torch.tensor([second_per_grid] * len(visuals))
        positions, delta = rope_index(model, theirs)
        assert (got.pos == positions[:, 0].numpy()).all()
        assert got.next_pos == len(got.tokens) + int(delta)


@pytest.fixture
def small_words(tmp_path):
    """A tokenizer whose visual ids are those of the tiny reference model."""
    names = {"<|vision_start|>": 303, "<|vision_end|>": 304, "<|image_pad|>": 305, "<|video_pad|>": 306}
    words = ["[UNK]", "<|im_start|>", "<|im_end|>", "system", "user", "assistant", "or", "?", "You", "are", "helpful"]
    vocab = {**{word: i for i, word in enumerate(words)}, **names}
    tok = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    tok.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tok.add_special_tokens([tokenizers.AddedToken(n, special=True) for n in [*names, "<|im_start|>", "<|im_end|>"]])
    tok.save(str(tmp_path / "tokenizer.json"))
    return Tokenizer.load(tmp_path)


@pytest.mark.parametrize("rule", ["published", "transformers5"])
def test_logits_of_two_videos_and_an_image(small_words, test_data, image, rule):
    """From files to logits. The published positions are handed to transformers, its own rule it finds by itself."""
    model = reference.hf_model(seed=5)
    cfg, params = reference.ours(model)
    asked = conversations(test_data / "videos", image)["two videos and an image"]
    inputs = messages.process(small_words, asked, rule=rule, max_length=cfg.text.max_position_embeddings)
    assert len({visual.grid[1:] for visual in inputs.visuals}) == 3

    def joined(kind):
        mine = [v for v in inputs.visuals if v.kind == kind]
        rows = np.concatenate([normalise_patches(v.patches).reshape(-1, 1176) for v in mine])
        return torch.from_numpy(rows), torch.tensor([v.grid for v in mine])

    tokens = torch.from_numpy(inputs.prompt.tokens)[None].long()
    given = dict(zip(("pixel_values", "image_grid_thw"), joined("image"), strict=True))
    given |= dict(zip(("pixel_values_videos", "video_grid_thw"), joined("video"), strict=True))
    if rule == "published":
        given["position_ids"] = torch.from_numpy(inputs.prompt.pos)[:, None].long()
    else:
        given["mm_token_type_ids"] = (tokens == 305) + 2 * (tokens == 306)
        seconds = [v.second_per_grid for v in inputs.visuals if v.kind == "video"]
        given["second_per_grid_ts"] = torch.tensor(seconds)
    with torch.no_grad():
        theirs = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), **given).logits[0].numpy()

    encode = jax.jit(lambda x, grid: qwen25_vl.bind(cfg, params).vision(x, grid), static_argnums=1)
    padded = prompts.pad_prompts([inputs.prompt], len(inputs.prompt.tokens) + 5)

    @jax.jit
    def forward(rows):
        bound = qwen25_vl.bind(cfg, params)
        x = bound.embed(padded.tokens_bp, rows, padded.vis_index_bp)
        return bound.logits(bound.prefill(x, padded.pos_3bp, padded.mask_bp)[0])

    with jax.default_matmul_precision("highest"):
        got = np.asarray(forward(messages.encode_visuals(encode, [inputs])))[0, : len(theirs)]
    np.testing.assert_allclose(got, theirs, atol=1e-5, rtol=0)
