"""The hive: one machine's devices, model files and worker processes, and what they say."""
