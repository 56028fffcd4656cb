"""Studies: every method on one footing under every order of the stream, and the ablations of the SDA paper."""
