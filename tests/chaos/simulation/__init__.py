"""A whole rbee on virtual time: the production queen, hives and worker fronts, and all that can go wrong."""
