"""What is taken from TRL beyond its top level. A release of TRL that moves it breaks this file, and no other."""

from trl.models import unwrap_model_for_generation

__all__ = ["unwrap_model_for_generation"]
