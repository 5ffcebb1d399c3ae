"""One interface to whatever embeds events and questions in one space: PE-Core, SigLIP 2, or a run's small retriever.

    encoder = open_encoder("weights/pe-l14")               # PE-Core or SigLIP 2, from Orbax or safetensors; or a run's:
    encoder = run.own_encoder("runs/retriever")            # marc_jax.run
    frames_td = encoder.embed_frames(frames)               # uint8 [T, H, W, 3] of any size -> unit vectors [T, D]
    texts_nd = encoder.embed_texts(["a red car"])          # unit vectors [N, D]
    events_ed = pool_frames(frames_td, spans)              # mean of an event's unit vectors, renormalised

Preprocessing as published: squashed to a square by PIL's antialiased bilinear filter, then (x / 255 - 0.5) / 0.5.
"""

import functools
import hashlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines import patches
from data_pipelines.patches import squash
from marc_jax import checkpoint, sharding
from marc_jax.clip_tokenizer import ClipTokenizer, SiglipTokenizer
from marc_jax.memory import embed, store
from marc_jax.memory.view import normalise
from marc_jax.models import clip, clip_weights, perception_encoder, qwen25_vl, siglip2
from marc_jax.models.safetensors_io import WeightsError, open_folder

POOLS = ("mean", "max")


class Encoder(Protocol):
    """What `memory.indexer` and the commands need.

    Attributes:
      name: for people.
      fingerprint: text that differs where embeddings would; part of a memory's fingerprint.
      side: of the square that frames are squashed to [pixels].
    """

    name: str
    fingerprint: str
    side: int

    def embed_frames(self, frames: np.ndarray) -> np.ndarray:
        """Unit vectors float32 [T, D] of uint8 frames [T, H, W, 3]."""

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors float32 [N, D]."""


def pool_frames(emb_td: np.ndarray, spans: Sequence[tuple[int, int]], how: str = "mean") -> np.ndarray:
    """Event embeddings of unit vectors [T, D] and spans (start, end) in rows.

    "mean": the mean over the event, renormalised, [E, D].
    "max": all of them, [E, F, D], F the longest event, shorter ones padded by their last row: an event is then as near
    to a question as its nearest frame (`nearest_frames`).
    """
    if how not in POOLS:
        raise ValueError(f"pool {how!r}: choose one of {', '.join(POOLS)}")
    if how == "mean":
        mean_ed = np.stack([emb_td[a:b].mean(0) for a, b in spans])
        return (mean_ed / np.maximum(np.linalg.norm(mean_ed, axis=-1, keepdims=True), 1e-12)).astype(np.float32)
    most = max(b - a for a, b in spans)
    return np.stack([emb_td[np.minimum(np.arange(a, a + most), b - 1)] for a, b in spans]).astype(np.float32)


def embed_shown(encoder: Encoder, frames: np.ndarray, shown: np.ndarray | None) -> np.ndarray:
    """`embed_frames`, each key frame of `video.Clip.shown` once; all frames where it is None."""
    if shown is None:
        return encoder.embed_frames(frames)
    _, first, row = np.unique(shown, return_index=True, return_inverse=True)
    return encoder.embed_frames(frames[first])[row]


def nearest_frames(event_emb: np.ndarray, query_d: np.ndarray) -> np.ndarray:
    """[E, D] for one question: of "max" embeddings [E, F, D] each event's nearest frame; of [E, D] the same."""
    if event_emb.ndim == 2:
        return event_emb
    best_e = np.argmax(event_emb @ query_d, axis=1)
    return event_emb[np.arange(len(event_emb)), best_e]


def in_chunks(run: Callable, rows: np.ndarray, chunk: int, size: Callable[[int], int] | None = None):
    """run(rows) with at most `chunk` of N >= 1 rows at a time; what it returns, arrays [N, ...], in numpy.

    A last chunk of n < chunk rows is padded by its last row to `chunk`, or to size(n).
    """
    parts = []
    for start in range(0, len(rows), chunk):
        part = rows[start : start + chunk]
        missing = (size(len(part)) if size else chunk) - len(part)
        out = run(np.concatenate([part, np.repeat(part[-1:], missing, axis=0)]))
        parts.append([np.asarray(x)[: len(part)] for x in jax.tree.leaves(out)])
    return jax.tree.unflatten(jax.tree.structure(out), [np.concatenate(x) for x in zip(*parts, strict=True)])


class DualEncoder:
    """PE-Core or SigLIP 2. Frames and texts go through in chunks of one compiled shape."""

    def __init__(
        self, cfg: clip.Config, params: dict, tokenizer: Callable, *, fingerprint: str = "", dtype=None,
        chunk: int = 16, mesh=None,
    ):  # fmt: skip
        """Args:
        tokenizer: texts -> int32 [N, context].
        fingerprint: of the weights; default a hash of `params`.
        dtype: of the computation; default bfloat16 on an accelerator, float32 on a CPU.
        mesh: chunks are split over its data and fsdp axes.

        `threads` (1) resize frames; more where a single video is waited for.
        """
        family = family_of(cfg)
        dtype = dtype or compute_dtype()
        self._ways = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
        self.cfg, self.params, self.name, self.side = cfg, params, cfg.name or cfg.family, cfg.image.size
        self.chunk = -(-chunk // self._ways) * self._ways
        weights = fingerprint or store.tree_sha256(jax.device_get(params))
        self.fingerprint = f"{self.name} {cfg.image.size}px squash-bilinear {weights}"
        self._tokenizer, self.threads = tokenizer, 1
        self._place = (lambda x: x) if mesh is None else (lambda x: jax.device_put(x, sharding.batch(mesh)))
        self._images = jax.jit(lambda p, x: clip.unit(family.bind(cfg, p, dtype=dtype).embed_images(x)))
        self._texts = jax.jit(lambda p, x: clip.unit(family.bind(cfg, p, dtype=dtype).embed_texts(x)))

    def embed_frames(self, frames: np.ndarray) -> np.ndarray:
        """Unit vectors float32 [T, D] of uint8 frames [T, H, W, 3] of any size."""
        return self._embed(self._images, squash(frames, self.cfg.image.size, self.threads))

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors float32 [N, D]; a text longer than the model reads is cut as published."""
        return self._embed(self._texts, self._tokenizer(list(texts)))

    def _embed(self, run: Callable, rows: np.ndarray) -> np.ndarray:
        if not len(rows):
            return np.zeros((0, self.cfg.output), np.float32)
        return in_chunks(lambda x: run(self.params, self._place(x)), rows, self.chunk, self._padded)

    def _padded(self, count: int) -> int:
        """A power of two (one question needs no full chunk) that divides over the mesh."""
        size = min(1 << (count - 1).bit_length(), self.chunk)
        return -(-size // self._ways) * self._ways


def tower_sha256(params: dict) -> str:
    """Hash of what makes tower features: the vision tower's parameters without the merger."""
    tower = {name: part for name, part in params["vision"].items() if name != "merger"}
    return store.tree_sha256(sharding.fetch(tower))


def patch_encoder(cfg, dtype=jnp.float32) -> Callable:
    """Compiled (params, retriever, pixel patches uint8 [T, n, 1176], grid (h, w)) -> features [T, n, V], embeddings.

    Embeddings are [T, D]; zeros [T, 1] where the retriever is None.
    """

    @functools.partial(jax.jit, static_argnums=3)
    def run(params, retriever, pixels_tnc, grid_hw):
        features = qwen25_vl.bind(cfg, params, dtype=dtype).vision_features(normalise(pixels_tnc), grid_hw)
        return features, embed.embed_patches(retriever, features) if retriever else jnp.zeros((len(features), 1))

    return run


class SmallEncoder:
    """The retriever that a run trained: pairs of frames through the model's vision tower, and questions."""

    name = "retriever"

    def __init__(self, cfg, params: dict, retriever: dict, size: int, queries: Callable, chunk: int = 16):
        """Args:
        params: of the Qwen2.5-VL whose tower the retriever was trained on; `size`: side of its square frames.
        queries: texts -> (tokens int32 [N, L], mask bool [N, L]), e.g. `batches.Prompter.queries`.
        """
        self.params, self.retriever, self._queries, self._chunk, self.side = params, retriever, queries, chunk, size
        self._patches = lambda frames: patches.frames_to_pixel_patches(patches.resize_frames(frames, size, size))
        weights = f"{tower_sha256(params)} {store.tree_sha256(jax.device_get(retriever))}"
        self.fingerprint = f"{self.name} {size}px {patches.RESIZE} {weights}"
        self._run, self._grid = patch_encoder(cfg), (size // patches.PATCH, size // patches.PATCH)
        self._ask = jax.jit(embed.embed_questions)

    def embed_frames(self, frames: np.ndarray) -> np.ndarray:
        """Unit vectors float32 [T, D]; both frames of a temporal patch share theirs."""
        run = lambda x: self._run(self.params, self.retriever, x, self._grid)[1]  # noqa: E731
        return np.repeat(in_chunks(run, self._patches(frames)[0], self._chunk), 2, axis=0)[: len(frames)]

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors float32 [N, D]."""
        return np.asarray(self._ask(self.retriever, *self._queries(list(texts))))


def family_of(cfg: clip.Config):
    """The module of a model: `bind`, `init`, `abstract`."""
    return siglip2 if cfg.family == "siglip2" else perception_encoder


def compute_dtype():
    """bfloat16 on an accelerator, float32 on a CPU."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def open_encoder(folder, *, dtype=None, mesh=None, chunk: int = 16) -> DualEncoder:
    """PE-Core or SigLIP 2 from a folder, see `load_towers`."""
    cfg, params, tokenizer, mark = load_towers(folder, mesh)
    return DualEncoder(cfg, params, tokenizer, fingerprint=mark, dtype=dtype, mesh=mesh, chunk=chunk)


def load_towers(folder, mesh=None) -> tuple[clip.Config, dict, Callable, str]:
    """(sizes, parameters, tokenizer, hash of the files) of a checkpoint of tools/convert_pe.py or
    `marc_jax.contrastive`, or of published safetensors.

    The tokenizer's file lies in the folder too: CLIP's merges or a tokenizer.json.

    Raises:
      WeightsError, checkpoint.CheckpointError, TokenizerError: one line naming the file and the reason.
    """
    folder = pathlib.Path(folder)
    step = checkpoint.latest(folder, verify="size") if folder.is_dir() else None
    param_dtype = jnp.float32
    if step is not None:
        meta = checkpoint.read_meta(folder, step)
        param_dtype = meta.get("dtype", param_dtype)
        try:
            cfg = clip.config_from(meta["model"])
        except (KeyError, ValueError, TypeError) as e:
            raise WeightsError(f"{folder}: a checkpoint, but not of PE-Core or SigLIP 2 ({e})") from None
    else:
        files = open_folder(folder)
        cfg = clip_weights.recognise({name: file.tensors[name][1] for name, file in files.items()}, str(folder))
        if clip_weights.form_of(files) == "timm":
            raise WeightsError(f"{folder}: timm's file holds the image tower alone; questions need the text tower too")
    load_tokenizer = SiglipTokenizer.load if cfg.family == "siglip2" else ClipTokenizer.load
    tokenizer = load_tokenizer(folder, cfg.text.context)
    target = family_of(cfg).abstract(cfg, jnp.dtype(param_dtype), mesh)
    if step is not None:
        tree, _ = checkpoint.restore(folder, {"params": target}, step, partial=True)
        params, mark = tree["params"], _sha256((folder / f"step_{step:08d}" / "manifest.json").read_bytes())
    else:
        params = clip_weights.load(folder, cfg, target)
        mark = _sha256("".join(sorted({store.file_sha256(file.path) for file in files.values()})).encode())
    return cfg, params, tokenizer, mark


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
