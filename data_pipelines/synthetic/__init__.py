"""A procedural video question set: real MP4 files, exact answers, no download.

`scenes` draws and renders videos, `questions` asks about them, `recompose` makes new videos out of old events,
`vocabulary` writes the tokenizer, `build` puts everything on disk.
"""
