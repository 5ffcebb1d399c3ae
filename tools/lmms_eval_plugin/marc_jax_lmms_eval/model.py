"""The model class of lmms-eval around `marc_jax.evaluation.direct`: a video or image by its file, greedy answers."""

import os
import sys
from collections import defaultdict

from lmms_eval.api.model import lmms

from marc_jax.evaluation.direct import Direct

_ASKED = 256  # requests decoded, encoded and answered together


class MarcJax(lmms):
    """--model_args: checkpoint=FOLDER, and any keyword of `Direct` (view, encoder, fps, max_frames, frame_tokens, ...).

    `pretrained` is taken for `checkpoint`, as other models of lmms-eval call it. Sampling at a temperature is not done:
    answers are greedy, and a task that asks for another is told so once.
    """

    is_simple = True

    def __init__(self, checkpoint: str = "", pretrained: str = "", workdir: str = "", batch_size=8, **options):
        super().__init__()
        for ignored in ("device", "device_map", "max_batch_size"):  # lmms-eval passes them to every model
            options.pop(ignored, None)
        workdir = workdir or os.path.join(os.path.expanduser("~"), ".cache", "marc_jax", "lmms_eval")
        self.batch_size = int(batch_size)
        self.direct = Direct(checkpoint or pretrained, workdir, batch=self.batch_size, **options)
        self._told = False

    def generate_until(self, requests) -> list[str]:
        answers: dict[int, str] = {}
        groups = defaultdict(list)
        for i, request in enumerate(requests):
            text, file, how = self._question(request.args)
            groups[int(how.get("max_new_tokens", 128))].append((i, text, file, how))
        for most, group in groups.items():
            for start in range(0, len(group), _ASKED):
                part = group[start : start + _ASKED]
                said = self.direct.answer([(text, file) for _, text, file, _ in part], most)
                for (i, text, _, how), answer in zip(part, said, strict=True):
                    answers[i] = until(answer, how.get("until"))
                    self.cache_hook.add_partial("generate_until", (text, how), answers[i])
        return [answers[i] for i in range(len(requests))]

    def _question(self, args) -> tuple[str, str, dict]:
        context, how, doc_to_visual, doc_id, task, split = args
        return context, one_file(doc_to_visual(self.task_dict[task][split][doc_id]), task), self._greedy(how)

    def _greedy(self, how: dict) -> dict:
        if how.get("temperature") and how.get("do_sample", True) and not self._told:
            self._told = True
            print(f"marc_jax: answers are greedy; temperature={how['temperature']} is not used", file=sys.stderr)
        return how

    def loglikelihood(self, requests):
        raise NotImplementedError("marc_jax answers in words; choose a task with output_type generate_until")

    def generate_until_multi_round(self, requests):
        raise NotImplementedError("marc_jax answers one question at a time; choose a task of one round")


class MarcJaxChat(MarcJax):
    """The same for tasks that give messages."""

    is_simple = False

    def _question(self, args) -> tuple[str, str, dict]:
        _, doc_to_messages, how, doc_id, task, split = args
        parts = []
        for message in doc_to_messages(self.task_dict[task][split][doc_id]):
            if message["role"] != "user":
                raise ValueError(f"task {task}: a {message['role']} turn; marc_jax takes one user turn")
            content = message["content"]
            parts += [{"type": "text", "text": content}] if isinstance(content, str) else content
        text = "\n".join(part["text"] for part in parts if part["type"] == "text")
        visuals = [part.get("url", part.get(part["type"])) for part in parts if part["type"] != "text"]
        return text, one_file(visuals, task), self._greedy(how)


def one_file(visuals, task: str) -> str:
    """The one file a question is about. ValueError: none, several, or pictures in memory."""
    if not isinstance(visuals, list | tuple) or len(visuals) != 1 or not isinstance(visuals[0], str):
        kinds = [type(v).__name__ for v in visuals] if isinstance(visuals, list | tuple) else type(visuals).__name__
        raise ValueError(f"task {task}: visuals {kinds}; marc_jax takes one video or image file per question")
    return visuals[0]


def until(text: str, stops) -> str:
    """The text up to the first of the stop strings, as lmms-eval cuts it."""
    for stop in [stops] if isinstance(stops, str) else stops or []:
        if stop and stop != "\n\n":
            text = text.split(stop)[0]
    return text
