"""What crosses a process boundary, each thing defined once."""
