"""Scores, intervals, tables, pictures."""
