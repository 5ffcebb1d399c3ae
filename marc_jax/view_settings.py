"""The keys of a view in an experiment: defaults, what may be set, and what goes with what. No jax here."""

from ml_collections import ConfigDict

SELECTORS = ("uniform", "topk", "bolt", "aks")
SELECT = ("all", "retrieve", "random", "none", *SELECTORS)
WATCHERS = ("visionzip", "fastvid", "holitom")
SCENIC = ("adjacent_merge", "token_learner")
TOKENS = ("random_tokens", "pooled_tokens", "vidcom2", "evs", "dtd", *WATCHERS, *SCENIC)
LADDER = (64, 128, 256, 512, 1024)  # of `memory.budget`
METHOD = ("keep", "merge", "per_event", "mean", "pooled", "moviechat", "fastv", *TOKENS)
ONE_SIZE = ("pooled", "pooled_tokens", *SCENIC)  # methods for videos of one size alone


def unknown(key: str, value, known) -> list[str]:
    """[what is wrong with the value of a key that takes one of `known`], or []."""
    show = repr if "" in known else str
    return [] if value in known else [f"{key} = {value!r}: choose one of {', '.join(map(show, known))}"]


def view() -> ConfigDict:
    c = ConfigDict({"select": "all", "method": "keep", "k": 3, "keep": 1, "in_event": 1, "weighted": False})
    c.update(represent="mean", rule=None, adaptive=False, tokens=None, budgets=LADDER)
    c.update(share=None, shrink=1, apart=1, seed=0, layer=2, tell="")
    return c


def problems(name: str, c) -> list[str]:
    wrong = unknown(f"views.{name}.select", c.select, SELECT) + unknown(f"views.{name}.method", c.method, METHOD)
    try:
        c.tell.format(patches=0, tokens=0)
    except (ValueError, LookupError):
        wrong.append(f"views.{name}.tell = {c.tell!r}: may hold {{patches}} and {{tokens}}, and no other braces")
    if c.method == "per_event" and c.select != "retrieve":
        wrong.append(f"views.{name}: method 'per_event' needs select 'retrieve'")
    if min(c.k, c.keep, c.shrink, c.apart, c.layer) < 1:
        wrong.append(f"views.{name}: k, keep, shrink, apart and layer must be at least 1")
    if not c.budgets or any(a >= b for a, b in zip((0, *c.budgets), c.budgets, strict=False)):
        wrong.append(f"views.{name}.budgets = {c.budgets}: rising numbers of tokens")
    if c.adaptive and c.method != "merge":
        wrong.append(f"views.{name}.adaptive shares the budget of a merge: method must be 'merge', not {c.method!r}")
    if c.share is None and c.method in (*TOKENS, "moviechat", "fastv"):
        wrong.append(f"views.{name}: method {c.method!r} needs a share, the part of the video's tokens to read")
    if c.method in ("fastv", "adjacent_merge") and c.select != "all":
        wrong.append(f"views.{name}: method {c.method!r} takes its share of whole videos: select must be 'all'")
    if c.share is not None:
        if not 0.001 <= c.share <= 1:
            wrong.append(f"views.{name}.share = {c.share} must lie between 0.001 and 1")
        if c.method in ("per_event", "mean", "pooled") or c.adaptive or c.tokens is not None:
            wrong.append(f"views.{name}: share goes with neither per_event, mean, pooled, adaptive nor tokens")
        if c.select in ("random", "none"):
            wrong.append(f"views.{name}: select {c.select!r} has a size of its own, it takes no share")
    return wrong


def budget_problems(views, patches: int) -> list[str]:
    """Of views that read more than a video of so many temporal patches can have."""
    return [
        f"views.{name}.{key} = {c[key]} is above the {patches} temporal patches that a video can have"
        for name, c in views.items()
        for key, budget in (("keep", c.method == "merge"), ("k", c.select in SELECTORS and c.share is None))
        if budget and c[key] > patches
    ]  # fmt: skip


def file_problems(name: str, c) -> list[str]:
    """Files have frames of many sizes, and the memory holds features of them and embeddings of their events."""
    wrong = []
    if c.method in ONE_SIZE:
        wrong.append(f"views.{name}: {c.method!r} needs videos of one size, and files have many")
    if c.method in WATCHERS or c.shrink > 1:
        needs = f"shrink = {c.shrink}" if c.shrink > 1 else repr(c.method)
        wrong.append(f"views.{name}: {needs} needs the pixels, and a run on files reads stored features")
    if c.select in SELECTORS[1:]:
        wrong.append(f"views.{name}: {c.select!r} needs an embedding of every patch, and files have those of events")
    return wrong


def trained_problems(name: str, c, visual: str) -> list[str]:
    """Of the view that the stage `name` trains through."""
    wrong = []
    if c.method == "fastv":
        wrong.append(f"{name}.view drops tokens inside the decoder ('fastv'): that is for evaluation, not for training")
    if c.select in SELECTORS[1:]:
        wrong.append(f"{name}.view chooses patches by {c.select!r}: that is for evaluation, not for training")
    if visual != "pixels" and (c.method in WATCHERS or c.shrink > 1):
        wrong.append(f"{name}.view needs the vision tower to run: {name}.visual must be 'pixels'")
    return wrong


def layer_problems(views, layers: int) -> list[str]:
    """Of views that drop tokens inside a decoder of so many layers."""
    return [
        f"views.{name}.layer = {v.layer}: 'fastv' needs layers after it, the model has {layers}"
        for name, v in views.items() if v.method == "fastv" and v.layer >= layers
    ]  # fmt: skip
