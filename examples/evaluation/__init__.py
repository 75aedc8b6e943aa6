"""Measures of image-text models and frozen features, each with a command of its own."""
