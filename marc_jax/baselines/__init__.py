"""Training-free compressors and frame selectors, one file each, same signature as `memory.compress`."""
