"""Programs compiled for a TPU on this machine: the arithmetic always, the compiler where libtpu is installed."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from marc_jax import sharding
from marc_jax.models import attention
from tools import compile_for_tpu, tpu_program

TEXT = """HloModule jit_step

%cond.1 (p: (s32[], bf16[8])) -> pred[] {
  %constant.3 = s32[]{:T(128)} constant(36)
  %p = (s32[], bf16[8]{0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.3), direction=LT
}

%fused.1 (a: bf16[8,4]) -> bf16[8,64] {
  %a = bf16[8,4]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[8,64]{1,0:T(8,128)} all-gather(%a), channel_id=7, dimensions={1}
}

%body.1 (p: (s32[], bf16[8])) -> (s32[], bf16[8]) {
  %all-gather.1 = bf16[8,64]{1,0:T(8,128)} all-gather(%x), channel_id=7, dimensions={1}
  %fusion.1 = bf16[8,64]{1,0} fusion(%x), kind=kCustom, calls=%fused.1
}

%until_all_have_stopped (p: (s32[])) -> pred[] {
  ROOT %call = pred[] fusion(%p), kind=kLoop, calls=%other
}

ENTRY %main.1 (a: f32[4]) -> f32[4] {
  %while.1 = (s32[], bf16[8]{0}) while(%t), condition=%cond.1, body=%body.1
  %while.2 = (s32[]) while(%t), condition=%until_all_have_stopped, body=%body.2
  %all-reduce-start = (f32[100]{0}, f32[100]{0}) all-reduce-start(%a), channel_id=9, to_apply=%sum
  %all-reduce-done = f32[100]{0} all-reduce-done(%all-reduce-start)
}

%body.2 (p: (s32[])) -> (s32[]) {
  %collective-permute.1 = f32[3]{0} collective-permute(%a), channel_id=11
}
"""


def test_collectives_count_loops_and_each_channel_once():
    assert tpu_program.collectives(TEXT) == {
        "all-gather": (36, 36 * 8 * 64 * 2),
        "all-reduce": (1, 400),
        "collective-permute": (1, 12),
    }


UNROLLED = """HloModule jit_step

%cond.1 (p: (bf16[8], u32[])) -> pred[] {
  %constant.3 = u32[]{:T(128)} constant(7)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=1
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.3), direction=LT
}

%body.1 (p: (bf16[8], u32[])) -> (bf16[8], u32[]) {
  %constant.4 = u32[]{:T(128)} constant(2)
  %i.1 = u32[]{:T(128)} get-tuple-element(%p), index=1
  %collective-permute.1 = bf16[8]{0} collective-permute(%x), channel_id=1
  %collective-permute.2 = bf16[8]{0} collective-permute(%collective-permute.1), channel_id=2
  %add.1 = u32[]{:T(128)} add(%i.1, %constant.4)
  ROOT %tuple.1 = (bf16[8]{0}, u32[]{:T(128)}) tuple(%collective-permute.2, /*index=1*/%add.1)
}

ENTRY %main.1 (a: f32[4]) -> f32[4] {
  %while.1 = (bf16[8]{0}, u32[]) while(%t), condition=%cond.1, body=%body.1
}
"""


def test_an_unrolled_loop_counts_its_turns_not_its_counter():
    assert tpu_program.collectives(UNROLLED) == {"collective-permute": (2 * 4, 2 * 4 * 8 * 2)}


def test_flops_count_scans_and_shards():
    mesh = sharding.make_mesh(2, 2, 2)

    def f(x, w):
        half = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0], half(x)

    jaxpr = jax.make_jaxpr(f)(jnp.zeros((6, 4)), jnp.zeros((5, 4, 4))).jaxpr
    assert tpu_program.flops(jaxpr) == 5 * 2 * 6 * 4 * 4 + 8 * 2 * 3 * 3 * 4


def test_a_refusal_names_the_largest_buffers():
    message = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm.
  Used 20.1G of 15.75G hbm.
  1. Size: 9.00G
     Operator: op_name="jit(step)/dot_general"
     Shape: f32[1,2]{1,0}
  2. Size: 3.00G
     Shape: bf16[7]{0}"""
    first, *buffers = tpu_program.refusal(message)
    assert "Ran out of memory" in first
    assert [line.split("  ")[0] for line in buffers] == ["1. Size: 9.00G", "2. Size: 3.00G"]
    assert "f32[1,2]" in buffers[0] and "dot_general" in buffers[0]
    assert tpu_program.refusal("INTERNAL: Mosaic failed") is None


def test_wrong_arguments_are_one_line(capsys):
    assert compile_for_tpu.main(["--topology=v5e:2x2"]) == 2
    assert "either --model or --config" in capsys.readouterr().err


@pytest.fixture(scope="module")
def chips():
    pytest.importorskip("libtpu", reason="libtpu is not installed (the extra [tpu]): nothing can compile for a TPU")
    return compile_for_tpu.devices_of("v5e:2x2")


@pytest.mark.parametrize("shape", [(1, 4, 1), (1, 2, 2)])
def test_splash_compiles_for_a_tpu_with_its_gradients(chips, shape):
    mesh = sharding.make_mesh(*shape, devices=chips)

    def rows(*dims, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, P(("data", "fsdp"))))

    b, g, r, p, kv, h = 4, 2, 31, 150, 2, 128
    ok, ok_prefix = rows(b, g, r, dtype=bool), rows(b, p, dtype=bool)
    arrays = (rows(b, g, r, 8, h), *[rows(b, g, r, kv, h)] * 2, *[rows(b, p, kv, h)] * 2)

    def loss(arrays, vision, ok, ok_prefix):
        q, k, v, k_prefix, v_prefix = arrays
        own = attention.prefix_causal(q, k, v, ok, k_prefix, v_prefix, ok_prefix, "splash")
        prompt = attention.causal(k_prefix, k_prefix, v_prefix, ok_prefix, "splash")
        seen = attention.bidirectional(vision, vision, vision, "splash")
        return sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in (own, prompt, seen))

    program = compile_for_tpu.Program(jax.grad(loss, (0, 1)), (arrays, rows(b, 324, 2, 80), ok, ok_prefix))
    compiled = jax.jit(program.run).lower(*program.args).compile()
    assert compiled.as_text().count("tpu_custom_call") >= 9  # three calls, each forward, dq and dkv


def test_a_model_that_does_not_fit_is_refused_by_name(chips, capsys):
    assert compile_for_tpu.main(["--model=72b", "--topology=v5e:2x2", "--only=prefill_243"]) == 1
    out = capsys.readouterr()
    assert "prefill_243: DOES NOT FIT 16 GiB" in out.out and "['text']" in out.out
    assert "does not fit: prefill_243" in out.err


def test_a_small_prefill_reports_memory_and_collectives(chips, capsys):
    assert compile_for_tpu.main(["--model=tiny", "--topology=v5e:2x2", "--mesh=1,2,2", "--only=prefill_243"]) == 0
    out = capsys.readouterr().out
    assert "GiB of 16 GiB per chip" in out and "all-gather" in out


def test_an_unknown_topology_is_one_line(chips, capsys):
    assert compile_for_tpu.main(["--model=tiny", "--topology=v9z:2x2"]) == 2
    assert "--topology=v9z:2x2" in capsys.readouterr().err


def test_an_experiment_on_files_gives_updates_and_rollouts_at_its_largest_sizes(repo):
    """Shapes alone, so no libtpu: 3B, 8 devices."""
    from tools import tpu_cases

    given = [f"--config.{name}.videos=8" for name in ("sft", "cgrpo", "distill")]
    preset = str(repo / "experiments" / "marc_qwen25vl_3b.py")
    _, programs, _ = tpu_cases.of_experiment(preset, given, "xla", jax.devices())
    stages = ["sft", "sft_retrieve", "cgrpo", "cgrpo_retrieve", "cgrpo_rollout", "cgrpo_teacher"]
    stages += ["distill", "distill_retrieve", "distill_rollout"]
    views = ["blind", "full", "marc", "per_event", "whole"]
    assert list(programs)[: len(stages)] == stages
    assert sorted(list(programs)[len(stages) :]) == [f"evaluate_{view}" for view in views]
    program = programs["sft"]()
    now, _ = jax.eval_shape(program.run, *program.args)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), now) == jax.tree.map(
        lambda x: (x.shape, x.dtype), program.args[0]
    )
    sample = programs["cgrpo_teacher"]()
    assert sample.args[1].tokens_bp.shape == (8, 16 + 32 * 144 + 512)  # 64 frames, padded
    assert jax.eval_shape(sample.run, *sample.args).tokens_bgr.shape == (8, 8, 768)
    choose, answer = programs["cgrpo_retrieve"](), programs["evaluate_full"]()
    chosen = jax.eval_shape(choose.run, *choose.args)  # three events may be the whole video
    assert chosen.patches_bsnc.shape == (8, 32, 4 * 144, 1280)
    assert jax.eval_shape(answer.run, *answer.args).tokens_bgr.shape == (16, 1, 768)


def test_with_adapters_the_model_is_held_once(repo):
    """The 3B's C-GRPO update at rank 16: the state has the only model, and moments of the adapters alone."""
    from tools import tpu_cases

    given = ["--config.cgrpo.videos=8", "--config.cgrpo.lora.rank=16", "--config.cgrpo.skip_dead=True"]
    given += ["--config.cgrpo.micro_batches=2", "--config.cgrpo.credit=0.1", "--config.only=('cgrpo',)"]
    preset = str(repo / "experiments" / "marc_qwen25vl_3b.py")
    _, programs, _ = tpu_cases.of_experiment(preset, given, "xla", jax.devices())
    program = programs["cgrpo"]()
    now, _, teacher = program.args
    assert teacher is None and sum(x.size for x in now.params.values()) == 29_933_568
    moments = sum(x.size for x in jax.tree.leaves(now.opt_state) if x.ndim)
    assert moments == 2 * 29_933_568
    after, _ = jax.eval_shape(program.run, *program.args)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), now)


def test_packed_rows_are_what_a_packing_stage_updates_on(repo):
    """The 3B's SFT update on 8 rows of 2,048 tokens, up to 4 questions in each, for 8 devices."""
    from tools import tpu_cases

    given = [f"--config.sft.{key}" for key in ("videos=8", "packing=True", "max_length=2048", "max_segments=4")]
    preset = str(repo / "experiments" / "marc_qwen25vl_3b.py")
    given += ["--config.only=('sft',)", "--config.cgrpo.videos=8", "--config.distill.videos=8"]
    _, programs, _ = tpu_cases.of_experiment(preset, given, "splash", jax.devices())
    program = programs["sft"]()
    assert program.args[1].tokens_bgr.shape == (32, 1, 512 + 768)
    now, metrics = jax.eval_shape(program.run, *program.args)
    assert metrics["packed_fill"][0].shape == () and now.step.shape == ()
