"""What can be wrong with a batch job."""


class BatchError(ValueError):
    """Something a batch job cannot go on with: the message names it, what is allowed and the fix."""
