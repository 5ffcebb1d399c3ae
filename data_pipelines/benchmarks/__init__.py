"""Video benchmarks as `sources.Record`s: in the form they are published in, and in Video-R1's evaluation schema."""
