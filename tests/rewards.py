"""Reward functions as a user writes them, named by import path in test_end_to_end."""


def letters(completions, problem_type, **columns):
    return [len(text) / 100 for text in completions]


def broken(completions, solution):
    raise RuntimeError("no judge today")
