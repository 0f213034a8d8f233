"""What users meet: one sentence that says what was wrong and what to do."""


class CaloraError(ValueError):
    """Raised for bad input: a wrong shape, a missing file, an option that is not supported."""


class NotBuiltError(ImportError):
    """The native half of the package is missing."""
