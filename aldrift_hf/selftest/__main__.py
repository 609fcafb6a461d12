"""For `python -m aldrift_hf.selftest`."""

import sys

from . import main

sys.exit(main())
