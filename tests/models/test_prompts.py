"""M-RoPE positions: the published rule's golden values, other rules by name, several visuals, padding."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from marc_jax.models.prompts import Visual, check_rows, expand, pad_prompts

PADS = {"image": 305, "video": 306}


def _video(grid, spg, rule, before=16, after=3):
    return expand([*range(before), 306, *range(20, 20 + after)], [Visual("video", grid, spg)], PADS, rule=rule)


@pytest.mark.parametrize(
    "spg,rule,last_t,first_text,delta",
    [
        (1.0, "published", 78, 79, -3777),
        (1.5, "published", 109, 110, -3746),
        (0.9, "published", 71, 72, -3784),
        (2.7, "published", 183, 184, -3672),
        (1.0, "transformers5", 78, 31, -3788),
        (1.5, "transformers5", 78, 31, -3788),
        (0.9, "transformers5", 16, 31, -3825),
        (2.7, "transformers5", 140, 31, -3726),
    ],
)
def test_golden_positions_of_64_frames(spg, rule, last_t, first_text, delta):
    """Grid 32 x 8 x 15 merged, video from id 16, 11 tokens behind it; measured with transformers 4.51 and 5.17."""
    p = _video((32, 8, 15), spg, rule, after=11)
    visual = np.flatnonzero(p.vis_index >= 0)
    assert p.pos[:, visual[0]].tolist() == [16, 16, 16]
    assert p.pos[0, visual[-1]] == last_t
    assert p.pos[:, visual[-1] + 1].tolist() == [first_text] * 3
    assert p.next_pos - len(p.tokens) == delta


def test_spatial_extent_beyond_the_temporal_one_decides_where_text_goes_on():
    p = _video((2, 3, 9), 1.0, "published", before=1)
    assert p.pos[:, -3].tolist() == [10, 10, 10]


def test_an_image_has_one_time_and_visuals_count_on():
    visuals = [Visual("image", (1, 2, 3)), Visual("video", (2, 1, 1), 1.0)]
    p = expand([1, 305, 2, 306, 3], visuals, PADS)
    assert p.vis_index.tolist() == [-1, *range(6), -1, 6, 7, -1]
    assert p.pos[0].tolist() == [0, *[1] * 6, 4, 5, 7, 8]
    assert p.pos[1].tolist() == [0, 1, 1, 1, 2, 2, 2, 4, 5, 5, 8]
    assert p.pos[2].tolist() == [0, 1, 2, 3, 1, 2, 3, 4, 5, 5, 8]
    assert p.next_pos == 9


def test_kept_patches_keep_their_time_and_the_original_extent():
    full = expand([1, 306, 2], [Visual("video", (8, 2, 2), 1.0)], PADS)
    kept = expand([1, 306, 2], [Visual("video", (2, 2, 2), t_ids=(4, 9.7), extent=15)], PADS)
    assert kept.pos[0].tolist() == [0, *[5] * 4, *[10] * 4, 16]
    assert kept.next_pos == full.next_pos


@pytest.mark.parametrize(
    "ids,visuals,reason",
    [
        ([1, 306, 2], [], "holds 1 placeholders, the prompt has 0 visuals of 0 tokens"),
        ([1, 306, 2], [Visual(), Visual()], "holds 1 placeholders, the prompt has 2 visuals of 2 tokens"),
        ([1, 306, 2], [Visual("image")], r"visual 1 is image \(1 placeholders\), the text has 1 video placeholders"),
        ([306] * 7, [Visual(grid=(2, 2, 2))], "holds 7 placeholders, the prompt has 1 visuals of 8 tokens"),
        ([306] * 9, [Visual(grid=(2, 2, 2))], "holds 9 placeholders, the prompt has 1 visuals of 8 tokens"),
        ([306, 306, 1, 306], [Visual(grid=(1, 1, 4))], "1 visuals of 4 tokens"),
        ([306, 1, 306, 306], [Visual(grid=(3, 1, 1))], r"visual 1 is video \(3 placeholders\), the text has 1 video"),
    ],
)
def test_pads_and_visuals_must_agree(ids, visuals, reason):
    with pytest.raises(ValueError, match=reason):
        expand(ids, visuals, PADS)


def test_expanded_placeholders_stay_as_they_are():
    visuals = [Visual("image", (1, 2, 3)), Visual("video", (2, 1, 1), 1.0), Visual("video", (1, 1, 1), 1.0)]
    one = expand([1, 305, 2, 306, 306, 3], visuals, PADS)
    many = expand([1, *[305] * 6, 2, *[306] * 3, 3], visuals, PADS)
    for field in ("tokens", "pos", "vis_index"):
        assert (getattr(one, field) == getattr(many, field)).all()
    assert one.next_pos == many.next_pos


def test_too_long_a_prompt_and_too_many_rows_name_both_counts():
    visuals = [Visual("video", (4, 5, 6))]
    with pytest.raises(ValueError, match=r"the prompt has 123 tokens \(120 of them visual\), the model takes 122"):
        expand([1, 306, 2, 3], visuals, PADS, max_length=122)
    prompt = expand([1, 306, 2, 3], visuals, PADS, max_length=123)
    check_rows(prompt, 120)
    for rows in (119, 121):
        with pytest.raises(ValueError, match=f"120 visual placeholders, {rows} visual tokens"):
            check_rows(prompt, rows)


def test_padding_keeps_prompts_and_refuses_longer_ones():
    prompts = [_video((2, 1, 2), 1.0, "published"), expand([1, 2], [], PADS)]
    batch = pad_prompts(prompts, 30, pad_id=300)
    assert batch.tokens_bp.shape == (2, 30) and batch.pos_3bp.shape == (3, 2, 30)
    assert batch.mask_bp.sum(1).tolist() == [23, 2]
    assert batch.tokens_bp[1].tolist() == [1, 2] + [300] * 28
    assert (batch.vis_index_bp[1] == -1).all() and batch.next_pos_b.tolist() == [p.next_pos for p in prompts]
    with pytest.raises(ValueError, match="23 tokens.*22"):
        pad_prompts(prompts, 22)


@given(
    st.integers(1, 9), st.integers(1, 6), st.integers(1, 6), st.floats(0, 5, allow_nan=False), st.integers(0, 20)
)
def test_text_after_a_video_never_overlaps_it(t, h, w, spg, before):
    p = _video((t, h, w), spg, "published", before)
    visual = p.pos[:, p.vis_index >= 0]
    after = p.pos[:, np.flatnonzero(p.vis_index >= 0)[-1] + 1 :]
    assert (visual >= before).all() and after.min() == visual.max() + 1
    assert (np.diff(after) == 1).all() and p.next_pos == after.max() + 1


def test_the_longest_prompt_is_the_checkpoints(test_data):
    from marc_jax.models.qwen25_vl import config_from_hf
    from marc_jax.models.weights import hf_config

    cfg = config_from_hf(test_data / "tokenizer" / "qwen2.5")  # a file whose publisher set 8192
    assert cfg.text.max_position_embeddings == 8192
    assert config_from_hf(hf_config(cfg)).text.max_position_embeddings == 8192
