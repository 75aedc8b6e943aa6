"""Train CLIP-style models on image-text shards such as CC3M."""
