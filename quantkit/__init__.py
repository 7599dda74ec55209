"""quantkit: make a language model cheaper, and prove that it still does its job."""

__version__ = "0.1.0"
