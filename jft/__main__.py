"""``python -m jft``: the same as the ``jft`` command."""

from jft.cli.main import run

if __name__ == "__main__":
    run()
