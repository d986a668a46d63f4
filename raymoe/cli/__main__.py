"""`python -m raymoe.cli <verb>`: the command line, as Ray jobs start it."""

from raymoe.cli.main import main

main()
