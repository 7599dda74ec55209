"""``python -m quantkit``, which ``torchrun -m quantkit`` runs."""

from quantkit.cli.main import main

main()
