"""The lmms-eval plug-in against a stand-in of lmms-eval's interface: only the interface is tested, not lmms-eval."""

import dataclasses
import importlib
import sys
import types

import pytest


@dataclasses.dataclass
class Request:
    args: tuple


class Stub:
    """Answers with what it was asked."""

    def __init__(self, checkpoint, workdir, **options):
        self.checkpoint, self.options, self.calls = checkpoint, options, []

    def answer(self, questions, max_new_tokens):
        self.calls.append((len(questions), max_new_tokens))
        return [f"{text}|{file}|{max_new_tokens}###rest" for text, file in questions]


@pytest.fixture
def plugin(monkeypatch, repo):
    class Lmms:
        def __init__(self):
            self.task_dict, self.cache_hook = {}, types.SimpleNamespace(add_partial=lambda *a: None)

    @dataclasses.dataclass
    class ModelManifest:
        model_id: str
        simple_class_path: str | None = None
        chat_class_path: str | None = None

    made = {
        "lmms_eval": {}, "lmms_eval.api": {}, "lmms_eval.api.model": {"lmms": Lmms}, "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
    }  # fmt: skip
    for name, members in made.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.syspath_prepend(str(repo / "tools" / "lmms_eval_plugin"))
    model = importlib.import_module("marc_jax_lmms_eval.model")
    monkeypatch.setattr(model, "Direct", Stub)
    yield model
    for name in ("marc_jax_lmms_eval", "marc_jax_lmms_eval.model"):
        sys.modules.pop(name, None)


DOCS = {"t": {"test": {i: {"video": f"/v/{i}.mp4", "q": f"q{i}"} for i in range(3)}}}


def test_the_manifest_names_both_classes(plugin):
    package = importlib.import_module("marc_jax_lmms_eval")
    found = package.manifest()
    assert found.model_id == "marc_jax"
    for path, simple in ((found.simple_class_path, True), (found.chat_class_path, False)):
        module, _, name = path.rpartition(".")
        assert getattr(importlib.import_module(module), name).is_simple is simple


def test_simple_requests_come_back_in_their_order(plugin):
    model = plugin.MarcJax(pretrained="weights", batch_size="2", device="cuda:0", view="whole")
    assert model.direct.checkpoint == "weights" and model.direct.options == {"batch": 2, "view": "whole"}
    model.task_dict = DOCS
    how = [{"max_new_tokens": 16, "until": ["###"]}, {"max_new_tokens": 4}, {"max_new_tokens": 16, "temperature": 0}]
    requests = [Request((f"q{i}", how[i], lambda doc: [doc["video"]], i, "t", "test")) for i in range(3)]
    assert model.generate_until(requests) == ["q0|/v/0.mp4|16", "q1|/v/1.mp4|4###rest", "q2|/v/2.mp4|16###rest"]
    assert sorted(model.direct.calls) == [(1, 4), (2, 16)]


def test_chat_requests(plugin, capsys):
    model = plugin.MarcJaxChat(checkpoint="weights")
    model.task_dict = DOCS

    def messages(doc):
        parts = [{"type": "video", "url": doc["video"]}, {"type": "text", "text": doc["q"]}]
        return [{"role": "user", "content": parts}]

    how = {"max_new_tokens": 8, "temperature": 0.7, "do_sample": True}
    requests = [Request(("", messages, how, i, "t", "test")) for i in range(2)]
    assert model.generate_until(requests)[1] == "q1|/v/1.mp4|8###rest"
    assert capsys.readouterr().err.count("answers are greedy") == 1
    system = Request(("", lambda doc: [{"role": "system", "content": "x"}], {}, 0, "t", "test"))
    with pytest.raises(ValueError, match="one user turn"):
        model.generate_until([system])


def test_what_it_cannot_do_is_said(plugin):
    model = plugin.MarcJax(checkpoint="weights")
    model.task_dict = DOCS
    for visuals in ([], ["a", "b"], [object()]):
        with pytest.raises(ValueError, match="one video or image file"):
            model.generate_until([Request(("q", {}, lambda doc, v=visuals: v, 0, "t", "test"))])
    for name in ("loglikelihood", "generate_until_multi_round"):
        with pytest.raises(NotImplementedError, match="marc_jax answers"):
            getattr(model, name)([])
