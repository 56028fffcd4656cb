"""The stages of SDA on folders: each reads images, writes images or a model, and can be resumed."""
