"""The keeper: the person's terminal. It asks the queen and draws what she says; it decides nothing."""
