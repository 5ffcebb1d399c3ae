"""The mesh and the one table that says where arrays live.

Parameters name their dimensions by logical axes; `RULES` maps a logical axis to a mesh axis. A dimension that does not
divide over its mesh axis stays whole on it, and that is said in the log (`fallbacks` lists them).
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")

RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),  # prompts, temporal patches
    "layers": None,  # the axis that lax.scan walks
    "embed": "fsdp",  # model width of a weight
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}

_log = logging.getLogger(__name__)
_said: set = set()


@dataclasses.dataclass(frozen=True)
class Fallback:
    """A dimension that could not be split: `pieces` indivisible units of `axis` over `ways` devices of `mesh_axis`."""

    path: str
    axis: str
    pieces: int
    mesh_axis: str
    ways: int

    def __str__(self):
        return f"{self.path}: {self.axis} ({self.pieces}) does not divide over {self.mesh_axis}={self.ways}; kept whole"


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh (data, fsdp, tensor); one of the three may be -1 and takes the devices left over.

    Raises:
      ValueError: when the product is not the number of devices.
    """
    devices = np.asarray(jax.devices() if devices is None else devices)
    shape = [data, fsdp, tensor]
    if shape.count(-1) > 1:
        raise ValueError(f"mesh {tuple(shape)}: only one axis may be -1")
    if -1 in shape:
        known = -int(np.prod(shape))
        shape[shape.index(-1)] = devices.size // known if known and devices.size % known == 0 else 0
    if min(shape) < 1 or int(np.prod(shape)) != devices.size:
        asked = dict(zip(AXES, (data, fsdp, tensor), strict=True))
        raise ValueError(f"mesh {asked} does not fit {devices.size} devices")
    return Mesh(devices.reshape(shape), AXES)


def spec(axes, mesh: Mesh, shape=None, units=(), path: str = "", fallbacks: list | None = None) -> P:
    """PartitionSpec of an array whose dimensions have these logical axes.

    Args:
      shape: the array's shape; None skips the divisibility check.
      units: indivisible pieces per dimension (0 = its size), e.g. the heads of a heads x head_dim dimension.
      fallbacks: a list that receives what was kept whole.
    Raises:
      ValueError: an unknown logical axis, or two dimensions on one mesh axis.
    """
    out, used = [], {}
    for i, axis in enumerate(axes):
        if axis is not None and axis not in RULES:
            raise ValueError(f"{path or 'array'}: unknown logical axis {axis!r}; known: {sorted(RULES)}")
        target = RULES[axis] if axis is not None else None
        names = (target,) if isinstance(target, str) else (target or ())
        for name in names:
            if name in used:
                raise ValueError(f"{path or 'array'}: {used[name]!r} and {axis!r} both map to mesh axis {name!r}")
            used[name] = axis
        ways = int(np.prod([mesh.shape[name] for name in names])) if names else 1
        pieces = 0 if shape is None else (units[i] if units and units[i] else shape[i])
        if pieces % ways:
            fall = Fallback(path, axis, pieces, "*".join(names), ways)
            if fallbacks is not None:
                fallbacks.append(fall)
            names = ()
        out.append(None if not names else names[0] if len(names) == 1 else tuple(names))
    return P(*out)


def shardings(weights: Any, mesh: Mesh) -> Any:
    """NamedShardings of a pytree of leaves with .shape, .axes and .units; what stays whole is logged once."""
    falls: list[Fallback] = []

    def one(path, w):
        name = "/".join(str(getattr(k, "key", k)) for k in path)
        return NamedSharding(mesh, spec(w.axes, mesh, w.shape, w.units, name, falls))

    out = jax.tree_util.tree_map_with_path(one, weights)
    for fall in falls:
        if fall not in _said:
            _said.add(fall)
            _log.warning("%s", fall)
    return out


def fallbacks(weights: Any, mesh: Mesh) -> list[Fallback]:
    """What `shardings` would keep whole on this mesh."""
    falls: list[Fallback] = []
    for path, w in jax.tree_util.tree_leaves_with_path(weights):
        spec(w.axes, mesh, w.shape, w.units, "/".join(str(getattr(k, "key", k)) for k in path), falls)
    return falls


def batch(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Sharding of an array whose dimension `axis` is the batch: split over data and fsdp, whole on tensor."""
    return NamedSharding(mesh, P(*(None,) * axis, RULES["batch"]))


def mesh_of(x: jax.Array) -> Mesh | jax.sharding.AbstractMesh | None:
    """The mesh a computation is for: of the array's type, else of `jax.set_mesh`.

    None on one device by default, and within a `shard_map`.
    """
    of_type = getattr(getattr(jax.typeof(x), "sharding", None), "mesh", None)
    for mesh in (of_type, jax.sharding.get_abstract_mesh()):
        if mesh is not None and not mesh.empty:
            return None if mesh.manual_axes else mesh
    return None


def constrain_batch(x: jax.Array) -> jax.Array:
    """An activation whose first dimension is the batch, held to data and fsdp; its other dimensions are left to XLA.

    Weights are then gathered over fsdp, layer by layer. Left to itself, XLA may rather split the activation's width as
    the weights' is, and sum partial products of every matrix over the chips. Nothing changes outside a mesh, or where
    the batch does not divide.
    """
    mesh = mesh_of(x)
    axes = () if mesh is None else tuple(axis for axis in RULES["batch"] if axis in mesh.shape)
    ways = int(np.prod([mesh.shape[axis] for axis in axes]))
    if ways == 1 or x.shape[0] % ways:
        return x
    rest = (P.UNCONSTRAINED,) * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(axes, *rest)))


def ways_of_heads(mesh: Mesh | jax.sharding.AbstractMesh | None, heads: int, kv: int) -> int:
    """Over how many devices attention's query and key heads are split: those on tensor, or 1 where it does not divide.

    Fewer key heads than devices do divide, if each goes to a whole number of them.
    """
    ways = 1 if mesh is None else mesh.shape.get("tensor", 1)
    return ways if heads % ways == 0 and (kv % ways == 0 or ways % kv == 0) else 1


def _axes_of_rows(mesh: Mesh | jax.sharding.AbstractMesh, b: int) -> tuple[str, ...] | None:
    """Mesh axes over which b rows divide: data and fsdp, else the first of them that does."""
    axes = tuple(axis for axis in RULES["batch"] if axis in mesh.shape)
    tries = [axes, *((axis,) for axis in axes)]
    return next((names for names in tries if b % int(np.prod([mesh.shape[name] for name in names])) == 0), None)


def split_attention(
    local: Callable[..., jax.Array], q: jax.Array, keys: Sequence[jax.Array], *by_row: jax.Array | None, heads: int = -2
) -> jax.Array:
    """local(q, *keys, *by_row), on a mesh as a `shard_map`: each device on its own rows and heads alone.

    For kernels that XLA does not partition (Pallas) or whose own partitioner takes few layouts (cuDNN). Rows are split
    over data and fsdp, heads over tensor; what does not divide stays whole. Outside a mesh, within a `shard_map` and
    on one device it is the plain call.

    Args:
      q: queries [b, .., n, .., h]; `local` returns an array of their shape.
      keys: keys and values [b, .., k, .., h]; query head j reads key head j // (n / k).
      by_row: arrays [b, ..] without heads, or None.
      heads: where the heads are, from the end.
    """
    mesh = mesh_of(q)
    if mesh is None or mesh.size == 1:
        return local(q, *keys, *by_row)
    kv = keys[0].shape[heads]
    rows, ways = _axes_of_rows(mesh, len(q)), ways_of_heads(mesh, q.shape[heads], kv)
    if kv % ways:  # fewer key heads than devices: each key head where its query heads are
        keys = [jnp.repeat(a, ways // kv, axis=heads) for a in keys]
    name = "tensor" if ways > 1 else None
    specs = [P(rows, *(None,) * (a.ndim + heads - 1), name) for a in (q, *keys)]
    specs_in = (*specs, *(P(rows) for _ in by_row))
    run = jax.shard_map(local, mesh=mesh, in_specs=specs_in, out_specs=specs[0], check_vma=False)
    return run(q, *keys, *by_row)


def place(x, sharding: NamedSharding) -> jax.Array:
    """An array (or key) that is the same in every process, as one over the mesh; no process waits for another.

    `device_put` makes the processes compare what they hold: a collective, and a deadlock or worse where a thread draws
    batches while the step runs.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        wrap = functools.partial(jax.random.wrap_key_data, impl=jax.random.key_impl(x))
        return jax.jit(wrap, out_shardings=sharding)(np.asarray(jax.random.key_data(x)))
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def place_all(tree: Any, where: Any) -> Any:
    """`place` of a tree of arrays by a tree of shardings; at once where it can be, which costs the host far less."""
    if all(sharding.is_fully_addressable for sharding in jax.tree.leaves(where)):
        return jax.device_put(tree, where)
    return jax.tree.map(place, tree, where)


def fetch(tree: Any) -> Any:
    """Whole numpy arrays of what is split over the mesh; a collective where it is split over processes."""

    def one(x):
        split = isinstance(x, jax.Array) and not x.is_fully_addressable
        return multihost_utils.process_allgather(x, tiled=True) if split else jax.device_get(x)

    return jax.tree.map(one, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of an array that every device holds whole."""
    return NamedSharding(mesh, P())
