"""Configs: files with a `get_config()` that gives an `ml_collections.ConfigDict`; studies start from the base ones."""
