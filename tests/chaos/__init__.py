"""What the real programs must survive: kills, lost networks, full disks. `make chaos` runs it in full."""
