"""Attacks on a server of this package, started for them, and tables of what each attack gives."""
