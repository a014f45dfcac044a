"""The version of the package, which the wheel and every checkpoint record."""

__version__ = "0.1.0"
