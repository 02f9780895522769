"""Routers and experts that are not part of this package: a saved model that has some imports their files here."""

CUSTOM_CODE = ()
