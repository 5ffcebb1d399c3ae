"""Which way of training a student wins where: labels, reward, the teacher's distribution; budgets; retrieval. 3 seeds.

    python -m tools.sweep --config=experiments/regimes.py --workdir=runs/regimes --seeds=0,1,2 --jobs=8 \\
        --also=experiments/baselines.py:regimes --pack=regimes.npz
    python -m tools.sweep_report regimes.npz --config=experiments/regimes.py --out=OUT

The synthetic set of experiments/synthetic.py and its model with fewer layers: steps of so small a model take as long as
they have kernels. Each seed has its own 4,000 training videos, 1,400 held-out videos with three questions each, and
weights of its own throughout. Stages stand in the order of what they tell, so a
sweep that is cut short still has the main rows.

Students see 40,960 questions, drawn once (`records`), or fewer where it says so; each arm one patch merged from three
retrieved events, where it does not say otherwise. One-patch students are not asked about order: it has no time in it.
"""

from ml_collections import ConfigDict

from experiments import synthetic

SINGLE, PAIRS = synthetic.SINGLE, synthetic.PAIRS
ALL = 40960  # questions of a student that has as many as it wants
TRAINED = SINGLE + PAIRS[:-1] + PAIRS[:-1]
PIXELS = {"init": "teacher", "videos": 128, "visual": "pixels", "trainable": (".*",), "types": TRAINED, "records": ALL}

SFT_STEPS, GRPO_STEPS, DISTILL_STEPS = 3000, 250, 2000
SHORT = 600  # steps of early SFT, and of what distillation is compared in: budgets, retrieval, divergence


def get_config(size=""):
    """`size`: "rehearsal" is a few stages of two steps on a dozen videos: does everything run, in minutes on a CPU."""
    given = synthetic.get_config()
    c = ConfigDict({key: given[key] for key in ("model", "clips", "teacher", "retriever")})
    c.model.vision.depth, c.model.text.num_layers = 2, 4
    c.title = "Training regimes on the synthetic set"
    c.save_every = 100_000
    c.data = {"train_videos": 4000, "test_videos": 1400, "questions_per_video": 3, "types": PAIRS, "workers": 10}
    c.data.keep_decoded = True
    c.retriever.steps = 1500
    c.views = views()
    c.stages = ("clips", "teacher", "retriever", *students(c))
    c.eval = ConfigDict({"main": "distill", "batch": 700, "pictures": 0})
    if size == "rehearsal":
        rehearse(c)
    c.eval.arms = arms(c)
    c.eval.claims = differences(c.eval.arms)
    return c


def rehearse(c) -> None:
    for name in c.stages:
        if name not in ("clips", "teacher", "retriever", "sft_early", "distill", "cgrpo_early", "sft_on"):
            del c[name]
    c.stages = tuple(name for name in c.stages if name in c)
    c.data.update(train_videos=16, test_videos=4, workers=0)
    c.model = {"vision": {"depth": 1, "hidden_size": 32}, "text": {"hidden_size": 32, "num_layers": 3}}
    for name in c.stages:
        c[name].update(steps=2, videos=4, events=(1, 1) if name == "clips" else (6, 6))
        if "records" in c[name]:
            c[name].records = 8


def views():
    retrieved = {"select": "retrieve", "method": "merge"}
    events = {"select": "retrieve", "method": "per_event"}
    return ConfigDict({
        "full": {"select": "all", "method": "keep"},
        "marc": {**retrieved, "k": 3, "keep": 1},
        "marc_2": {**retrieved, "k": 3, "keep": 2},
        "marc_3": {**retrieved, "k": 3, "keep": 3},
        "marc_4": {**retrieved, "k": 3, "keep": 4, "in_event": 2},
        "marc_6": {**retrieved, "k": 3, "keep": 6, "in_event": 2},
        "marc_k1": {**events, "k": 1},
        "weighted": {**retrieved, "k": 3, "keep": 1, "weighted": True},
        "per_event": {**events, "k": 3},
        "per_event_k2": {**events, "k": 2},
        "per_event_k4": {**events, "k": 4},
        "mass": {**events, "k": 4, "rule": "mass"},
        "gap": {**events, "k": 4, "rule": "gap"},
        "adaptive": {**retrieved, "k": 3, "keep": 6, "adaptive": True, "budgets": (4, 8, 12, 16, 20, 24)},
        "whole": {"select": "all", "method": "merge", "keep": 1},
        "whole_weighted": {"select": "all", "method": "merge", "keep": 1, "weighted": True},
        "mean": {"select": "all", "method": "mean"},
        "pooled": {"select": "all", "method": "pooled"},
        "random": {"select": "random", "method": "keep"},
        "blind": {"select": "none", "method": "keep"},
    })  # fmt: skip


def students(c) -> tuple[str, ...]:
    """Defines the students; their names in the order of what they tell."""
    names = []

    def stage(name: str, kind: str, steps: int, rate: float, view: str = "marc", **more) -> None:
        c[name] = {"kind": kind, **PIXELS, "view": view, "steps": steps, "optimizer": {"learning_rate": rate}}
        c[name].update(more)
        names.append(name)

    def sft(name: str, steps: int = SFT_STEPS, **more) -> None:
        stage(name, "sft", steps, 7e-4, **more)

    def distill(name: str, view: str = "marc", steps: int = SHORT, **more) -> None:
        stage(name, "distill", steps, 7e-4, view, **{"group": 4, "divergence": "forward", **more})

    def cgrpo(name: str, init: str, rate: float = 3e-4, **more) -> None:
        stage(name, "cgrpo", GRPO_STEPS, rate, **{"init": init, "group": 8, "beta": 0.02, **more})

    with_order = {"types": TRAINED + ("order",)}  # where more than one patch is read
    sft("sft_early", SHORT)
    distill("distill", steps=DISTILL_STEPS)
    sft("sft")
    cgrpo("cgrpo_early", "sft_early")
    sft("sft_on", 5 * GRPO_STEPS, init="sft_early")  # about C-GRPO's time on a GPU; and as many steps as it:
    sft("sft_on_steps", GRPO_STEPS, init="sft_early")
    cgrpo("cgrpo", "teacher")
    cgrpo("cgrpo_alpha0", "sft_early", alpha=0.0)
    sft("sft_whole", view="whole")
    distill("distill_short")
    distill("distill_whole", "whole")
    distill("distill_events", "per_event", **with_order)
    cgrpo("distill_reward", "teacher", credit=1.0)
    sft("sft_1k", 1200, records=1024)
    sft("sft_4k", 1200, records=4096)
    distill("distill_2", "marc_2", **with_order)
    distill("distill_3", "marc_3", **with_order)
    distill("distill_weighted", "weighted")
    distill("distill_pooled", "pooled", **with_order)
    distill("distill_reverse", divergence="reverse")
    cgrpo("cgrpo_none", "sft_early", scale="none")
    cgrpo("cgrpo_none_alpha0", "sft_early", scale="none", alpha=0.0)
    cgrpo("cgrpo_lost", "sft_early", weight="lost")
    cgrpo("cgrpo_credit", "sft_early", credit=0.1)
    cgrpo("cgrpo_batch", "sft_early", scale="batch")
    cgrpo("cgrpo_tau4", "sft_early", tau=0.4)
    cgrpo("cgrpo_tau8", "sft_early", tau=0.8)
    cgrpo("cgrpo_late", "sft")
    cgrpo("cgrpo_slow", "sft_early", 1e-4)
    cgrpo("cgrpo_1k", "sft_1k", records=1024)
    cgrpo("cgrpo_distilled", "distill")
    distill("distill_late", init="sft_early")
    return tuple(names)


UNTRAINED = (
    ("blind", "blind", "no video"),
    ("random", "random", "one random patch"),
    ("pooled", "pooled", "4 uniform frames, each pooled to one token"),
    ("mean", "mean", "mean of all patches"),
    ("whole", "whole", "whole video merged to one patch"),
    ("whole_weighted", "whole_weighted", "whole video merged to one patch, weighted by size"),
    ("untrained", "marc", "retrieval + one patch"),
    ("untrained_weighted", "weighted", "retrieval + one patch, weighted by size"),
    ("untrained_k1", "marc_k1", "one retrieved event, one patch"),
    ("untrained_2", "marc_2", "retrieval + two patches"),
    ("untrained_3", "marc_3", "retrieval + three patches"),
    ("untrained_4", "marc_4", "retrieval + four patches"),
    ("untrained_6", "marc_6", "retrieval + six patches"),
    ("per_event", "per_event", "one patch for each of three retrieved events"),
    ("per_event_k2", "per_event_k2", "one patch for each of two retrieved events"),
    ("per_event_k4", "per_event_k4", "one patch for each of four retrieved events"),
    ("mass", "mass", "one patch per event, as many events as hold 80 % of the retriever's belief, at most four"),
    ("gap", "gap", "one patch per event, events down to the largest gap in their scores, at most four"),
    ("adaptive", "adaptive", "retrieval + as many patches as the events deserve"),
)
LABELS = {
    "sft_early": f"SFT, early: {SHORT} steps",
    "sft": f"SFT, all labels, {SFT_STEPS:,} steps",
    "sft_1k": "SFT on 1,024 labels",
    "sft_4k": "SFT on 4,096 labels",
    "sft_on_steps": f"SFT continued from early SFT for C-GRPO's {GRPO_STEPS} steps",
    "sft_on": "SFT continued from early SFT for about C-GRPO's time",
    "sft_whole": "SFT, whole video merged to one patch",
    "cgrpo": "C-GRPO from the teacher's weights",
    "cgrpo_early": "C-GRPO from early SFT (alpha 0.3, tau 0.6)",
    "cgrpo_alpha0": "C-GRPO from early SFT, alpha 0",
    "cgrpo_none": "C-GRPO from early SFT, no division by the std",
    "cgrpo_none_alpha0": "C-GRPO from early SFT, no division by the std, alpha 0",
    "cgrpo_batch": "C-GRPO from early SFT, one scale for the batch",
    "cgrpo_lost": "C-GRPO from early SFT, questions weighted by 1 - eta",
    "cgrpo_credit": "C-GRPO from early SFT, 0.1 x the teacher's credit per token",
    "cgrpo_tau4": "C-GRPO from early SFT, tau 0.4",
    "cgrpo_tau8": "C-GRPO from early SFT, tau 0.8",
    "cgrpo_late": "C-GRPO from converged SFT",
    "cgrpo_slow": "C-GRPO from early SFT, a third of the learning rate",
    "cgrpo_1k": "C-GRPO from SFT on 1,024 labels, on the same ones",
    "cgrpo_distilled": "C-GRPO from the distilled student",
    "distill": f"on-policy distillation, no labels, forward KL, {DISTILL_STEPS:,} steps",
    "distill_short": f"on-policy distillation, no labels, forward KL, {SHORT} steps",
    "distill_reverse": f"distillation, {SHORT} steps, reverse KL",
    "distill_weighted": f"distillation, {SHORT} steps, patches merged by size",
    "distill_late": f"distillation, {SHORT} steps, from early SFT",
    "distill_whole": f"distillation, {SHORT} steps, whole video merged to one patch",
    "distill_pooled": f"distillation, {SHORT} steps, 4 uniform frames, each pooled to one token",
    "distill_2": f"distillation, {SHORT} steps, two patches",
    "distill_3": f"distillation, {SHORT} steps, three patches",
    "distill_events": f"distillation, {SHORT} steps, one patch for each of three retrieved events",
    "distill_reward": "C-GRPO + the teacher's credit per token, from the teacher's weights",
}
SAME = (  # a student that looks another way
    ("distill_events_k2", "distill_events", "per_event_k2", "the per-event student, two events"),
    ("distill_events_k4", "distill_events", "per_event_k4", "the per-event student, four events"),
    ("distill_events_mass", "distill_events", "mass", "the per-event student, as many events as hold 80 % of belief"),
    ("distill_k1", "distill", "marc_k1", "the one-patch student, one event"),
)


def arms(c):
    """Who answers the held-out questions, looking how."""
    made = ConfigDict()
    made.teacher = {"stage": "teacher", "view": "full", "group": "teacher", "label": "teacher, every patch"}
    for key, view, label in UNTRAINED:
        made[key] = {"stage": "teacher", "view": view, "label": f"{label}, untrained"}
    for name in (name for name in c.stages if name in LABELS):
        made[name] = {"stage": name, "view": c[name].view, "label": LABELS[name], "group": "student"}
    for key, stage, view, label in (row for row in SAME if row[1] in c.stages):
        made[key] = {"stage": stage, "view": view, "label": label, "group": "student"}
    return made


DIFFERENCES = (
    ("distill", "untrained", "distillation without labels against the untrained student"),
    ("distill", "sft", "distillation without labels against SFT on all labels"),
    ("distill_short", "sft_early", "distillation without labels against SFT, 600 steps each"),
    ("distill_short", "distill_reverse", "forward against reverse KL"),
    ("distill_short", "distill_weighted", "pairwise mean against mean weighted by size, distilled"),
    ("untrained", "untrained_weighted", "pairwise mean against mean weighted by size, untrained"),
    ("whole", "whole_weighted", "pairwise mean against mean weighted by size, whole video, untrained"),
    ("distill_short", "distill_whole", "retrieval against the whole video, distilled"),
    ("sft", "sft_whole", "retrieval against the whole video, SFT"),
    ("distill_short", "distill_pooled", "one patch against 4 uniform pooled frames, distilled"),
    ("untrained", "pooled", "one patch against 4 uniform pooled frames, untrained"),
    ("cgrpo_early", "sft_early", "C-GRPO against early SFT, its start"),
    ("cgrpo_early", "sft_on_steps", "C-GRPO against SFT continued for as many steps"),
    ("cgrpo_early", "sft_on", "C-GRPO against SFT continued for about its time"),
    ("cgrpo", "untrained", "C-GRPO from the teacher's weights against its start"),
    ("cgrpo_late", "sft", "C-GRPO from converged SFT against its start"),
    ("cgrpo_slow", "sft_early", "C-GRPO at a third of the learning rate against early SFT, its start"),
    ("cgrpo_1k", "sft_1k", "C-GRPO on 1,024 labels against SFT on them, its start"),
    ("cgrpo_distilled", "distill", "C-GRPO from the distilled student against its start"),
    ("distill_late", "sft_early", "distillation from early SFT against its start"),
    ("distill_late", "distill_short", "distillation from early SFT against distillation from the teacher's weights"),
    ("distill_short", "sft_4k", "distillation without labels against SFT on 4,096 labels"),
    ("cgrpo_early", "cgrpo_alpha0", "retention reward (alpha 0.3 against 0), divided by the group's std"),
    ("cgrpo_none", "cgrpo_none_alpha0", "retention reward (alpha 0.3 against 0), not divided"),
    ("cgrpo_none", "cgrpo_early", "C-GRPO: no division by the std"),
    ("cgrpo_batch", "cgrpo_early", "C-GRPO: one scale for the batch"),
    ("cgrpo_lost", "cgrpo_early", "C-GRPO: questions weighted by 1 - eta"),
    ("cgrpo_credit", "cgrpo_early", "C-GRPO: 0.1 x the teacher's credit per token"),
    ("cgrpo_tau4", "cgrpo_early", "C-GRPO: tau 0.4 against 0.6"),
    ("cgrpo_tau8", "cgrpo_early", "C-GRPO: tau 0.8 against 0.6"),
    ("distill_reward", "cgrpo", "the teacher's credit per token added to C-GRPO, from the teacher's weights"),
    ("distill_short", "distill_reward", "distillation against C-GRPO with the teacher's credit"),
    ("distill_2", "distill_short", "two patches against one, distilled"),
    ("distill_3", "distill_2", "three patches against two, distilled"),
    ("distill_events", "distill_3", "one patch per event against three patches, distilled"),
    ("per_event", "untrained_3", "one patch per event against three patches, untrained"),
    ("distill_events_mass", "distill_events", "adaptive number of events against three"),
    ("distill_events_mass", "distill_events_k2", "adaptive number of events against two"),
)


def differences(arms):
    """What the report compares question by question."""
    return ConfigDict({
        f"{i:02d}": {"text": label, "arm": arm, "minus": minus}
        for i, (arm, minus, label) in enumerate(DIFFERENCES) if arm in arms and minus in arms
    })  # fmt: skip
