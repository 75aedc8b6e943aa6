"""Training data: shards read in an exact order, a teacher's features beside them, and batches."""
