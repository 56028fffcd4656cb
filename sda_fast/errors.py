"""The exceptions this package raises on purpose."""


class SdaError(Exception):
    """A mistake the caller can mend: one sentence naming the culprit and the way out."""


class WriteError(SdaError):
    """A file that cannot be written: the disk is full, or the folder not ours."""
