"""The command line: `tp-mrs prune | finetune | sensitivity | evaluate | export | doctor | completion`."""

from .commands import main

__all__ = ["main"]
