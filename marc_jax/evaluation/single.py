"""One video, one question: the parts of an answer in order, each timed on its own."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines import patches, video
from marc_jax.batches import Sizes, Videos
from marc_jax.config import ConfigError
from marc_jax.evaluation import experiment, pictures, run
from marc_jax.memory import embed, encoders, indexer, store
from marc_jax.memory import view as views
from marc_jax.models import qwen25_vl
from marc_jax.rl import rollout
from marc_jax.run import Run


@dataclasses.dataclass(frozen=True)
class Answer:
    """What was said, and what it was made from. `looked`: see `experiment.look`."""

    text: str
    entry: store.MemoryEntry
    looked: dict
    tokens: int
    all_tokens: int


def ask(
    here: Run, stage: str, view: views.View, path: Path, clip: video.Clip, question: str, clock, memory=None,
    encoder: encoders.Encoder | None = None, pool: str = "mean",
) -> Answer:  # fmt: skip
    """Answers with the parameters of `stage`. `clock` takes the time of every part.

    Events are retrieved by the run's own retriever, or by `encoder`; `pool` as in `encoders.pool_frames`.

    Raises StaleMemory (exit code 2) where the memory was made by other weights or from another file.
    """
    params = here.parameters(stage)
    base = here.parameters(here.config.eval.teacher)
    worker = indexer.Indexer(here.cfg, base, here.retriever, here.sampling, encoder=encoder, pool=pool)
    entry = _entry(worker, clip, path, clock, memory)
    query = clock.twice("retrieve", _asked(here, encoder, question))
    nearest = encoders.nearest_frames(entry.event_embeddings, np.asarray(query[0]))
    entry = dataclasses.replace(entry, event_embeddings=nearest)
    test = _one_video(here, entry, clip, path, question)
    visual = here.config[stage].get("visual", "features")
    bank = jnp.asarray(test.bank[visual])
    index = test.videos.index(test.sizes)
    picked = views.select(view, index, query, bank, test.sizes.event, jax.random.key(0))

    kept = view.kept(test.sizes.patches, test.sizes.event)
    prompt = here.prompter.prompts([question], kept, index.mask_bt.sum(1), _length(here, question, kept))
    encode = views.make_encode(view, here.grid_hw, here.time_scale)
    see = jax.jit(lambda p, v, q: encode(qwen25_vl.bind(here.cfg, p), v, q))
    vis, prompt = clock.twice("vision + compress", lambda: see(params, picked, prompt))
    read = jax.jit(lambda p, v, q: rollout.prefill(qwen25_vl.bind(here.cfg, p), v, q))
    prefix = clock.twice("prefill", lambda: read(params, vis, prompt))
    keys = rollout.rollout_keys(here.config.seed, 0, np.zeros(1, np.int32), 1)
    how = here.decoding(0.0)
    say = jax.jit(lambda p, x, k: rollout.decode(qwen25_vl.bind(here.cfg, p), x, k, how))
    done = clock.twice("decode, all tokens", lambda: say(params, prefix, keys))
    said = np.asarray(done.tokens_bgr)[0, 0][np.asarray(done.mask_bgr)[0, 0]]
    clock.parts["decode per token"] = clock.parts["decode, all tokens"] / max(len(said), 1)
    looked = experiment.look(here, test, 0, params, visual, view, query)
    used = int(run.visual_tokens(here, view, index)[0])
    everything = len(entry.tokens) * here.prompter.tokens_per_patch
    return Answer(here.tokenizer.decode(said.tolist()), entry, looked, used, everything)


def _asked(here: Run, encoder: encoders.Encoder | None, question: str):
    """A function that embeds the question, [1, D]."""
    if encoder is not None:
        return lambda: encoder.embed_texts([question])
    tokens_bl = here.prompter.queries([question], here.sizes.question)
    retrieve = jax.jit(lambda p, q: embed.embed_questions(p, *q))
    return lambda: retrieve(here.retriever, tokens_bl)


def _entry(worker: indexer.Indexer, clip, path: Path, clock, memory) -> store.MemoryEntry:
    if memory is None:
        sha256 = store.file_sha256(path)
        full = None if worker.encoder is None else worker.sampling.read_full(path).frames
        return clock.twice("index (vision, events)", lambda: worker.entry(clip, sha256, full=full))
    key, reader = str(path.resolve()), store.MemoryReader(memory, worker.fingerprint)
    if key not in reader:
        raise ConfigError(f"{memory} does not hold {path}; add it with python -m marc_jax.index")
    return clock.once("memory", lambda: reader.get_checked(key, store.file_sha256(path)))


def _one_video(here: Run, entry: store.MemoryEntry, clip, path: Path, question: str) -> run.TestSet:
    """The video and its question as a test set of one."""
    spans = entry.event_spans
    length = np.diff(spans, axis=1)[:, 0]
    most = max([len(spans), *(v.k for v in here.views.values())])
    sizes = Sizes(len(entry.tokens), most, int(length.max()), here.sizes.question, here.sizes.answer)
    pad = ((0, 0), (0, most - len(spans)))
    start, count = np.pad(spans[None, :, 0], pad), np.pad(length[None], pad)
    emb = np.pad(entry.event_embeddings[None], ((0, 0), pad[1], (0, 0)))
    videos = Videos(start.astype(np.int64), start.astype(np.int64), count.astype(np.int64), count > 0, emb)
    bank = {"features": entry.tokens, "pixels": patches.frames_to_pixel_patches(clip.frames)[0]}
    record = {"problem": question, "options": [], "path": str(path)}
    return run.TestSet([record], bank, videos, sizes, {str(path): entry})


def _length(here: Run, question: str, kept: int) -> int:
    """Prompt length, in steps of 16 so that questions of like length share a compiled function."""
    text = len(here.tokenizer.encode(question)) + 8
    return -(-(kept * here.prompter.tokens_per_patch + text) // 16) * 16


def draw(path, clip: video.Clip, answer: Answer, question: str) -> None:
    """The picture of an answer whose truth nobody knows."""
    pictures.draw_sample(
        path, clip.frames, clip.seconds, answer.entry.event_spans.tolist(), question=question,
        answers={"answer": (answer.text, None)}, **answer.looked,
    )  # fmt: skip
