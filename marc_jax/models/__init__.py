"""Teacher and student: Qwen2.5-VL, its positions, caches and weights."""
