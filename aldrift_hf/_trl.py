"""Every TRL import that is not a top-level export of `trl`: a TRL upgrade breaks here, or nowhere."""

from trl.trainer.utils import get_callable_name, is_async_callable

__all__ = ["get_callable_name", "is_async_callable"]
