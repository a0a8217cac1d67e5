"""`python -m foreseen` and `accelerate launch -m foreseen` come in here."""

from foreseen.cli import main

if __name__ == "__main__":
    main()
