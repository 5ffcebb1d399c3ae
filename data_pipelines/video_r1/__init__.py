"""Question files in Video-R1's schema as a TFDS data set in ArrayRecord files: built and read without TensorFlow."""
