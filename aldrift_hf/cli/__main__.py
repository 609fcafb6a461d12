"""For `accelerate launch -m aldrift_hf.cli`."""

from . import main

main()
