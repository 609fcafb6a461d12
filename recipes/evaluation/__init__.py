import aldrift_hf  # noqa: F401  # before PEFT imports bitsandbytes: see aldrift_hf/models/quiet.py
from aldrift_hf.reporting.letters import print_every_letter

print_every_letter()
