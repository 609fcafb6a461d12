import aldrift_hf  # noqa: F401  # before PEFT imports bitsandbytes: see aldrift_hf/models/quiet.py
