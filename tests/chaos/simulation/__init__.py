"""A whole rbee on virtual time: the production queen, hives and worker fronts, and everything that can go wrong."""
