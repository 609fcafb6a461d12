"""What is taken from TRL beyond its top level. A release of TRL that moves it breaks this file, and no other."""

from trl.models.utils import add_hooks, remove_hooks

__all__ = ["add_hooks", "remove_hooks"]
