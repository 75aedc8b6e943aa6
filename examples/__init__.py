"""Runnable examples, and the helper modules they share."""
