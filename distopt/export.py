"""The entry point of `python -m distopt.export`."""

from distopt.models.export import main

if __name__ == "__main__":
    main()
