"""The command `distopt`, which starts without importing torch."""
