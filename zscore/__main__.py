"""`python -m zscore` is `zscore`."""

from zscore.cli import main

if __name__ == "__main__":
    main()
