"""The entry point of `python -m distopt`."""

from distopt.command.main import main

if __name__ == "__main__":
    main()
