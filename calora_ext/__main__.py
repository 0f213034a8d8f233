"""``python -m calora_ext`` is the ``calora`` command."""

from .cli import main

main()
