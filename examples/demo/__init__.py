"""Compare the losses on generated scenes, on a laptop."""
