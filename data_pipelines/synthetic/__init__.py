"""The embedded default data: procedural video questions rendered to real MP4 files."""
