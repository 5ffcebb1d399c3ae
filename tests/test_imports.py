"""The arrows between the rooms (who may import whom), read from the source, function-level imports included."""

import ast
import pathlib
import subprocess
import sys

import pytest

REPO = pathlib.Path(__file__).resolve().parent.parent

FOUNDATION = (
    "marc_jax.config", "marc_jax.files", "marc_jax.guard", "marc_jax.hardware", "marc_jax.locks",
    "marc_jax.manifest", "marc_jax.optim", "marc_jax.paths", "marc_jax.streamed",
)  # fmt: skip
PURE = (
    "marc_jax.models.rope",
    "marc_jax.memory.retrieve",
    "marc_jax.memory.compress",
    "marc_jax.memory.budget",
    "marc_jax.rl.advantages",
    "marc_jax.rl.answers",
    "marc_jax.rl.logprob",
    "marc_jax.rl.loss",
    "marc_jax.rl.packing",
    "marc_jax.rl.parity",
    "marc_jax.rl.rewards",
    "marc_jax.evaluation.intervals",
    "marc_jax.evaluation.scoring",
    "marc_jax.evaluation.judging",
    "marc_jax.evaluation.official",
    "marc_jax.evaluation.moments",
    "marc_jax.evaluation.benchmarks",
)
FORBIDDEN = ("tensorflow", "torch", "transformers", "clu", "pickle", "dill", "joblib", "yaml")
ENTRIES = tuple(f"marc_jax.{name}" for name in "train eval index index_with_beam ask precompute".split())
# Between the maths and the entries: each room and all that it may import.
ABOVE = {
    "marc_jax.baselines.fastv": ("marc_jax.baselines", "marc_jax.rl.rollout", "marc_jax.rl.types"),
    "marc_jax.memory.view": (
        "marc_jax.baselines",
        "marc_jax.memory.budget",
        "marc_jax.memory.choose",
        "marc_jax.memory.compress",
        "marc_jax.memory.retrieve",
        "marc_jax.rl.types",
        "data_pipelines.patches",
    ),
    "marc_jax.memory.encoders": (
        "data_pipelines.patches",
        "marc_jax.checkpoint",
        "marc_jax.clip_tokenizer",
        "marc_jax.memory",
        "marc_jax.models",
        "marc_jax.sharding",
    ),
    "marc_jax.memory.shots": ("data_pipelines", "marc_jax.checkpoint", "marc_jax.memory", "marc_jax.models"),
    "marc_jax.memory.indexer": ("data_pipelines", "marc_jax.memory", "marc_jax.models"),
    "marc_jax.batches": ("data_pipelines", "marc_jax.memory.view", "marc_jax.models.prompts", "marc_jax.rl.types"),
    "marc_jax.messages": ("data_pipelines", "marc_jax.models.prompts"),
    "marc_jax.loop": ("marc_jax.checkpoint", "marc_jax.interrupt", "marc_jax.metrics", "marc_jax.state", *FOUNDATION),
    "marc_jax.pretrained": ("marc_jax.checkpoint", "marc_jax.models", "marc_jax.tokenizer", *FOUNDATION),
    "marc_jax.run": ("data_pipelines", "marc_jax"),
    "marc_jax.plan": ("data_pipelines", "marc_jax"),
    "marc_jax.evaluation.compare": ("data_pipelines.benchmarks", "marc_jax.config", "marc_jax.evaluation"),
    "marc_jax.media": ("data_pipelines", "marc_jax"),
    "marc_jax.records": ("data_pipelines", "marc_jax"),
    "marc_jax.unusable": ("data_pipelines", "marc_jax"),
    "marc_jax.synthetic": ("data_pipelines", "marc_jax"),
    "marc_jax.stages": ("data_pipelines", "marc_jax"),
    "marc_jax.stage_parts": ("data_pipelines", "marc_jax"),
    "marc_jax.distill": ("data_pipelines", "marc_jax"),
    "marc_jax.cgrpo": ("data_pipelines", "marc_jax"),
    "marc_jax.grades": ("marc_jax.rl", "marc_jax.run", "marc_jax.sharding", *FOUNDATION),
    "marc_jax.samples": ("marc_jax.metrics", *FOUNDATION),
    "marc_jax.watch": ("marc_jax.metrics", "marc_jax.samples", *FOUNDATION),
    "marc_jax.evaluation.run": ("data_pipelines", "marc_jax"),
    "marc_jax.evaluation.during": ("data_pipelines", "marc_jax"),
    "marc_jax.evaluation.experiment": ("data_pipelines", "marc_jax"),
    "marc_jax.evaluation.harness": ("data_pipelines", "marc_jax"),
    "marc_jax.evaluation.grounding": ("data_pipelines", "marc_jax"),
    "marc_jax.evaluation.direct": ("data_pipelines", "marc_jax"),
    "marc_jax.evaluation.single": ("data_pipelines", "marc_jax"),
    "marc_jax.archive": ("data_pipelines", "marc_jax"),
}


def modules(*roots: str) -> dict[str, pathlib.Path]:
    """Dotted name -> file, of every module under the given folders that exist."""
    found = {}
    for root in roots:
        folder = REPO / root
        for path in [*folder.rglob("*.py")] if folder.is_dir() else [folder.with_suffix(".py")]:
            if path.is_file():
                parts = path.relative_to(REPO).with_suffix("").parts
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: pathlib.Path) -> set[str]:
    """Every module that a file imports anywhere; `from a import b` gives both "a" and "a.b"."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def within(module: str, roots) -> bool:
    return any(module == root or module.startswith(f"{root}.") for root in roots)


def ours(found: set[str]) -> set[str]:
    """Only modules of this repository, without the names imported from them."""
    known = set(modules("marc_jax", "data_pipelines", "experiments", "tools"))
    packages = {name for name, path in modules("marc_jax", "data_pipelines").items() if path.name == "__init__.py"}
    return {name for name in found if name in known and name not in packages}


def offences(names: dict[str, pathlib.Path], wrong) -> list[str]:
    return [
        f"{name} imports {found}"
        for name, path in names.items()
        for found in sorted(imports(name, path))
        if wrong(found)
    ]


def strangers(module: str, path: pathlib.Path, allowed) -> list[str]:
    """What a module imports from this repository beyond what it may."""
    return [f"{module} imports {m}" for m in sorted(ours(imports(module, path))) if not within(m, allowed)]


def assert_none(found: list[str]) -> None:
    assert not found, "\n".join(found)


def test_data_pipelines_never_touch_jax_or_marc_jax():
    assert_none(
        offences(modules("data_pipelines"), lambda m: within(m, ("jax", "jaxlib", "flax", "optax", "marc_jax")))
    )


def test_experiments_import_only_ml_collections():
    assert_none(offences(modules("experiments"), lambda m: not within(m, ("ml_collections", "experiments"))))


@pytest.mark.parametrize("name", PURE)
def test_pure_maths_know_only_each_other(name):
    for module, path in modules(name.replace(".", "/")).items():
        allowed = (*PURE, "marc_jax.hopper", "marc_jax.rl.types", "marc_jax.sharding")
        assert_none(strangers(module, path, allowed))
        assert_none(offences({module: path}, lambda m: within(m, ("flax", "optax", "orbax", "grain", "cv2", "av"))))


def test_the_foundation_imports_no_models_rl_or_data():
    names = modules(
        *(f"marc_jax/{n}" for n in "sharding optim state checkpoint metrics config manifest interrupt".split()),
        *("marc_jax/paths", "marc_jax/streamed"),
    )
    allowed = (*FOUNDATION, "marc_jax.sharding")
    for module, path in names.items():
        # config looks VideoError up among the loaded modules, it does not import it.
        assert_none(strangers(module, path, allowed))


def test_models_import_only_sharding_paths_and_types():
    for module, path in modules("marc_jax/models").items():
        allowed = ("marc_jax.hopper", "marc_jax.models", "marc_jax.paths", "marc_jax.sharding", "marc_jax.rl.types")
        assert_none(strangers(module, path, allowed))


def test_memory_and_baselines_stay_below_training():
    for module, path in modules("marc_jax/memory", "marc_jax/baselines").items():
        if module in ABOVE:
            continue
        allowed = ["marc_jax.hopper", "marc_jax.memory", "marc_jax.baselines", "marc_jax.rl.types", "marc_jax.sharding"]
        allowed += FOUNDATION
        if module in ("marc_jax.memory.embed", "marc_jax.memory.events"):
            allowed += ["marc_jax.models"]
        assert_none(strangers(module, path, allowed))


@pytest.mark.parametrize("name", ABOVE)
def test_rooms_above_the_maths_know_only_what_they_build_on(name):
    for module, path in modules(name.replace(".", "/")).items():
        assert_none(strangers(module, path, ABOVE[name]))


def test_what_runs_share_knows_neither_stages_nor_evaluation():
    above = ("marc_jax.stages", "marc_jax.loop", "marc_jax.evaluation")
    for name in ("run", "records", "unusable", "synthetic", "grades", "samples", "watch"):
        assert_none(offences(modules(f"marc_jax/{name}"), lambda m: within(m, above)))
    for name in ("stages", "stage_parts", "distill", "cgrpo"):
        assert_none(offences(modules(f"marc_jax/{name}"), lambda m: within(m, above[1:])))


def test_reports_are_drawn_without_models_or_training():
    for module, path in modules("marc_jax/evaluation").items():
        if module not in ABOVE:
            assert_none(strangers(module, path, ("marc_jax.evaluation", "marc_jax.rl.answers", *FOUNDATION)))


def test_nobody_imports_the_entries_or_tools_or_tests():
    library = {n: p for n, p in modules("marc_jax", "data_pipelines", "experiments").items() if n not in ENTRIES}
    assert_none(offences(library, lambda m: within(m, (*ENTRIES, "marc_jax.doctor", "tools", "tests"))))


def test_runs_need_neither_tensorflow_nor_torch_nor_pickle():
    assert_none(offences(modules("marc_jax", "data_pipelines"), lambda m: within(m, FORBIDDEN)))


def test_nothing_unpickles():
    for name, path in modules("marc_jax", "data_pipelines", "tools").items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "trust_remote_code"):
                assert isinstance(node.value, ast.Constant) and node.value.value is False, f"{name}: {node.arg}"


def test_files_keep_the_house_limits():
    limits = {"marc_jax.train": 350}
    for name, path in modules("marc_jax", "data_pipelines", "tools").items():
        limit = limits.get(name, 600 if within(name, ("marc_jax.models",)) else 400)
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= limit, f"{name} has {lines} lines, the limit is {limit}"
        assert path.name != "utils.py", f"{name}: no utils"


def test_importing_the_package_is_cheap():
    heavy = "jax flax optax orbax cv2 av tensorflow_datasets matplotlib tensorflow torch".split()
    code = f"import sys, marc_jax, marc_jax.config; print([m for m in {heavy!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_training_process_never_loads_tensorflow_or_torch(tmp_path):
    code = (
        "import sys, marc_jax.checkpoint, marc_jax.metrics, marc_jax.state\n"
        f"marc_jax.metrics.Writer({str(tmp_path)!r}, 'stage').write(1, {{'loss': 1.0}})\n"
        "print([m for m in ('tensorflow', 'torch', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
