"""`python -m moesaic`: the same as the command `moesaic`."""

from moesaic.cli import main

main()
