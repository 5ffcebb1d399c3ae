"""The published forms of the benchmarks: one function each, from a decoded row to Video-R1's fields.

Every function takes (row, name of the file without suffix, keys it lies under) and returns a dict for
`sources.parse_record`. What it cannot use is a `Wrong(field, reason)`. Beside Video-R1's fields each row gets

    question_type     the row of the per-type table
    duration          the benchmark's own class of video length, "" where it has none
    paths             where the video may lie under the data root, the first that exists is used
    clip              (start, end) in seconds, where the question is about a part of the video only
    published         {name: value} of the original row that its official scoring or submission needs

Schemas: github.com/vision-x-nyu/thinking-in-space (VSI-Bench), EvolvingLMMs-Lab/VideoMMMU, yale-nlp/MMVU,
OpenGVLab/Ask-Anything video_chat2/mvbench.ipynb (MVBench), llyx97/TempCompass, BradyFU/Video-MME, doc-doc/NExT-QA,
jayleicn/moment_detr data/README (QVHighlights); each also as EvolvingLMMs-Lab/lmms-eval reads it.
"""

import math
import re
import string

LETTERS = string.ascii_uppercase
VSI_NUMBERS = ("object_abs_distance", "object_counting", "object_size_estimation", "room_size_estimation")
VSI_CHOICES = (
    "object_rel_direction_easy", "object_rel_direction_medium", "object_rel_direction_hard", "object_rel_distance",
    "route_planning", "obj_appearance_order",
)  # fmt: skip
# Task: (folder of its videos, whether `start` and `end` cut the clip out of a longer video).
MVBENCH = {
    "action_antonym": ("ssv2_video", False),
    "action_count": ("perception/videos", False),
    "action_localization": ("sta/sta_video", True),
    "action_prediction": ("star/Charades_v1_480", True),
    "action_sequence": ("star/Charades_v1_480", True),
    "character_order": ("perception/videos", False),
    "counterfactual_inference": ("clevrer/video_validation", False),
    "egocentric_navigation": ("vlnqa", False),
    "episodic_reasoning": ("tvqa/frames_fps3_hq", True),
    "fine_grained_action": ("Moments_in_Time_Raw/videos", False),
    "fine_grained_pose": ("nturgbd", False),
    "moving_attribute": ("clevrer/video_validation", False),
    "moving_count": ("clevrer/video_validation", False),
    "moving_direction": ("clevrer/video_validation", False),
    "object_existence": ("clevrer/video_validation", False),
    "object_interaction": ("star/Charades_v1_480", True),
    "object_shuffle": ("perception/videos", False),
    "scene_transition": ("scene_qa/video", False),
    "state_change": ("perception/videos", False),
    "unexpected_action": ("FunQA_test/test", False),
}
TEMPCOMPASS_TASKS = ("multi-choice", "yes_no", "caption_matching", "captioning")
TEMPCOMPASS_ASPECTS = ("action", "direction", "speed", "order", "attribute_change")
VIDEOMMMU_FOLDERS = {
    "Art": "Art Art_Theory Design Music",
    "Science": "Biology Chemistry Geography Math Physics",
    "Humanities": "History Literature Sociology Psychology",
    "Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power Materials "
    "Mechanical_Engineering",
    "Medicine": "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy Public_Health",
    "Business": "Accounting Economics Finance Manage Marketing",
}
NEXTQA_TYPES = ("CW", "CH", "TN", "TP", "TC", "DC", "DL", "DO")
_VIDEOMME = ("video_id", "duration", "domain", "sub_category", "question_id", "task_type", "question", "options")
_LETTERED = re.compile(r"([A-Z])[.):] ?")


class Wrong(ValueError):
    """A row that cannot be used: .field and .reason."""

    def __init__(self, field: str | None, reason: str):
        self.field, self.reason = field, reason
        super().__init__(f"field {field!r} {reason}")


def _get(row: dict, name: str, kind=str, allowed=None):
    value = row.get(name)
    if value is None:
        raise Wrong(name, "is missing")
    if not isinstance(value, kind) or isinstance(value, bool):
        wanted = {str: "a text", int: "a number", list: "a list", dict: "an object"}
        raise Wrong(name, f"is {value!r:.60}, not {wanted.get(kind, 'a number or a text')}")
    if allowed is not None and value not in allowed:
        raise Wrong(name, f"is {value!r:.60}, not one of {', '.join(allowed)}")
    return value


def lettered(options: list[str]) -> list[str]:
    """Options with their letters in front, "A. text"; those that all carry their own keep them."""
    own = [_LETTERED.match(option) for option in options]
    if all(match and match[1] == letter for match, letter in zip(own, LETTERS, strict=False)):
        return options
    return [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]


def bare(options) -> list[str]:
    """Lettered options without their letters."""
    return [option[match.end() :] if (match := _LETTERED.match(option)) else option for option in options]


def _choice(field: str, options, answer: str, answer_field: str) -> dict:
    """The fields of a multiple choice question; `answer` is a letter."""
    if not isinstance(options, list):
        raise Wrong(field, f"is {options!r:.60}, not a list of texts")
    if not 2 <= len(options) <= len(LETTERS):
        raise Wrong(field, f"holds {len(options)} options of a multiple choice question")
    for i, option in enumerate(options):
        if not isinstance(option, str) or not option.strip():
            raise Wrong(field, f"option {LETTERS[i]} is {option!r:.40}, not a text")
    if answer not in LETTERS[: len(options)] or len(answer) != 1:
        raise Wrong(answer_field, f"is {answer!r:.40}, not one of the letters of {len(options)} options")
    return {"problem_type": "multiple choice", "options": lettered(options), "solution": wrapped(answer)}


def _is_number(text: str) -> bool:
    """Whether it is one, and finite."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def wrapped(answer) -> str:
    return f"<answer>{answer}</answer>"


def unwrapped(solution: str) -> str:
    return solution.strip().removeprefix("<answer>").removesuffix("</answer>").strip()


def _text(value) -> dict:
    return {"problem_type": "free-form", "options": [], "solution": wrapped(value)}


def _video(problem_id, problem: str, question_type: str, paths, published: dict, duration: str = "") -> dict:
    return {
        "problem_id": problem_id, "problem": problem, "data_type": "video", "question_type": question_type,
        "duration": duration, "path": paths[0], "paths": tuple(paths), "published": published,
    }  # fmt: skip


def vsibench(row: dict, name: str, keys: tuple) -> dict:
    """test.jsonl or Parquet: id, dataset, scene_name, question_type, question, options, ground_truth."""
    kind = _get(row, "question_type", allowed=VSI_NUMBERS + VSI_CHOICES)
    scene = f"{_get(row, 'dataset')}/{_get(row, 'scene_name')}.mp4"
    truth = str(_get(row, "ground_truth", (str, int, float)))
    published = {"ground_truth": truth, "number": kind in VSI_NUMBERS}
    out = _video(_get(row, "id", (int, str)), _get(row, "question"), kind, (scene,), published)
    if kind in VSI_CHOICES:
        return out | _choice("options", row.get("options") or [], truth.strip(), "ground_truth")
    if not _is_number(truth):
        raise Wrong("ground_truth", f"is {truth!r:.40}, not a number")
    return out | {"problem_type": "regression", "options": [], "solution": wrapped(truth)}


def videomme(row: dict, name: str, keys: tuple) -> dict:
    """Parquet or JSON: videoID, duration, domain, sub_category, question_id, task_type, question, options, answer."""
    video = _get(row, "videoID")
    published = {field: row.get(field) for field in _VIDEOMME}
    published["video_id"] = _get(row, "video_id") if row.get("video_id") else None
    published["answer"] = answer = _get(row, "answer")
    duration = _get(row, "duration", allowed=("short", "medium", "long"))
    paths = [f"{folder}{video}.mp4" for folder in ("data/", "video/", "videos/", "")]
    out = _video(_get(row, "question_id"), _get(row, "question"), _get(row, "task_type"), paths, published, duration)
    return out | _choice("options", row.get("options") or [], answer.strip(), "answer")


def mmvu(row: dict, name: str, keys: tuple) -> dict:
    """validation.json: id, video (a URL), question_type, metadata.subject, question, choices {A..E}, answer."""
    kind = _get(row, "question_type", allowed=("multiple-choice", "open-ended"))
    video = _get(row, "video" if "video" in row else "video_path")
    path = "videos/" + video.rpartition("/videos/")[2]
    subject = path.split("/")[1] if path.count("/") > 1 else ""
    told = _get(row, "metadata", dict) if row.get("metadata") else {}
    subject = _get(told, "subject") if told.get("subject") else subject.replace("_", " ")
    published = {field: row.get(field) for field in ("id", "question_type", "question", "choices", "answer")}
    out = _video(_get(row, "id", (str, int)), _get(row, "question"), subject, (path,), published)
    answer = _get(row, "answer", (str, int, float))
    if kind == "open-ended":
        return out | _text(answer)
    choices = _get(row, "choices", dict)
    if sorted(choices) != list(LETTERS[: len(choices)]):
        raise Wrong("choices", f"is {choices!r:.60}, not an object of A, B, ...")
    return out | _choice("choices", [choices[letter] for letter in sorted(choices)], str(answer).strip(), "answer")


def mvbench(row: dict, name: str, keys: tuple) -> dict:
    """json/<task>.json: video, question, candidates, answer (a candidate's text), start and end where it is cut."""
    if name not in MVBENCH:
        raise Wrong(None, f"is of {name}.json, which is none of MVBench's {len(MVBENCH)} tasks")
    folder, cut = MVBENCH[name]
    video, candidates, answer = _get(row, "video"), _get(row, "candidates", list), _get(row, "answer")
    found = [i for i, text in enumerate(candidates) if text == answer]
    found = found or [i for i, text in enumerate(candidates) if str(text).strip() == answer.strip()]
    if not found:
        raise Wrong("answer", f"is {answer!r:.60}, none of the candidates")
    published = {"candidates": candidates, "answer": candidates[found[0]]}
    paths = (f"{folder}/{video}", f"video/{folder}/{video}")
    out = _video(f"{name}/{keys[-1]}", _get(row, "question"), name, paths, published)
    if name == "episodic_reasoning":
        out |= {"data_type": "frame", "fps": 3}  # a folder of pictures, named 00001.jpg and on
    if cut:
        out["clip"] = tuple(float(_get(row, field, (int, float))) for field in ("start", "end"))
    return out | _choice("candidates", candidates, LETTERS[found[0]], "answer")


def tempcompass(row: dict, name: str, keys: tuple) -> dict:
    """questions/<task>.json: {video: {aspect: [{question, answer}]}}; or rows with video_id and dim."""
    if name not in TEMPCOMPASS_TASKS:
        raise Wrong(None, f"is of {name}, which is none of TempCompass's tasks {', '.join(TEMPCOMPASS_TASKS)}")
    video, aspect, index = keys if len(keys) == 3 else (_get(row, "video_id"), _get(row, "dim"), keys[-1])
    if aspect not in TEMPCOMPASS_ASPECTS:
        raise Wrong("dim", f"is {aspect!r}, not one of {', '.join(TEMPCOMPASS_ASPECTS)}")
    question, answer = _get(row, "question"), _get(row, "answer")
    published = {"task": name, "video_id": video, "dim": aspect, "question": question, "answer": answer}
    paths = [f"{folder}{video}.mp4" for folder in ("videos/", "")]
    problem, *lines = question.split("\n")
    out = _video(f"{name}/{video}/{aspect}/{index}", problem, aspect, paths, published)
    out["task"] = name
    if name == "captioning":
        return out | _text(answer) | {"problem": question}
    if name == "yes_no":
        if answer not in ("yes", "no"):
            raise Wrong("answer", f"is {answer!r:.40}, neither yes nor no")
        return out | _choice("question", ["yes", "no"], "A" if answer == "yes" else "B", "answer")
    if answer not in lines:
        raise Wrong("answer", f"is {answer!r:.60}, none of the question's options")
    texts = lines if name == "multi-choice" else [line.partition(": ")[2] for line in lines]
    return out | _choice("question", texts, LETTERS[lines.index(answer)], "answer")


def videommmu(row: dict, name: str, keys: tuple) -> dict:
    """<track>_video.json: {track: {number: {id, question, options, answer, question_type}}}; or rows of one track."""
    track = (keys[0] if len(keys) == 2 else name.removesuffix("_video").partition("-")[0]).capitalize()
    if track not in ("Perception", "Comprehension", "Adaptation"):
        raise Wrong(None, f"is of track {track!r}, not one of Perception, Comprehension, Adaptation")
    video, options = _get(row, "id"), row.get("options") or []
    subject = "_".join(video.split("_")[1:-1])
    folders = [folder for folder, subjects in VIDEOMMMU_FOLDERS.items() if subject in subjects.split()]
    paths = [f"{folder}/{video}.mp4" for folder in (*folders, "videos")] + [f"{video}.mp4"]
    answer = _get(row, "answer", (str, list))
    # Perception and comprehension name no type: all of theirs are choices.
    kind = row.get("question_type") or ("multiple-choice" if options else "open")
    kind = "multiple-choice" if kind in ("perception", "comprehension") else kind
    if kind not in ("multiple-choice", "open"):
        raise Wrong("question_type", f"is {kind!r:.40}, not one of multiple-choice, open")
    if isinstance(answer, list) and not (answer and all(isinstance(text, str) for text in answer)):
        raise Wrong("answer", f"is {answer!r:.60}, not texts")
    published = {"id": video, "track": track, "subject": subject, "options": options, "answer": answer, "type": kind}
    problem = re.sub(r"\s*<image 1>\s*", " ", _get(row, "question")).strip()
    out = _video(f"{track}/{keys[-1]}", problem, track, paths, published)
    if kind == "open":
        return out | _text(answer[0] if isinstance(answer, list) else answer)
    return out | _choice("options", options, str(answer).strip(), "answer")


def nextqa(row: dict, name: str, keys: tuple) -> dict:
    """<split>.csv: video, frame_count, width, height, question, answer (0..4), qid, type, a0..a4."""
    video, qid = str(row.get("video")), row.get("qid")
    kind = _get(row, "type", allowed=NEXTQA_TYPES)
    answer = str(row.get("answer"))
    if answer not in ("0", "1", "2", "3", "4"):
        raise Wrong("answer", f"is {answer!r}, not the number of an option, 0 to 4")
    key = f"{video}_{qid}"
    paths = [f"{folder}{video}.mp4" for folder in ("NExTVideo/", "videos/", "")]
    options = [_get(row, f"a{i}") for i in range(5)]
    published = {"key": key, "type": kind, "answer": int(answer), "options": options}
    group = "TN" if kind == "TP" else kind  # before and after are one row of the published table
    out = _video(key, _get(row, "question"), group, paths, published)
    return out | _choice("a0..a4", options, LETTERS[int(answer)], "answer")


def of_video_r1(benchmark: str, row: dict, kind: str) -> dict:
    """`published` of a row in Video-R1's evaluation schema, as far as official scoring needs it."""
    answer, texts = unwrapped(row["solution"]), bare(row.get("options") or [])
    choice = row["problem_type"] == "multiple choice"
    if benchmark == "vsibench":
        return {"ground_truth": answer, "number": not choice}
    if benchmark == "videomme":
        return {field: row.get(field) for field in _VIDEOMME} | {"answer": answer, "options": row["options"]}
    if benchmark == "mvbench":
        right = dict(zip(LETTERS, texts, strict=False))
        return {"candidates": texts, "answer": right.get(answer)}
    if benchmark == "mmvu":
        kind = "multiple-choice" if choice else "open-ended"
        choices = dict(zip(LETTERS, texts, strict=False))
        return {"id": row["problem_id"], "question_type": kind, "question": row["problem"], "choices": choices,
                "answer": answer}  # fmt: skip
    if benchmark == "videommmu":
        name = row["path"].rpartition("/")[2].rpartition(".")[0]
        return {"id": name, "track": kind, "options": texts, "answer": answer,
                "type": "multiple-choice" if choice else "open"}  # fmt: skip
    if benchmark == "nextqa":
        number = LETTERS.find(answer) if answer else -1
        return {"key": row["problem_id"], "type": kind, "answer": number, "options": texts}
    if benchmark == "tempcompass":  # which of the four tasks a row is of, only its options tell
        yes_no = sorted(text.strip(" .").lower() for text in texts) == ["no", "yes"]
        own = dict(zip(LETTERS, texts if yes_no else lettered(list(row.get("options") or [])), strict=False))
        right = own.get(answer, answer)
        video = row["path"].rpartition("/")[2].rpartition(".")[0]
        return {"task": "yes_no" if yes_no else "multi-choice", "video_id": video, "dim": kind,
                "question": "\n".join([row["problem"], *([] if yes_no else own.values())]),
                "answer": right.strip(" .").lower() if yes_no else right}  # fmt: skip
    return {}


def _numbers(values, count: int) -> bool:
    """Whether it is a list of so many finite numbers."""
    numbers = isinstance(values, list) and all(type(v) in (int, float) and math.isfinite(v) for v in values)
    return numbers and len(values) == count


def qvhighlights(row: dict, name: str, keys: tuple) -> dict:
    """highlight_<split>_release.jsonl: qid, query, duration, vid, relevant_windows, relevant_clip_ids, saliency_scores.

    The answer is a list of windows, not a text: `problem_type` "moment retrieval", which no prompt asks for.
    """
    video, duration = _get(row, "vid"), _get(row, "duration", (int, float))
    windows = row.get("relevant_windows")
    if not isinstance(windows, list) or not windows:
        raise Wrong("relevant_windows", "is missing or empty (the test split publishes none)")
    for window in windows:
        if not _numbers(window, 2) or not 0 <= window[0] < window[1]:
            raise Wrong("relevant_windows", f"holds {window!r:.40}, not a [start, end] in seconds")
    judged = ("saliency_scores", "relevant_clip_ids")
    scores, clips = (_get(row, name, list) if row.get(name) else [] for name in judged)
    if len(scores) != len(clips):
        raise Wrong("saliency_scores", f"has {len(scores)} entries for {len(clips)} relevant_clip_ids")
    if wrong := [score for score in scores if not _numbers(score, 3)]:
        raise Wrong("saliency_scores", f"holds {wrong[0]!r:.40}, not the scores of three annotators")
    if wrong := [clip for clip in clips if type(clip) is not int or not 0 <= clip < duration // 2]:
        raise Wrong("relevant_clip_ids", f"holds {wrong[0]!r:.40}, no clip of 2 s of the video's {duration} s")
    kept = ("qid", "query", "vid", "duration", "relevant_windows", "relevant_clip_ids", "saliency_scores")
    paths = [f"{folder}{video}.mp4" for folder in ("videos/", "")]
    out = _video(_get(row, "qid", int), _get(row, "query"), "moment", paths, {field: row.get(field) for field in kept})
    out |= {"problem_type": "moment retrieval", "options": [], "solution": wrapped(windows), "video_seconds": duration}
    return out
