"""The one error of this package."""


class DataError(ValueError):
    """Prompts, samples or settings that cannot be used: the message gives the place, what is wrong and the fix."""
