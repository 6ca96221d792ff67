"""The ``jft`` command: every module here with a ``main(argv) -> int`` is a command of that name."""
