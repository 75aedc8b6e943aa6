"""DINOv3's recipe at the size of a laptop: a small teacher with structure, and no download."""
