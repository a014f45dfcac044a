"""The entry point of `python -m distopt.plan`."""

from distopt.plan.plan import main

if __name__ == "__main__":
    main()
