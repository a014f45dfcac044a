"""distopt inside the programs of others."""
