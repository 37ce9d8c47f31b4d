"""`python -m tp_mrs` is `tp-mrs`."""

import sys

from .cli import main

sys.exit(main())
