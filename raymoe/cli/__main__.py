"""`python -m raymoe.cli`: the command line, as a job starts it."""

from raymoe.cli.main import main

main()
