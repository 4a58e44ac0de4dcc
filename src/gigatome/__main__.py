"""``python -m gigatome``."""

from gigatome.cli.main import main

if __name__ == "__main__":
    main()
