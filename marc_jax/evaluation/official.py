"""Each benchmark's own scoring of one answer, equal to its published code item by item, oddities included.

    rule(benchmark)(text, published) -> (score or None, answer found or None)

`published` is what `data_pipelines.benchmarks.published` keeps of a row; a score of None says that the benchmark leaves
the item to a judge model or out of its mean. Pure Python; the rules are written from what the published code does:

    vsibench      vision-x-nyu/thinking-in-space lmms_eval/tasks/vsibench/utils.py
    mvbench       OpenGVLab/Ask-Anything video_chat2/mvbench.ipynb, check_ans
    tempcompass   llyx97/TempCompass eval_*.py --disable_llm (captioning has no rule: a judge model only)
    videomme      BradyFU/Video-MME evaluation/eval_your_results.py
    nextqa        doc-doc/NExT-QA eval_mc.py: option numbers compared; reading the number off a text is ours
    mmvu          lmms-eval tasks/mmvu/utils.py for choices (the authors' is a judge model); open ended: a judge model
    videommmu     EvolvingLMMs-Lab/VideoMMMU lmms_eval/tasks/videommmu/utils.py
"""

import re
import string

from marc_jax.evaluation.judging import option_letter, vsi_relative_accuracy
from marc_jax.rl.answers import parse_number

LETTERS = string.ascii_uppercase
# Two pairs of strings run together in the published list, as two commas are missing there.
_VIDEOMME_PREFIXES = (
    "The best answer is", "The correct answer is", "The answer is", "The answer",
    "The best option isThe correct option is", "Best answer:Best option:",
)  # fmt: skip
_OPEN_SIGNS = (
    "could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ", "are ", "in total ", "total ",
    "identify ", "recognize ", "calculated as ", "counted as ", "measured as ", "observed as ", "concluded as ",
    "found to be ", "equals ", "determined to be ", "number of ", "value is ", "adds up to ", "have ", "has ",
)  # fmt: skip
_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)
Verdict = tuple[float | None, str | None]


def rule(benchmark: str):
    """The rule of a benchmark. ValueError where it has none."""
    known = {
        "vsibench": vsibench, "mvbench": mvbench, "tempcompass": tempcompass, "videomme": videomme, "nextqa": nextqa,
        "mmvu": mmvu, "videommmu": videommmu,
    }  # fmt: skip
    if benchmark not in known:
        raise ValueError(f"{benchmark!r} has no rule for single answers; known: {', '.join(known)}")
    return known[benchmark]


def vsibench(text: str, published: dict) -> Verdict:
    """The first word, without full stops behind it: a letter compared without case, or a number's MRA."""
    word, truth = text.split(" ")[0].rstrip(".").strip(), published["ground_truth"]
    if not published["number"]:
        return float(word.lower() == truth.lower()), word if len(word) == 1 else None
    return (vsi_relative_accuracy(float(word), float(truth)), word) if _is_float(word) else (0.0, None)


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def mvbench(text: str, published: dict) -> Verdict:
    """The first word against "(b)": right if it is a part of it (nothing at all is), or it of the word."""
    right = [i for i, candidate in enumerate(published["candidates"]) if candidate == published["answer"]]
    sign = f"({LETTERS[right[-1]]})".lower()
    word = text.lower().split(" ")[0]
    found = re.fullmatch(r"\(?([a-z])\)?[.:,]?", word)
    return float(word.replace(".", "") in sign or sign in word), found[1].upper() if found else None


def tempcompass(text: str, published: dict) -> Verdict:
    """By task; what no rule matches is 0 and counts as not found."""
    said, answer = text.replace("</s>", "").strip(), published["answer"]
    if published["task"] == "captioning":
        return None, None
    if published["task"] == "yes_no":
        found = next((word for word in ("yes", "no") if said.lower().startswith(word)), None)
        return float(found == answer), found
    if published["task"] == "caption_matching":
        return _caption(said, published["question"], answer)
    if said == answer:
        return 1.0, said[:1]
    if said in ("A", "B", "C", "D") or re.match(r"[ABCD][.)]", said):
        return float(said[0] == answer[0]), said[0]
    return 0.0, None


def _caption(said: str, question: str, answer: str) -> Verdict:
    """The option as a whole, its sentence, or its name ("Caption A", "A"); the last that matches counts."""
    lines = [line.split(": ") for line in question.split("\n")[1:]]
    names = [line[0] for line in lines]
    short = [re.sub("Sentence |Option |Caption ", "", name) for name in names]
    after = said.split(") ")[1] if ") " in said else said
    found = None
    for line in question.split("\n")[1:]:
        found = line if line == said else found
    for line in lines:
        found = line[1] if line[1] in (said, after) else found
    for name in names + short:
        found = name if name in (said, said.replace(".", "")) else found
    if found is None:
        return 0.0, None
    name, sentence = answer.split(": ")[:2]
    return float(found in (answer, answer.split(":")[0], sentence, name.split()[1])), found


def videomme(text: str, published: dict) -> Verdict:
    """The first of the letters ABCD anywhere behind stripped phrases; an answer without one is out of the mean."""
    said = text.strip()
    for prefix in _VIDEOMME_PREFIXES:
        said = said.replace(prefix, "")
    found = re.search("[ABCD]", said)
    return (float(found[0] == published["answer"]), found[0]) if found else (None, None)


def nextqa(text: str, published: dict) -> Verdict:
    options = [f"{letter}. {words}" for letter, words in zip(LETTERS, published["options"], strict=False)]
    found = option_letter(text, options)
    return float(found is not None and LETTERS.index(found) == published["answer"]), found


def mmvu(text: str, published: dict) -> Verdict:
    """A choice is right if its letter stands alone anywhere, or its text occurs, or its letter and a word of it do."""
    if published["question_type"] != "multiple-choice":
        return None, None
    said, letter = text.strip(), published["answer"].strip()
    found = re.search(r"\b([A-E])\b", said, re.IGNORECASE)
    found = found[1].upper() if found else None
    right = re.search(rf"\b{letter}\b", said, re.IGNORECASE) is not None
    choice, lower = published["choices"][letter].strip().lower(), said.lower()
    words = [word.strip(string.punctuation) for word in choice.split()]
    right = right or choice in lower
    right = right or letter.lower() in lower and any(word in lower for word in words if len(word) > 2)
    return float(right), found


def videommmu(text: str, published: dict) -> Verdict:
    """Choices by letter marks, else by an option's words; open answers by the numbers and phrases behind key words."""
    if text in ("", "API Error"):
        return None, None
    if published["type"] == "multiple-choice":
        found = _mmmu_choice(text, published["options"])
        return float(found == published["answer"]), found
    truths = published["answer"] if isinstance(published["answer"], list) else [published["answer"]]
    wanted = [value for truth in truths for value in _normal(truth)]
    said = _open_answers(text)
    right = any(
        value in wanted if isinstance(value, float) else any(isinstance(w, str) and w in value for w in wanted)
        for value in said
    )
    return float(right), "; ".join(map(str, said[:3]))


def _mmmu_choice(text: str, options: list[str]) -> str | None:
    for sign in ",.!?;:'":
        text = text.strip(sign)
    text, letters = f" {text} ", LETTERS[: len(options)]

    def marked(form):
        return [letter for letter in letters if form.format(letter) in text]

    dots, colons = marked("{}."), marked("{}:")
    found, place = dots + colons, "{}." if dots else "{}:"
    if not found:
        found, place = marked("({})"), "({})"
    if not found:
        found, place = marked("{} "), " {} "
    if found:
        return max(found, key=lambda letter: text.rfind(place.format(letter)))
    if len(text.split()) > 5:
        low = text.lower()
        named = [letter for letter, option in zip(letters, options, strict=True) if option.lower() in low]
        return max(named, key=lambda letter: low.rfind(options[LETTERS.index(letter)].lower()), default=None)
    return None


def _open_answers(text: str) -> list:
    """Floats, and texts in small letters, that an open answer may mean."""
    low = text.strip().strip(".").lower()
    parts = re.split(r"\.\s(?=[A-Z])|\n", low)
    keys = []
    for i, part in enumerate(parts):
        signs = (*_OPEN_SIGNS, "=") if i == len(parts) - 1 else _OPEN_SIGNS
        tails = [part.split(sign)[-1].strip() for sign in signs if sign in part]
        # An empty tail gives way to any later one, as in the published loop.
        best = ""
        for tail in tails:
            best = tail if not best or len(tail) < len(best) else best
        if best and best not in (":", ",", ".", "!", "?", ";", "'"):
            keys.append(best)
    keys = keys or [low]
    found = keys + [number for key in keys for pattern in _NUMBERS for number in re.findall(pattern, key)]
    return list(dict.fromkeys(value for one in found for value in _normal(one)))


def _normal(text: str) -> list:
    """A number as a float of two decimals; other texts in small letters, one letter alone with a space beside it."""
    text = text.strip()
    number = parse_number(text)
    if number is not None:
        return [round(number, 2)]
    text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]
