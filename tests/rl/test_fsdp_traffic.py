"""What a sharded update sends between devices: weights and their gradients, no layer's activations."""

import dataclasses
import functools
import re

import jax

from marc_jax import sharding
from marc_jax.models import qwen25_vl
from tools.bench import scaling, train


def test_an_update_over_fsdp_moves_weights_and_no_activations():
    cfg, tx = qwen25_vl.tiny(), train.optimizer()
    case = next(case for case in train.CASES if case.key == "student")
    case = dataclasses.replace(case, view=dataclasses.replace(case.view, batch=2), new=24)
    mesh = sharding.make_mesh(1, 2, 1, jax.devices()[:2])
    with jax.set_mesh(mesh):
        now = scaling.state_on(cfg, tx, mesh)
        batch = jax.tree.map_with_path(functools.partial(scaling.placed, mesh), train.batch_of(cfg, case))
        held = jax.tree.map(lambda x: x.sharding, now)
        step = train.build(cfg, case, tx, "xla", out_shardings=(held, None)).lower(now, batch)
        text = step.compile().as_text()
    # (The rows of the split embedding go to their devices by all-to-all, once.)
    collectives = re.findall(r"= (.*?) (?:all-gather|all-reduce|reduce-scatter)(?:-start)?\(", text)
    shapes = [dims for result in collectives for dims in re.findall(r"f32\[([\d,]+)\]", result)]
    moved = {tuple(map(int, dims.split(","))) for dims in shapes}
    sizes = cfg.text.hidden_size, cfg.text.intermediate_size
    assert moved & {sizes, sizes[::-1]}, "the layers' weights have to come from the other device"
    suffix = train.GROUP * case.new
    rows = {n * count for n in (1, 2) for count in (suffix, suffix + batch.prompt.tokens_bp.shape[1])}
    found = {shape for shape in moved if rows & {*shape}}
    assert not found, f"activations go between devices: {found}"
