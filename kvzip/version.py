"""The version, in one place: a checkout that is not installed has no metadata to ask."""

VERSION = "0.1.0"
