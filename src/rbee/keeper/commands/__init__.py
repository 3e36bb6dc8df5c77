"""The keeper's commands, one module each; what is costly to import is imported when a command runs."""
