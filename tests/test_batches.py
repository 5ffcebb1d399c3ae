"""Host batches: the same step gives the same batch, spans become patches, a prompt cut in two is the prompt."""

import numpy as np
import pytest

from data_pipelines.synthetic import recompose, scenes, vocabulary
from marc_jax import batches
from marc_jax.memory import retrieve
from marc_jax.memory import view as views
from marc_jax.tokenizer import Tokenizer

SIZES = batches.Sizes(patches=16, events=8, event=2, question=22, answer=13)


@pytest.fixture(scope="module")
def prompter(tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    vocabulary.write_tokenizer(path)
    return batches.Prompter(Tokenizer.load(path), (2, 2), 1.0)


@pytest.fixture(scope="module")
def source():
    rng = np.random.default_rng(0)
    pool = recompose.make_pool(event for _ in range(60) for event in scenes.sample_video(rng, scenes.Difficulty()))
    rows = np.cumsum(pool.patches_e) - pool.patches_e
    return batches.Recomposer(pool, rows, SIZES, seed=3)


def test_a_step_is_a_function_of_its_number(source):
    a, b, other = (source.draw("sft", step, 5, 2, (6, 8), scenes.PAIRS) for step in (7, 7, 8))
    assert a.texts_bg == b.texts_bg and a.answers_bg == b.answers_bg and a.texts_bg != other.texts_bg
    assert (a.videos.row_be == b.videos.row_be).all()
    assert source.draw("distill", 7, 5, 2, (6, 8), scenes.PAIRS).texts_bg != a.texts_bg


def test_questions_read_as_they_always_did(source):
    """The text that shipped weights were trained on, to the byte."""
    types = ("order", *scenes.PAIRS)
    asked = [source.draw("sft", step, 5, 6, (6, 8), types) for step in range(4)]
    texts = [text for a in asked for row in a.texts_bg for text in row]
    questions = [q for a in asked for row in a.questions_bg for q in row]
    assert texts == [q.problem + ("Options:\n" + "\n".join(q.options) if q.options else "") for q in questions]
    assert 0 < sum(bool(q.options) for q in questions) < len(questions)


def test_spans_become_the_patches_of_their_events(source):
    videos = source.draw("sft", 1, 6, 1, (6, 8), scenes.PAIRS).videos
    index = videos.index(SIZES)
    for b in range(6):
        want, owner = [], []
        for e in range(SIZES.events):
            if videos.mask_be[b, e]:
                want += range(videos.row_be[b, e], videos.row_be[b, e] + videos.len_be[b, e])
                owner += [e] * videos.len_be[b, e]
        n = len(want)
        assert index.patch_bt[b, :n].tolist() == want and index.event_bt[b, :n].tolist() == owner
        assert index.mask_bt[b].tolist() == [True] * n + [False] * (SIZES.patches - n)


def test_patches_between_events_are_read_with_the_video_but_not_with_an_event():
    start, length = np.array([[0, 3, 5]]), np.array([[2, 1, 2]])  # patches 2 and 4 are transitions
    videos = batches.Videos(start + 40, start, length, length > 0, np.zeros((1, 3, 1), np.float32))
    index = videos.index(batches.Sizes(patches=9, events=3, event=2, question=22, answer=13))
    assert index.patch_bt[0, :7].tolist() == list(range(40, 47))
    assert index.mask_bt[0].tolist() == [True] * 7 + [False] * 2
    assert index.event_bt[0].tolist() == [0, 0, 1, 1, 2, 2, 2, 3, 3]
    full = views.select(views.View(), index, None, np.arange(50)[:, None, None], 2, None)
    assert full.patches_bsnc[0, :7, 0, 0].tolist() == list(range(40, 47)) and full.mask_bs.sum() == 7
    ids, valid = np.arange(3)[None], np.ones((1, 3), bool)
    patch, mask, _ = retrieve.gather_patches(ids, valid, index.start_be, index.len_be, 2)
    assert patch[mask].tolist() == [0, 1, 3, 5, 6]


def test_needed_events_are_those_of_the_question(source):
    asked = source.draw("retriever", 2, 4, 3, (6, 8), scenes.PAIRS)
    needed = asked.needed(SIZES.events)
    questions = [q for row in asked.questions_bg for q in row]
    assert [set(np.flatnonzero(row)) for row in needed] == [set(q.needed) for q in questions]


@pytest.mark.parametrize("kept", [1, 3])
def test_a_prompt_cut_behind_its_visual_tokens_is_the_prompt(prompter, kept):
    text, answer = "how many in blue stripes ?", "<think>blue stripes</think><answer>2</answer>"
    whole = prompter.prompt(text, kept, 9)
    prefix, tokens, mask, train = prompter.split([[text]], [[answer]], kept, [9], SIZES)
    cut = prefix.tokens_bp.shape[1]
    rest = len(whole.tokens) - cut
    assert prefix.tokens_bp[0].tolist() == whole.tokens[:cut].tolist()
    assert tokens[0, 0, :rest].tolist() == whole.tokens[cut:].tolist()
    assert (prefix.next_pos_b[0] + np.arange(rest) == whole.pos[0, cut:]).all()
    assert prefix.next_pos_b[0] + rest == whole.next_pos
    decoded = prompter.tokenizer.decode(tokens[0, 0][train[0, 0]].tolist())
    assert decoded == "<think> blue stripes </think> <answer> 2 </answer>"
    assert mask[0, 0].sum() == rest + train[0, 0].sum() and not train[0, 0, :rest].any()


@pytest.mark.parametrize("patches", [1, 2, 9, 16])
def test_the_text_goes_on_where_the_whole_video_ends(prompter, patches):
    """A student that keeps one patch of nine stands its question where the teacher's stands: after nine."""
    prompt = prompter.prompt("how many in blue stripes ?", 1, patches)
    start = prompt.pos[0, np.flatnonzero(prompt.vis_index >= 0)[0]]
    after = np.flatnonzero(prompt.vis_index >= 0)[-1] + 1
    assert prompt.pos[0, after] == start + max(patches, 2)


def test_a_question_that_does_not_fit_names_both_counts(prompter):
    small = batches.Sizes(16, 8, 2, question=4, answer=13)
    with pytest.raises(ValueError, match=r"question of \d+ tokens \(limit 4\)"):
        prompter.split([["how many in blue stripes ?"]], [["<answer>2</answer>"]], 1, [9], small)


def test_records_come_again_shuffled_anew_and_few_are_the_first_of_many(source):
    def texts(records, steps, stage="sft"):
        return [source.again(stage, n, records, 64, 1, (6, 8), scenes.PAIRS).texts_bg for n in steps]

    def flat(batches):
        return [text for rows in batches for (text,) in rows]

    few, again = flat(texts(192, range(3))), flat(texts(192, range(3, 6)))
    assert sorted(few) == sorted(again) and few != again
    assert flat(texts(192, [4])) == flat(texts(192, [4])) != flat(texts(192, [4], "other"))
    assert sorted(flat(texts(192, range(3), "other"))) == sorted(few)
    more = flat(texts(320, range(5)))
    assert len(more) == 320 and not (set(few) - set(more))


def test_records_take_the_embeddings_that_the_events_have_now(source):
    before = source.again("sft", 0, 64, 64, 1, (6, 8), scenes.PAIRS).videos
    source.embed(np.arange(len(source.row_e), dtype=np.float32)[:, None])
    after = source.again("sft", 0, 64, 64, 1, (6, 8), scenes.PAIRS).videos
    assert (before.row_be == after.row_be).all() and before.emb_bed.max() == 0 < after.emb_bed.max()
    source.embed(np.zeros((len(source.row_e), 1), np.float32))
