"""Routers that are not part of this package: a saved model that has one imports its file here, so that it travels."""

CUSTOM_ROUTERS = ()
