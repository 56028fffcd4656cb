"""The one exception this package raises on purpose."""


class SdaError(Exception):
    """A mistake the caller can mend: one sentence naming the culprit and the way out."""
