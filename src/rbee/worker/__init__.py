"""A worker: one loaded model behind one port, narrated."""
